"""Evaluates a trained network on a split of its dataset.

dynconv evaluate --workdir=workdir/spots_dynconv --split=test

Prints a table and, on the last line, JSON. Writes to the workdir:
evaluation_SPLIT.json, predictions_SPLIT.csv with one row per example (for
`dynconv compare`), the density of each block, and a grid of ponder-cost maps.
--results adds a row for the run to a table of runs.

By default, gates choose their more likely outcome, and the result for an image
does not depend on other images. With --stochastic_gates, they sample as in
training, which is how the authors of ConvNet-AIG evaluate. Execution rates then
match training, and the result for an image depends on the run's seed, its
batch, and its position in the batch. File names then end in _stochastic.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from dynconv_jax.cli import config_flags, program
from dynconv_jax.cli.predictions import (
  predictions_file,
  split_stem,
  write_predictions,
)
from dynconv_jax.cli.results_table import check_table, write_result
from dynconv_jax.data.augment import denormalize
from dynconv_jax.files import check_folder, write_atomic
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.method import METHODS, load_method
from dynconv_jax.options import to_text
from dynconv_jax.plotting import plot_block_density, plot_ponder_grid
from dynconv_jax.plotting.ponder import ponder_cost_map
from dynconv_jax.sparse import SparseExecutor
from dynconv_jax.training import inputs, workdir
from dynconv_jax.training.config import DataConfig, MethodConfig
from dynconv_jax.training.evaluation import evaluate, make_predict
from dynconv_jax.training.state import split as split_model

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Workdir of the run to evaluate.', required=True
)
_SPLIT = flags.DEFINE_string(
  'split',
  'validation',
  "train, validation, or test for the run's own split, or in TFDS notation.",
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint',
  'best',
  ['best', 'latest'],
  'best by validation accuracy (the latest if there was no validation), or '
  'latest.',
)
_CONVENTION = flags.DEFINE_enum(
  'convention', 'conv', ['conv', 'conv+linear'], 'MAC counting convention.'
)
_STOCHASTIC = flags.DEFINE_bool(
  'stochastic_gates',
  False,
  "Sample gate decisions as in training, with the run's seed.",
)
_EXECUTION = flags.DEFINE_enum(
  'execution',
  'dense',
  ['dense', 'sparse', 'auto'],
  'sparse: run blocks only at active positions, with the same result; auto: '
  'sparse if measured to be faster.',
)
_NUM_MAPS = flags.DEFINE_integer(
  'num_maps',
  12,
  'Number of images in the grid of ponder-cost maps.',
  lower_bound=0,
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'CSV table of runs to add a row for this run to.'
)
_RECIPE = flags.DEFINE_string(
  'recipe', '', 'Value of the column `recipe`, which distinguishes curves.'
)
# Flags for data locations that have changed since training.
_PLACES = config_flags.define_places()


def main(argv: Sequence[str]) -> None:
  """Evaluates the run, writes its files, and prints the result."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  folder = pathlib.Path(_WORKDIR.value).expanduser().absolute()
  texts = workdir.read_texts(folder)
  places = {name: flags.FLAGS[name].value for name in _PLACES}
  places = {name: value for name, value in places.items() if value is not None}
  data = workdir.read_part(folder, DataConfig, places)
  config = workdir.read_part(folder, MethodConfig)
  method = config.record
  if _STOCHASTIC.value and not method.samples:
    sampling = [name for name in METHODS if load_method(name).samples]
    raise ValueError(
      '--stochastic_gates needs gates that sample, as in '
      f'{" or ".join(sampling)}; the run uses {method.name}'
    )
  if _EXECUTION.value != 'dense' and _STOCHASTIC.value:
    raise ValueError(
      f'--execution={_EXECUTION.value} cannot be combined with '
      '--stochastic_gates'
    )
  if _EXECUTION.value != 'dense' and not method.gated:
    raise ValueError(
      f'--execution={_EXECUTION.value} needs a gated network; the run is dense'
    )
  target = config.target()
  check_folder(folder)
  row = _result_row(folder, texts, target)
  if _RESULTS.value:
    results = pathlib.Path(_RESULTS.value).expanduser()
    check_table(results, row)
  source = inputs.open_split(data, _SPLIT.value)
  run = workdir.load_run(folder, best=_CHECKPOINT.value == 'best')
  if source.class_names != run.class_names:
    raise ValueError(
      f'the data has the classes {", ".join(source.class_names)}; the run was '
      f'trained on {", ".join(run.class_names)}'
    )
  size = run.image_size
  batches = inputs.eval_batches(
    data,
    source,
    image_size=size,
    batch_size=int(texts.get('eval_batch_size', 250)),
  )
  report = count_macs(
    run.model,
    jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
    convention=_CONVENTION.value,
  )
  view = nnx.view(run.model, deterministic=not _STOCHASTIC.value)
  graphdef, params, model_state = split_model(view)
  predict = make_predict(graphdef)
  root, number = jax.random.key(int(texts.get('seed', 0))), itertools.count()

  def network(images):
    key = None
    if _STOCHASTIC.value:
      key = jax.random.fold_in(root, next(number))
    return predict(params, model_state, images, key)

  fallbacks = []
  executor = functools.cache(
    lambda shape: SparseExecutor(
      run.model, shape, mode=_EXECUTION.value, budget=target or None
    )
  )

  def sparse_network(images):
    logits, stats = executor(images.shape)(images, return_masks=True)
    fallbacks.append(int(stats.fallbacks.sum()))
    return logits, stats.masks

  dense = _EXECUTION.value == 'dense'
  result = evaluate(network if dense else sparse_network, batches, report)
  summary = {
    'split': _SPLIT.value,
    'step': run.step,
    **result.summary(),
    'gmacs_dense': report.total / 1e9,
    'convention': _CONVENTION.value,
  }
  if target is not None:
    summary['budget'] = target
  if method.samples:
    summary['stochastic_gates'] = _STOCHASTIC.value
  if not dense:
    summary['execution'] = _EXECUTION.value
    summary['fallbacks'] = sum(fallbacks)
  if batches.num_skipped:
    summary['skipped'] = batches.num_skipped

  name = split_stem(_SPLIT.value, _STOCHASTIC.value)
  written = folder / f'evaluation_{name}.json'
  write_atomic(written, json.dumps(summary, indent=2, allow_nan=False) + '\n')
  names = [source[i]['name'] for i in range(len(source))]
  write_predictions(
    folder / predictions_file(name), result, names, run.class_names
  )
  figures = []
  if result.block_names:
    figures.append(folder / f'block_density_{name}.png')
    plot_block_density(
      result.block_names,
      result.densities.T,
      figures[-1],
      target,
      stages=result.stages,
    )
    if indices := _spread(source, batches.skipped):
      figures.append(folder / f'ponder_maps_{name}.png')
      _draw_maps(run, data, network, source, indices, report, figures[-1])
  if _RESULTS.value:
    write_result(results, row | _measured(summary))
  for key, value in summary.items():
    if not isinstance(value, Mapping):
      print(
        f'{key:20} {value:.4f}'
        if isinstance(value, float)
        else f'{key:20} {value}'
      )
  for figure in figures:
    print(f'wrote {figure} and {figure.with_suffix(".svg")}')
  print(json.dumps(summary))


def _spread(source, skipped: Sequence[str]) -> list[int]:
  """Returns the indices of examples spread evenly over the split."""
  count = min(_NUM_MAPS.value, len(source))
  spread = np.linspace(0, len(source) - 1, count).astype(int).tolist()
  return [i for i in spread if source[i]['name'] not in skipped]


def _draw_maps(
  run: workdir.Run, data, network, source, indices, report, path: pathlib.Path
) -> None:
  batches = inputs.eval_batches(
    dataclasses.replace(data, cache='none', num_workers=0),
    source,
    image_size=run.image_size,
    batch_size=len(indices),
    indices=indices,
  )
  batch = next(iter(batches))
  logits, masks = network(batch['image'])
  predicted = np.argmax(logits, -1)
  titles = [
    _title(run.class_names[label], run.class_names[guess])
    for label, guess in zip(np.asarray(batch['label']), predicted, strict=True)
  ]
  plot_ponder_grid(
    np.asarray(denormalize(batch['image'], run.normalization)),
    ponder_cost_map(masks, batch['image'].shape[1:3], 'macs'),
    report.executed(masks) / 1e9,
    titles,
    path,
    object_masks=batch.get('object_mask'),
    label='executed MACs of the gated blocks (%)',
  )


def _title(label: str, guess: str) -> str:
  label, guess = (name.replace('_', ' ') for name in (label, guess))
  return label if label == guess else f'{label}\nnot {guess}'


def _result_row(folder, texts, target) -> dict[str, Any]:
  """Returns what is known of the row before the evaluation."""
  row = {'run': folder.name, 'model': texts['model'], 'method': texts['method']}
  row['budget'] = '' if target is None else target
  if _RECIPE.value:
    row['recipe'] = _RECIPE.value
  for name in ('width_multiplier', 'image_size', 'epochs', 'seed'):
    row[name] = texts.get(name, '')
  for flag in (_SPLIT, _CHECKPOINT, _CONVENTION, _STOCHASTIC):
    row[flag.name] = to_text(flag.value)
  return row


def _measured(summary) -> dict[str, Any]:
  kept = (
    'num_examples',
    'accuracy',
    'accuracy_low',
    'accuracy_high',
    'executed_fraction',
    'gmacs_mean',
    'gmacs_p50',
    'gmacs_p95',
    'gmacs_dense',
  )
  row = {}
  for name in kept:
    value = summary.get(name, '')
    row[name] = round(value, 6) if isinstance(value, float) else value
  return row


if __name__ == '__main__':
  program.run(main)
