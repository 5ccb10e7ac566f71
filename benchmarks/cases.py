"""Timing of the cases of dynconv_jax.cli.benchmark."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import interleaved


class Runtime(NamedTuple):
  """Another runtime to time.

  Attributes:
    worker: the process that runs it, a key of `workers.WORKERS`.
    packages: the packages that it needs.
    dense: whether it runs the dense network.
    gpu: whether it needs a GPU.
  """

  worker: str
  packages: tuple[str, ...]
  dense: bool = True
  gpu: bool = False


RUNTIMES = {
  'torch': Runtime('torch', ('torch',)),
  'torch_compiled': Runtime('torch_compiled', ('torch',)),
  'torch_cuda_graph': Runtime('torch_cuda_graph', ('torch',), gpu=True),
  'torch_index': Runtime('torch', ('torch',), dense=False),
  'onnxruntime': Runtime('onnxruntime', ('onnx', 'onnxruntime')),
  'openvino': Runtime('openvino', ('onnx', 'openvino')),
  'litert': Runtime('litert', ('ai_edge_litert', 'litert_converter')),
  # The sparse network, exported by dynconv_jax.sparse.onnx.
  'onnx_sparse': Runtime('onnxruntime', ('onnx', 'onnxruntime'), dense=False),
  'openvino_sparse': Runtime('openvino', ('onnx', 'openvino'), dense=False),
}
# Tolerance between a runtime's logits and JAX's, relative to the largest logit.
_TOLERANCES = {'float32': 1e-4, 'bfloat16': 0.1}


def available_runtimes(wanted: Sequence[str], trained: bool) -> list[str]:
  """Returns the runtimes that can run here; prints why others cannot.

  Args:
    wanted: keys of RUNTIMES.
    trained: whether the network is a trained one, which uses its own masks.
  """
  available = []
  for name in wanted:
    runtime = RUNTIMES[name]
    missing = [p for p in runtime.packages if not importlib.util.find_spec(p)]
    if missing:
      print(f'skipping {name}: {", ".join(missing)} not installed')
    elif runtime.gpu and not _torch_sees_gpu():
      print(f'skipping {name}: PyTorch finds no GPU')
    elif not (trained and name == 'torch_index'):
      available.append(name)
  return available


def _torch_sees_gpu() -> bool:
  import torch

  return torch.cuda.is_available()


@contextlib.contextmanager
def start_workers(
  runtimes: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[dict[str, interleaved.Worker]]:
  """Starts the processes of JAX and the runtimes, and stops them on exit.

  Args:
    runtimes: keys of RUNTIMES.
    settings: flags of dynconv_jax.cli.benchmark.
  """
  names = [
    'jax',
    *dict.fromkeys(RUNTIMES[runtime].worker for runtime in runtimes),
  ]
  with contextlib.ExitStack() as stack:
    workers = {}
    for name in names:
      arguments = [name, json.dumps(settings)]
      workers[name] = interleaved.Worker('benchmarks.workers', arguments)
      stack.callback(workers[name].stop)
    yield workers


def time_case(
  case: Mapping[str, Any],
  workers: Mapping[str, interleaved.Worker],
  runtimes: Sequence[str],
  *,
  rounds: int,
  per_block: bool = False,
) -> dict[str, Any]:
  """Returns the median times of a case, in milliseconds, and their ratios.

  A runtime that ends early, for example because it crashes on the network, is
  not timed. 'failed' in the result says why.

  Args:
    case: 'batch_size', 'mask_granularity', and 'density'.
    workers: processes from `start_workers`.
    runtimes: keys of RUNTIMES.
    rounds: number of rounds of interleaved timing.
    per_block: whether to also time each block.

  Raises:
    ValueError: a runtime's result differs from JAX's.
  """
  info = workers['jax'].ask(kind='prepare', **case)
  kinds = dict.fromkeys(info.pop('kinds'), 'jax')
  tolerance = _TOLERANCES[info.pop('compute_dtype')]
  failed = {}
  for runtime in runtimes:
    worker = RUNTIMES[runtime].worker
    try:
      logits = workers[worker].ask(kind='logits', of=runtime, **case)
    except OSError as error:
      print(f'skipping {runtime}: {error}')
      failed[runtime] = str(error)
      continue
    ours = 'dense' if RUNTIMES[runtime].dense else 'sparse'
    check_equal(
      runtime,
      logits,
      workers['jax'].ask(kind='logits', of=ours, **case),
      # Gates of a trained network may decide close cases differently.
      0.1 if ours == 'sparse' and case['density'] is None else tolerance,
    )
    kinds[runtime] = worker
  runtimes = [runtime for runtime in runtimes if runtime not in failed]
  times = interleaved.medians(
    {
      kind: functools.partial(workers[worker].ask, kind=kind, **case)
      for kind, worker in kinds.items()
    },
    rounds,
  )
  dense = [runtime for runtime in runtimes if RUNTIMES[runtime].dense]
  jax = [kind for kind in ('dense', 'dense_launched') if kind in times]
  fastest = min([*jax, *dense], key=times.get)
  own = {f'{k}_ms': v for k, v in times.items() if k not in runtimes}
  result = {
    **case,
    **info,
    **own,
    'runtimes': {runtime: times[runtime] for runtime in runtimes},
    **({'failed': failed} if failed else {}),
    'fastest_dense': 'jax' if fastest in jax else fastest,
  }
  if 'sparse' not in times:
    return result
  sparse = times['sparse']
  result |= {
    'sparse_over_dense': sparse / times['dense'],
    'sparse_over_fastest_dense': sparse / times[fastest],
    'sparse_over_proportional': sparse / (times[fastest] * result['mac_ideal']),
  }
  if 'native_dense' in times:
    result['sparse_over_native_dense'] = sparse / times['native_dense']
  if 'onnx_sparse' in times:
    result['onnx_sparse_over_fastest_dense'] = (
      times['onnx_sparse'] / times[fastest]
    )
  if per_block:
    result['blocks'] = workers['jax'].ask(kind='blocks', **case)
  return result


def check_equal(
  name: str, logits: Any, expected: Any, tolerance: float
) -> None:
  """Raises ValueError if a runtime's logits differ from JAX's.

  Args:
    name: name of the runtime.
    logits: float[N, classes], logits of the runtime.
    expected: float[N, classes], logits of JAX.
    tolerance: maximum difference, relative to the largest logit.
  """
  logits, expected = np.asarray(logits), np.asarray(expected)
  if logits.shape != expected.shape:
    raise ValueError(
      f'{name} returns logits {logits.shape}, JAX returns {expected.shape}'
    )
  difference = np.abs(logits - expected).max() / np.abs(expected).max()
  if not difference <= tolerance:
    raise ValueError(
      f'the result of {name} differs from JAX by {difference:.2g} of the '
      f'largest logit; allowed: {tolerance:g}'
    )


def describe_machine() -> dict[str, Any]:
  """Returns the processor and the versions of Python and the runtimes."""
  versions = {'python': platform.python_version()}
  for name in (
    *('jax', 'flax', 'torch', 'onnxruntime', 'openvino'),
    *('ai-edge-litert', 'litert-converter'),
  ):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {'cpu': _cpu(), 'versions': versions}


def _cpu() -> str:
  """Returns the number of cores, the processor's name, and its vectors."""
  described = {'model name': platform.processor() or platform.machine()}
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      key, _, value = line.partition(':')
      described[key.strip()] = value.strip()
  cores = len(os.sched_getaffinity(0))
  text = f'{cores} cores of {described["model name"]}'
  features = described.get('flags', '').split()
  for feature, name in (('avx512f', 'AVX-512'), ('avx2', 'AVX2')):
    if feature in features:
      return f'{text}, {name}'
  return text
