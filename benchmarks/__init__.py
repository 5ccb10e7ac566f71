"""Timing against other runtimes and counters."""
