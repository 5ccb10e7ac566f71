"""Lower bounds of the time of bottleneck ResNets on a GPU (roofline model).

Each kernel takes at least the time of its arithmetic, and at least the time to
move its operands once between memory and chip (Williams et al., Roofline,
2009). The kernels are those of the Triton backend, including mask units, on
clustered masks. In the dense network, there is one kernel per convolution,
including pointwise operations. Values have 2 bytes. Stem, pooling, projections,
mask units, and lists count as separate kernels, even if the backend fuses them.
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
# Columns of a mask unit: nine taps and the average.
_COLUMNS = 10


class Kernel(NamedTuple):
  """The work of a kernel.

  Attributes:
    name: name of the layer.
    macs: number of multiply-accumulates.
    moved: number of 2-byte values read and written.
  """

  name: str
  macs: int
  moved: int

  def seconds(self, bandwidth: float, rate: float) -> float:
    """Returns the lower bound of the kernel's time.

    Args:
      bandwidth: bytes per second.
      rate: floating-point operations per second.
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
  """Returns the kernels of a network, except the head, which is small.

  Args:
    batch_size: number of images.
    image_size: side of the images, in pixels.
    density: density of the masks; None for the network without gates.
    model: name of a bottleneck ResNet.
    mask_granularity: sides of the masks' patches, in positions: one value for
      all stages, or one per stage.

  Raises:
    ValueError: the model is not a bottleneck ResNet, or the sides do not fit
      it.
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
        # Lists have 4-byte entries, which count as two values: the index of
        # each position, and the active positions.
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
  """Returns each mask unit's index in its group, and the units left in it.

  After a block that keeps its inactive positions, the next unit reads the same
  map. Units of one map share products, in groups.
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
  """Returns the kernels of a block.

  Args:
    name: name of the block.
    branch: branch of the block.
    before: number of input positions.
    after: number of output positions.
    counts: number of active positions of each level.
    mask: the execution mask; None for a dense network, whose kernels are not
      fused.
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
  # Reads the shortcut and writes the sum.
  added = 2 * counts[0] * last.features
  kernels.append(
    _convolution(f'{name}.{last.name}', last, counts[0], read, added)
  )
  if (
    mask is not None and last.is_pointwise and last.in_features <= _FUSED_WIDTH
  ):
    second, third = kernels[-2:]
    kept = 2 * counts[0] * last.in_features  # Stays in registers.
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
  """Returns the kernel of a product of rows with a matrix of weights."""
  return Kernel(name, rows * weights, read + weights + written)
