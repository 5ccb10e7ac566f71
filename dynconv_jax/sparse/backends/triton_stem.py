"""The stem, before the first block, on a GPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.sparse.backends import cudnn, triton_launch
from dynconv_jax.sparse.backends.triton_launch import cdiv, tile_side
from dynconv_jax.sparse.fold import FoldedConv

# Positions per program of the stem convolution and of the pooling after it.
_STEM_ROWS, _POOL_ROWS = 128, 16
# Maximum number of image channels.
STEM_DEPTH = 4


class TritonStem(nnx.Module):
  """The 7x7 convolution of ImageNet networks with its ReLU, in bfloat16.

  Args:
    conv: the folded convolution.
  """

  def __init__(self, conv: FoldedConv):
    conv = cudnn.lay_out_conv(conv)
    self.layout = conv.replace(kernel=None, bias=None)
    self.kernel, self.bias = nnx.Param(conv.kernel), nnx.Param(conv.bias)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns bfloat16[N, h, w, features] for float[N, H, W, 3]."""
    layer = self.layout.replace(kernel=self.kernel[...], bias=self.bias[...])
    return stem(x.astype(jnp.bfloat16), layer)


class TritonMaxPool(nnx.Module):
  """Replacement of `layers.MaxPool`."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, C] for float[N, H, W, C]."""
    return max_pool(x)


def stem(images: jax.Array, layer: cudnn.CudnnConv) -> jax.Array:
  """Returns the rectified first convolution, bfloat16[N, h, w, features].

  Args:
    images: bfloat16[N, H, W, 3].
    layer: a layer from `cudnn.lay_out_conv` that reads squares of positions.
  """
  x = cudnn.rearrange(images, layer)
  n, h, w, depth = x.shape
  features, taps = layer.kernel.shape[:2]
  return triton_launch.launch(
    'convolve_rows',
    *(x, layer.kernel, layer.bias),
    out_shape=jax.ShapeDtypeStruct((n, h, w, features), x.dtype),
    grid=cdiv(n * h * w, _STEM_ROWS),
    SIZE=n * h * w,
    TAPS=taps,
    HEIGHT=h,
    WIDTH=w,
    DEPTH=depth,
    FEATURES=features,
    BLOCK_ROWS=_STEM_ROWS,
    BLOCK_FEATURES=tile_side(features),
    num_warps=4,
    num_stages=2,
  )


def max_pool(x: jax.Array) -> jax.Array:
  """Returns the 3x3 max pooling at stride 2 and padding 1.

  Args:
    x: float32 or bfloat16[N, H, W, C].
  """
  n, height, width, features = x.shape
  shape = (n, -(-height // 2), -(-width // 2), features)
  size = math.prod(shape[:3])
  return triton_launch.launch(
    'max_pool',
    x,
    out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
    grid=cdiv(size, _POOL_ROWS),
    SIZE=size,
    HEIGHT=height,
    WIDTH=width,
    FEATURES=features,
    BLOCK_ROWS=_POOL_ROWS,
    BLOCK_FEATURES=tile_side(features),
    num_warps=8,
  )
