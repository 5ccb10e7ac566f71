"""Runs programs in several JAX processes on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# Generous, for a busy machine; no run should come close.
_TIMEOUT = 1200
_START = """
import sys
from dynconv_jax import distributed
address, count, number, *args = sys.argv[1:]
assert distributed.start(address, int(count), int(number))
"""


def free_address():
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{sock.getsockname()[1]}'


def run_all(commands, devices=1):
  """Returns (status, stdout, stderr) of commands that run concurrently."""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests/helpers')]),
  }
  environment.pop('XLA_FLAGS', None)
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  processes = [
    subprocess.Popen(
      list(map(str, command)), env=environment, cwd=ROOT, **pipes
    )
    for command in commands
  ]
  try:
    outputs = [p.communicate(timeout=_TIMEOUT) for p in processes]
    return [
      (p.returncode, *output)
      for p, output in zip(processes, outputs, strict=True)
    ]
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def run(program, *args, devices=1):
  """Returns (status, stderr) of two connected processes of a program.

  The program can use `args` and its `number`, as text.
  """
  address = free_address()
  commands = [
    [sys.executable, '-c', _START + program, address, 2, number, *args]
    for number in range(2)
  ]
  return [(status, err) for status, _, err in run_all(commands, devices)]
