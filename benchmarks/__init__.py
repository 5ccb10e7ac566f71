"""Comparisons with other runtimes and MAC counters."""
