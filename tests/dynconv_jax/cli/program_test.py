"""Tests of code that the programs share."""

import os
import subprocess
import sys

import pytest

_CORES = len(os.sched_getaffinity(0))


def _devices(arguments, xla_flags='', before=''):
  """Returns the number of devices of a process that calls `share_cpu`."""
  code = f"""
import jax
from dynconv_jax.cli import program
{before}
program.share_cpu{arguments}
print(jax.local_device_count())
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'XLA_FLAGS': xla_flags, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return int(done.stdout)


@pytest.mark.parametrize(
  'arguments, xla_flags, before, expected',
  [
    ((0, 64), '', '', min(_CORES, 2)),
    ((0, 63), '', '', 1),
    ((1, 64), '', '', 1),
    ((3, 63), '', '', 3),
    ((2, 64), '--xla_force_host_platform_device_count=4', '', 4),
    ((3, 63), '', 'jax.devices()', 1),
  ],
)
def test_devices_of_the_cpu(arguments, xla_flags, before, expected):
  assert _devices(arguments, xla_flags, before) == expected


@pytest.mark.parametrize('kept', [False, True])
def test_memory_is_kept(kept):
  """Counts page faults when 128 MiB are used again after freeing them."""
  code = f"""
import ctypes, resource
from dynconv_jax.cli import program
if {kept}:
  program.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  memory = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**27)))
  ctypes.memset(memory, 1, 2**27)
  libc.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  pages = 2**27 // os.sysconf('SC_PAGE_SIZE')
  assert (int(done.stdout) < pages // 100) == kept


def _program(body):
  """Returns the output of a program whose main has this body."""
  code = f"""
import os, signal, sys
from absl import flags
from dynconv_jax.cli import program
flags.DEFINE_string('workdir', None, 'A folder.')
flags.DEFINE_string('note', '', 'May be empty.')
def main(argv):
  {body}
program.run(main)
"""
  return lambda *arguments, **environment: subprocess.run(
    [sys.executable, '-c', code, *arguments],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
  )


def test_a_flag_without_its_value():
  run = _program('print("ran")')
  assert run('--note=', '--workdir=x').stdout == 'ran\n'
  done = run('--note=', '--workdir=')
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr == 'error: missing values: --workdir\n'


def test_ctrl_c_is_one_line():
  done = _program('os.kill(os.getpid(), signal.SIGINT)')()
  assert (done.returncode, done.stderr) == (130, 'interrupted\n')


def test_without_a_home_folder():
  missing = 'raise RuntimeError("Could not determine home directory.")'
  done = _program(missing)()
  assert done.returncode == 1
  assert done.stderr.startswith('error: Could not determine home directory. ')
  assert 'Traceback' in _program('raise RuntimeError("a bug")')().stderr


def test_ctrl_c_during_imports_is_one_line():
  code = (
    'import os, signal\n'
    'from dynconv_jax.cli import command\n'
    'command.importlib.import_module = lambda name: os.kill('
    'os.getpid(), signal.SIGINT)\n'
    "command.run('train', [])"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (130, 'interrupted\n')


def test_errors_that_nobody_catches_but_one():
  lines = [
    'class Gone:',
    '  def __init__(self, text): self.text = text',
    '  def __del__(self): raise RuntimeError(self.text)',
  ]
  body = '\n  '.join([*lines, "Gone('Event loop is closed')", "Gone('a bug')"])
  errors = _program(body)().stderr
  assert 'a bug' in errors
  assert 'Event loop' not in errors


def test_writes_that_never_started_are_not_reported():
  lines = [
    'async def async_serialize_from_host(): pass',
    'async def forgotten(): pass',
    'async_serialize_from_host()',
    'forgotten()',
  ]
  errors = _program('\n  '.join(lines))().stderr
  assert "'main.<locals>.forgotten' was never awaited" in errors
  assert 'async_serialize' not in errors


def test_a_name_of_a_file_that_is_no_text():
  done = _program(r"print('caf\udce9', os.path.basename('x'))")()
  assert (done.returncode, done.stdout) == (0, 'caf\\udce9 x\n')
