"""Max pooling as a module, so that sparse backends can replace it."""

from __future__ import annotations

import jax
from flax import nnx

from dynconv_jax.layers.cpu import max_pool


class MaxPool(nnx.Module):
  """The 3x3 maximum at stride 2, padding 1."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, C] for x, float[N, H, W, C]."""
    return max_pool(x)
