"""Compares this MAC counter with others on public models.

  pip install -e '.[counters]'
  python -m benchmarks.counters [--table=TABLE] [--output=FILE] [NAME...]

makes a table of docs/macs_comparison.md: 'torch' (with other counters),
'detection', 'onnx' or 'jax'. It counts multiply-accumulates of one image or of
one sequence of 128 tokens, in the convention `conv+linear`. Nothing is
downloaded: the models have random weights.

Each cell is computed in a separate process, because some counters leave PyTorch
patched, and so that a timeout or crash affects one cell only. Rows that FILE
already contains are kept, so an interrupted table can be resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import logging
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from torch import nn

from benchmarks import other_counters, public_models
from dynconv_jax.macs import onnx as onnx_front_end
from dynconv_jax.macs.torch import count_macs

_EXPORTERS = ('traced', 'dynamo')

# Slow imports for each table that leave no threads behind.
_TORCH = ['benchmarks.public_models', 'timm', 'torchvision', 'transformers']
_IMPORTED_ONCE = {
  'torch': _TORCH,
  'detection': _TORCH,
  'onnx': [
    *_TORCH,
    'onnx.reference',
    'onnxscript.rewriter',
    'torch._inductor.decomposition',
    'torch.onnx._internal.exporter._core',
  ],
  'jax': ['benchmarks.jax_models', 'equimo', 'flax.nnx', 'haiku', 'keras'],
}

# Functions that compute the cells of a row, by the names of their columns.
Columns = Mapping[tuple[str, ...], Callable[[str], list[str]]]


def of_counter(name: str, counter: str) -> list[str]:
  """Returns the cell of a counter, and the seconds for this counter."""
  model, inputs = _made(name)
  start = time.process_time()
  macs = other_counters.COUNTERS[counter](model, inputs)
  seconds = f'{time.process_time() - start:.1f}'
  return [_billions(macs / 1e9), *([seconds] if counter == 'ours' else [])]


def of_known(name: str) -> list[str]:
  """Returns the cell with the published or closed-form count."""
  return [_billions(public_models.known(name))]


def of_onnx(
  name: str, exporter: str, asked: list[str], folder: str
) -> list[str]:
  """Returns the cells of a PyTorch model exported to ONNX.

  For the first exporter, the first cell is PyTorch's total. The other cells are
  the difference of ONNX's total, without and with work on constants, and the
  seconds of the former. They are omitted if `exporter` is not in `asked`.
  """
  if exporter not in asked and exporter != _EXPORTERS[0]:
    return []
  model, inputs = _made(name)
  macs = other_counters.by_ours(model, inputs)
  first = [_billions(macs / 1e9)] if exporter == _EXPORTERS[0] else []
  if exporter not in asked:
    return first
  path = os.path.join(folder, f'{name}.{exporter}.onnx')
  try:
    if not os.path.exists(path):
      export(model, inputs, path, exporter == 'dynamo')
  except Exception as error:  # Exporters fail in many ways.
    print(f'{name}, {exporter}: {error!r:.2000}', file=sys.__stderr__)
    return [*first, 'not exported']
  start = time.process_time()
  report = onnx_front_end.count_macs(path)
  seconds = time.process_time() - start
  whole = onnx_front_end.count_macs(path, constants=True)
  differences = [
    '=' if total == macs else f'{total - macs:+,}'
    for total in (report.total, whole.total)
  ]
  if report.uncounted:
    differences[0] += f', {len(report.uncounted)} not counted'
  return [*first, *differences, f'{seconds:.1f}']


def export(model, inputs, path: str, dynamo: bool) -> None:
  """Writes a model to an ONNX file; writes nothing if the export fails."""
  if isinstance(inputs, dict) and 'input_ids' in inputs:
    # Without a mask, decoders look for packed sequences with `torch.diff`,
    # which the tracing exporter does not support.
    inputs = inputs | {'attention_mask': torch.ones_like(inputs['input_ids'])}
  model, args = other_counters.positional(model, inputs)
  with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
    draft = os.path.join(folder, 'model.onnx')
    torch.onnx.export(
      model,
      args,
      draft,
      dynamo=dynamo,
      opset_version=18 if dynamo else 17,
      verbose=False,
    )
    # Counting does not need the weights, which are large.
    weights = f'{os.path.basename(path)}.weights'
    onnx.save(
      onnx.load(draft),
      path,
      save_as_external_data=True,
      location=weights,
      size_threshold=2**19,
    )
  pathlib.Path(path).with_name(weights).unlink(missing_ok=True)


def of_detection(name: str) -> list[str]:
  """Returns the cells of a detection network: boxes, known, ours, seconds."""
  make, inputs, boxes = public_models.detection()[name]
  torch.manual_seed(0)
  model = make().eval()
  torch.set_num_threads(1)  # CPU time includes threads that wait for others.
  start = time.process_time()
  macs = count_macs(model, inputs, run='drawn').total
  seconds = f'{time.process_time() - start:.1f}'
  known = _billions(public_models.known(name))
  return [boxes, known, _billions(macs / 1e9), seconds]


def of_jax(name: str) -> list[str]:
  """Returns the cells of a JAX model: known, ours, seconds."""
  from benchmarks import jax_models
  from dynconv_jax.macs import count_macs as count_jax

  function, args, known = jax_models.models()[name]()
  start = time.process_time()
  report = count_jax(function, *args)
  seconds = time.process_time() - start
  return [_billions(known), _billions(report.total / 1e9), f'{seconds:.1f}']


def _made(name: str) -> tuple[nn.Module, Any]:
  make, inputs = public_models.models()[name]
  torch.manual_seed(0)
  return make().eval(), inputs


def _billions(macs: float | None) -> str:
  return '' if macs is None else f'{macs:.3f}'


def columns(options: argparse.Namespace, folder: str) -> Columns:
  """Returns the columns of a table.

  Args:
    options: the command line options.
    folder: folder of ONNX files.
  """
  if options.table == 'jax':
    return {('known', 'ours', 'seconds'): of_jax}
  if options.table == 'detection':
    return {('boxes', 'known', 'ours', 'seconds'): of_detection}
  if options.table == 'onnx':
    found = {}
    for exporter in _EXPORTERS:
      first = ('PyTorch',) if exporter == _EXPORTERS[0] else ()
      found[*first, exporter, 'with constants', 'seconds'] = functools.partial(
        of_onnx, exporter=exporter, asked=options.exporters, folder=folder
      )
    return found
  found = {('known',): of_known}
  for counter in options.counters:
    names = (counter, 'seconds') if counter == 'ours' else (counter,)
    found[names] = functools.partial(of_counter, counter=counter)
  return found


def _send(sender, cells: Callable[[str], list[str]], name: str) -> None:
  logging.disable(logging.WARNING)
  silent = io.StringIO()
  try:
    with (
      contextlib.redirect_stdout(silent),
      contextlib.redirect_stderr(silent),
      warnings.catch_warnings(),
    ):
      warnings.simplefilter('ignore')
      sender.send(cells(name))
  except Exception:  # Other counters may raise anything.
    print(f'{name}:\n{traceback.format_exc()[-2000:]}', file=sys.stderr)
    sender.send(['fails'])


def in_a_process(
  cells: Callable[[str], list[str]], name: str, limit_s: float
) -> list[str]:
  """Computes cells in a separate process, or returns the reason for failure."""
  # A fork of this process would wait for its threads.
  context = multiprocessing.get_context('forkserver')
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_send, args=(sender, cells, name))
  process.start()
  sender.close()
  try:
    return receiver.recv() if receiver.poll(limit_s) else ['time limit']
  except EOFError:
    return ['dies']
  finally:
    process.kill()
    process.join()


class Table:
  """A table in a Markdown file.

  Args:
    names: names of the columns.
    order: names of the rows, in order.
    path: the file. If it has no such table, the table is appended. If None,
      rows are printed instead.
  """

  def __init__(self, names: list[str], order: list[str], path: str | None):
    self._path, self._order = path, order
    self._head = f'| model | {" | ".join(names)} |\n|---|'
    self._head += f'{"---:|" * len(names)}\n'
    if path is None:
      print(self._head, end='', flush=True)

  def rows(self) -> dict[str, str]:
    """Returns the existing lines, by the name of their row."""
    return self._read()[1]

  def add(self, name: str, cells: list[str]) -> None:
    """Writes a row at its position."""
    line = f'| {name} | {" | ".join(cells)} |\n'
    if self._path is None:
      print(line, end='', flush=True)
      return
    before, rows, after = self._read()
    rows[name] = line
    lines = [rows[name] for name in sorted(rows, key=self._order.index)]
    with open(self._path, 'w') as file:
      file.writelines((before, self._head, *lines, after))

  def _read(self) -> tuple[str, dict[str, str], str]:
    """Returns the text before the table, its rows, and the text after it."""
    if self._path is None or not os.path.exists(self._path):
      return '', {}, ''
    with open(self._path) as file:
      before, found, after = file.read().partition(self._head)
    lines = after.splitlines(keepends=True) if found else []
    rows = list(itertools.takewhile(lambda line: line[0] == '|', lines))
    after = ''.join(lines[len(rows) :])
    return before, {row.split('|')[1].strip(): row for row in rows}, after


def main() -> None:
  """Makes the table for the named models, or for all."""
  parser = argparse.ArgumentParser(description=main.__doc__)
  parser.add_argument(
    '--table', choices=('torch', 'detection', 'onnx', 'jax'), default='torch'
  )
  for kind, known in (
    ('--counters', list(other_counters.COUNTERS)),
    ('--exporters', list(_EXPORTERS)),
  ):
    parser.add_argument(
      kind, type=functools.partial(_of, known), default=known, metavar='A,B'
    )
  parser.add_argument('--output', help='Markdown file with the table')
  parser.add_argument('--exports', help='folder that keeps ONNX files')
  parser.add_argument(
    '--limit_s', type=float, default=600, help='time limit per cell in seconds'
  )
  parser.add_argument('names', nargs='*', metavar='NAME', help='model names')
  options = parser.parse_args()
  models = _models(options.table)
  if unknown := set(options.names) - {name.split()[1] for name in models}:
    parser.error(f'unknown models: {sorted(unknown)}; known: {models}')
  multiprocessing.set_forkserver_preload(
    ['benchmarks.counters', *_IMPORTED_ONCE[options.table]]
  )
  with contextlib.ExitStack() as stack:
    folder = options.exports
    if folder is None:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
    os.makedirs(folder, exist_ok=True)
    parts = columns(options, folder)
    table = Table([x for part in parts for x in part], models, options.output)
    for name in models:
      if options.names and name.split()[1] not in options.names:
        continue
      if name in table.rows():
        continue
      row = []
      for part, cells in parts.items():
        found = in_a_process(cells, name, options.limit_s)
        row += found + [''] * (len(part) - len(found))
      table.add(name, row)


def _of(known: list[str], text: str) -> list[str]:
  """Parses names separated by commas."""
  names = text.split(',')
  if unknown := [name for name in names if name not in known]:
    raise argparse.ArgumentTypeError(f'must be among {known}; got {unknown}')
  return names


def _models(table: str) -> list[str]:
  if table == 'jax':
    from benchmarks import jax_models

    return list(jax_models.models())
  if table == 'detection':
    return list(public_models.detection())
  return list(public_models.models())


if __name__ == '__main__':
  main()
