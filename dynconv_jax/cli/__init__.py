"""Command-line programs, which translate absl flags to library calls."""
