"""Programs: absl flags to calls of the library."""
