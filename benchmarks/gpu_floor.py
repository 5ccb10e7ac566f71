"""Computes a lower bound of the time of a bfloat16 ResNet on a GPU.

python -m benchmarks.gpu_floor --batch_size=128 --density=0.1,0.3,0.5,1

The bound is the sum of the bounds of the kernels (`benchmarks.roofline`). The
network is not run. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags

from benchmarks.roofline import count_kernels
from dynconv_jax.cli import program

_MODEL = flags.DEFINE_string('model', 'resnet50', 'A bottleneck ResNet.')
_GRANULARITY = flags.DEFINE_list(
  'mask_granularity',
  '1',
  "Side of the masks' patches, in positions: one value for all stages, or one "
  'per stage.',
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 128, 'Number of images.', lower_bound=1
)
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 224, 'Side of the images, in pixels.', lower_bound=64
)
_DENSITY = flags.DEFINE_list(
  'density', '0.1,0.3,0.5,1', 'Densities of the masks, in (0, 1].'
)
_BANDWIDTH = flags.DEFINE_float('bandwidth', 4.3, 'Memory bandwidth, in TB/s.')
_RATE = flags.DEFINE_float(
  'rate', 790, 'Arithmetic rate in bfloat16, in TFLOP/s; a MAC is two FLOPs.'
)


def main(argv: Sequence[str]) -> None:
  """Prints the lower bounds of the dense network and of each density."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  densities = [float(density) for density in _DENSITY.value]
  if not all(0 < density <= 1 for density in densities):
    raise ValueError(f'density must be in (0, 1]; got {_DENSITY.value}')
  rows = []
  print('density    GMACs       GB  floor, ms  of dense')
  for density in (None, *densities):
    kernels = count_kernels(
      _BATCH_SIZE.value,
      _IMAGE_SIZE.value,
      density,
      model=_MODEL.value,
      mask_granularity=[int(side) for side in _GRANULARITY.value],
    )
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


if __name__ == '__main__':
  program.run(main)
