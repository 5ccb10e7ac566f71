"""The steps of benchmarks.gpu_run, and the parsing of their results."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

_LOG = re.compile(r'command_buffer_thunk\.cc:\d+\] (.*)')


class Step(NamedTuple):
  """A step of the run.

  Attributes:
    minutes: expected time. The step is killed after twice this time plus one
      minute.
    command: arguments after `python -m`. The last line of the output is JSON,
      or is stored as text.
    environment: additional environment variables.
    races: whether to check for races in shared memory with compute-sanitizer.
  """

  minutes: float
  command: tuple[str, ...]
  environment: dict[str, str] = {}
  races: bool = False


def steps(dry_run: bool) -> dict[str, Step]:
  """Returns the steps by name, most important first.

  Args:
    dry_run: whether to use a small network.
  """
  model, depthwise, deeper = 'resnet50', 'mobilenet_v2', 'resnet101'
  size, few = ('--image_size=224',), ('--density=0.3,0.5',)
  batches, densities, rounds = (32, 1, 128), '0.1,0.3,0.5,1', ('--rounds=5',)
  if dry_run:
    model, deeper = 'cifar_resnet8', 'cifar_resnet14'
    size, few = ('--image_size=64', '--num_classes=3'), ('--density=0.3',)
    batches, densities = (1,), '0.3'
    rounds = ('--rounds=1', '--steps=1')

  def benchmark(name):
    return (
      *('experiments.benchmark', f'--model={name}', *size, *rounds),
      *('--compute_dtype=bfloat16', '--nomasked_dense'),
    )

  itself = ('benchmarks.gpu_run', *(('--dry_run',) if dry_run else ()))
  logged = {'TF_CPP_MIN_LOG_LEVEL': '0'}
  logged['TF_CPP_VMODULE'] = 'command_buffer_thunk=5,command_buffer_cmd=1'
  found = {
    'tests': Step(
      4,
      ('pytest', '-q', '-k', 'on_a_gpu', 'tests/dynconv_jax/sparse/backends'),
    ),
    'graphs': Step(1, (*itself, '--inside=graphs'), logged),
  }
  for batch in batches:
    found[f'times_{batch}'] = Step(
      2.5,
      (
        *benchmark(model),
        f'--batch_size={batch}',
        f'--density={densities}',
        '--mode=sparse',
        '--launched',
        '--runtimes=torch_cuda_graph',
      ),
    )
  for density in densities.split(',')[1:3] or [densities]:
    found[f'profile_{density}'] = Step(
      1.5, (*itself, '--inside=profile', f'--density={density}')
    )
  found['gluon'] = Step(3, ('benchmarks.gpu_gluon',))
  found['gluon_races'] = Step(
    2, ('benchmarks.gpu_gluon', '--check'), races=True
  )
  found['auto'] = Step(
    3,
    (
      *(*benchmark(model), '--runtimes=none', '--mode=auto'),
      *(f'--batch_size={batches[-1]}', f'--density={densities}'),
    ),
  )
  for name, other, minutes, sizes in (
    ('mobilenet', depthwise, 4, sorted(batches, reverse=True)),
    ('resnet101', deeper, 3, batches[-1:]),
  ):
    found[name] = Step(
      minutes,
      (
        *(*benchmark(other), '--runtimes=torch_cuda_graph', '--mode=sparse'),
        *(f'--batch_size={",".join(map(str, sizes))}', *few),
      ),
    )
  return found


def run_step(step: Step, log: pathlib.Path) -> dict[str, Any]:
  """Runs a step; returns its status and the last line of its output.

  Steps share compiled programs, unless JAX_COMPILATION_CACHE_DIR says where
  they are.
  """
  shared = {'JAX_COMPILATION_CACHE_DIR': f'{log.parent.resolve()}/compiled'}
  start, failure, tool = time.monotonic(), None, []
  sanitizer = shutil.which('compute-sanitizer')
  if step.races and sanitizer:
    tool = [sanitizer, '--tool=racecheck', '--error-exitcode=1']
  with tempfile.TemporaryFile('w+', errors='replace') as printed:
    try:
      code = subprocess.run(
        [*tool, sys.executable, '-m', *step.command],
        env=shared | os.environ | step.environment,
        stdout=printed,
        stderr=subprocess.STDOUT,
        timeout=120 * step.minutes + 60,
      ).returncode
      if code:
        failure = f'exited with code {code}'
    except subprocess.TimeoutExpired:
      failure = 'timed out'
    printed.seek(0)
    text = printed.read()
  with log.open('a') as file:
    file.write(f'# {" ".join(step.command)}\n{text[-200_000:]}\n')
  lines = [line for line in text.splitlines() if line.strip()]
  result: Any = lines[-1] if lines else ''
  for line in reversed(lines):
    if line.startswith(('{', '[')):
      try:
        result = json.loads(line)
        break
      except ValueError:
        continue
  messages = collections.Counter(
    re.sub(r'\d+', '#', message)[:120] for message in _LOG.findall(text)
  )
  return {
    'ok': failure is None,
    'failure': failure,
    'seconds': round(time.monotonic() - start, 1),
    'command': ' '.join([*tool, *step.command]),
    'result': result,
    **({'graph_log': messages.most_common(20)} if messages else {}),
  }


def find_card() -> str:
  """Returns the name of the GPU, or 'none', without using the GPU."""
  command = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
  try:
    return subprocess.run(
      command, capture_output=True, text=True, check=True
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'none'


def gpu_events(data: Any) -> list[tuple[str, float, float]]:
  """Returns (name, start, duration) of GPU events, in ns, ordered by start.

  Args:
    data: a `jax.profiler.ProfileData`.
  """
  events = [
    (event.name, event.start_ns, event.duration_ns)
    for plane in data.planes
    if '/device:GPU' in plane.name
    for line in plane.lines
    if line.name.startswith('Stream')
    for event in line.events
  ]
  return sorted(events, key=lambda event: event[1])
