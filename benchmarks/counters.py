"""Counts public models by this counter and by others.

  pip install -e '.[counters]'
  python -m benchmarks.counters [--frontend=torch|onnx|jax] [NAME...]

prints a table of docs/macs.md in Markdown: billions of multiply-accumulates of
one image or of one sequence of 128 tokens, by `conv+linear`. Nothing is
downloaded: the models have random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import inspect
import io
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import flop_counter

from benchmarks import public_models
from dynconv_jax.macs import onnx as onnx_front_end
from dynconv_jax.macs.torch import count_macs


def by_ours(model, inputs) -> float:
  args, kwargs = _split(inputs)
  return count_macs(model, *args, kwargs=kwargs).total


def by_torch(model, inputs) -> float:
  counter = flop_counter.FlopCounterMode(display=False)
  with torch.no_grad(), counter:
    _call(model, inputs)
  return counter.get_total_flops() / 2


def by_ptflops(model, inputs, backend='pytorch') -> float:
  import ptflops

  macs, _ = ptflops.get_model_complexity_info(
    model,
    (1,),
    input_constructor=lambda _: _named(model, inputs),
    as_strings=False,
    print_per_layer_stat=False,
    backend=backend,
    ost=io.StringIO(),
    verbose=False,
  )
  return macs


def by_fvcore(model, inputs) -> float:
  from fvcore.nn import FlopCountAnalysis

  args, kwargs = _split(inputs)
  wrapped = _Positional(model, list(kwargs)) if kwargs else model
  analysis = FlopCountAnalysis(wrapped, (*args, *kwargs.values()))
  analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
  return analysis.total()


def by_thop(model, inputs) -> float:
  import thop

  args, kwargs = _split(inputs)
  wrapped = _Positional(model, list(kwargs)) if kwargs else model
  macs, _ = thop.profile(
    wrapped, inputs=(*args, *kwargs.values()), verbose=False
  )
  return macs


def by_torchinfo(model, inputs) -> float:
  import torchinfo

  return torchinfo.summary(
    model, input_data=inputs, verbose=0, mode='eval'
  ).total_mult_adds


def by_calflops(model, inputs) -> float:
  import calflops

  args, kwargs = _split(inputs)
  _, macs, _ = calflops.calculate_flops(
    model,
    **({'kwargs': kwargs} if kwargs else {'args': list(args)}),
    output_as_string=False,
    print_results=False,
    print_detailed=False,
  )
  return macs


COUNTERS = {
  'ours': by_ours,
  'ptflops': by_ptflops,
  'fvcore': by_fvcore,
  'torch': by_torch,
  'thop': by_thop,
  'torchinfo': by_torchinfo,
  'calflops': by_calflops,
}


class _Positional(nn.Module):
  """A module whose arguments by name are positional, for tracers."""

  def __init__(self, module, names):
    super().__init__()
    self.module, self.names = module, names

  def forward(self, *values):
    named = dict(zip(self.names, values, strict=True))
    outputs = self.module(**named, use_cache=False, return_dict=False)
    return outputs[0]


def _split(inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
  return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def _call(model, inputs):
  args, kwargs = _split(inputs)
  return model(*args, **kwargs)


def _named(model, inputs):
  if isinstance(inputs, dict):
    return inputs
  (name, *_) = inspect.signature(model.forward).parameters
  return {name: inputs}


def of_pytorch(name: str, counters: Sequence[str]) -> list[str]:
  """Returns the cells of a PyTorch model: known, by each counter, seconds."""
  model, inputs = _made(name)
  cells, seconds = [_billions(public_models.known(name))], 0.0
  for counter in counters:
    start = time.process_time()
    try:
      silent = io.StringIO()
      with (
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
        warnings.catch_warnings(),
      ):
        warnings.simplefilter('ignore')
        macs = COUNTERS[counter](copy.deepcopy(model), copy.deepcopy(inputs))
      cells.append(_billions(macs / 1e9))
    except Exception as error:  # Any counter may fail in any way.
      cells.append('fails')
      print(f'{name}, {counter}: {error!r:.300}', file=sys.stderr)
    if counter == 'ours':
      seconds = time.process_time() - start
  return [*cells, f'{seconds:.1f}']


def of_onnx(name: str) -> list[str]:
  """Returns the cells of a PyTorch model exported to ONNX by each exporter."""
  model, inputs = _made(name)
  args, kwargs = _split(inputs)
  cells = [_billions(by_ours(model, inputs) / 1e9)]
  for dynamo in (False, True):
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, 'model.onnx')
      try:
        with contextlib.redirect_stdout(io.StringIO()):
          torch.onnx.export(
            model,
            args,
            path,
            kwargs=kwargs,
            dynamo=dynamo,
            opset_version=18 if dynamo else 17,
            verbose=False,
          )
      except Exception as error:
        print(f'{name}, dynamo={dynamo}: {error!r:.300}', file=sys.stderr)
        cells += ['not exported', '', '']
        continue
      start = time.process_time()
      report = onnx_front_end.count_macs(path)
      seconds = time.process_time() - start
      whole = onnx_front_end.count_macs(path, constants=True)
    missing = f' ({len(report.uncounted)} missing)' if report.uncounted else ''
    cells.append(_billions(report.total / 1e9) + missing)
    cells += [_billions(whole.total / 1e9), f'{seconds:.1f}']
  return cells


def of_jax(name: str) -> list[str]:
  """Returns the cells of a JAX model: known, ours, seconds."""
  from benchmarks import jax_models
  from dynconv_jax.macs import count_macs as count_jax

  function, args, known = jax_models.models()[name]()
  start = time.process_time()
  report = count_jax(function, *args)
  seconds = time.process_time() - start
  return [_billions(known), _billions(report.total / 1e9), f'{seconds:.1f}']


class _Table(NamedTuple):
  """How a front end's models are counted: a cell for each column."""

  columns: Sequence[str]
  cells: Callable[[str], list[str]]


def tables(counters: Sequence[str]) -> dict[str, _Table]:
  """Returns the table of each front end."""
  exporters = [
    column
    for exporter in ('traced', 'dynamo')
    for column in (exporter, 'with constants', 'seconds')
  ]
  return {
    'torch': _Table(
      ('known', *counters, 'seconds'),
      functools.partial(of_pytorch, counters=counters),
    ),
    'onnx': _Table(('PyTorch', *exporters), of_onnx),
    'jax': _Table(('known', 'ours', 'seconds'), of_jax),
  }


def _made(name: str) -> tuple[nn.Module, Any]:
  make, inputs = public_models.models()[name]
  torch.manual_seed(0)
  return make().eval(), inputs


def _billions(macs: float | None) -> str:
  return '' if macs is None else f'{macs:.3f}'


def row(table: _Table, name: str) -> None:
  """Prints a model's row of the table."""
  logging.disable(logging.WARNING)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    cells = table.cells(name)
  print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)


def main() -> None:
  """Prints the table of the models named, or of all."""
  parser = argparse.ArgumentParser(description=main.__doc__)
  parser.add_argument('--frontend', choices=tables(()), default='torch')
  parser.add_argument('--counters', default=','.join(COUNTERS))
  parser.add_argument('names', nargs='*', metavar='NAME')
  options = parser.parse_args()
  counters = options.counters.split(',')
  if unknown := set(counters) - COUNTERS.keys():
    parser.error(f'unknown counters: {sorted(unknown)}')
  table = tables(counters)[options.frontend]
  models = _models(options.frontend)
  if unknown := set(options.names) - {name.split()[1] for name in models}:
    parser.error(f'unknown models: {sorted(unknown)}; there are {list(models)}')
  print(f'| model | {" | ".join(table.columns)} |')
  print('|---|' + '---:|' * len(table.columns), flush=True)
  for name in models:
    if options.names and name.split()[1] not in options.names:
      continue
    if options.frontend == 'jax':
      row(table, name)
      continue
    # A process each: some counters leave PyTorch patched.
    process = multiprocessing.get_context('fork').Process(
      target=row, args=(table, name)
    )
    process.start()
    process.join()


def _models(front_end: str) -> Mapping[str, Any]:
  """Returns the models of a front end by name."""
  if front_end != 'jax':
    return public_models.models()
  from benchmarks import jax_models

  return jax_models.models()


if __name__ == '__main__':
  main()
