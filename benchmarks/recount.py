"""Counts public models in two fresh processes and compares the reports.

  python -m benchmarks.recount --table=torch|detection|onnx|jax
    [--exports=DIR] [NAME...]

The processes have different hash seeds and numbers of threads. Their reports
must be identical: layers in order, shapes, parameters, notes, and uncounted
operations. ONNX files are those that
`benchmarks.counters --table=onnx --exports=DIR` wrote to DIR.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import logging
import os
import pathlib
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from dynconv_jax.macs import report

# Models by name, and functions that count them.
Models = Iterator[tuple[str, Callable[[], report.Report]]]


def models(table: str, exports: str, names: list[str]) -> Models:
  """Yields the models of a table with a word in `names`; all if it is empty."""

  def is_selected(name: str) -> bool:
    return not names or not set(names).isdisjoint(name.split())

  if table == 'jax':
    from benchmarks import jax_models
    from dynconv_jax.macs import count_macs as count_jax

    for name, make in jax_models.models().items():
      if not is_selected(name):
        continue
      function, args, _ = make()
      yield name, functools.partial(count_jax, function, *args)
  elif table == 'onnx':
    from dynconv_jax.macs.onnx import count_macs as count_onnx

    for path in sorted(pathlib.Path(exports).glob('*.onnx')):
      if is_selected(path.stem):
        yield path.stem, functools.partial(count_onnx, path)
  else:
    import torch

    from benchmarks import other_counters, public_models
    from dynconv_jax.macs.torch import count_macs as count_torch

    run, found = None, public_models.models()
    if table == 'detection':
      run, found = 'drawn', public_models.detection()
    for name, (make, inputs, *_) in found.items():
      if not is_selected(name):
        continue
      torch.manual_seed(0)
      args, kwargs = other_counters.split(inputs)
      yield (
        name,
        functools.partial(count_torch, make(), *args, kwargs=kwargs, run=run),
      )


def main() -> None:
  """Prints each model with its total; fails if any reports differ."""
  parser = argparse.ArgumentParser(description=main.__doc__)
  parser.add_argument(
    '--table', choices=('torch', 'detection', 'onnx', 'jax'), default='torch'
  )
  parser.add_argument('--exports', default='.', help='folder of ONNX files')
  parser.add_argument('--once', action='store_true', help='print digests only')
  parser.add_argument('names', nargs='*', metavar='NAME', help='model names')
  options = parser.parse_args()
  if options.once:
    _print_digests(models(options.table, options.exports, options.names))
    return
  runs = [_run(seed) for seed in (1, 2)]
  if not runs[0]:
    parser.error(f'there are no models of {options.table}')
  for lines in zip(*runs, strict=True):
    print(
      'equal' if lines[0] == lines[1] else 'DIFFERENT', *lines[0].split('\t')
    )
  if runs[0] != runs[1]:
    sys.exit('reports differ')


def _run(seed: int) -> list[str]:
  """Runs a fresh process; returns lines of name, total and digest."""
  environment = os.environ | {
    'PYTHONHASHSEED': str(seed),
    'OMP_NUM_THREADS': str(seed),
  }
  command = [sys.executable, '-m', 'benchmarks.recount', '--once']
  return subprocess.run(
    [*command, *sys.argv[1:]],
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout.splitlines()


def _print_digests(counted: Models) -> None:
  logging.disable(logging.WARNING)
  warnings.simplefilter('ignore')
  for name, count in counted:
    start = time.process_time()
    found = count()
    seconds = time.process_time() - start
    print(f'{name}: {seconds:.1f} s', file=sys.stderr, flush=True)
    digest = hashlib.sha256(found.to_json().encode()).hexdigest()
    print(f'{name}\t{found.total:,}\t{digest[:16]}')


if __name__ == '__main__':
  main()
