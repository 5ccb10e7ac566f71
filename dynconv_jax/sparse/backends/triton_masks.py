"""Where blocks run on a GPU: lists of active positions, and mask units.

Positions are listed and counted on the device: no count travels to the host.
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
from dynconv_jax.methods.dynconv import MaskUnit, Squeeze
from dynconv_jax.models.gated import GatedBlock
from dynconv_jax.sparse.backends import triton_launch
from dynconv_jax.sparse.backends.cpu import squeeze_columns
from dynconv_jax.sparse.backends.triton_launch import (
  cdiv,
  ceil_power,
  tile_side,
)

# Positions that a program lists, and that one of a mask unit sums up at a time.
_LIST_BLOCK, _AVERAGE_BLOCK = 256, 1024
# An image of up to so many positions is decided on and dilated by one program.
_IMAGE = 1024
# Mask units that share products, so that their matrix has 64 columns.
UNITS = 6
# Two counts that lists go on from.
ZEROS = 2 * (jax.ShapeDtypeStruct((1,), jnp.int32),)


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
    zeros: `ZEROS`, where the products are those of the map as it is; else None.
  """

  terms: jax.Array
  changed: Positions | None
  zeros: tuple[jax.Array, jax.Array] | None = None


def list_positions(mask: jax.Array) -> Positions:
  """Returns the active positions of a mask.

  Args:
    mask: float32[N, h, w], active where it is not 0.
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
  """Returns the positions that a 3x3 convolution at others reads.

  Args:
    active: positions of its output.
    zero: int32[1], 0: counted on.
    shape: (N, H, W) of its input.
    strides: of the convolution.
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
  # Tiles of positions are read to their end.
  shapes = ((cdiv(size, _LIST_BLOCK) * _LIST_BLOCK,), (size,), (1,))
  return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


@flax.struct.dataclass(kw_only=True)
class ListedMask(ExecutionMask):
  """An execution mask whose active positions are listed.

  Attributes:
    lists: the positions of its maps.
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
  """Returns whether kernels compute a gate: see `decide`."""
  return type(gate) is MaskUnit and type(gate.maskconv) is ColumnSqueeze


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
    squeezed: what the block before returned; None: nothing is known.
  """
  branch, unit = block.branch, block.masker.maskconv
  end, middle = (
    (x.shape[0], *size) for size in branch.level_sizes(x.shape[1:3])
  )
  if squeezed is None or squeezed.zeros is None:
    squeezed = unit.squeeze(x, squeezed)
  # Else the block before has done it.
  _, active, needed = unit.list_positions(
    squeezed, x.shape, end, given, middle, branch.reads[0].strides
  )
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
  return mask, Squeezed(squeezed.terms, active)


def share_squeezes(chains: Sequence[Sequence[GatedBlock]]) -> None:
  """Has the kernels compute the mask units of blocks, in place.

  Args:
    chains: in each a block reads what the one before it wrote.
  """
  asked = collections.Counter(
    id(block.masker) for chain in chains for block in chain
  )
  groups: list[list[GatedBlock]] = []
  for chain in chains:
    same_map = False
    for block in chain:
      # One that decides several times has several maps.
      if not _is_unit(block.masker) or asked[id(block.masker)] > 1:
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
    before: the name of the block whose unit is the one before it, or None.
    following: of the unit after it, or None.
  """

  def __init__(
    self,
    units: Sequence[MaskUnit],
    index: int,
    before: str | None = None,
    following: ColumnSqueeze | None = None,
  ):
    self.before, self.following = before, following
    found = [squeeze_columns(unit.maskconv) for unit in units]
    self.strides = units[index].strides
    self.granularity = units[index].granularity
    self.size, _, _, bias = found[index]
    matrices = [matrix for _, _, matrix, _ in found]
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
    """Returns [parts, C, columns], which sum up to the matrix.

    Args:
      dtype: of the map.
    """
    return (self.matrix if dtype == jnp.float32 else self.parts)[...]

  def squeeze(self, x: jax.Array, squeezed: Squeezed | None) -> Squeezed:
    """Returns the products of a map as it is.

    Args:
      x: float32 or bfloat16[N, H, W, C].
      squeezed: of the unit before, of which what was changed is computed anew;
        None: the whole map is multiplied.
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
    """Returns the logits and the positions where they are not negative.

    Args:
      squeezed: products of the map as it is.
      in_shape: (N, H, W, C) of the map.
      shape: (N, h, w) of the mask.
      given: float32[N, h, w], lists where it is not 0 instead; or None.
      middle: (N, H, W) of what a 3x3 convolution at those positions reads.
      strides: of that convolution.

    Returns:
      float32[N, h, w], one logit at all positions of a patch, the positions,
      and those that the convolution reads.
    """
    side = self.granularity
    window = 1 if side == 1 else ceil_power((side * self.strides) ** 2)
    patches = cdiv(shape[1], side) * cdiv(shape[2], side)
    dilated = side == 1 and patches <= _IMAGE
    # The positions that a tap reads are a tile.
    most = _LIST_BLOCK if side == 1 else max(1, min(32, 1024 // window))
    block = min(_IMAGE if dilated else most, tile_side(patches))
    pixels = math.prod(middle[1:])
    logits, *found = triton_launch.launch(
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
    active, needed = Positions(*found[:3]), Positions(*found[3:])
    if not dilated:
      needed = list_dilated(active, needed.count, middle, strides)
    return logits, active, needed


def _squeeze_tiles(depth: int, width: int, dtype: jnp.dtype) -> dict[str, int]:
  """Tile sizes of a mask unit's products, chosen as those of `_tiles`."""
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
