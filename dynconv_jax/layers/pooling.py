"""Max pooling as a module, which sparse backends can replace."""

from __future__ import annotations

import jax
from flax import nnx

from dynconv_jax.layers.cpu import max_pool


class MaxPool(nnx.Module):
  """3x3 max pooling with stride 2 and padding 1."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, C] for x, float[N, H, W, C]."""
    return max_pool(x)
