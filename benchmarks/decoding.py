"""Measures how many photographs per second a core decodes for training.

python -m benchmarks.decoding [--photographs=DIR]

Without a folder, the photographs are smooth random images, JPEGs of quality 95
in several sizes. Each is read from memory, randomly cropped as by
`--crop=resized`, and resized, on one thread. "full" decodes every pixel;
"scaled" lets the JPEG decoder shrink the image first, as training does. Timing
is interleaved. Prints a Markdown table in photographs per second of CPU time,
and the machine.
"""

from __future__ import annotations

import functools
import io
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence

import numpy as np
import PIL
from absl import flags
from PIL import Image

from dynconv_jax.cli import program
from dynconv_jax.data import augment, decode, readers

_PHOTOGRAPHS = flags.DEFINE_string(
  'photographs', None, 'Folder that contains .jpg files at any depth.'
)
_SIZES = flags.DEFINE_list(
  'sizes',
  ['500x375', '1024x768'],
  'Sizes of random images, WIDTHxHEIGHT in pixels.',
)
_IMAGE_SIZES = flags.DEFINE_list(
  'image_sizes', ['64', '160', '224'], 'Sides of the inputs, in pixels.'
)
_NUM_IMAGES = flags.DEFINE_integer(
  'num_images',
  100,
  'Number of photographs, spread evenly over the folder.',
  lower_bound=1,
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 5, 'Number of timing rounds.', lower_bound=1
)
_GAPS = {'full': None, 'scaled': readers.REDUCING_GAP}


def rate(
  photographs: Sequence[bytes], image_size: int, gap: float | None
) -> float:
  """Returns photographs per second of CPU time.

  Args:
    photographs: JPEG files.
    image_size: side of the result, in pixels.
    gap: `reducing_gap` of `decode.decode_resized`.
  """
  uniform = np.random.default_rng(0).random((len(photographs), 4))
  crops = augment.Augmentation(crop='resized')
  start = time.process_time()
  for numbers, data in zip(uniform, photographs, strict=True):
    box = functools.partial(augment.crop_boxes, numbers, augmentation=crops)
    decode.decode_resized(data, 'photograph', image_size, box, reducing_gap=gap)
  return len(photographs) / (time.process_time() - start)


def draw(width: int, height: int, seed: int) -> bytes:
  """Returns a JPEG of a smooth random image.

  Args:
    width: width in pixels.
    height: height in pixels.
    seed: seed of the image.
  """
  coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
  picture = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
  file = io.BytesIO()
  picture.save(file, 'JPEG', quality=95)
  return file.getvalue()


def _find(folder: pathlib.Path, number: int) -> list[bytes]:
  paths = sorted(folder.rglob('*.jpg'))
  if len(paths) < number:
    raise ValueError(
      f'{folder} must contain at least {number} photographs; got {len(paths)}'
    )
  spread = np.linspace(0, len(paths) - 1, number).astype(int)
  return [paths[i].read_bytes() for i in spread]


def main(argv: Sequence[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  number = _NUM_IMAGES.value
  if _PHOTOGRAPHS.value:
    folder = pathlib.Path(_PHOTOGRAPHS.value).expanduser()
    cases = {'folder': _find(folder, number)}
  else:
    cases = {
      size: [draw(*map(int, size.split('x')), seed) for seed in range(number)]
      for size in _SIZES.value
    }
  print('| JPEG | input | full, images/s | scaled, images/s |')
  print('|---|---|---|---|')
  for label, photographs in cases.items():
    for size in map(int, _IMAGE_SIZES.value):
      rates = {name: [] for name in _GAPS}
      for _ in range(_ROUNDS.value):
        for name, gap in _GAPS.items():
          rates[name].append(rate(photographs, size, gap))
      cells = ' | '.join(f'{statistics.median(r):.0f}' for r in rates.values())
      print(f'| {label} | {size} | {cells} |')
  print(
    f'\n{number} photographs each, {_ROUNDS.value} rounds, one thread; '
    f'{platform.machine()}, Python {platform.python_version()}, Pillow '
    f'{PIL.__version__}'
  )


if __name__ == '__main__':
  program.run(main)
