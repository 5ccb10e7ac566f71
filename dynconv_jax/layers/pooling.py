"""Pooling, as a module that a sparse backend can replace."""

from __future__ import annotations

import jax
from flax import nnx

from dynconv_jax.layers.cpu import max_pool


class MaxPool(nnx.Module):
  """The 3x3 maximum at stride 2, padding 1."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, C] of float[N, H, W, C]."""
    return max_pool(x)
