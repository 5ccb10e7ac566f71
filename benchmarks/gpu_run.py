"""Runs tests, timings, and profiles on a GPU within half an hour.

python -m benchmarks.gpu_run --output=DIR

Needs jax[cuda12] or jax[cuda13], Triton, and, for the second dense baseline,
PyTorch with CUDA. Each step runs in a separate process. Its result is written
to DIR/gpu_run.json immediately, and its output to DIR/gpu_run.log. A second
start continues with the missing steps. A failed step is recorded and does not
stop the others; rerun it with --steps=NAME. A step that does not fit into
--minutes is left for the next start. Use the same card for all steps.

--dry_run does the same with a small network, on any device.
"""

from __future__ import annotations

import collections
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks import cases, gpu_steps
from dynconv_jax.checks import check_choice
from dynconv_jax.cli import program
from dynconv_jax.files import write_atomic

_OUTPUT = flags.DEFINE_string('output', None, 'Folder for the results.')
_STEPS = flags.DEFINE_list(
  'steps', None, 'Steps to run, even if they are done. Default: missing steps.'
)
_MINUTES = flags.DEFINE_float('minutes', 30, 'Time limit for all steps.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Use a small network and few rounds.'
)
# For the processes of steps.
_INSIDE = flags.DEFINE_enum(
  'inside', None, ['graphs', 'profile'], 'For internal use: the step to run.'
)
_DENSITY = flags.DEFINE_float(
  'density', 0.3, 'For internal use: density of the masks.'
)

_RATES = {'bandwidth': 4.3e12, 'rate': 790e12}  # H200; see `gpu_floor`.


def main(argv: Sequence[str]) -> None:
  """Runs the requested or missing steps."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  if _INSIDE.value:
    inside = {'graphs': _graphs, 'profile': _profile}[_INSIDE.value]
    print(json.dumps(inside()))
    return
  if not _OUTPUT.value:
    raise ValueError('--output=DIR is required: a folder for the results')
  known = gpu_steps.steps(_DRY_RUN.value)
  for name in _STEPS.value or ():
    check_choice('step', name, known)
  output = pathlib.Path(_OUTPUT.value).expanduser()
  output.mkdir(parents=True, exist_ok=True)
  path = output / 'gpu_run.json'
  settings = {'dry_run': _DRY_RUN.value, 'card': gpu_steps.find_card()}
  results = {**settings, 'steps': {}}
  if path.exists():
    results = json.loads(path.read_text())
    for key, value in settings.items():
      if results[key] != value:
        raise ValueError(f'{path} has {key} {results[key]!r}; got {value!r}')
  results |= cases.describe_machine()
  done = [name for name, result in results['steps'].items() if result['ok']]
  end = time.monotonic() + 60 * _MINUTES.value
  for name in _STEPS.value or [name for name in known if name not in done]:
    if time.monotonic() + 60 * known[name].minutes > end:
      print(f'{name} is left for the next start: too little time is left')
      continue
    print(f'{name} ...', flush=True)
    result = gpu_steps.run_step(known[name], output / 'gpu_run.log')
    results['steps'][name] = result
    write_atomic(path, json.dumps(results, indent=2) + '\n')
    print(f'{name}: {json.dumps(result)[:600]}', flush=True)
  print(f'wrote {path}')
  print(json.dumps(results))


def _make(density: float):
  """Returns a function that runs a sparse network with masks of a density."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from benchmarks.networks import masks_of
  from dynconv_jax import create_model
  from dynconv_jax.sparse import SparseExecutor

  name, shape = 'resnet50', (128, 224, 224, 3)
  if _DRY_RUN.value:
    name, shape = 'cifar_resnet8', (2, 32, 32, 3)
  model = create_model(
    name, method='dynconv', dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
  )
  model = nnx.view(model, deterministic=True, use_running_average=True)
  executor = SparseExecutor(model, shape, mode='sparse')
  masks = {
    block: jnp.asarray(mask)
    for block, mask in masks_of(model, shape, density).items()
  }
  images = jax.random.normal(jax.random.key(0), shape)

  def run():
    return jax.block_until_ready(executor(images, masks=masks))

  run()
  return run


def _graphs() -> dict[str, Any]:
  """Calls a network 20 times; XLA logs the graphs it records and updates."""
  run = _make(_DENSITY.value)
  times = []
  for _ in range(20):
    start = time.perf_counter()
    run()
    times.append(1e3 * (time.perf_counter() - start))
  return {'milliseconds': [round(ms, 3) for ms in times]}


def _profile() -> dict[str, Any]:
  """Returns the profiled time of each kernel, and lower bounds.

  XLA does not use CUDA graphs while profiling.
  """
  import jax

  from benchmarks.roofline import count_kernels

  run, calls = _make(_DENSITY.value), 5
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(calls):
        run()
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    data = jax.profiler.ProfileData.from_file(str(path))
    events = gpu_steps.gpu_events(data)
  microseconds = collections.Counter()
  for name, _, duration in events:
    microseconds[name] += duration / 1e3 / calls
  result: dict[str, Any] = {
    'density': _DENSITY.value,
    'kernels': dict(microseconds.most_common()),
    'total': sum(microseconds.values()),
    'last_call': [
      (name, duration / 1e3)
      for name, _, duration in events[-(len(events) // calls) :]
    ],
  }
  if not _DRY_RUN.value:
    result['floors'] = [
      (kernel.name, 1e6 * kernel.seconds(**_RATES))
      for kernel in count_kernels(128, 224, _DENSITY.value)
    ]
  return result


if __name__ == '__main__':
  program.run(main)
