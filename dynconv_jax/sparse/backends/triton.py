"""Blocks at active positions by kernels for a GPU, through jax-triton.

The counterpart of `cpu.py`. Active positions are listed, counted and
computed on the device: no count travels to the host, and nothing overflows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.layers import MaxPool
from dynconv_jax.masks import ExecutionMask, masked_layers
from dynconv_jax.methods.dynconv import MaskUnit
from dynconv_jax.models.gated import GatedBlock
from dynconv_jax.sparse.backend import Backend
from dynconv_jax.sparse.backends import cudnn
from dynconv_jax.sparse.backends.cpu import squeeze_columns
from dynconv_jax.sparse.backends.dense import DenseConv, run_dense
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv

_DTYPES = (jnp.float32, jnp.bfloat16)
# Positions that a program lists, and that one of a mask unit sums up at a time.
_LIST_BLOCK, _AVERAGE_BLOCK = 256, 1024
# Mask units that share products, so that their matrix has 64 columns.
UNITS = 6
# Positions of a program of the stem, and of the pooling after it.
_STEM_ROWS, _POOL_ROWS = 128, 16
# Bottlenecks up to this inner width keep the rows between their last two
# convolutions in registers.
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
      load()
    except ImportError:
      return False
    return True

  def supports(self, branch, dtype, platform):
    convs = branch.convs
    return (
      self.supports_platform(dtype, platform)
      and branch.levels in ((1, 0), (1, 0, 0))
      and convs[0].kernel_size in (1, 3)
      and convs[1].kernel_size == 3
      and all(c.groups == 1 and c.padding == 'symmetric' for c in convs)
      and all(c.activation == 'relu' for c in convs[:-1])
      and convs[-1].activation is None
      and branch.activation == 'relu'
      and (branch.stays or branch.shortcut == 'projection')
    )

  def pack(self, block):
    load()
    return block

  def run(self, packed, x, mask):
    if mask is None:
      return run_dense(packed, x)
    lists = None
    if isinstance(mask, ListedMask):
      lists = mask.lists
    return run_block(packed, x, lists or Lists(*map(list_positions, mask.maps)))

  def decide(self, block, x, gating):
    if not decides(block.masker):
      return super().decide(block, x, gating)
    shape = (x.shape[0], *block.branch.sizes(x.shape[1:3])[-1])
    given = gating.given(block.name, shape)
    squeezed = gating.scratch.get(self.name)
    mask, squeezed = decide(block, x, given, squeezed)
    gating.scratch[self.name] = squeezed
    return mask

  def convolution(self, conv):
    load()
    if conv.kernel.dtype == jnp.bfloat16 and cudnn.lay_out_conv(conv).block > 1:
      return TritonStem(conv)
    return DenseConv(conv)

  def replacement(self, module):
    return TritonMaxPool() if type(module) is MaxPool else None

  def prepare(self, chains):
    share_squeezes(chains)


def generation() -> int:
  """Returns the number before the point of the GPU's compute capability.

  8 is an A100's, 9 an H100's, which is assumed where there is no such GPU.
  """
  capability = getattr(jax.local_devices()[0], 'compute_capability', '')
  return int(capability.split('.')[0]) if '.' in capability else 9


@functools.cache
def load() -> tuple[Callable[..., Any], ModuleType]:
  """Returns `jax_triton.triton_call` and the module of the kernels.

  Raises:
    ImportError: jax-triton is not installed, or JAX has no GPU support.
  """
  try:
    import jax_triton

    from dynconv_jax.sparse import triton_kernels
  except ImportError as error:
    raise ImportError(
      f'kernels for a GPU need jax-triton ({error}):'
      " pip install 'dynconv-jax[gpu]' installs it"
    ) from error
  return jax_triton.triton_call, triton_kernels


def launch(kernel: str, *args: jax.Array, **options: Any) -> Any:
  """Returns the outputs of a kernel.

  Args:
    kernel: its name in `triton_kernels.py`.
    *args: its inputs.
    **options: of `jax_triton.triton_call`, the kernel's constants among them.
  """
  triton_call, kernels = load()
  return triton_call(*args, kernel=getattr(kernels, kernel), **options)


class Positions(NamedTuple):
  """The active positions of a map.

  Attributes:
    indices: int32[at least size], the flat positions of the active ones, in any
      order; undefined from `count` on.
    rows: int32[size], the place of each active position in that list; -1 where
      the map is inactive.
    count: int32[1], how many there are.
  """

  indices: jax.Array
  rows: jax.Array
  count: jax.Array


class Lists(NamedTuple):
  """Where a block is computed.

  Attributes:
    active: positions of its output.
    needed: those of its first convolution.
  """

  active: Positions
  needed: Positions


class Squeezed(NamedTuple):
  """Products of a map and the weights of the mask units that read it.

  Attributes:
    terms: float32[columns, N * H * W].
    changed: positions of the map that have other values since; None: none.
  """

  terms: jax.Array
  changed: Positions | None


def list_positions(mask: jax.Array) -> Positions:
  """Returns the active positions of a mask.

  Args:
    mask: float32[N, h, w], active where it is not 0.
  """
  return Positions(
    *launch(
      'list_positions',
      mask,
      out_shape=_list_shapes(mask.size),
      zeroed_outputs=(2,),
      grid=_cdiv(mask.size, _LIST_BLOCK),
      SIZE=mask.size,
      BLOCK=_LIST_BLOCK,
    )
  )


def list_dilated(
  active: Positions, zero: jax.Array, shape: tuple[int, int, int], strides: int
) -> Positions:
  """Returns the positions that a 3x3 convolution at others reads.

  Args:
    active: positions of its output.
    zero: int32[1], 0: counted on.
    shape: (N, H, W) of its input.
    strides: of the convolution.
  """
  size = math.prod(shape)
  return Positions(
    *launch(
      'list_dilated',
      *(active.rows, zero),
      out_shape=_list_shapes(size),
      input_output_aliases={1: 2},
      grid=_cdiv(size, _LIST_BLOCK),
      SIZE=size,
      STRIDES=strides,
      HEIGHT=shape[1],
      WIDTH=shape[2],
      BLOCK=_LIST_BLOCK,
    )
  )


def _list_shapes(size):
  # Tiles of positions are read to their end.
  shapes = ((_cdiv(size, _LIST_BLOCK) * _LIST_BLOCK,), (size,), (1,))
  return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


@flax.struct.dataclass
class ListedMask(ExecutionMask):
  """An execution mask whose active positions are listed.

  Attributes:
    lists: the positions of its maps.
  """

  lists: Lists | None = None


def decides(gate: nnx.Module | None) -> bool:
  """Returns whether kernels compute a gate: see `decide`."""
  return isinstance(gate, MaskUnit) and isinstance(gate.maskconv, ColumnSqueeze)


def decide(
  block: Any,
  x: jax.Array,
  given: jax.Array | None,
  squeezed: Squeezed | None,
) -> tuple[ListedMask, Squeezed]:
  """Returns a block's mask with its lists, and what the next block takes.

  Args:
    block: has a mask unit that `share_squeezes` has changed.
    x: float32 or bfloat16[N, H, W, in_features], its input.
    given: float32[N, h, w] of {0, 1} to obey instead of the decision, which is
      computed all the same, or None.
    squeezed: what the block before returned; None: there is none.
  """
  branch, unit = block.branch, block.masker.maskconv
  end, middle = (
    (x.shape[0], *size) for size in branch.level_sizes(x.shape[1:3])
  )
  squeezed, zero = unit.squeeze(x, squeezed)
  _, active, zero = unit.list_positions(
    squeezed.terms, x.shape, end, given, zero
  )
  needed = list_dilated(active, zero, middle, branch.reads[0].strides)
  mask = ListedMask(
    maps=tuple(
      (found.rows >= 0).astype(jnp.float32).reshape(shape)
      for found, shape in ((active, end), (needed, middle))
    ),
    name=block.name,
    layers=masked_layers(branch, block.name),
    stage=block.stage,
    lists=Lists(active, needed),
  )
  return mask, squeezed._replace(changed=active)


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
  return launch(
    'convolve_rows',
    *(x, layer.kernel, layer.bias),
    out_shape=jax.ShapeDtypeStruct((n, h, w, features), x.dtype),
    grid=_cdiv(n * h * w, _STEM_ROWS),
    SIZE=n * h * w,
    TAPS=taps,
    HEIGHT=h,
    WIDTH=w,
    DEPTH=depth,
    FEATURES=features,
    BLOCK_ROWS=_STEM_ROWS,
    BLOCK_FEATURES=_power(features),
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
  return launch(
    'max_pool',
    x,
    out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
    grid=_cdiv(size, _POOL_ROWS),
    SIZE=size,
    HEIGHT=height,
    WIDTH=width,
    FEATURES=features,
    BLOCK_ROWS=_POOL_ROWS,
    BLOCK_FEATURES=_power(features),
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
  if second.bias.size <= FUSED_WIDTH[x.dtype]:
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
  return launch(
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
  return launch(
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
  if table.dtype == jnp.bfloat16 and generation() < 9:
    # Else an A100's registers do not hold the tile of the shortcut too.
    tiles |= {'BLOCK_ROWS': 64, 'num_warps': 8}
  return launch(
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
  return launch(
    'convolve_matmul_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, last.kernel, last.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={8: 0},
    grid=_cdiv(written.rows.size, tiles['BLOCK_ROWS']),
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
      'BLOCK_FEATURES': min(_power(features), 64),
      'BLOCK_DEPTH': min(_power(depth), 32),
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
    'BLOCK_FEATURES': min(_power(features), 128),
    'BLOCK_DEPTH': min(_power(depth), 64),
    'num_warps': 4,
    'num_stages': 4 if lookup else 3,
  }


def _squeeze_tiles(depth: int, width: int, dtype: jnp.dtype) -> dict[str, int]:
  """Tile sizes of a mask unit's products, chosen as those of `_tiles`."""
  rows, block, num_stages = 64, min(_power(depth), 64), 3
  if dtype == jnp.float32:
    block = min(block, 32)
  elif width <= 32 and depth < 1024:
    rows, num_stages = 128, 3 if depth >= 512 else 2
  return {
    'BLOCK_ROWS': rows,
    'BLOCK_DEPTH': block,
    'num_warps': 4,
    'num_stages': num_stages,
  }


def _grid(size, layer, tiles):
  """Programs for all rows, those of the same rows one after the other."""
  rows = _cdiv(size, tiles['BLOCK_ROWS'])
  return rows * _cdiv(layer.bias.size, tiles['BLOCK_FEATURES'])


def _cdiv(a: int, b: int) -> int:
  return -(-a // b)


def _ceil_power(n: int) -> int:
  """The smallest power of two that is not below n."""
  return 1 << (n - 1).bit_length()


def _power(n: int) -> int:
  """The power of two from n up that is a side of a tile, 16 at least."""
  return max(16, _ceil_power(n))


def share_squeezes(chains: Sequence[Sequence[GatedBlock]]) -> None:
  """Has the kernels compute the mask units of blocks, in place.

  Args:
    chains: in each a block reads what the one before it wrote.
  """
  groups: list[list[GatedBlock]] = []
  for chain in chains:
    same_map = False
    for block in chain:
      if not isinstance(block.masker, MaskUnit):
        same_map = False
        continue
      if same_map and len(groups[-1]) < UNITS:
        groups[-1].append(block)
      else:
        groups.append([block])
      # Its output is its input but where it is executed.
      same_map = block.branch.stays
  for group in groups:
    units = [block.masker for block in group]
    columns = [ColumnSqueeze(units, index) for index in range(len(units))]
    for unit, squeeze in zip(units, columns, strict=True):
      unit.maskconv = squeeze


class ColumnSqueeze(nnx.Module):
  """Computes what a mask unit decides on, and where that is not negative.

  A map is multiplied by a matrix whose columns are the taps of the convolution,
  and what the average is taken of; another kernel sums up the logits and lists
  the positions. Means of patches are linear too: it takes them of the products.
  Units that read the same map, but for the positions that the blocks between
  them execute, share the products: the first multiplies the map by the columns
  of them all, each later one what was changed by its own and those after it.

  Decisions are made of float32 numbers: for features in bfloat16 the matrix is
  the sum of three in bfloat16, which hold all of its bits.

  Args:
    units: the mask units that share products, in network order.
    index: of this one.
  """

  def __init__(self, units: Sequence[MaskUnit], index: int):
    found = [squeeze_columns(unit.maskconv) for unit in units]
    self.strides = units[index].strides
    self.granularity = units[index].granularity
    self.size, _, _, bias = found[index]
    matrices = [matrix for _, _, matrix, _ in found]
    self.first = sum(matrix.shape[1] for matrix in matrices[:index])
    matrix = np.concatenate(matrices[index:], 1)
    self.columns = matrix.shape[1]
    padding = _power(self.columns) - self.columns
    matrix = np.pad(matrix, ((0, 0), (0, padding)))
    parts = []
    for _ in range(3):
      parts.append((matrix - sum(parts)).astype(jnp.bfloat16))
      parts[-1] = parts[-1].astype(np.float32)
    self.matrix = nnx.Param(jnp.asarray(matrix[None]))
    self.parts = nnx.Param(jnp.asarray(np.stack(parts), jnp.bfloat16))
    self.bias = nnx.Param(jnp.full(1, bias, jnp.float32))

  def squeeze(
    self, x: jax.Array, squeezed: Squeezed | None
  ) -> tuple[Squeezed, jax.Array]:
    """Returns the products of a map, and int32[1], 0, for `list_positions`.

    Args:
      x: float32 or bfloat16[N, H, W, C].
      squeezed: of the unit before; of no account for the first of those that
        share products.
    """
    exact, listed = x.dtype == jnp.float32, self.first > 0
    weights = (self.matrix if exact else self.parts)[...]
    terms, changed = jnp.zeros(1), Positions(*3 * (jnp.zeros(1, jnp.int32),))
    if listed:
      terms, changed = squeezed
    rows, depth = math.prod(x.shape[:3]), x.shape[3]
    tiles = _squeeze_tiles(depth, weights.shape[2], x.dtype)
    terms, zero = launch(
      'squeeze',
      *(x, weights, changed.indices, changed.count, terms),
      out_shape=[
        jax.ShapeDtypeStruct((self.first + self.columns, rows), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
      ],
      input_output_aliases={4: 0} if listed else {},
      grid=_cdiv(rows, tiles['BLOCK_ROWS']),
      LISTED=listed,
      SIZE=rows,
      PARTS=len(weights),
      DEPTH=depth,
      FIRST=self.first,
      COLUMNS=self.columns,
      WIDTH=weights.shape[2],
      **tiles,
    )
    return Squeezed(terms, None), zero

  def list_positions(
    self,
    terms: jax.Array,
    in_shape: tuple[int, ...],
    shape: tuple[int, int, int],
    given: jax.Array | None,
    zero: jax.Array,
  ) -> tuple[jax.Array, Positions, jax.Array]:
    """Returns the logits and the positions where they are not negative.

    Args:
      terms: float32[columns, N * H * W], products of the map.
      in_shape: (N, H, W, C) of the map.
      shape: (N, h, w) of the mask.
      given: float32[N, h, w], lists where it is not 0 instead; or None.
      zero: of `squeeze`.

    Returns:
      float32[N, h, w], one logit at all positions of a patch, the list, and
      int32[1], 0, for `list_dilated`.
    """
    side = self.granularity
    window = 1 if side == 1 else _ceil_power((side * self.strides) ** 2)
    patches = _cdiv(shape[1], side) * _cdiv(shape[2], side)
    # The positions that a tap reads are a tile.
    most = _LIST_BLOCK if side == 1 else max(1, min(32, 1024 // window))
    block = min(most, _power(patches))
    logits, *found, zero = launch(
      'decide',
      *(terms, self.bias[...], self.bias[...] if given is None else given),
      zero,
      out_shape=[
        jax.ShapeDtypeStruct(shape, jnp.float32),
        *_list_shapes(math.prod(shape)),
        jax.ShapeDtypeStruct((1,), jnp.int32),
      ],
      input_output_aliases={3: 3},
      grid=shape[0] * _cdiv(patches, block),
      SIZE=math.prod(shape),
      OBEY=given is not None,
      FIRST=self.first,
      TAPS=self.size,
      STRIDES=self.strides,
      GRANULARITY=side,
      HEIGHT=in_shape[1],
      WIDTH=in_shape[2],
      BLOCK=block,
      CELLS=_ceil_power(side**2),
      WINDOW=window,
      LANES=min(_AVERAGE_BLOCK, _power(in_shape[1] * in_shape[2])),
    )
    return logits, Positions(*found), zero
