"""Blocks at active positions by kernels for a GPU, through Triton.

The counterpart of `cpu.py`. Active positions are listed, counted and
computed on the device: no count travels to the host, and nothing overflows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import MaxPool
from dynconv_jax.sparse.backend import Backend
from dynconv_jax.sparse.backends import cudnn, triton_launch
from dynconv_jax.sparse.backends.dense import DenseConv, run_dense
from dynconv_jax.sparse.backends.triton_launch import cdiv, tile_side
from dynconv_jax.sparse.backends.triton_masks import (
  ListedMask,
  Lists,
  decide,
  decides,
  list_positions,
  share_squeezes,
)
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv

_DTYPES = (jnp.float32, jnp.bfloat16)
# Positions of a program of the stem, and of the pooling after it.
_STEM_ROWS, _POOL_ROWS = 128, 16
# The most channels of an image for which a row of the stem's taps is a tile.
_STEM_DEPTH = 4
# Bottlenecks up to this inner width keep the rows between their last two
# convolutions in registers, if it is the same on both sides of the 3x3.
FUSED_WIDTH = {jnp.dtype(jnp.float32): 64, jnp.dtype(jnp.bfloat16): 128}
# Outputs for which tiles of 128 x 128 keep an H100's 132 multiprocessors busy,
# twice over.
_MANY = 2 * 132 * 128 * 128


class TritonBackend(Backend):
  """Kernels in Triton, for bottlenecks and basic blocks."""

  name = 'triton'
  # A conditional waits for the host at each block.
  falls_back = False
  evaluates_given = True

  def supports_platform(self, dtype, platform):
    return platform == 'gpu' and dtype in _DTYPES

  def prefers(self, dtype, platform):
    # In float32 XLA's products are rounded to TF32, on tensor cores.
    if not self.supports_platform(dtype, platform) or dtype != jnp.bfloat16:
      return False
    try:
      triton_launch.load()
    except ImportError:
      return False
    return True

  def supports(self, branch, dtype, platform):
    return self.supports_platform(dtype, platform) and computes(branch)

  def compiler_options(self, platform):
    return cudnn.COMPILER_OPTIONS

  def pack(self, block):
    triton_launch.load()
    return block

  def run(self, packed, x, mask):
    if mask is None:
      # As the dense backend, but that XLA copies the kernels at each call.
      return run_dense(cudnn.lay_out(packed), x)
    lists = mask.lists if isinstance(mask, ListedMask) else None
    return run_block(packed, x, lists or Lists(*map(list_positions, mask.maps)))

  def decide(self, block, x, gating):
    if not decides(block.masker):
      return super().decide(block, x, gating)
    shape = (x.shape[0], *block.branch.sizes(x.shape[1:3])[-1])
    given = gating.given(block.name, shape)
    before, squeezed = gating.scratch.get(self.name, (None, None))
    if before != block.masker.maskconv.before:
      squeezed = None
    mask, squeezed = decide(block, x, given, squeezed)
    gating.scratch[self.name] = block.name, squeezed
    return mask

  def convolution(self, conv):
    c = conv.conv
    if (
      conv.kernel.dtype == jnp.bfloat16
      and cudnn.reads_squares(c)
      and c.in_features <= _STEM_DEPTH
      and c.activation == 'relu'
    ):
      return TritonStem(conv)
    return DenseConv(conv)

  def replacement(self, module):
    return TritonMaxPool() if type(module) is MaxPool else None

  def prepare(self, chains):
    share_squeezes(chains)


def computes(branch: Branch) -> bool:
  """Returns whether the kernels compute a branch.

  Args:
    branch: a bottleneck or a basic block, or what differs in sizes only.
  """

  def is_plain(conv: Conv) -> bool:
    return (conv.groups, conv.padding) == (1, 'symmetric')

  first, *others = branch.convs
  return (
    branch.levels in ((1, 0), (1, 0, 0))
    and all(map(is_plain, branch.convs))
    # A 1x1 is computed at the positions that it reads.
    and (first.is_pointwise or first.kernel_size == 3)
    and others[0].kernel_size == 3
    and {conv.activation for conv in branch.convs[:-1]} == {'relu'}
    and branch.convs[-1].activation is None
    and branch.activation == 'relu'
    and (branch.stays or branch.shortcut == 'projection')
  )


class TritonStem(nnx.Module):
  """The 7x7 convolution of ImageNet's networks in bfloat16, and its ReLU.

  Args:
    conv: gives the weights.
  """

  def __init__(self, conv: FoldedConv):
    conv = cudnn.lay_out_conv(conv)
    self.layout = conv.replace(kernel=None, bias=None)
    self.kernel, self.bias = nnx.Param(conv.kernel), nnx.Param(conv.bias)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns bfloat16[N, h, w, features] of float[N, H, W, 3]."""
    layer = self.layout.replace(kernel=self.kernel[...], bias=self.bias[...])
    return stem(x.astype(jnp.bfloat16), layer)


class TritonMaxPool(nnx.Module):
  """What `layers.MaxPool` computes."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, C] of float[N, H, W, C]."""
    return max_pool(x)


def stem(images: jax.Array, layer: cudnn.CudnnConv) -> jax.Array:
  """Returns the rectified first convolution, bfloat16[N, h, w, features].

  Args:
    images: bfloat16[N, H, W, 3].
    layer: of `cudnn.lay_out_conv`, on squares of positions.
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
  """Returns the 3x3 maximum at stride 2, padding 1.

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


def run_block(block: FoldedBlock, x: jax.Array, lists: Lists) -> jax.Array:
  """Returns a block's output, the branch computed at active positions only.

  Positions outside of the mask are not touched where the shortcut is the
  identity, whose values are rectified already.

  Args:
    block: the folded block.
    x: float32 or bfloat16[N, H, W, in_features], rectified.
    lists: where the branch is executed.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  active, needed = lists
  end, middle = (
    (x.shape[0], *size) for size in block.branch.level_sizes(x.shape[1:3])
  )
  first, second, *last = block.convs
  y = _convolve(x, x.shape, needed, needed, first, lookup=False)
  base = x if block.projection is None else _project(x, end, active, block)
  if not last:
    return _convolve_add(y, middle, needed, active, second, base)
  inner = second.conv
  if inner.in_features == inner.features <= FUSED_WIDTH[x.dtype]:
    return _convolve_matmul_add(
      y, middle, needed, active, second, last[0], base
    )
  z = _convolve(y, middle, needed, active, second, lookup=True)
  return _convolve_add(z, end, active, active, last[0], base)


def _project(x, shape, active, block):
  """The shortcut, rectified where the branch is not executed."""
  layer = block.projection
  size = math.prod(shape)
  tiles = _tiles(size, layer, x.dtype)
  if x.dtype == jnp.bfloat16 and layer.kernel.shape[2] <= 64:
    tiles['BLOCK_ROWS'] = 64  # Nearly all of its time is the output's.
  return triton_launch.launch(
    'project',
    *(x, active.rows, layer.matrix, layer.bias),
    out_shape=jax.ShapeDtypeStruct((*shape, layer.bias.size), x.dtype),
    grid=_grid(size, layer, tiles),
    SIZE=size,
    FEATURES=layer.bias.size,
    **_geometry(x.shape, layer),
    **tiles,
  )


def _convolve(table, shape, read, written, layer, *, lookup):
  """relu(convolution), float[positions, features] in the order of a list."""
  tiles = _tiles(written.rows.size, layer, table.dtype, lookup)
  return triton_launch.launch(
    'convolve',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias),
    out_shape=jax.ShapeDtypeStruct(
      (written.rows.size, layer.bias.size), table.dtype
    ),
    grid=_grid(written.rows.size, layer, tiles),
    LOOKUP=lookup,
    TAPS=layer.conv.kernel_size,
    FEATURES=layer.bias.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_add(table, shape, read, written, layer, base):
  """relu(base + convolution) at the positions of a list, written in place."""
  tiles = _tiles(
    written.rows.size, layer, table.dtype, lookup=layer.conv.kernel_size > 1
  )
  if table.dtype == jnp.bfloat16 and triton_launch.generation() < 9:
    # Else an A100's registers do not hold the tile of the shortcut too.
    tiles |= {'BLOCK_ROWS': 64, 'num_warps': 8}
  return triton_launch.launch(
    'convolve_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={6: 0},
    grid=_grid(written.rows.size, layer, tiles),
    TAPS=layer.conv.kernel_size,
    FEATURES=layer.bias.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_matmul_add(table, shape, read, written, layer, last, base):
  """relu(base + last(relu(convolution))) likewise, for small inner widths."""
  tiles = _tiles(written.rows.size, layer, table.dtype, lookup=True)
  inner = tiles.pop('BLOCK_FEATURES')
  if table.dtype == jnp.float32:
    tiles |= {'BLOCK_DEPTH': 16, 'num_warps': 8}  # Else registers spill.
  else:
    tiles |= {'BLOCK_ROWS': max(64, inner), 'num_stages': 3}
  return triton_launch.launch(
    'convolve_matmul_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, last.kernel, last.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={8: 0},
    grid=cdiv(written.rows.size, tiles['BLOCK_ROWS']),
    FEATURES=last.bias.size,
    BLOCK_INNER=inner,
    BLOCK_FEATURES=64,
    **_geometry(shape, layer),
    **tiles,
  )


def _geometry(shape: tuple[int, ...], layer: FoldedConv) -> dict[str, int]:
  """How a convolution reads a map of (N, H, W, ...)."""
  return {
    'STRIDES': layer.conv.strides,
    'HEIGHT': shape[1],
    'WIDTH': shape[2],
    'DEPTH': layer.kernel.shape[2],
  }


def _tiles(
  size: int, layer: FoldedConv, dtype: jnp.dtype, lookup: bool = False
) -> dict[str, int]:
  """Tile sizes of a product of up to `size` rows.

  Those in bfloat16 are the fastest of about twenty on an H200, for ResNet-50.
  """
  depth, features = layer.kernel.shape[2:]
  if dtype == jnp.float32:  # No tensor cores.
    return {
      'BLOCK_ROWS': 64,
      'BLOCK_FEATURES': min(tile_side(features), 64),
      'BLOCK_DEPTH': min(tile_side(depth), 32),
      'num_warps': 4,
      'num_stages': 2,
    }
  if lookup and depth >= 512:
    return {
      'BLOCK_ROWS': 64,
      'BLOCK_FEATURES': 64,
      'BLOCK_DEPTH': 128,
      'num_warps': 4,
      'num_stages': 3,
    }
  many = not lookup and features > 128 and size * features >= _MANY
  return {
    'BLOCK_ROWS': 128 if many else 64,
    'BLOCK_FEATURES': min(tile_side(features), 128),
    'BLOCK_DEPTH': min(tile_side(depth), 64),
    'num_warps': 4,
    'num_stages': 4 if lookup else 3,
  }


def _grid(size, layer, tiles):
  """Programs for all rows, those of the same rows one after the other."""
  rows = cdiv(size, tiles['BLOCK_ROWS'])
  return rows * cdiv(layer.bias.size, tiles['BLOCK_FEATURES'])
