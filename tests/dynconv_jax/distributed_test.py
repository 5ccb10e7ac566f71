"""Tests of two processes on this machine against one, and of early errors."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax_processes
import numpy as np
import pytest

from dynconv_jax import distributed

_SHARED = """
import importlib.util
import jax, jax.numpy as jnp, numpy as np
from dynconv_jax.data import batches
from dynconv_jax.layers import norm
from dynconv_jax.layers.depthwise import depthwise

def load(path):
  spec = importlib.util.spec_from_file_location('fakes', path)
  module = importlib.util.module_from_spec(spec)
  sys.modules['fakes'] = module
  spec.loader.exec_module(module)
  return module

def results(fakes, sharding=None, place=lambda a: a):
  '''Returns batches and a gradient, which do not depend on the processes.'''
  found = {}
  for cache, corrupt, augmentation in (
    ('none', (), fakes.RICH),
    ('none', (1, 4, 5), fakes.STILL),
    ('device', (1, 4, 5), fakes.STILL),
  ):
    stream = fakes.train(
      fakes.FakeSource(corrupt=corrupt, noise=True, size=10),
      sharding=sharding, cache=cache, skip_corrupt=bool(corrupt),
      augmentation=augmentation,
    )
    for step in range(2):
      for name, value in next(stream).items():
        found[f'{cache}{corrupt}{step}{name}'] = value
    stream.close()
  source = fakes.FakeSource(n=5, corrupt=(2,), mask=True)
  stream = fakes.evaluate(source, sharding=sharding, skip_corrupt=True)
  for number, batch in enumerate(stream):
    for name, value in batch.items():
      found[f'evaluation{number}{name}'] = value
  rng = np.random.default_rng(0)
  x, w = (rng.normal(size=s).astype(np.float32)
          for s in ((4, 9, 9, 24), (5, 5, 1, 24)))
  def loss(x, w):
    y = depthwise(x, w, 2, ((2, 2), (2, 2)))
    y, mean, var = norm._batch_norm(y, w[0, 0, 0], w[1, 1, 0], 1e-5, 'relu6')
    return jnp.sum(jnp.sin(y)), (mean, var)
  step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  x = place(x)
  gradient = jax.tree.leaves(step(x, w))
  found |= {f'gradient{i}': a for i, a in enumerate(gradient)}
  return found, step.lower(x, w)
"""
_SEVERAL = """
folder, fakes = args
mesh = distributed.make_mesh()
split = distributed.batch_sharding(mesh)
rows = distributed.rows_of(split, 4)
assert rows.tolist() == [2 * int(number), 2 * int(number) + 1]
found, lowered = results(
  load(fakes), split, lambda a: distributed.place(a[rows], split))
text = lowered.compile().as_text()
assert 'all-gather' not in text and 'all-reduce' in text
assert all(not a.is_fully_addressable for a in found.values())
np.savez(f'{folder}/{number}.npz', **distributed.fetch(found))
assert distributed.gather(7 + int(number)).tolist() == [7, 8]
distributed.check_same('the same')
for wanted, call in {
  'process 1 differ': lambda: distributed.check_same('of ' + number),
  ('its own error', 'of one')[int(number)]: fail,
}.items():
  try:
    call()
  except Exception as error:
    assert wanted in str(error), error
  else:
    raise AssertionError(wanted)
"""
_FAIL = """
def fail():
  with distributed.together():
    if number == '1':
      raise ValueError('of one')
"""


def test_two_processes_share_batches_and_kernels(tmp_path, monkeypatch):
  # Compiling takes longer than computing.
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  fakes = pathlib.Path(__file__).with_name('data') / 'batches_test.py'
  ended = jax_processes.run(_SHARED + _FAIL + _SEVERAL, tmp_path, fakes)
  assert [status for status, _ in ended] == [0, 0], ended[0][1] + ended[1][1]
  alone = {'sys': sys}
  exec(_SHARED, alone)
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    expected, _ = alone['results'](alone['load'](fakes))
  finally:
    jax.config.update('jax_disable_most_optimizations', before)
  for number in range(2):
    found = np.load(tmp_path / f'{number}.npz')
    assert set(found) == set(expected)
    for name, value in expected.items():
      np.testing.assert_allclose(
        found[name], value, rtol=1e-4, atol=1e-4, err_msg=name
      )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('host:1', 2), 'missing process_id'),
    ((None, 2, 0), 'missing coordinator_address'),
    (('host', 2, 0), "host:port; got 'host'"),
    (('host:1', 0, 0), 'num_processes must be >= 1; got 0'),
    (('host:1', 2, 2), r'process_id must be in \[0, 2\); got 2'),
    (('host:1', 2, -1), r'process_id must be in \[0, 2\); got -1'),
  ],
)
def test_refusals(arguments, message):
  with pytest.raises(ValueError, match=message):
    distributed.start(*arguments)


def test_one_process_needs_no_start():
  assert not distributed.start()
  assert not distributed.start('host:1', 1, 0)


@pytest.mark.parametrize(
  ('number', 'message'),
  [
    (0, 'not all 2 processes connected'),
    (1, 'process 1 found no coordinator at'),
  ],
)
def test_who_waits_in_vain_says_so(number, message):
  program = 'from dynconv_jax import distributed; import sys;'
  program += 'distributed.start(sys.argv[1], 2, int(sys.argv[2]), timeout=2)'
  done = subprocess.run(
    [sys.executable, '-c', program, jax_processes.free_address(), str(number)],
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 1
  assert message in done.stderr and 'within 2 s' in done.stderr
  assert 'stack trace' not in done.stderr


def test_a_cluster_that_is_not_there(monkeypatch):
  monkeypatch.delenv('SLURM_JOB_ID', raising=False)
  monkeypatch.setattr(distributed.jax.distributed, 'initialize', _no_cluster)
  with pytest.raises(ValueError, match='auto found no cluster: .*defined'):
    distributed.start(cluster='auto')


def _no_cluster(**kwargs):
  assert kwargs['cluster_detection_method'] is None
  raise ValueError('coordinator_address should be defined.')


def test_the_longest_even_dimension_is_sharded():
  mesh = jax.sharding.AbstractMesh((1, 4), ('data', 'fsdp'))
  shapes = {
    (3, 3, 64, 128): (None, None, None, 'fsdp'),
    (128, 64): ('fsdp',),
    (6, 3, 1000): (None, None, 'fsdp'),
    (1023,): (),  # odd
    (64, 4): (),  # small
    (): (),
  }
  for shape, spec in shapes.items():
    array = jax.ShapeDtypeStruct(shape, np.float32)
    assert distributed.weight_shardings(array, mesh).spec == (
      jax.sharding.PartitionSpec(*spec)
    )


def test_an_address_in_use():
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    sock.listen()
    address = f'127.0.0.1:{sock.getsockname()[1]}'
    program = f'distributed.start({address!r}, 2, 0, timeout=20)'
    done = subprocess.run(
      [sys.executable, '-c', f'from dynconv_jax import distributed; {program}'],
      capture_output=True,
      text=True,
      timeout=600,
    )
  assert done.returncode == 1
  assert f'cannot start at {address}: ' in done.stderr


@pytest.mark.parametrize('elsewhere', (False, True))
def test_only_the_port_that_jax_listens_on_is_checked(monkeypatch, elsewhere):
  monkeypatch.delenv('JAX_COORDINATOR_BIND_ADDRESS', raising=False)
  if elsewhere:
    monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', '127.0.0.1:1')
  monkeypatch.setattr(distributed.atexit, 'register', lambda leave: None)
  started = []
  monkeypatch.setattr(
    distributed.jax.distributed, 'initialize', lambda **_: started.append(1)
  )
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    sock.listen()
    address = f'127.0.0.1:{sock.getsockname()[1]}'
    if elsewhere:
      assert distributed.start(address, 2, 0)
    else:
      with pytest.raises(OSError, match=f'cannot start at {address}: '):
        distributed.start(address, 2, 0)
  assert len(started) == elsewhere
