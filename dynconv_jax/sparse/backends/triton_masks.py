"""Lists of active positions and mask units on a GPU.

The device lists and counts positions, so no count is copied to the host.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.masks import ExecutionMask, masked_layers
from dynconv_jax.methods.mask_unit import MaskUnit, Squeeze
from dynconv_jax.models.gated import GatedBlock
from dynconv_jax.sparse.backends import triton_launch
from dynconv_jax.sparse.backends.cpu import squeeze_columns
from dynconv_jax.sparse.backends.triton_launch import (
  cdiv,
  ceil_power,
  tile_side,
)

# Positions that a program lists, and map positions that it sums at a time.
_LIST_BLOCK, _AVERAGE_BLOCK = 256, 1024
# One program decides on and dilates an image of up to this many positions.
_IMAGE = 1024
# Maximum number of mask units that share products: 3x3 units then have at most
# 60 of 64 columns.
UNITS = 6
# Two counts, which lists start from.
ZEROS = 2 * (jax.ShapeDtypeStruct((1,), jnp.int32),)


class Positions(NamedTuple):
  """The active positions of a map.

  Attributes:
    indices: int32[at least size], flat active positions in any order; undefined
      from `count` on.
    rows: int32[size], index of each position in that list; -1 if inactive.
    count: int32[1], number of active positions.
  """

  indices: jax.Array
  rows: jax.Array
  count: jax.Array


class Lists(NamedTuple):
  """The positions at which a block is computed.

  Attributes:
    active: positions of the block's output.
    needed: positions of its first convolution.
  """

  active: Positions
  needed: Positions


class Squeezed(NamedTuple):
  """Products of a map with the weights of the mask units that read it.

  Attributes:
    terms: float32[columns, N * H * W].
    changed: positions of the map that changed after the products were computed;
      None if there are none.
    zeros: two zero counts, see `ZEROS`, if the products are up to date;
      otherwise None.
  """

  terms: jax.Array
  changed: Positions | None
  zeros: tuple[jax.Array, jax.Array] | None = None


def list_positions(mask: jax.Array) -> Positions:
  """Returns the active positions of a mask.

  Args:
    mask: float32[N, h, w]; nonzero values are active.
  """
  return Positions(
    *triton_launch.launch(
      'list_positions',
      mask,
      out_shape=_list_shapes(mask.size),
      zeroed_outputs=(2,),
      grid=cdiv(mask.size, _LIST_BLOCK),
      SIZE=mask.size,
      BLOCK=_LIST_BLOCK,
    )
  )


def list_dilated(
  active: Positions, zero: jax.Array, shape: tuple[int, int, int], strides: int
) -> Positions:
  """Returns the positions that a 3x3 convolution reads.

  Args:
    active: output positions.
    zero: int32[1], 0, the initial count.
    shape: (N, H, W) of the input.
    strides: strides of the convolution.
  """
  size = math.prod(shape)
  return Positions(
    *triton_launch.launch(
      'list_dilated',
      *(active.rows, zero),
      out_shape=_list_shapes(size),
      input_output_aliases={1: 2},
      grid=cdiv(size, _LIST_BLOCK),
      SIZE=size,
      STRIDES=strides,
      HEIGHT=shape[1],
      WIDTH=shape[2],
      BLOCK=_LIST_BLOCK,
    )
  )


def _list_shapes(size):
  # Pad indices, because kernels read whole tiles.
  shapes = ((cdiv(size, _LIST_BLOCK) * _LIST_BLOCK,), (size,), (1,))
  return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


@flax.struct.dataclass(kw_only=True)
class ListedMask(ExecutionMask):
  """An execution mask with lists of its active positions.

  Attributes:
    lists: active positions of the maps.
  """

  lists: Lists

  @classmethod
  def of(cls, mask: ExecutionMask) -> ListedMask:
    """Returns a mask with its lists."""
    if isinstance(mask, cls):
      return mask
    lists = Lists(*map(list_positions, mask.maps))
    return cls(**vars(mask), lists=lists)

  @property
  def counts(self) -> jax.Array:
    """int32[2], as the lists hold them: the maps are not read."""
    return jnp.concatenate([found.count for found in self.lists])


def decides(gate: nnx.Module | None) -> bool:
  """Returns whether the kernels compute a gate; see `decide`."""
  return type(gate) is MaskUnit and type(gate.maskconv) is ColumnSqueeze


def decide(
  block: Any,
  x: jax.Array,
  given: jax.Array | None,
  squeezed: Squeezed | None,
) -> tuple[ListedMask, Squeezed]:
  """Returns a block's mask with its lists, and the products for the next block.

  Args:
    block: has a mask unit that `share_squeezes` replaced.
    x: float32 or bfloat16[N, H, W, in_features], the block's input.
    given: float32[N, h, w] of {0, 1}, used instead of the decision, which is
      still computed; or None.
    squeezed: products from the previous block, or None.
  """
  branch, unit = block.branch, block.masker.maskconv
  end, middle = (
    (x.shape[0], *size) for size in branch.level_sizes(x.shape[1:3])
  )
  if squeezed is None or squeezed.zeros is None:
    squeezed = unit.squeeze(x, squeezed)
  # Otherwise, the previous block computed the products.
  _, active, needed = unit.list_positions(
    squeezed, x.shape, end, given, middle, branch.reads[0].strides
  )
  mask = ListedMask(
    maps=tuple(
      (positions.rows >= 0).astype(jnp.float32).reshape(shape)
      for positions, shape in ((active, end), (needed, middle))
    ),
    name=block.name,
    layers=masked_layers(branch, block.name),
    stage=block.stage,
    lists=Lists(active, needed),
  )
  return mask, Squeezed(squeezed.terms, active)


def share_squeezes(chains: Sequence[Sequence[GatedBlock]]) -> None:
  """Replaces the mask units of blocks with ones that share products, in place.

  Args:
    chains: lists of blocks in which each reads the previous one's output.
  """
  uses = collections.Counter(
    id(block.masker) for chain in chains for block in chain
  )
  groups: list[list[GatedBlock]] = []
  for chain in chains:
    same_map = False
    for block in chain:
      # A unit that is used more than once reads several maps. The kernel that
      # dilates masks knows one kernel size and padding.
      read = block.branch.reads[0]
      if (
        not _is_unit(block.masker)
        or uses[id(block.masker)] > 1
        or (read.kernel_size, read.padding) != (3, 'symmetric')
      ):
        same_map = False
        continue
      if same_map and len(groups[-1]) < UNITS:
        groups[-1].append(block)
      else:
        groups.append([block])
      # The output equals the input except at executed positions.
      same_map = block.branch.stays
  for group in groups:
    units = [block.masker for block in group]
    before = [None, *(block.name for block in group)]
    squeezes, following = [], None
    for index in reversed(range(len(units))):
      following = ColumnSqueeze(units, index, before[index], following)
      squeezes.append(following)
    for unit, squeeze in zip(units, squeezes[::-1], strict=True):
      unit.maskconv = squeeze


def _is_unit(gate: nnx.Module | None) -> bool:
  return (
    type(gate) is MaskUnit
    and type(gate.maskconv) is Squeeze
    and gate.norm is None
  )


class ColumnSqueeze(nnx.Module):
  """Computes the logits of a mask unit, and lists positions with logits >= 0.

  One kernel multiplies the map by a matrix with one column per tap of the
  convolution and one for the average. Another kernel sums the products to
  logits and lists the positions. Means over patches are linear too, so that
  kernel takes them from the products.

  Consecutive units share products if they read the same map except at the
  positions that the blocks between them execute. The first unit multiplies the
  whole map by the columns of all units. Each later unit updates the changed
  positions, for its own columns and those of later units.

  Logits have float32 precision: for bfloat16 features, the matrix is the sum of
  three bfloat16 matrices, which together represent all of its bits.

  Args:
    units: the mask units that share products, in network order.
    index: index of this unit.
    before: name of the previous unit's block, or None.
    following: the squeeze of the next unit, or None.
  """

  def __init__(
    self,
    units: Sequence[MaskUnit],
    index: int,
    before: str | None = None,
    following: ColumnSqueeze | None = None,
  ):
    self.before, self.following = before, following
    weights = [squeeze_columns(unit.maskconv) for unit in units]
    self.strides = units[index].strides
    self.granularity = units[index].granularity
    self.size, _, _, bias = weights[index]
    matrices = [matrix for _, _, matrix, _ in weights]
    self.first = sum(matrix.shape[1] for matrix in matrices[:index])
    matrix = np.concatenate(matrices[index:], 1)
    self.columns = matrix.shape[1]
    padding = tile_side(self.columns) - self.columns
    matrix = np.pad(matrix, ((0, 0), (0, padding)))
    parts = []
    for _ in range(3):
      parts.append((matrix - sum(parts)).astype(jnp.bfloat16))
      parts[-1] = parts[-1].astype(np.float32)
    self.matrix = nnx.Param(jnp.asarray(matrix[None]))
    self.parts = nnx.Param(jnp.asarray(np.stack(parts), jnp.bfloat16))
    self.bias = nnx.Param(jnp.full(1, bias, jnp.float32))

  def weights(self, dtype: jnp.dtype) -> jax.Array:
    """Returns [parts, C, columns], which sum to the matrix.

    Args:
      dtype: dtype of the map.
    """
    return (self.matrix if dtype == jnp.float32 else self.parts)[...]

  def squeeze(self, x: jax.Array, squeezed: Squeezed | None) -> Squeezed:
    """Returns up-to-date products of a map.

    Args:
      x: float32 or bfloat16[N, H, W, C].
      squeezed: products of the previous unit, to update at changed positions;
        None to multiply the whole map.
    """
    listed, weights = squeezed is not None, self.weights(x.dtype)
    terms, changed = jnp.zeros(1), Positions(*3 * (jnp.zeros(1, jnp.int32),))
    if listed:
      terms, changed, _ = squeezed
    rows, depth = math.prod(x.shape[:3]), x.shape[3]
    tiles = _squeeze_tiles(depth, weights.shape[2], x.dtype)
    terms, *zeros = triton_launch.launch(
      'squeeze',
      *(x, weights, changed.indices, changed.count, terms),
      out_shape=[
        jax.ShapeDtypeStruct((self.first + self.columns, rows), jnp.float32),
        *ZEROS,
      ],
      input_output_aliases={4: 0} if listed else {},
      grid=cdiv(rows, tiles['BLOCK_ROWS']),
      LISTED=listed,
      SIZE=rows,
      PARTS=len(weights),
      DEPTH=depth,
      FIRST=self.first,
      COLUMNS=self.columns,
      WIDTH=weights.shape[2],
      **tiles,
    )
    return Squeezed(terms, None, tuple(zeros))

  def list_positions(
    self,
    squeezed: Squeezed,
    in_shape: tuple[int, ...],
    shape: tuple[int, int, int],
    given: jax.Array | None,
    middle: tuple[int, int, int],
    strides: int,
  ) -> tuple[jax.Array, Positions, Positions]:
    """Returns the logits and the active positions.

    Args:
      squeezed: up-to-date products of the map.
      in_shape: (N, H, W, C) of the map.
      shape: (N, h, w) of the mask.
      given: float32[N, h, w], the mask to list instead; or None.
      middle: (N, H, W) of the input of a 3x3 convolution at active positions.
      strides: strides of that convolution.

    Returns:
      logits: float32[N, h, w], equal at all positions of a patch.
      active: positions where logits >= 0, or where `given` is not 0.
      needed: positions that the convolution reads.
    """
    side = self.granularity
    window = 1 if side == 1 else ceil_power((side * self.strides) ** 2)
    patches = cdiv(shape[1], side) * cdiv(shape[2], side)
    dilated = side == 1 and patches <= _IMAGE
    # Limit the tile of the positions that a tap reads.
    most = _LIST_BLOCK if side == 1 else max(1, min(32, 1024 // window))
    block = min(_IMAGE if dilated else most, tile_side(patches))
    pixels = math.prod(middle[1:])
    logits, *lists = triton_launch.launch(
      'decide',
      *(squeezed.terms, self.bias[...]),
      self.bias[...] if given is None else given,
      *squeezed.zeros,
      out_shape=[
        jax.ShapeDtypeStruct(shape, jnp.float32),
        *_list_shapes(math.prod(shape)),
        *_list_shapes(math.prod(middle) if dilated else 1),
      ],
      input_output_aliases={3: 3, 4: 6},
      grid=shape[0] * cdiv(patches, block),
      SIZE=math.prod(shape),
      OBEY=given is not None,
      FIRST=self.first,
      TAPS=self.size,
      STRIDES=self.strides,
      GRANULARITY=side,
      HEIGHT=in_shape[1],
      WIDTH=in_shape[2],
      BLOCK=block,
      CELLS=ceil_power(side**2),
      WINDOW=window,
      LANES=min(_AVERAGE_BLOCK, tile_side(in_shape[1] * in_shape[2])),
      DILATED=dilated,
      D_STRIDES=strides,
      D_HEIGHT=middle[1],
      D_WIDTH=middle[2],
      D_BLOCK=min(_IMAGE, tile_side(pixels)),
      num_warps=8 if block > _LIST_BLOCK else 4,
    )
    active, needed = Positions(*lists[:3]), Positions(*lists[3:])
    if not dilated:
      needed = list_dilated(active, needed.count, middle, strides)
    return logits, active, needed


def _squeeze_tiles(depth: int, width: int, dtype: jnp.dtype) -> dict[str, int]:
  """Returns tile sizes of products, chosen like those of `triton._tiles`."""
  rows, block, num_stages = 64, min(tile_side(depth), 64), 3
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
