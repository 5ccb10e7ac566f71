"""Tests of jobs on Ray: errors on a stand-in, the rest on two nodes."""

import contextlib
import csv
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

import pytest

from dynconv_jax import extras
from dynconv_jax.cli import processes, ray_jobs

_ROOT = pathlib.Path(processes.__file__).parents[2]
_real = pytest.mark.skipif(
  not importlib.util.find_spec('ray'), reason='needs Ray'
)


def _node(cpus, gpus=0, alive=True):
  has = {'CPU': cpus, 'memory': 1e9} | ({'GPU': gpus} if gpus else {})
  return {'NodeID': f'{cpus} {gpus}', 'Alive': alive, 'Resources': has}


def _free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


@pytest.fixture
def fake_ray(monkeypatch):
  """A module `ray` whose cluster has two live nodes and a dead one."""
  modules = {
    name: types.ModuleType(name)
    for name in ('ray', 'ray._private', 'ray._private.services')
  }
  for name, module in modules.items():
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
  ray, private, services = modules.values()
  ray._private, private.services = private, services
  services.canonicalize_bootstrap_address = lambda address: address
  ray.calls = []
  ray.init = lambda address, **_: ray.calls.append(address)
  ray.shutdown = lambda: ray.calls.append('shutdown')
  ray.nodes = lambda: [_node(64, 8, False), _node(2), _node(4, 1), _node(2)]
  return ray


def _connected(address, cpus=1, gpus=0):
  return ray_jobs.connected(address, cpus=cpus, gpus=gpus, retries=0)


def test_an_address_where_nobody_answers(fake_ray):
  for address in ('here', 'ray://here:1', 'a b:1', ':1', ''):
    with (
      pytest.raises(ValueError, match="must be 'auto' or host:port; got"),
      _connected(address),
    ):
      pass
  address = f'127.0.0.1:{_free_port()}'
  with (
    pytest.raises(ConnectionError, match=f'cluster at {address}: .*refused'),
    _connected(address),
  ):
    pass
  services = sys.modules['ray._private.services']
  services.canonicalize_bootstrap_address = lambda address: None
  with (
    pytest.raises(ConnectionError, match='no Ray cluster found: set'),
    _connected('auto'),
  ):
    pass
  with (
    pytest.raises(ValueError, match='be an integer; got 1.5'),
    _connected('h:1', 1, 1.5),
  ):
    pass
  assert not fake_ray.calls


def test_a_node_must_have_what_a_run_needs(fake_ray):
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    with _connected(address, 3, 0.5) as cluster:
      assert cluster.node == _node(4, 1)
    message = (
      'no node of the Ray cluster has the 4 CPUs and 2 GPUs of a run; it has '
      '2 x 2 CPUs and 0 GPUs, 1 x 4 CPUs and 1 GPUs'
    )
    with pytest.raises(ValueError) as error, _connected(address, 4, 2):
      pass
    assert str(error.value) == message
    assert fake_ray.calls == [address, 'shutdown'] * 2

    def mismatch(*_, **__):
      raise RuntimeError('Version mismatch: 2.1, 2.2')

    fake_ray.init = mismatch
    with (
      pytest.raises(ConnectionError, match=f'{address}: Version mismatch'),
      _connected(address),
    ):
      pass


def test_a_sweep_checks_before_it_runs_anything(program, tmp_path, monkeypatch):
  common = ('sweep', '--grid=seed=0', f'--results={tmp_path}/results')
  common += (f'--workdir={tmp_path}/runs',)
  for flags, message in (
    (('--ray_cpus=2', '--ray_gpus=1'), '--ray_cpus needs .*; --ray_gpus needs'),
    (('--engine=ray', '--parallel=2'), '--parallel needs --engine=local'),
  ):
    with pytest.raises(ValueError, match=message):
      program(*common, *flags)
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda n, *a: None if n == 'ray' else find(n, *a),
  )
  with pytest.raises(extras.MissingError, match=r"ray.*'dynconv-jax\[ray\]'"):
    program(*common, '--engine=ray')
  assert not (tmp_path / 'runs').exists()


def test_a_share_of_a_node():
  share = ray_jobs._share
  assert share({'num_cpus': 4, 'num_gpus': 1}) == {'NPROC': '4'}
  assert share({'num_cpus': 0.5, 'num_gpus': 0.5}) == {
    'NPROC': '1',
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.450',
  }


def test_a_job_waits_for_a_program_in_its_workdir(tmp_path):
  log, code = (
    tmp_path / 'log',
    (
      'import sys, time; from dynconv_jax.files import locked\n'
      'with locked(sys.argv[1], "training"): print(flush=True); time.sleep(3)'
    ),
  )
  command = [sys.executable, '-c', code, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT) as other:
    other.stdout.readline()
    ray_jobs._wait_until_free(log)
    assert other.wait() == 0
  assert f'is in use by process {other.pid} on' in log.read_text()
  assert log.read_text().count('waiting: ') == 1


class _Cluster:
  """Two nodes with one CPU each on this machine, started by `ray start`."""

  def __init__(self, folder, port):
    self.address, self._nodes = f'127.0.0.1:{port}', []
    self._head = ('--head', f'--port={port}', f'--temp-dir={folder}')

  def start(self):
    self._start(*self._head, '--include-dashboard=false')
    self._start(f'--address={self.address}')

  def _start(self, *arguments):
    command = [sys.executable, '-m', 'ray.scripts.scripts', 'start']
    command += ['--num-cpus=1', '--num-gpus=0', '--disable-usage-stats']
    command += ['--object-store-memory=80000000', *arguments]
    # All processes of a node share its session; its workers end with it.
    node = subprocess.Popen(
      command,
      env={**os.environ, 'RAY_raylet_start_wait_time_s': '120'},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    self._nodes.append(node)
    text = node.communicate()[0].decode()
    assert node.returncode == 0, text

  def node(self, index):
    return self._nodes[index].pid

  def kill(self, index):
    os.killpg(self._nodes.pop(index).pid, signal.SIGKILL)

  def end(self):
    while self._nodes:
      with contextlib.suppress(ProcessLookupError):  # it did not start
        self.kill(-1)


@pytest.fixture(scope='module')
def cluster():
  # Socket paths must be short.
  folder = tempfile.mkdtemp(prefix='ray')
  nodes = _Cluster(folder, _free_port())
  try:
    nodes.start()
    yield nodes
  finally:
    nodes.end()
    shutil.rmtree(folder, ignore_errors=True)


_JOBS = """
import functools, json, pathlib, sys
from dynconv_jax.cli import processes, ray_jobs
address, folder = sys.argv[1], pathlib.Path(sys.argv[2])
finished = []
def job(name, line, *needs):
  return name, processes.Job(
    functools.partial(iter, [['sh', '-c', line]]), folder / name / 'log',
    needs, lambda result: finished.append(name))
def run(**options):
  with ray_jobs.connected(address, gpus=0, retries=1, **options) as cluster:
    jobs = [job('a', f'sleep 1; touch {folder}/up')]
    jobs += [job('b', 'echo bad >&2; exit 3'), job('c', 'true', 'b')]
    jobs += [job('d', f'test -e {folder}/up', 'a', 'elsewhere')]
    jobs += [job('e', 'true', 'f'), job('f', 'true', 'e')]
    ended = cluster.run_jobs(dict(jobs), lambda running, ended: None)
    last = cluster.run_jobs(
      dict([job('g', 'echo $NPROC')]), lambda running, ended: None, alone=True)
    print(json.dumps([ended | last, finished]))
try:
  run(cpus=2)
except ValueError as error:
  print(error)
run(cpus=1)
import os
line = f'trap "echo saved; exit 143" TERM; kill -TERM {os.getpid()}; '
try:
  with ray_jobs.connected(address, cpus=1, gpus=0, retries=1) as cluster:
    jobs = [job('h', line + 'while true; do sleep 0.1; done')]
    jobs += [job('i', 'ls', 'h')]
    cluster.run_jobs(dict(jobs), lambda running, ended: None)
except processes.Interrupted as error:
  print(error)
"""


@_real
@pytest.mark.slow
def test_jobs_on_a_cluster(cluster, tmp_path):
  script = tmp_path / 'jobs.py'
  script.write_text(_JOBS)
  done = subprocess.run(
    [sys.executable, script, cluster.address, tmp_path],
    cwd=_ROOT,  # Ray's workers import from there, too
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  refused, result, interrupted = done.stdout.splitlines()
  assert interrupted == 'SIGTERM'
  assert (tmp_path / 'h' / 'log').read_text().endswith('\nsaved\n')
  assert not (tmp_path / 'i').exists()
  assert 'the 2 CPUs and 0 GPUs of a run; it has 2 x 1 CPUs' in refused
  ended, finished = json.loads(result)
  cycle = 'needs a run that needs this one'
  assert ended == {
    'a': '',
    'b': 'bad',
    'c': 'needs b, which failed',
    'd': '',
    'e': cycle,
    'f': cycle,
    'g': '',
  }
  assert sorted(finished) == ['a', 'd', 'g']
  assert (tmp_path / 'g' / 'log').read_text().endswith('\n1\n')


def _sweep(folder, address):
  command = [sys.executable, '-m', 'experiments.sweep', '--dataset=spots']
  command += ['--spots_size=24', '--spots_train=64', '--spots_test=20']
  command += ['--image_size=24', '--crop=none', '--width_multiplier=0.25']
  command += ['--model=cifar_resnet8', '--batch_size=16', '--epochs=12']
  command += ['--grid=method=dense,dynconv', '--grid=seed=0,1']
  command += ['--grid=dynconv:seed=0']
  command += [f'--grid=dynconv:distill_from={folder}/runs/dense_seed0']
  command += [f'--data_dir={folder}/data', '--latency_batch_size=0']
  command += [f'--results={folder}/results', f'--workdir={folder}/runs']
  command += ['--checkpoint=latest', '--engine=ray', f'--ray_address={address}']
  return subprocess.Popen(command, cwd=_ROOT, stderr=subprocess.PIPE, text=True)


def _epochs(folder):
  file = folder / 'metrics.jsonl'
  lines = file.read_text().splitlines() if file.exists() else []
  rows = [json.loads(line) for line in lines]
  return [row['epoch'] for row in rows if row['split'] == 'train']


def _parent(pid):
  stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  return int(stat.rpartition(')')[2].split()[1])


def _nodes_of(runs):
  """Returns the session of the node of each run that is training."""
  found = {}
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      command = (folder / 'cmdline').read_text().split('\0')
      for run in runs:
        if 'dynconv_jax.cli.train' in command and f'--workdir={run}' in command:
          # It is in the process group of its worker, which the node started.
          worker = os.getpgid(int(folder.name))
          found[run] = os.getpgid(_parent(worker))
  return found


@_real
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_a_node_is_lost_and_the_table_is_complete(cluster, tmp_path):
  # The last test with this cluster, because one of its nodes is lost.
  runs, lost = tmp_path / 'runs', None
  first = [runs / f'dense_seed{seed}' for seed in (0, 1)]
  with _sweep(tmp_path, cluster.address) as sweep:
    while not lost:
      assert sweep.poll() is None, sweep.stderr.read()
      time.sleep(0.2)
      for run, node in _nodes_of(first).items():
        if node == cluster.node(1) and 1 < len(_epochs(run)) < 10:
          cluster.kill(1)
          lost = run
    errors = sweep.communicate()[1]
    assert sweep.returncode == 0, errors
  with (tmp_path / 'results' / 'results.csv').open() as file:
    rows = {row['run']: row for row in csv.DictReader(file)}
  assert sorted(rows) == ['dense_seed0', 'dense_seed1', 'dynconv']
  for name, row in rows.items():
    folder = runs / name
    summary = json.loads((folder / 'evaluation_test.json').read_text())
    assert float(row['accuracy']) == pytest.approx(summary['accuracy'])
    # Each epoch appears once: training resumed where it was.
    assert _epochs(folder) == list(range(1, 13))
    log = (folder / 'sweep.log').read_text()
    starts = log.count('-m dynconv_jax.cli.train')
    assert starts == (2 if folder == lost else 1)
