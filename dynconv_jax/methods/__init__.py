"""Gating methods: how a network decides where to compute."""

from dynconv_jax.methods.gate import Decision, Gate, GateSite
from dynconv_jax.methods.method import METHODS, Method, load_method

__all__ = ['METHODS', 'Decision', 'Gate', 'GateSite', 'Method', 'load_method']
