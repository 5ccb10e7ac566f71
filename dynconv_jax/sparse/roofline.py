"""Floor of the time of bottleneck ResNets on a GPU, by the roofline model.

Each kernel takes at least the time to multiply what it has to, and at least
that to move its operands once between memory and chip (Williams et al. 2009,
Roofline). The kernels are those of `dynconv_jax.sparse.gpu`, with mask units,
on clustered masks; in the dense network one a convolution, with whatever is
pointwise. Values have 2 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dynconv_jax.masks import dilate
from dynconv_jax.models.blocks import Bottleneck
from dynconv_jax.models.create import stage_granularities
from dynconv_jax.models.resnet import ARCHITECTURES, check_choice
from dynconv_jax.sparse import gpu
from dynconv_jax.sparse.cost import clustered_masks

_FUSED_WIDTH = gpu.FUSED_WIDTH[jnp.dtype(jnp.bfloat16)]


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
  sides = stage_granularities(model, mask_granularity)
  architecture, rng = ARCHITECTURES[model], np.random.default_rng(0)
  side, width = -(-image_size // 2), architecture.width
  stem = batch_size * side**2
  pooled = batch_size * (-(-side // 2)) ** 2 * width
  kernels = [
    _product(
      'stem', stem, (7, 3, width), batch_size * image_size**2 * 3, stem * width
    ),
    Kernel('pool', 0, stem * width + pooled),
  ]
  side, depth = -(-side // 2), width
  active, place, units = 0, 0, 1
  for stage, blocks in enumerate(architecture.depths):
    for index in range(blocks):
      if (stage or index) and index != 1:
        place += 1
      else:  # A new map, which as many mask units read.
        place, units = 0, 1
        if index:
          units = blocks - 1 + (stage + 1 < len(architecture.depths))
      strides = 2 if stage and not index else 1
      masks = None
      if density is not None:
        shape = (batch_size, *(2 * (-(-side // strides),)))
        hard = clustered_masks(rng, shape, density, side=sides[stage])
        dilated = np.asarray(dilate(hard, strides))[:, :side, :side]
        masks = (int(hard.sum()), int(dilated.sum()))
      name = f'layer{stage + 1}.{index}'
      if masks:
        # Units share a product; the first multiplies the map.
        first = place // gpu.UNITS * gpu.UNITS
        asked = min(units, first + gpu.UNITS) - place
        rows = batch_size * side**2 if place == first else active
        kernels += _count_unit(name, batch_size * side**2, depth, rows, asked)
        after = batch_size * (-(-side // strides)) ** 2
        # What follows is of 4 bytes, two values: of a list the place of each
        # position and the active positions.
        kernels += [
          Kernel(f'{name}.list', 0, 2 * (2 * after + masks[0])),
          Kernel(
            f'{name}.dilate',
            0,
            2 * (after + batch_size * side**2 + masks[1]),
          ),
        ]
        active = masks[0]
      kernels += _count_block(
        name, batch_size, side, strides, depth, width << stage, masks
      )
      side, depth = -(-side // strides), 4 * (width << stage)
  return kernels


def _count_unit(name, positions, depth, rows, asked):
  """The kernel of a mask unit's products, and the one that sums them up.

  rows: positions of the map that are multiplied; asked: units whose products,
  of nine taps and of the average, are computed of them.
  """
  columns = 10 * asked
  return [
    _product(
      f'{name}.mask',
      rows,
      (1, depth, columns),
      rows * depth,
      2 * columns * rows,
    ),
    Kernel(f'{name}.decide', 0, 2 * 10 * positions),
  ]


def _count_block(name, batch_size, side, strides, depth, planes, masks):
  """The kernels of a bottleneck; masks: (active, dilated) positions."""
  features, before = 4 * planes, batch_size * side**2
  after = batch_size * (-(-side // strides)) ** 2
  active, dilated = masks or (after, before)
  kernels = []
  if strides > 1 or depth != features:
    kernels.append(
      _product(
        f'{name}.downsample.0',
        after,
        (1, depth, features),
        after * depth,
        after * features,
      )
    )
  first = (1, depth, planes)
  second, third = (3, planes, planes), (1, planes, features)
  added = 2 * active * features  # The shortcut is read, the sum written.
  kernels.append(
    _product(f'{name}.conv1', dilated, first, dilated * depth, dilated * planes)
  )
  last = [
    _product(f'{name}.conv2', active, second, dilated * planes, 0),
    _product(f'{name}.conv3', active, third, 0, added),
  ]
  if masks and planes <= _FUSED_WIDTH:
    return [
      *kernels,
      Kernel(f'{name}.conv2+3', *np.add(last[0][1:], last[1][1:]).tolist()),
    ]
  return kernels + [
    kernel._replace(moved=kernel.moved + active * planes) for kernel in last
  ]


def _product(name, rows, kernel, read, written):
  """A product of rows and a (taps a side, depth, features) kernel."""
  weights = kernel[0] ** 2 * kernel[1] * kernel[2]
  return Kernel(name, rows * weights, read + weights + written)
