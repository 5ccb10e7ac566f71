"""Triton backend: runs blocks at active positions on a GPU.

The GPU counterpart of `cpu.py`. The device lists, counts, and computes active
positions, so no count is copied to the host and nothing can overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import MaxPool
from dynconv_jax.sparse.backend import Backend
from dynconv_jax.sparse.backends import cudnn, triton_depthwise, triton_launch
from dynconv_jax.sparse.backends.dense import DenseConv, run_dense
from dynconv_jax.sparse.backends.triton_launch import cdiv, tile_side
from dynconv_jax.sparse.backends.triton_masks import (
  ZEROS,
  ColumnSqueeze,
  ListedMask,
  Lists,
  Positions,
  Squeezed,
  decide,
  decides,
  share_squeezes,
)
from dynconv_jax.sparse.backends.triton_stem import (
  POOLED_FEATURES,
  STEM_DEPTH,
  PooledStem,
  TritonMaxPool,
  TritonStem,
)
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv

_DTYPES = (jnp.float32, jnp.bfloat16)
# Bottlenecks up to this inner width keep the rows between their last two
# convolutions in registers, if the 3x3 has as many outputs as inputs.
FUSED_WIDTH = {jnp.dtype(jnp.float32): 64, jnp.dtype(jnp.bfloat16): 128}
# Number of outputs for which 128 x 128 tiles keep an H100's 132 multiprocessors
# busy for two waves.
_MANY = 2 * 132 * 128 * 128


class TritonBackend(Backend):
  """Triton kernels for bottlenecks, basic blocks, and inverted residuals."""

  name = 'triton'
  # A conditional would wait for the host at each block.
  falls_back = False
  evaluates_given = True

  def supports_platform(self, dtype, platform):
    return platform == 'gpu' and dtype in _DTYPES

  def prefers(self, dtype, platform):
    # In float32, XLA uses TF32 on tensor cores, which these kernels do not.
    if not self.supports_platform(dtype, platform) or dtype != jnp.bfloat16:
      return False
    try:
      triton_launch.load()
    except ImportError:
      return False
    return True

  def supports(self, branch, dtype, platform):
    return self.supports_platform(dtype, platform) and (
      computes(branch) or triton_depthwise.computes(branch)
    )

  def compiler_options(self, platform):
    return cudnn.COMPILER_OPTIONS

  def pack(self, block):
    triton_launch.load()
    return PackedBlock.pack(block)

  def run(self, packed, x, mask):
    if mask is None:
      # Like the dense backend, except that XLA copies the kernels at each call.
      return run_dense(cudnn.lay_out(packed.block), x)
    lists = ListedMask.of(mask).lists
    if triton_depthwise.computes(packed.block.branch):
      its = packed.convolve or convolve
      return triton_depthwise.run_block(packed.block, x, lists, its)
    return run_block(packed, x, lists)[0]

  def run_gated(self, block, x, mask, gating):
    packed = block.packed.tree()
    following = decides(block.masker) and block.masker.maskconv.following
    if not (following and fuses(block.branch, x.dtype)):
      return self.run(packed, x, mask)
    name, squeezed = gating.scratch[self.name]
    out, squeezed = run_block(packed, x, mask.lists, squeezed, following)
    gating.scratch[self.name] = name, squeezed
    return out

  def decide(self, block, x, gating):
    if not decides(block.masker):
      mask = super().decide(block, x, gating)
      return None if mask is None else ListedMask.of(mask)
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
      and c.in_features <= STEM_DEPTH
      and c.activation == 'relu'
    ):
      return TritonStem(conv)
    return DenseConv(conv)

  def replacement(self, module):
    return TritonMaxPool() if type(module) is MaxPool else None

  def stem(self, conv, pool, gate):
    if (
      type(conv) is TritonStem
      and type(pool) is MaxPool
      and conv.layout.conv.features <= POOLED_FEATURES
    ):
      unit = gate.maskconv if decides(gate) else None
      return PooledStem(conv, unit, self.name)
    return None

  def prepare(self, chains):
    share_squeezes(chains)


def computes(branch: Branch) -> bool:
  """Returns whether the kernels support a branch.

  They support bottlenecks and basic blocks of any size.

  Args:
    branch: description of the branch.
  """

  def is_plain(conv: Conv) -> bool:
    return (conv.groups, conv.padding) == (1, 'symmetric')

  first, *others = branch.convs
  return (
    branch.levels in ((1, 0), (1, 0, 0))
    and all(map(is_plain, branch.convs))
    # A first 1x1 runs at the positions that it reads.
    and (first.is_pointwise or first.kernel_size == 3)
    and others[0].kernel_size == 3
    and {conv.activation for conv in branch.convs[:-1]} == {'relu'}
    and branch.convs[-1].activation is None
    and branch.activation == 'relu'
    and (branch.stays or branch.shortcut == 'projection')
  )


def fuses(branch: Branch, dtype: jnp.dtype) -> bool:
  """Returns whether one kernel runs all convolutions of a block but the first.

  Args:
    branch: a branch that `computes` accepts.
    dtype: compute dtype.
  """
  _, inner, *last = branch.convs
  narrow = inner.in_features == inner.features <= FUSED_WIDTH[jnp.dtype(dtype)]
  return bool(last) and narrow and inner.groups == 1


@flax.struct.dataclass
class PackedBlock:
  """The weights of a block in the layout of the kernels.

  Attributes:
    block: the folded block.
    shortcut: the projection in cuDNN's layout, or None.
    bias: float32[features], sum of the last convolution's and the projection's.
    convolve: function that computes the convolutions before the last kernel;
      None for `convolve`.
  """

  block: FoldedBlock
  shortcut: cudnn.CudnnConv | None
  bias: jax.Array
  convolve: Callable[..., jax.Array] | None = flax.struct.field(
    pytree_node=False, default=None
  )

  @classmethod
  def pack(cls, block: FoldedBlock) -> PackedBlock:
    """Packs a folded block."""
    projection, bias = block.projection, block.convs[-1].bias
    if projection is None:
      return cls(block, None, bias)
    shortcut = cudnn.lay_out_conv(projection)
    return cls(block, shortcut, bias + projection.bias)


def run_block(
  packed: PackedBlock,
  x: jax.Array,
  lists: Lists,
  squeezed: Squeezed | None = None,
  following: ColumnSqueeze | None = None,
) -> tuple[jax.Array, Squeezed | None]:
  """Returns a block's output, with the branch computed at active positions.

  With an identity shortcut, inactive positions are left unchanged; their values
  are already rectified. With a projection, cuDNN computes and rectifies the
  shortcut everywhere; the last kernel recomputes it at active positions as part
  of its product.

  Args:
    packed: the block.
    x: float32 or bfloat16[N, H, W, in_features], rectified.
    lists: where to execute the branch.
    squeezed: products of x that the block's mask unit used.
    following: the squeeze of the mask unit that reads the output, if its
      products are computed here, which requires `fuses`; or None.

  Returns:
    out: float[N, h, w, features], in the dtype of x.
    squeezed: products for the next mask unit; unchanged unless `following` is
      given.
  """
  block, (active, needed) = packed.block, lists
  end, middle = (
    (x.shape[0], *size) for size in block.branch.level_sizes(x.shape[1:3])
  )
  first, second, *last = block.convs
  run = packed.convolve or convolve
  y = run(x, x.shape, needed, needed, first, lookup=False)
  if fuses(block.branch, x.dtype):
    return _convolve_matmul_add(
      *(y, middle, needed, active, second, last[0], packed, x),
      *(squeezed, following),
    )
  if last:
    y = run(y, middle, needed, active, second, lookup=True)
    middle, needed, second = end, active, last[0]
  return _convolve_add(y, middle, needed, active, second, packed, x), squeezed


def _shortcut(packed, x):
  """Returns the map to write the output to, and the projection's arguments."""
  projection = packed.block.projection
  if projection is None:
    # Do not pass x: XLA would copy it, because the kernel overwrites it.
    nothing = jnp.zeros(1, x.dtype)
    return x, (nothing, nothing), geometry((1, 1, 1), None)
  # By default, XLA would round float32 to TF32.
  precision = 'highest' if x.dtype == jnp.float32 else None
  base = jax.nn.relu(cudnn.convolve(x, packed.shortcut, precision))
  constants = geometry(x.shape, projection)
  return base, (x, projection.matrix), constants


def convolve(
  table: jax.Array,
  shape: tuple[int, ...],
  read: Positions,
  written: Positions,
  layer: FoldedConv,
  *,
  lookup: bool,
) -> jax.Array:
  """Returns a rectified convolution at listed positions, [positions, features].

  Args:
    table: a map, or the listed rows of one.
    shape: (N, H, W, ...) of that map.
    read: the positions of the listed rows.
    written: the output positions.
    layer: a 1x1 or 3x3 convolution.
    lookup: whether the table contains listed rows.
  """
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
    MAXIMUM=triton_depthwise.MAXIMA[layer.conv.activation],
    REVERSED=lookup,
    TAPS=layer.conv.kernel_size,
    FEATURES=layer.bias.size,
    **geometry(shape, layer),
    **tiles,
  )


def _convolve_add(table, shape, read, written, layer, packed, x):
  """Returns relu(shortcut + convolution), computed at listed positions."""
  lookup = layer.conv.kernel_size > 1
  tiles = _tiles(written.rows.size, layer, table.dtype, lookup)
  if table.dtype == jnp.bfloat16 and triton_launch.generation() < 9:
    # Otherwise, an A100 has too few registers for the tile of the shortcut.
    tiles |= {'BLOCK_ROWS': 64, 'num_warps': 8}
  base, projected, constants = _shortcut(packed, x)
  return triton_launch.launch(
    'convolve_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, packed.bias, *projected, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={8: 0},
    grid=_grid(written.rows.size, layer, tiles),
    REVERSED=lookup,
    TAPS=layer.conv.kernel_size,
    FEATURES=layer.bias.size,
    **geometry(shape, layer),
    **{f'X_{name}': value for name, value in constants.items()},
    X_BLOCK_DEPTH=_block_depth(constants['DEPTH'], tiles),
    **tiles,
  )


def _convolve_matmul_add(
  table, shape, read, written, layer, last, packed, x, squeezed, following
):
  """Returns relu(shortcut + last(relu(convolution))) for small inner widths.

  Also returns the products with the weights of `following`, if it is given.
  """
  tiles = _tiles(written.rows.size, layer, table.dtype, lookup=True)
  inner = tiles.pop('BLOCK_FEATURES')
  if table.dtype == jnp.float32:
    tiles |= {'BLOCK_DEPTH': 16, 'num_warps': 8}  # Avoids register spills.
  else:
    tiles |= {'BLOCK_ROWS': max(64, inner), 'num_stages': 3}
    if following is not None and inner > 64:
      tiles['num_warps'] = 8  # Avoids register spills.
  base, projected, constants = _shortcut(packed, x)
  columns, terms = jnp.zeros((1, 1, 16), x.dtype), jnp.zeros(1)
  unit = {'PARTS': 0, 'FIRST': 0, 'COLUMNS': 0, 'COLUMNS_WIDTH': 16}
  if following is not None:
    columns, terms = following.weights(x.dtype), squeezed.terms
    unit = {
      'PARTS': len(columns),
      'FIRST': following.first,
      'COLUMNS': following.columns,
      'COLUMNS_WIDTH': columns.shape[2],
    }
  out, terms, *zeros = triton_launch.launch(
    'convolve_matmul_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, last.kernel, packed.bias),
    *(*projected, columns, base, terms),
    out_shape=[
      jax.ShapeDtypeStruct(base.shape, base.dtype),
      jax.ShapeDtypeStruct(terms.shape, terms.dtype),
      *ZEROS,
    ],
    input_output_aliases={11: 0} if following is None else {11: 0, 12: 1},
    grid=cdiv(written.rows.size, tiles['BLOCK_ROWS']),
    **unit,
    SIZE=math.prod(base.shape[:3]),
    REVERSED=True,
    FEATURES=last.bias.size,
    BLOCK_INNER=inner,
    BLOCK_FEATURES=64,
    **geometry(shape, layer),
    **{f'X_{name}': value for name, value in constants.items()},
    X_BLOCK_DEPTH=_block_depth(constants['DEPTH'], tiles),
    **tiles,
  )
  if following is None:
    return out, squeezed
  return out, Squeezed(terms, None, tuple(zeros))


def geometry(
  shape: tuple[int, ...], layer: FoldedConv | None
) -> dict[str, int]:
  """Returns the kernel constants for a convolution of a map (N, H, W, ...).

  Args:
    shape: shape of the map.
    layer: the convolution, or None if there is none.
  """
  return {
    'STRIDES': layer.conv.strides if layer else 1,
    'HEIGHT': shape[1],
    'WIDTH': shape[2],
    'DEPTH': layer.kernel.shape[2] if layer else 0,
  }


def _block_depth(depth: int, tiles: dict[str, int]) -> int:
  """Returns the tile size over the channels of the shortcut's input."""
  return min(tile_side(max(depth, 1)), tiles['BLOCK_DEPTH'])


def _tiles(
  size: int, layer: FoldedConv, dtype: jnp.dtype, lookup: bool = False
) -> dict[str, int]:
  """Returns tile sizes of a product of up to `size` rows.

  The bfloat16 sizes are the fastest of about twenty for ResNet-50 on an H200.
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
  """Returns the number of programs; those of the same rows are consecutive."""
  rows = cdiv(size, tiles['BLOCK_ROWS'])
  return rows * cdiv(layer.bias.size, tiles['BLOCK_FEATURES'])
