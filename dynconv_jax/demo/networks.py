"""Trained networks as the page shows them."""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from PIL import Image

from dynconv_jax.data.augment import NORMALIZATIONS, normalize
from dynconv_jax.data.decode import (
  CorruptImageError,
  preprocess_image,
  resize_ratio_of,
  to_png,
)
from dynconv_jax.macs import count_macs
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.sparse import SparseExecutor
from dynconv_jax.training.config import DataConfig, ModelConfig
from dynconv_jax.training.inputs import eval_batches, open_split
from dynconv_jax.training.workdir import Run, load_run, read_part

# Of a photograph: enough for any camera, and decoded within 200 MB.
MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000
# Timed calls of each form, taking turns.
TIMED_CALLS = 7

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')


class DemoNetwork:
  """A trained network, sparse and dense, for one photograph at a time.

  Args:
    run: the trained network.
    name: what the page calls it.

  Attributes:
    ungated: the same weights without gates: every block runs everywhere.
  """

  def __init__(self, run: Run, name: str):
    self.run, self.name = run, name
    size = run.image_size
    self._shape = (1, size, size, 3)
    self.ungated = nnx.clone(run.model)
    for block in gated_blocks(self.ungated):
      block.masker = None
    images = jax.ShapeDtypeStruct(self._shape, np.float32)
    self._report = count_macs(run.model, images, convention='conv')
    dense = count_macs(self.ungated, images, convention='conv')
    self.dense_macs = dense.total
    _, masks = nnx.eval_shape(run.model, images)
    nothing = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), masks)
    # MACs of stem, head and gates: what runs for any photograph.
    self.always_macs = float(
      self._report.executed(nothing)[0] if masks else dense.total
    )
    # Masks of tokens have no place in the picture.
    self.blocks = [
      {
        'name': mask.name,
        'stage': mask.stage,
        'size': list(mask.hard.shape[1:]),
        'output': f'mask_{i}',
      }
      for i, mask in enumerate(masks)
      if mask.hard.ndim == 3
    ]
    self.gated = bool(masks)

  @functools.cached_property
  def _sparse(self) -> SparseExecutor:
    return SparseExecutor(self.run.model, self._shape)

  @functools.cached_property
  def _dense(self) -> SparseExecutor:
    return SparseExecutor(self.ungated, self._shape, mode='dense')

  @property
  def description(self) -> dict[str, Any]:
    """What the page needs to know, fit for JSON."""
    run, method = self.run, self.run.network.method
    mean, std = NORMALIZATIONS[run.normalization]
    knob = method.record.knob
    value = getattr(method.options, knob, None) if knob else None
    return {
      'name': self.name,
      'model': run.network.model.model,
      'method': method.record.label or method.record.name,
      'gated': self.gated,
      # What a slider moves along: the budget of most methods.
      'knob': knob if isinstance(value, int | float) else '',
      'knob_value': value if isinstance(value, int | float) else None,
      'class_names': list(run.class_names),
      'image_size': run.image_size,
      'short_side': round(run.image_size * run.resize_ratio),
      'mean': list(mean),
      'std': list(std),
      'dense_macs': self.dense_macs,
      'always_macs': self.always_macs,
      'blocks': self.blocks,
    }

  def predict(self, image: np.ndarray) -> dict[str, Any]:
    """Returns what the network makes of a photograph, fit for JSON.

    Args:
      image: uint8[H, W, 3], at its own size.

    Returns:
      'probabilities', one a class; 'macs', executed; 'masks', of each block a
      text of 0 and 1 by rows; 'dense_ms', and of a gated network 'sparse_ms':
      the median time of a call, in milliseconds.

    Raises:
      FloatingPointError: the logits are not finite.
    """
    run = self.run
    ratio = run.resize_ratio
    seen = preprocess_image(image, run.image_size, ratio)[None]
    seen = jax.block_until_ready(normalize(seen, run.normalization))
    executors = {'dense': self._dense}
    if self.gated:
      executors['sparse'] = functools.partial(self._sparse, return_masks=True)
    for executor in executors.values():  # The first call compiles.
      logits, stats = jax.block_until_ready(executor(seen))
    probabilities = np.asarray(jax.nn.softmax(logits[0]), np.float64)
    if not np.isfinite(probabilities).all():
      raise FloatingPointError(f'the logits of {self.name} are not finite')
    masks = stats.masks if self.gated else []
    times = _interleaved(executors, seen)
    return {
      'probabilities': probabilities.tolist(),
      'macs': float(
        self._report.executed(masks)[0] if masks else self.dense_macs
      ),
      'masks': [
        ''.join('1' if active else '0' for active in np.ravel(mask.hard))
        for mask in masks
        if mask.hard.ndim == 3
      ],
      **{f'{form}_ms': value for form, value in times.items()},
    }

  def warm_up(self) -> None:
    """Compiles the network."""
    size = self.run.image_size
    self.predict(np.zeros((size, size, 3), np.uint8))


def _interleaved(executors, images) -> dict[str, float]:
  """Returns the median milliseconds of each; they take turns."""
  times = {form: [] for form in executors}
  for _ in range(TIMED_CALLS):
    for form, executor in executors.items():
      start = time.perf_counter()
      jax.block_until_ready(executor(images))
      times[form].append(1000 * (time.perf_counter() - start))
  return {form: statistics.median(values) for form, values in times.items()}


def load_networks(
  workdirs: Sequence[str], *, best: bool = True
) -> list[DemoNetwork]:
  """Returns the trained networks of workdirs.

  Args:
    workdirs: of the runs. Their folders' names are the networks', with the
      folder above where two share one.
    best: see `load_run`.

  Raises:
    ValueError: there is no workdir, or one is given twice; and as `load_run`.
  """
  paths = [pathlib.Path(workdir).expanduser() for workdir in workdirs]
  absolute = [path.absolute() for path in paths]
  if not paths or len(set(absolute)) < len(paths):
    raise ValueError(
      'give one or more different workdirs; got '
      f'{", ".join(workdirs) or "none"}'
    )
  runs = [load_run(path, best=best) for path in paths]
  names = [path.name for path in absolute]
  if len(set(names)) < len(names):
    names = [f'{path.parent.name}/{path.name}' for path in absolute]
  if len(set(names)) < len(names):
    names = [str(path) for path in absolute]
  return [DemoNetwork(*pair) for pair in zip(runs, names, strict=True)]


def check_size(data: bytes, name: str) -> None:
  """Raises CorruptImageError for a picture of too many pixels.

  What is no picture passes: `decode_image` says so.

  Args:
    data: an image file.
    name: what to call it in the error.
  """
  try:
    width, height = Image.open(io.BytesIO(data)).size
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # Where warnings are errors.
  ) as error:
    raise CorruptImageError(name, _too_large()) from error
  except Exception:
    return
  if width * height > MAX_PIXELS:
    raise CorruptImageError(name, f'{width} x {height} pixels; {_too_large()}')


def _too_large() -> str:
  return f'at most {MAX_PIXELS // 10**6} megapixels are allowed'


def find_examples(given: str, workdir: str) -> list[tuple[str, bytes]]:
  """Returns names and contents of images for the page to offer.

  Args:
    given: a folder of images; or a number, of test images of a run's data set,
      as scenes if it was trained on scenes. Without that data there are none,
      and the log says so.
    workdir: of the run.

  Raises:
    FileNotFoundError: the folder is none, or has no image.
  """
  if given.isdigit():
    return _of_run(workdir, int(given)) if int(given) else []
  folder = pathlib.Path(given).expanduser()
  paths = []
  if folder.is_dir():
    paths = [p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES]
  if not paths:
    raise FileNotFoundError(
      f'examples must be a number or a folder of images; {folder} has no '
      f'{", ".join(_SUFFIXES)}'
    )
  return [(path.stem, path.read_bytes()) for path in sorted(paths)]


def _of_run(workdir: str, number: int) -> list[tuple[str, bytes]]:
  data = read_part(workdir, DataConfig)
  try:
    split = open_split(data, 'test')
  except (OSError, ValueError) as error:
    logging.warning('no example images: %s', error)
    return []
  # Class after class: the first example of each, then the second.
  rank = np.zeros(len(split), int)
  for label in range(len(split.class_names)):
    members = np.flatnonzero(split.labels == label)
    rank[members] = np.arange(len(members))
  order = np.lexsort((split.labels, rank))[:number].tolist()
  names = [split.class_names[split.labels[i]] for i in order]
  if not data.scenes():
    return [
      (name, split[i]['image']) for name, i in zip(names, order, strict=True)
    ]
  # Around what the network will see.
  size = read_part(workdir, ModelConfig).image_size
  (batch,) = eval_batches(
    dataclasses.replace(data, cache='none', num_workers=0),
    split,
    image_size=round(size * resize_ratio_of(data.crop)),
    indices=order,
  )
  mean, std = NORMALIZATIONS[data.normalization]
  images = np.asarray(batch['image']) * std + mean
  images = np.rint(255 * images.clip(0, 1)).astype(np.uint8)
  return list(zip(names, map(to_png, images), strict=True))
