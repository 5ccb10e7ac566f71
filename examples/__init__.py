"""Short programs that extend the library from outside."""
