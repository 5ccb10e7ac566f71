"""Programs in several JAX processes on this machine."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[2]
_START = """
import sys
from dynconv_jax import distributed
address, count, number, *args = sys.argv[1:]
assert distributed.start(address, int(count), int(number), timeout=120)
"""


def free_address():
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{sock.getsockname()[1]}'


@contextlib.contextmanager
def started(program, *args, count=2, devices=1):
  """Yields the processes of a program, which sees `args` and `number`."""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'PYTHONPATH': os.pathsep.join([str(_ROOT), str(_ROOT / 'tests/helpers')]),
  }
  environment.pop('XLA_FLAGS', None)
  address = free_address()
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _START + program]
      + [address, str(count), str(i), *map(str, args)],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def run(program, *args, count=2, devices=1, timeout=300):
  """Returns (status, stderr) of each process of a program."""
  with started(program, *args, count=count, devices=devices) as processes:
    errors = [p.communicate(timeout=timeout)[1] for p in processes]
    return [
      (p.returncode, text) for p, text in zip(processes, errors, strict=True)
    ]
