"""Times sparse execution against dense execution.

python -m experiments.benchmark --model=resnet50 --method=dynconv \
  --density=0.5 --batch_size=8 --image_size=224

On synthetic clustered masks of one or more densities, which the network obeys
while its gates are evaluated all the same; or, with --workdir and --split, on a
trained network's own masks of real images. Several --density, --batch_size and
--mask_granularity are crossed.

Each framework runs in a process of its own; the processes take turns, and
medians are given. PyTorch and ONNX Runtime are measured where they are
installed (pip install -e .[benchmark]). The last line is JSON; --output=DIR
writes it to a file as well, with a figure.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags

from dynconv_jax.models.create import METHODS, stage_granularities
from dynconv_jax.models.resnet import (
  ARCHITECTURES,
  check_choice,
  check_image_size,
)
from dynconv_jax.training.workdir import read_config
from experiments import program, turns

_MODEL = flags.DEFINE_string('model', 'resnet50', 'A key of ARCHITECTURES.')
_METHOD = flags.DEFINE_string('method', 'dynconv', 'A gated method.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 224, 'Pixels.')
_BATCH_SIZE = flags.DEFINE_list('batch_size', '8', 'Images; one or more.')
_DENSITY = flags.DEFINE_list(
  'density', '0.5', 'Share of active positions, in (0, 1]; one or more.'
)
_GRANULARITY = flags.DEFINE_string(
  'mask_granularity',
  '1',
  "Side of DynConv's patches, positions: one for all stages, or one a stage "
  "(4,4,2,1); several are separated by ';'.",
)
_NUM_CLASSES = flags.DEFINE_integer('num_classes', 1000, 'Outputs of the head.')
_DTYPE = flags.DEFINE_string('compute_dtype', 'float32', 'float32 or bfloat16.')
_MODE = flags.DEFINE_string('mode', 'auto', 'Of the executor.')
_NATIVE = flags.DEFINE_bool(
  'native',
  None,
  'Kernels of our own; by default on a CPU where they can be compiled.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'A trained run, whose network and masks are timed.'
)
_SPLIT = flags.DEFINE_string(
  'split', 'validation', 'Of the run, for --workdir.'
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], "Which of the workdir's weights."
)
_NUM_BATCHES = flags.DEFINE_integer(
  'num_batches', 8, 'Different batches of the split.', lower_bound=1
)
_FOOD101_DIR = flags.DEFINE_string(
  'food101_dir', None, 'Where the data lies now, if not where it lay.'
)
_PEERS = flags.DEFINE_list(
  'peers', 'auto', 'auto: those that are installed; none; or names of them.'
)
_MASKED_DENSE = flags.DEFINE_bool(
  'masked_dense',
  True,
  'Time the gated network computed everywhere; for a GPU XLA takes minutes to '
  'compile it.',
)
_PER_BLOCK = flags.DEFINE_bool('per_block', False, 'Time each block as well.')
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Turns of each.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 2, 'Timed calls a turn.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for JSON and figure.')
_WORKER = flags.DEFINE_string(
  'worker', None, 'Used by the program itself, for the processes it starts.'
)

# Peer: the package that it needs, and the process that runs it.
PEERS = {
  'torch': ('torch', 'torch'),
  'torch_compiled': ('torch', 'torch_compiled'),
  'torch_index': ('torch', 'torch'),
  'onnxruntime': ('onnxruntime', 'onnxruntime'),
  # The sparse network, exported by dynconv_jax.sparse.onnx.
  'onnx_sparse': ('onnxruntime', 'onnxruntime'),
}
# Those that compute everywhere.
_DENSE_PEERS = ('torch', 'torch_compiled', 'onnxruntime')
_EXPORTED = ('dynconv', 'convnet_aig')


def main(argv: Sequence[str]) -> None:
  """Times the cases, prints a table, then JSON."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  if _WORKER.value:
    serve = importlib.import_module('experiments.benchmark_workers').serve
    serve(_WORKER.value, _settings())
    return
  cases, peers = _check()
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value).expanduser()
  if output:
    output.mkdir(parents=True, exist_ok=True)
  results = []
  with contextlib.ExitStack() as stack:
    workers = {}
    for name in ['jax', *dict.fromkeys(PEERS[peer][1] for peer in peers)]:
      workers[name] = turns.Worker(
        'experiments.benchmark', [f'--worker={name}', *_own_flags()]
      )
      stack.callback(workers[name].stop)
    for case in cases:
      results.append(_time(case, workers, peers))
      _print(results[-1])
      if output:
        _write(output, results)
  if output:
    print(f'wrote {output}')
  print(json.dumps(_summary(results)))


def _summary(results) -> dict[str, Any]:
  if len(results) == 1:
    return {**_common(), **results[0]}
  return {**_common(), 'runs': results}


def _write(output: pathlib.Path, results) -> None:
  """Writes the JSON file, whole or not at all, and the figure."""
  path = output / 'benchmark.json'
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(_summary(results), indent=2) + '\n')
  os.replace(partial, path)
  if not _WORKDIR.value:
    from dynconv_jax.plotting.speedup import plot_speedup

    plot_speedup(results, output / 'speedup.png', title=_title())


def _check() -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the cases and the peers that can run, if all flags are sound."""
  errors = []
  gated = [method for method in METHODS if method != 'dense']
  for what, given, allowed in (
    ('model', _MODEL.value, ARCHITECTURES),
    ('method', _METHOD.value, gated),
    ('compute_dtype', _DTYPE.value, ('float32', 'bfloat16')),
    ('mode', _MODE.value, ('auto', 'sparse', 'dense')),
  ):
    try:
      check_choice(what, given, allowed)
    except ValueError as error:
      errors.append(str(error))
  if _MODEL.value in ARCHITECTURES:
    try:
      check_image_size(_MODEL.value, _IMAGE_SIZE.value)
      for sides in _GRANULARITY.value.split(';'):
        if not all(side.strip().isdigit() for side in sides.split(',')):
          raise ValueError(f'mask_granularity must be integers; got {sides!r}')
        stage_granularities(_MODEL.value, [int(s) for s in sides.split(',')])
    except ValueError as error:
      errors.append(str(error))

  def numbers(flag, kind, holds, allowed):
    try:
      values = [kind(text) for text in flag.value]
      if values and all(map(holds, values)):
        return values
    except ValueError:
      pass
    errors.append(f'{flag.name} must be {allowed}; got {",".join(flag.value)}')
    return []

  batch_sizes = numbers(_BATCH_SIZE, int, lambda n: n > 0, 'one or more > 0')
  densities = numbers(
    _DENSITY, float, lambda d: 0 < d <= 1, 'one or more in (0, 1]'
  )
  wanted = list(PEERS) if _PEERS.value == ['auto'] else _PEERS.value
  wanted = [] if wanted == ['none'] else wanted
  unknown = [peer for peer in wanted if peer not in PEERS]
  if unknown:
    errors.append(
      f'peers must be auto, none or some of {", ".join(PEERS)}; got '
      f'{", ".join(unknown)}'
    )
  if errors:
    raise ValueError('; '.join(errors))
  method = _METHOD.value
  if _WORKDIR.value:
    method = read_config(pathlib.Path(_WORKDIR.value).expanduser()).method
  peers = []
  for peer in wanted:
    needed = {PEERS[peer][0]} | ({'onnx'} if 'onnx' in peer else set())
    missing = [n for n in sorted(needed) if not importlib.util.find_spec(n)]
    if missing:
      print(f'{peer} is left out: {", ".join(missing)} not installed')
    elif peer == 'onnx_sparse' and method not in _EXPORTED:
      print(f'{peer} is left out: it knows {", ".join(_EXPORTED)} only')
    elif not (peer == 'torch_index' and _WORKDIR.value):
      peers.append(peer)
  if _WORKDIR.value:
    densities = [None]
  cases = itertools.product(batch_sizes, _granularities(), densities)
  return [
    {'batch_size': n, 'mask_granularity': g, 'density': d} for n, g, d in cases
  ], peers


def _granularities() -> list[str]:
  """The settings of --mask_granularity; a trained network has its own."""
  return [''] if _WORKDIR.value else _GRANULARITY.value.split(';')


def _time(case, workers, peers) -> dict[str, Any]:
  """Returns the medians of one batch size and density."""
  info = workers['jax'].ask(kind='prepare', **case)
  kinds = {'dense': 'jax'}
  if gated := 'plans' in info:
    kinds['sparse'] = 'jax'
    if _MASKED_DENSE.value:
      kinds['masked_dense'] = 'jax'
  if info['native']:
    kinds['native_dense'] = 'jax'
  kinds |= {peer: PEERS[peer][1] for peer in peers}
  times: dict[str, list[float]] = {kind: [] for kind in kinds}
  for _ in range(_ROUNDS.value):
    for kind, worker in kinds.items():
      times[kind] += workers[worker].ask(kind=kind, **case)
  milliseconds = {k: 1e3 * statistics.median(t) for k, t in times.items()}
  dense = milliseconds['dense']
  fastest = min(
    ['dense', *(p for p in peers if p in _DENSE_PEERS)], key=milliseconds.get
  )
  result = {
    **case,
    **info,
    'dense_ms': dense,
    'peers': {peer: milliseconds[peer] for peer in peers},
    'fastest_dense': 'jax' if fastest == 'dense' else fastest,
  }
  if info['native']:
    result['native_dense_ms'] = milliseconds['native_dense']
  if not gated:
    return result
  sparse = milliseconds['sparse']
  if _MASKED_DENSE.value:
    result['masked_dense_ms'] = milliseconds['masked_dense']
  result |= {
    'sparse_ms': sparse,
    'sparse_over_dense': sparse / dense,
    'sparse_over_fastest_dense': sparse / milliseconds[fastest],
  }
  if info['native']:
    result['sparse_over_native_dense'] = sparse / milliseconds['native_dense']
  if 'onnx_sparse' in peers:
    result['onnx_sparse_over_fastest_dense'] = (
      milliseconds['onnx_sparse'] / milliseconds[fastest]
    )
  if _PER_BLOCK.value:
    result['blocks'] = workers['jax'].ask(kind='blocks', **case)
  return result


def _print(result) -> None:
  print(
    f'batch {result["batch_size"]}, density {result["density"]:.3f}, '
    f'patches {result["mask_granularity"] or "of the run"}, '
    f'MAC-proportional ideal {result["mac_ideal"]:.3f}'
  )
  rows = {'dense': result['dense_ms']}
  if 'native_dense_ms' in result:
    rows['native dense'] = result['native_dense_ms']
  if gated := 'sparse_ms' in result:
    if 'masked_dense_ms' in result:
      rows['masked dense'] = result['masked_dense_ms']
    rows['sparse'] = result['sparse_ms']
  rows |= result['peers']
  for name, value in rows.items():
    print(
      f'  {name:16} {value:9.2f} ms   {value / result["dense_ms"]:.3f} of dense'
    )
  if gated:
    print(
      f'  sparse is {result["sparse_over_fastest_dense"]:.3f} of the fastest '
      f'dense, {result["fastest_dense"]}'
    )
  for block in result.get('blocks', ()):
    print(
      f'  {block["name"]:12} load {block["load"]:.3f}  dense '
      f'{block["dense_ms"]:8.3f} ms  {block["plan"]:10} '
      f'{block["sparse_ms"]:8.3f} ms   {block["sparse_over_dense"]:.3f}'
    )


def _settings() -> dict[str, Any]:
  return dict(
    model=_MODEL.value,
    method=_METHOD.value,
    image_size=_IMAGE_SIZE.value,
    num_classes=_NUM_CLASSES.value,
    compute_dtype=_DTYPE.value,
    mode=_MODE.value,
    native=_NATIVE.value,
    masked_dense=_MASKED_DENSE.value,
    steps=_STEPS.value,
    workdir=_WORKDIR.value,
    checkpoint=_CHECKPOINT.value,
    split=_SPLIT.value,
    num_batches=_NUM_BATCHES.value,
    food101_dir=_FOOD101_DIR.value,
  )


def _own_flags() -> list[str]:
  settings = {k: v for k, v in _settings().items() if v is not None}
  return [f'--{name}={value}' for name, value in settings.items()]


def _common() -> dict[str, Any]:
  """Returns what all runs share: settings, machine, versions."""
  versions = {'python': platform.python_version()}
  for name in ('jax', 'flax', 'torch', 'onnxruntime'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  settings = _settings()
  for name in (
    *('masked_dense', 'steps'),
    *('food101_dir', 'workdir', 'num_batches'),
  ):
    del settings[name]
  if _WORKDIR.value:
    settings['workdir'] = pathlib.Path(_WORKDIR.value).name
    del settings['num_classes']
    config = read_config(pathlib.Path(_WORKDIR.value).expanduser())
    for name in ('model', 'method', 'image_size', 'compute_dtype'):
      settings[name] = getattr(config, name)
  else:
    del settings['split'], settings['checkpoint']
  return {**settings, 'cpu': _cpu(), 'versions': versions}


def _cpu() -> str:
  """Returns the cores, the processor's name and its widest vectors."""
  cores = len(os.sched_getaffinity(0))
  described = {'model name': platform.processor() or platform.machine()}
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      key, _, value = line.partition(':')
      described[key.strip()] = value.strip()
  parts = [f'{cores} cores of {described["model name"]}']
  features = described.get('flags', '').split()
  for feature, name in (('avx512f', 'AVX-512'), ('avx2', 'AVX2')):
    if feature in features:
      parts.append(name)
      break
  return ', '.join(parts)


def _title() -> str:
  return f'{_MODEL.value}, {_METHOD.value}, {_IMAGE_SIZE.value} pixels'


if __name__ == '__main__':
  program.run(main)
