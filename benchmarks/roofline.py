"""Floor of the time of bottleneck ResNets on a GPU, by the roofline model.

Each kernel takes at least the time to multiply what it has to, and at least
that to move its operands once between memory and chip (Williams et al. 2009,
Roofline). The kernels are those of the Triton backend, with mask units,
on clustered masks; in the dense network one a convolution, with whatever is
pointwise. Values have 2 bytes. Stem, pooling, projections, mask units, and
lists count as kernels of their own, also where the backend computes them in
another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax import create_model
from dynconv_jax.branch import Branch, Conv
from dynconv_jax.checks import check_choice
from dynconv_jax.masks import ExecutionMask, execution_mask
from dynconv_jax.models.blocks import Bottleneck
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.models.resnet import ARCHITECTURES
from dynconv_jax.sparse.backends.triton import FUSED_WIDTH
from dynconv_jax.sparse.backends.triton_masks import UNITS
from dynconv_jax.sparse.calibrate import clustered_masks
from dynconv_jax.sparse.sparsify import trace_blocks

_FUSED_WIDTH = FUSED_WIDTH[jnp.dtype(jnp.bfloat16)]
# Taps of a mask unit, and its average.
_COLUMNS = 10


class Kernel(NamedTuple):
  """What one kernel has to do.

  Attributes:
    name: of its layer.
    macs: multiply-accumulates.
    moved: values of 2 bytes that it reads and writes.
  """

  name: str
  macs: int
  moved: int

  def seconds(self, bandwidth: float, rate: float) -> float:
    """Returns the floor of its time.

    Args:
      bandwidth: bytes a second.
      rate: floating-point operations a second.
    """
    return max(2 * self.moved / bandwidth, 2 * self.macs / rate)


def count_kernels(
  batch_size: int,
  image_size: int,
  density: float | None,
  *,
  model: str = 'resnet50',
  mask_granularity: Sequence[int] = (1,),
) -> list[Kernel]:
  """Returns the kernels of a network; without its head, which is small.

  Args:
    batch_size: images.
    image_size: pixels a side.
    density: of the masks; None: the network without gates.
    model: one of bottlenecks.
    mask_granularity: sides of the masks' patches, positions: one for all
      stages, or one a stage.

  Raises:
    ValueError: another model, or sides that do not fit it.
  """
  bottlenecks = [k for k, v in ARCHITECTURES.items() if v.block is Bottleneck]
  check_choice('model', model, bottlenecks)
  network = nnx.eval_shape(
    lambda: create_model(
      model,
      method='dynconv',
      mask_granularity=tuple(mask_granularity),
      rngs=nnx.Rngs(0),
    )
  )
  network = nnx.view(network, deterministic=True, use_running_average=True)
  blocks = {block.name: block for block in gated_blocks(network)}
  traces = trace_blocks(network, (batch_size, image_size, image_size, 3))
  stem, pooled = -(-image_size // 2), traces[0].shape
  width = pooled[-1]
  positions = batch_size * stem**2
  kernels = [
    _product(
      'stem',
      positions,
      7 * 7 * 3 * width,
      batch_size * image_size**2 * 3,
      positions * width,
    ),
    Kernel('pool', 0, positions * width + math.prod(pooled)),
  ]
  rng = np.random.default_rng(0)
  left = _units_left([blocks[trace.name].branch for trace in traces])
  active = 0
  for trace, units in zip(traces, left, strict=True):
    block = blocks[trace.name]
    branch, size = block.branch, trace.shape[1:3]
    counts = tuple(batch_size * h * w for h, w in branch.level_sizes(size))
    before = math.prod(trace.shape[:3])
    mask = None
    if density is not None:
      mask = _mask(rng, block, trace.shape, density)
      executed = tuple(int(np.sum(m)) for m in mask.maps)
      first = units[0] == 0
      rows = before if first else active
      columns = _COLUMNS * units[1]
      kernels += [
        _product(
          f'{block.name}.mask',
          rows,
          branch.in_features * columns,
          rows * branch.in_features,
          2 * columns * rows,
        ),
        Kernel(f'{block.name}.decide', 0, 2 * _COLUMNS * before),
        # What follows is of 4 bytes, two values: of a list the place of each
        # position and the active positions.
        Kernel(f'{block.name}.list', 0, 2 * (2 * counts[0] + executed[0])),
        Kernel(
          f'{block.name}.dilate', 0, 2 * (counts[0] + counts[1] + executed[1])
        ),
      ]
      active, counts = executed[0], executed
    after = batch_size * math.prod(branch.sizes(size)[-1])
    kernels += _count_block(block.name, branch, before, after, counts, mask)
  return kernels


def _units_left(branches: Sequence[Branch]) -> list[tuple[int, int]]:
  """For each mask unit its number in its group, and how many are left in it.

  A block that stays as it is where it is not executed leaves its map to the
  next unit; units of one map share products, some at a time.
  """
  numbers = []
  for i in range(len(branches)):
    goes_on = i > 0 and branches[i - 1].stays
    numbers.append((numbers[-1] + 1) % UNITS if goes_on else 0)
  left = []
  for after in [0, *numbers[:0:-1]]:
    left.append(1 if after == 0 else left[-1] + 1)
  return list(zip(numbers, left[::-1], strict=True))


def _mask(rng, block, shape, density) -> ExecutionMask:
  hard = clustered_masks(
    rng,
    (shape[0], *block.branch.sizes(shape[1:3])[-1]),
    density,
    side=block.masker.granularity,
  )
  return execution_mask(
    block.branch, jnp.asarray(hard), shape[1:3], name=block.name
  )


def _count_block(
  name: str,
  branch: Branch,
  before: int,
  after: int,
  counts: tuple[int, ...],
  mask: ExecutionMask | None,
) -> list[Kernel]:
  """The kernels of a block.

  Args:
    name: of the block.
    branch: of it.
    before: positions of its input.
    after: positions of its output.
    counts: active positions of each level.
    mask: None: a dense network, whose kernels are not fused.
  """
  kernels = []
  if (projection := branch.projection) is not None:
    kernels.append(
      _convolution(
        f'{name}.{projection.name}',
        projection,
        after,
        after * projection.in_features,
        after * projection.features,
      )
    )
  *inner, last = branch.convs
  read = counts[branch.levels[0]] * branch.in_features
  for conv, level in zip(inner, branch.levels, strict=False):
    written = counts[level] * conv.features
    kernel = _convolution(
      f'{name}.{conv.name}', conv, counts[level], read, written
    )
    kernels.append(kernel)
    read = written
  # The shortcut is read, the sum written.
  added = 2 * counts[0] * last.features
  kernels.append(
    _convolution(f'{name}.{last.name}', last, counts[0], read, added)
  )
  if (
    mask is not None and last.is_pointwise and last.in_features <= _FUSED_WIDTH
  ):
    second, third = kernels[-2:]
    kept = 2 * counts[0] * last.in_features  # In registers: not moved.
    fused = Kernel(
      f'{second.name}+{last.name}',
      second.macs + third.macs,
      second.moved + third.moved - kept,
    )
    kernels[-2:] = [fused]
  return kernels


def _convolution(
  name: str, conv: Conv, rows: int, read: int, written: int
) -> Kernel:
  return _product(name, rows, conv.macs_per_position, read, written)


def _product(
  name: str, rows: int, weights: int, read: int, written: int
) -> Kernel:
  """A product of rows and a matrix of so many weights."""
  return Kernel(name, rows * weights, read + weights + written)
