"""Classifies images, and shows where the network computed.

python -m experiments.predict --workdir=workdir/spots_dynconv photo.jpg \
  --output_dir=workdir/predictions

Prints class, probability and GMACs of each image; writes a ponder-cost overlay
of each, at the image's own size. An image that cannot be read is reported, the
others go on, and the exit status is 1.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from dynconv_jax.data.augment import normalize
from dynconv_jax.data.decode import (
  CorruptImageError,
  decode_image,
  evaluation_box,
  preprocess_image,
)
from dynconv_jax.macs import count_macs
from dynconv_jax.plotting.ponder import ponder_cost_map, save_overlay
from dynconv_jax.training.evaluation import make_predict
from dynconv_jax.training.state import split as split_model
from dynconv_jax.training.workdir import load_run
from experiments import program

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the trained run.', required=True
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', None, 'Where the overlays go.', required=True
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Which weights.'
)


def main(argv: Sequence[str]) -> None:
  """Predicts each image; the last line is JSON, a list of the results."""
  paths = [pathlib.Path(arg).expanduser() for arg in argv[1:]]
  if not paths:
    raise ValueError('name at least one image: JPEG, PNG or WebP')
  output_dir = pathlib.Path(_OUTPUT_DIR.value).expanduser()
  output_dir.mkdir(parents=True, exist_ok=True)
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
      if path.exists() and not path.is_file():  # A pipe may never end.
        raise OSError(f'{path} is no file')
      image = decode_image(path.read_bytes(), str(path))
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
    best = int(probabilities.argmax())
    macs = report.executed(masks)[0] if masks else report.total
    result = {
      'image': str(path),
      'class': run.class_names[best],
      'probability': round(float(probabilities[best]), 6),
      'gmacs': float(macs) / 1e9,
    }
    if masks:
      overlay = output_dir / _unused(f'{path.stem}_ponder', names)
      cost = ponder_cost_map(masks, (size, size))[0]
      save_overlay(overlay, image, cost, _seen_box(image, size, ratio))
      result['overlay'] = str(overlay)
    results.append(result)
    print(
      f'{path}: {result["class"]} {result["probability"]:.3f}, '
      f'{result["gmacs"]:.4f} of {report.total / 1e9:.4f} GMAC'
    )
  print(json.dumps(results))
  if failed:
    print(f'{failed} of {len(paths)} images failed', file=sys.stderr)
    sys.exit(1)


def _seen_box(image, size: int, ratio: float) -> tuple[int, int, int, int]:
  """Returns the part of the image that the network saw, in whole pixels."""
  height, width = image.shape[:2]
  left, top, right, bottom = evaluation_box(width, height, size, ratio)
  return (
    max(0, round(left)),
    max(0, round(top)),
    min(width, max(round(right), round(left) + 1)),
    min(height, max(round(bottom), round(top) + 1)),
  )


def _unused(stem: str, names: set[str]) -> str:
  """Returns STEM.png, numbered where images of two folders share a name."""
  name, number = f'{stem}.png', 1
  while name in names:
    number += 1
    name = f'{stem}_{number}.png'
  names.add(name)
  return name


if __name__ == '__main__':
  program.run(main)
