"""Backends of sparse execution, one a file."""
