"""Trained networks for the demo page."""

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

# Limits of an image: enough for any camera, and at most 200 MB decoded.
MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000
# Timed calls of each form; timing is interleaved.
TIMED_CALLS = 7

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')


class DemoNetwork:
  """A trained network with sparse and dense execution, for single images.

  Args:
    run: the trained network.
    name: name of the network on the page.

  Attributes:
    run: the trained network.
    name: name of the network on the page.
    ungated: network with the same weights and without gates, which runs every
      block everywhere.
    dense_macs: MACs of `ungated`.
    always_macs: MACs that do not depend on the image: stem, head, and gates.
    blocks: name, stage, mask size, and output name of each gated block with a
      spatial mask.
    gated: whether the network has gates.
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
    self.always_macs = float(
      self._report.executed(nothing)[0] if masks else dense.total
    )
    # Masks of tokens cannot be shown on the image.
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
    """JSON-serializable description of the network for the page."""
    run, method = self.run, self.run.network.method
    mean, std = NORMALIZATIONS[run.normalization]
    knob = method.record.knob
    value = getattr(method.options, knob, None) if knob else None
    return {
      'name': self.name,
      'model': run.network.model.model,
      'method': method.record.label or method.record.name,
      'gated': self.gated,
      # The option that a slider changes; a budget for most methods.
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
    """Returns a JSON-serializable prediction for an image.

    Args:
      image: uint8[H, W, 3], of any size.

    Returns:
      'probabilities' of all classes; 'macs', the executed MACs; 'masks', a
      row-major string of 0 and 1 for each block; 'dense_ms' and, for gated
      networks, 'sparse_ms', the median latency in milliseconds.

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
  """Returns the median latency of each executor in ms, timed interleaved."""
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

  Networks are named after their workdirs, with the parent folder or the full
  path if names would be equal.

  Args:
    workdirs: workdirs of the runs.
    best: see `load_run`.

  Raises:
    ValueError: there are no workdirs, or a workdir is listed twice.
    FileNotFoundError, CheckpointError: as `load_run`.
  """
  paths = [pathlib.Path(workdir).expanduser() for workdir in workdirs]
  absolute = [path.absolute() for path in paths]
  if not paths or len(set(absolute)) < len(paths):
    raise ValueError(
      'specify one or more different workdirs; got '
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
  """Raises CorruptImageError if an image has too many pixels.

  Files that are not images pass; `decode_image` reports them.

  Args:
    data: contents of an image file.
    name: name of the image in the error.
  """
  try:
    width, height = Image.open(io.BytesIO(data)).size
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # If warnings are errors.
  ) as error:
    raise CorruptImageError(name, _too_large()) from error
  except Exception:
    return
  if width * height > MAX_PIXELS:
    raise CorruptImageError(name, f'{width} x {height} pixels; {_too_large()}')


def _too_large() -> str:
  return f'at most {MAX_PIXELS // 10**6} megapixels are allowed'


def find_examples(given: str, workdir: str) -> list[tuple[str, bytes]]:
  """Returns the names and contents of example images for the page.

  Args:
    given: a folder of images, or a number of test images from a run's dataset,
      as scenes if the run was trained on scenes. If the dataset is not
      available, there are no images and a warning is logged.
    workdir: workdir of the run.

  Raises:
    FileNotFoundError: the folder does not exist or contains no images.
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
  # Interleave classes: the first example of each class, then the second.
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
  # Scenes of the size that the network's preprocessing starts from.
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
