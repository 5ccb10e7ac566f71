"""Backends of sparse execution, one per file."""
