"""The dense baseline: every block runs everywhere."""

from __future__ import annotations

from dynconv_jax.methods.method import Method

METHOD = Method('dense', color='black', marker='s')
