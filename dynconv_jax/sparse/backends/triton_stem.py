"""The stem, before the first block, on a GPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.models.gated import Gating
from dynconv_jax.sparse.backends import cudnn, triton_launch
from dynconv_jax.sparse.backends.triton_launch import cdiv, tile_side
from dynconv_jax.sparse.backends.triton_masks import (
  ZEROS,
  ColumnSqueeze,
  Squeezed,
)
from dynconv_jax.sparse.fold import FoldedConv

# Positions per program of the stem convolution and of the pooling after it.
_STEM_ROWS, _POOL_ROWS = 128, 16
# Maximum number of image channels.
STEM_DEPTH = 4
# The most features of a stem that is pooled at once: else registers spill.
POOLED_FEATURES = 64
# Lines that a program of it goes down, if so many programs are left.
_LINES, _PROGRAMS = (8, 4, 2), 2 * 132
# Stands for the name of a block, before the first one.
_STEM = ''


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
    return stem(x.astype(jnp.bfloat16), self.layer())

  def layer(self) -> cudnn.CudnnConv:
    """Returns the convolution with its weights."""
    return self.layout.replace(kernel=self.kernel[...], bias=self.bias[...])


class PooledStem(nnx.Module):
  """A network's stem and pooling, and the products of the first mask unit.

  Args:
    conv: the convolution.
    unit: the mask unit that reads the pooled map, or None.
    name: name of the backend, under which the unit finds its products.
  """

  def __init__(self, conv: TritonStem, unit: ColumnSqueeze | None, name: str):
    self.conv, self.unit, self.name = conv, unit, name
    if unit is not None:
      unit.before = _STEM

  def __call__(self, x: jax.Array, gating: Gating | None = None) -> jax.Array:
    """Returns bfloat16[N, h, w, features] for float[N, H, W, 3]."""
    unit = None if gating is None else self.unit
    out, squeezed = pooled_stem(x.astype(jnp.bfloat16), self.conv.layer(), unit)
    if squeezed is not None:
      gating.scratch[self.name] = _STEM, squeezed
    return out


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


def pooled_stem(
  images: jax.Array, layer: cudnn.CudnnConv, unit: ColumnSqueeze | None
) -> tuple[jax.Array, Squeezed | None]:
  """Returns what `max_pool` does of `stem`, and what a mask unit takes of that.

  Args:
    images: bfloat16[N, H, W, 3].
    layer: see `stem`; of up to `POOLED_FEATURES` features.
    unit: the first that reads the map, or None.
  """
  x = cudnn.rearrange(images, layer)
  n, height, width, depth = x.shape
  features, taps = layer.kernel.shape[:2]
  shape = (n, -(-height // 2), -(-width // 2), features)
  size = math.prod(shape[:3])
  columns, of_unit = jnp.zeros((1, 1, 16), x.dtype), (0, 1, 1)
  if unit is not None:
    columns = unit.weights(x.dtype)
    of_unit = (len(columns), unit.columns, size)
  parts, count, length = of_unit
  # An A100's registers hold less. A program writes all positions but one.
  rows = 64 if triton_launch.generation() >= 9 else 32
  across = cdiv(n * shape[2], rows - 1)
  lines = next(
    (k for k in _LINES if across * cdiv(shape[1], k) >= _PROGRAMS), 1
  )
  out, terms, *zeros = triton_launch.launch(
    'convolve_pool',
    *(x, layer.kernel, layer.bias, columns),
    out_shape=[
      jax.ShapeDtypeStruct(shape, x.dtype),
      jax.ShapeDtypeStruct((count, length), jnp.float32),
      *ZEROS,
    ],
    grid=across * cdiv(shape[1], lines),
    SIZE=size,
    TAPS=taps,
    HEIGHT=height,
    WIDTH=width,
    DEPTH=depth,
    FEATURES=features,
    PARTS=parts,
    COLUMNS=count,
    COLUMNS_WIDTH=columns.shape[2],
    LINES=lines,
    BLOCK_ROWS=rows,
    BLOCK_FEATURES=tile_side(features),
    num_warps=4,
    num_stages=1,  # Through the L1 cache: neighbors read the same.
  )
  squeezed = Squeezed(terms, None, tuple(zeros))
  return out, None if unit is None else squeezed


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
