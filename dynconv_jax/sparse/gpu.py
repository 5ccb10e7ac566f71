"""Blocks at active positions by kernels for a GPU, through jax-triton.

The counterpart of `native.py`. Active positions are listed, counted and
computed on the device: no count travels to the host, and nothing overflows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.gating.mask import ExecutionMask
from dynconv_jax.gating.mask_unit import MaskUnit, Squeeze
from dynconv_jax.models.blocks import Block
from dynconv_jax.models.resnet import ResNet
from dynconv_jax.sparse.dense import shortcut
from dynconv_jax.sparse.fold import FoldedBlock, Layer
from dynconv_jax.sparse.native import squeeze_columns

_DTYPES = (jnp.float32, jnp.bfloat16)
# Positions a program lists, and rows of a map it squeezes.
_LIST_BLOCK, _SQUEEZE_ROWS = 256, 128
# Bottlenecks up to this inner width keep the rows between their last two
# convolutions in registers.
_FUSED_WIDTH = {jnp.dtype(jnp.float32): 64, jnp.dtype(jnp.bfloat16): 128}
# Outputs for which tiles of 128 x 128 keep an H100's 132 multiprocessors busy,
# twice over.
_MANY = 2 * 132 * 128 * 128


def usable(dtype: jnp.dtype) -> bool:
  """Returns whether the kernels compute in a dtype on JAX's default backend.

  Args:
    dtype: of the features.
  """
  return jax.default_backend() == 'gpu' and dtype in _DTYPES


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
    indices: int32[size], the flat positions of the active ones, in any order;
      undefined from `count` on.
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
  active: Positions, shape: tuple[int, int, int], strides: int
) -> Positions:
  """Returns the positions that a 3x3 convolution at others reads.

  Args:
    active: positions of its output.
    shape: (N, H, W) of its input.
    strides: of the convolution.
  """
  size = math.prod(shape)
  return Positions(
    *launch(
      'list_dilated',
      active.rows,
      out_shape=_list_shapes(size),
      zeroed_outputs=(2,),
      grid=_cdiv(size, _LIST_BLOCK),
      SIZE=size,
      STRIDES=strides,
      HEIGHT=shape[1],
      WIDTH=shape[2],
      BLOCK=_LIST_BLOCK,
    )
  )


def _list_shapes(size):
  shapes = ((size,), (size,), (1,))
  return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


def decides(block: Block) -> bool:
  """Returns whether kernels compute a block's mask unit: see `decide`."""
  return isinstance(block.masker, MaskUnit) and isinstance(
    block.masker.maskconv, ColumnSqueeze
  )


def decide(
  block: Block, folded: FoldedBlock, x: jax.Array, given: jax.Array | None
) -> tuple[ExecutionMask, jax.Array, Lists]:
  """Returns a block's mask, its gate's decision, and the lists of positions.

  Args:
    block: of `with_kernel_gates`.
    folded: the same block.
    x: float32 or bfloat16[N, H, W, in_features], its input.
    given: float32[N, h, w] of {0, 1} to obey instead of the decision, or None.

  Returns:
    The execution mask; float32[N, h, w] of {0, 1}, what the gate chose; the
    positions of both maps of the mask.
  """
  shape = folded.output_shape(x.shape)
  logits, active = block.masker.maskconv.list_positions(x, shape, given)
  middle = folded.first.output_shape(x.shape)
  needed = list_dilated(active, middle, folded.second.strides)
  hard, dilated = (
    (found.rows >= 0).astype(jnp.float32).reshape(shape)
    for found, shape in ((active, shape), (needed, middle))
  )
  mask, _ = block.decide(x, None, hard)
  decision = (logits >= 0).astype(jnp.float32)
  return mask.replace(dilated=dilated), decision, Lists(active, needed)


def run_triton(block: FoldedBlock, x: jax.Array, lists: Lists) -> jax.Array:
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
  middle, end = block.first.output_shape(x.shape), block.output_shape(x.shape)
  second, third = block.second, block.third
  y = _convolve(x, x.shape, needed, needed, block.first, lookup=False)
  base = shortcut(block, x)
  if block.projection is not None:
    inactive = active.rows.reshape(*end, 1) < 0
    base = jnp.where(inactive, jax.nn.relu(base), base)
  if third is None:
    return _convolve_add(y, middle, needed, active, second, base)
  if second.bias.size <= _FUSED_WIDTH[x.dtype]:
    return _convolve_matmul_add(y, middle, needed, active, second, third, base)
  z = _convolve(y, middle, needed, active, second, lookup=True)
  return _convolve_add(z, end, active, active, third, base)


def _convolve(table, shape, read, written, layer, *, lookup):
  """relu(convolution), float[positions, features] in the order of a list."""
  tiles = _tiles(written, layer, table.dtype, lookup)
  return launch(
    'convolve',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias),
    out_shape=jax.ShapeDtypeStruct(
      (written.indices.size, layer.bias.size), table.dtype
    ),
    grid=_grid(written, layer, tiles),
    LOOKUP=lookup,
    TAPS=layer.size,
    FEATURES=layer.bias.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_add(table, shape, read, written, layer, base):
  """relu(base + convolution) at the positions of a list, written in place."""
  tiles = _tiles(written, layer, table.dtype, lookup=layer.size > 1)
  return launch(
    'convolve_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={6: 0},
    grid=_grid(written, layer, tiles),
    TAPS=layer.size,
    FEATURES=layer.bias.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_matmul_add(table, shape, read, written, layer, last, base):
  """relu(base + last(relu(convolution))) likewise, for small inner widths."""
  tiles = _tiles(written, layer, table.dtype, lookup=True)
  inner = tiles.pop('BLOCK_FEATURES')
  if table.dtype == jnp.float32:
    tiles |= {'BLOCK_DEPTH': 16, 'num_warps': 8}  # Else registers spill.
  return launch(
    'convolve_matmul_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, last.kernel, last.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={8: 0},
    grid=_cdiv(written.indices.size, tiles['BLOCK_ROWS']),
    FEATURES=last.bias.size,
    BLOCK_INNER=inner,
    BLOCK_FEATURES=64,
    **_geometry(shape, layer),
    **tiles,
  )


def _geometry(shape: tuple[int, ...], layer: Layer) -> dict[str, int]:
  """How a convolution reads a map of (N, H, W, ...)."""
  return {
    'STRIDES': layer.strides,
    'HEIGHT': shape[1],
    'WIDTH': shape[2],
    'DEPTH': layer.kernel.shape[2],
  }


def _tiles(
  written: Positions, layer: Layer, dtype: jnp.dtype, lookup: bool
) -> dict[str, int]:
  """Tile sizes of a product whose rows are positions.

  Three pairs of tiles in bfloat16 are on their way, in 96 KiB of shared memory:
  two programs fit on a multiprocessor. A row that is looked up first takes two
  more stages.
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
  many = written.indices.size * features >= _MANY
  return {
    'BLOCK_ROWS': 128 if many else 64,
    'BLOCK_FEATURES': min(_power(features), 128),
    'BLOCK_DEPTH': min(_power(depth), 64),
    'num_warps': 8 if many else 4,
    'num_stages': 5 if lookup else 3,
  }


def _grid(written, layer, tiles):
  """Programs for all positions, those of the same rows one after the other."""
  rows = _cdiv(written.indices.size, tiles['BLOCK_ROWS'])
  return rows * _cdiv(layer.bias.size, tiles['BLOCK_FEATURES'])


def _cdiv(a: int, b: int) -> int:
  return -(-a // b)


def _power(n: int) -> int:
  """The power of two from n up that is a side of a tile, 16 at least."""
  return max(16, 1 << (n - 1).bit_length())


def with_kernel_gates(model: ResNet) -> ResNet:
  """Returns a copy of a network whose mask units compute by the kernels.

  Those of patches do not: they read a small map, which XLA pools.

  Args:
    model: in evaluation.
  """
  model = nnx.clone(model)
  for block in model.blocks:
    if isinstance(block.masker, MaskUnit) and block.masker.granularity == 1:
      block.masker.maskconv = ColumnSqueeze(block.masker.maskconv)
  return model


class ColumnSqueeze(nnx.Module):
  """Computes what a mask unit's `Squeeze` does, and where it is not negative.

  One kernel reads the input once: it multiplies it by a matrix whose columns
  are the taps of the convolution, and what the average is taken of. Another
  sums up the logits and lists the positions. Decisions are made of float32
  numbers: for features in bfloat16 the matrix is the sum of three in bfloat16,
  which hold all of its bits.

  Args:
    squeeze: gives the weights.
  """

  def __init__(self, squeeze: Squeeze):
    self.size, self.strides, matrix, bias = squeeze_columns(squeeze)
    matrix = np.pad(matrix, ((0, 0), (0, 16 - matrix.shape[1])))
    parts = []
    for _ in range(3):
      parts.append((matrix - sum(parts)).astype(jnp.bfloat16))
      parts[-1] = parts[-1].astype(np.float32)
    self.matrix = nnx.Param(jnp.asarray(matrix[None]))
    self.parts = nnx.Param(jnp.asarray(np.stack(parts), jnp.bfloat16))
    self.bias = nnx.Param(jnp.full(1, bias, jnp.float32))

  def list_positions(
    self, x: jax.Array, shape: tuple[int, int, int], given: jax.Array | None
  ) -> tuple[jax.Array, Positions]:
    """Returns the logits and the positions where they are not negative.

    Args:
      x: float32 or bfloat16[N, H, W, C].
      shape: (N, h, w) of the logits.
      given: float32[N, h, w], lists where it is not 0 instead; or None.

    Returns:
      float32[N, h, w] and the list.
    """
    exact = x.dtype == jnp.float32
    weights = (self.matrix if exact else self.parts)[...]
    n, height, width, depth = x.shape
    geometry = {
      'TAPS': self.size,
      'HEIGHT': height,
      'WIDTH': width,
      'BLOCK_ROWS': _SQUEEZE_ROWS,
    }
    rows, tiles = n * height * width, _cdiv(height * width, _SQUEEZE_ROWS)
    terms, sums = launch(
      'squeeze',
      *(x, weights),
      out_shape=[
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((self.size**2, rows), (n, tiles))
      ],
      grid=n * tiles,
      SIZE=rows,
      PARTS=len(weights),
      DEPTH=depth,
      BLOCK_DEPTH=min(_power(depth), 32 if exact else 64),
      num_warps=4,
      num_stages=3,
      **geometry,
    )
    size = math.prod(shape)
    logits, *found = launch(
      'decide',
      *(terms, sums, self.bias[...], terms if given is None else given),
      out_shape=[
        jax.ShapeDtypeStruct(shape, jnp.float32),
        *_list_shapes(size),
      ],
      zeroed_outputs=(3,),
      grid=_cdiv(size, _LIST_BLOCK),
      SIZE=size,
      OBEY=given is not None,
      STRIDES=self.strides,
      BLOCK=_LIST_BLOCK,
      **geometry,
    )
    return logits, Positions(*found)
