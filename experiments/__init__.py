"""Flag files, and the programs of dynconv_jax.cli for a checkout."""
