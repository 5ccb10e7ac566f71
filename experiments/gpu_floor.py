"""Says below which time ResNet-50 in bfloat16 cannot be executed on a GPU.

python -m experiments.gpu_floor --batch_size=128 --density=0.1,0.3,0.5,1

Each kernel takes at least the time to multiply what it has to, and at least
that to move its operands once between memory and chip. The floor is the sum of
the larger of both over the kernels: those of `dynconv_jax.sparse.gpu`, with
mask units, on clustered masks; in the dense network one a convolution, with
whatever is pointwise. Nothing is run. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from dynconv_jax.gating.mask import dilate
from dynconv_jax.models.resnet import ARCHITECTURES
from dynconv_jax.sparse.cost import clustered_masks
from experiments import program

_BATCH_SIZE = flags.DEFINE_integer('batch_size', 128, 'Images.', lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 224, 'Pixels.', lower_bound=64)
_DENSITY = flags.DEFINE_list(
  'density', '0.1,0.3,0.5,1', 'Shares of active positions, in (0, 1].'
)
_BANDWIDTH = flags.DEFINE_float('bandwidth', 4.3, 'TB/s, to and from memory.')
_RATE = flags.DEFINE_float('rate', 790, 'TFLOP/s in bfloat16; a MAC is two.')

# Inner width up to which a kernel ends a bottleneck from its first rows.
_FUSED_WIDTH = 128


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


def main(argv: Sequence[str]) -> None:
  """Prints the floors of the dense network and of each density."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  densities = [float(density) for density in _DENSITY.value]
  if not all(0 < density <= 1 for density in densities):
    raise ValueError(f'density must be in (0, 1]; got {_DENSITY.value}')
  rows = []
  print('density    GMACs       GB  floor, ms  of dense')
  for density in (None, *densities):
    kernels = count_kernels(_BATCH_SIZE.value, _IMAGE_SIZE.value, density)
    milliseconds = 1e3 * sum(
      kernel.seconds(_BANDWIDTH.value * 1e12, _RATE.value * 1e12)
      for kernel in kernels
    )
    rows.append(
      {
        'density': density,
        'gmacs': sum(kernel.macs for kernel in kernels) / 1e9,
        'gigabytes': sum(2 * kernel.moved for kernel in kernels) / 1e9,
        'floor_ms': milliseconds,
      }
    )
    print(
      f'{density or "dense":>7}  {rows[-1]["gmacs"]:7.1f}  '
      f'{rows[-1]["gigabytes"]:7.2f}  {milliseconds:9.3f}  '
      f'{milliseconds / rows[0]["floor_ms"]:8.2f}'
    )
  print(json.dumps(rows))


def count_kernels(
  batch_size: int, image_size: int, density: float | None
) -> list[Kernel]:
  """Returns the kernels of ResNet-50; without its head, which is small.

  Args:
    batch_size: images.
    image_size: pixels a side.
    density: of the masks; None: the network without gates.
  """
  architecture, rng = ARCHITECTURES['resnet50'], np.random.default_rng(0)
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
  for stage, blocks in enumerate(architecture.depths):
    for index in range(blocks):
      strides = 2 if stage and not index else 1
      masks = None
      if density is not None:
        shape = (batch_size, *(2 * (-(-side // strides),)))
        hard = clustered_masks(rng, shape, density)
        dilated = np.asarray(dilate(hard, strides))[:, :side, :side]
        masks = (int(hard.sum()), int(dilated.sum()))
      name = f'layer{stage + 1}.{index}'
      kernels += _count_block(
        name, batch_size, side, strides, depth, width << stage, masks
      )
      side, depth = -(-side // strides), 4 * (width << stage)
  return kernels


def _count_block(name, batch_size, side, strides, depth, planes, masks):
  """The kernels of a bottleneck; masks: (active, dilated) positions."""
  features, before = 4 * planes, batch_size * side**2
  after = batch_size * (-(-side // strides)) ** 2
  active, dilated = masks or (after, before)
  kernels = []
  if masks:
    # Nine taps and the average; a list reads 4 bytes a position, writes 8.
    kernels += [
      _product(f'{name}.mask', before, (1, depth, 10), before * depth, 0),
      Kernel(f'{name}.lists', 0, 6 * (before + after)),
    ]
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


if __name__ == '__main__':
  program.run(main)
