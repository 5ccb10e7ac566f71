"""Networks that compute only where it matters, in JAX."""
