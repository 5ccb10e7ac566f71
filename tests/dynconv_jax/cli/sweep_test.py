"""Tests of sweeps: with a script in place of the programs, and a real one."""

import csv
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from dynconv_jax.cli import processes, sweep_runs
from dynconv_jax.cli.results_table import write_result
from dynconv_jax.cli.sweep_progress import Progress
from dynconv_jax.data import sources
from dynconv_jax.files import locked
from dynconv_jax.plotting.results import read_results
from dynconv_jax.training import inputs, workdir
from dynconv_jax.training.config import (
  Config,
  operational_options,
  read_flags,
)

# Replaces Python: writes the files of the programs, and logs its calls.
_FAKE = """#!{python} -SE
import csv, json, pathlib, signal, sys, time
root = pathlib.Path({root!r})
program, given = sys.argv[2].split('.')[-1], {{}}
for argument in sys.argv[3:]:
  name, given[name] = argument[2:].split('=', 1)
folder = pathlib.Path(given.pop('--workdir'[2:]))
with (root / 'calls').open('a') as file:
  file.write(f'{{program}} {{folder.name}}\\n')
if (root / f'fail_{{program}}_{{folder.name}}').exists():
  print('something', flush=True)
  sys.exit('error: it diverged')
if program == 'train':
  text = pathlib.Path(given['flagfile']).read_text()
  (folder / 'flags.txt').write_text(text)
  rows = [{{'step': 7, 'epoch': 1, 'split': 'train', 'seconds': 61.4}}]
  (folder / 'metrics.jsonl').write_text(json.dumps(rows[0]))
  other = root / 'other.flags'
  if other.exists():  # Another sweep adds a run of this name.
    other.rename(root / f'results/some/flags/{{folder.name}}.flags')
  if (root / 'hang').exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (root / 'up').touch()
    time.sleep(60)
flags = dict(
  line[2:].split('=', 1)
  for line in (folder / 'flags.txt').read_text().splitlines()
)
dense = flags['method'] == 'dense'
width = float(flags['width_multiplier'])
if program == 'evaluate':
  assert given['split'] == 'test'
  # A row of another checkpoint would be an error.
  assert not pathlib.Path(given['results']).exists()
  row = dict(run=folder.name, model=flags['model'], method=flags['method'])
  row |= dict(budget='' if dense else flags['budget'], seed=flags['seed'])
  row |= dict(width_multiplier=width, split='test', num_examples=10)
  row |= dict(checkpoint=given['checkpoint'])
  row |= dict(accuracy=0.6, accuracy_low=0.5, accuracy_high=0.7)
  row |= dict(executed_fraction='' if dense else 0.4, gmacs_mean=width**2)
  row |= dict(gmacs_p50=width**2, gmacs_p95=width**2)
  with open(given['results'], 'w') as file:
    writer = csv.DictWriter(file, row)
    writer.writeheader()
    writer.writerow(row)
  predictions = f'name,label\\n0,{{folder.name}}'
  (folder / 'predictions_test.csv').write_text(predictions)
if program == 'benchmark':
  assert (given['split'], given['runtimes']) == ('test', 'none')
  assert given['checkpoint'] in ('best', 'latest')
  output = pathlib.Path(given['output'])
  output.mkdir(exist_ok=True)
  times = dict(dense_ms=8 * width) | ({{}} if dense else dict(sparse_ms=5.0))
  times |= {{}} if width < 1 else dict(native_dense_ms=7.5)
  times |= dict(cpu='2 cores', batch_size=int(given['batch_size']))
  (output / 'benchmark.json').write_text(json.dumps(times))
"""
_NAMES = ['dense_width_multiplier0.5', 'dense_width_multiplier1']
_NAMES += ['dynconv_budget0.3', 'dynconv_budget0.5']


class _Sweep:
  """Runs sweeps in a folder, with the script above."""

  def __init__(self, root, program):
    self.root, self._program = root, program
    self.table = root / 'results' / 'some' / 'results.csv'
    self.runs = root / 'runs'

  def __call__(self, *more):
    """Runs a sweep and returns its output."""
    return self._program(
      'sweep',
      '--grid=method=dense,dynconv',
      '--grid=budget=0.3,0.5',
      '--grid=dense:width_multiplier=0.5,1',
      '--checkpoint=latest',
      f'--results={self.table.parent}',
      f'--workdir={self.runs}',
      *more,
    )

  def calls(self):
    """Returns the calls since the last query."""
    path = self.root / 'calls'
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines

  def rows(self):
    with self.table.open() as file:
      return {row['run']: row for row in csv.DictReader(file)}


@pytest.fixture
def sweep(tmp_path, program, monkeypatch):
  fake = tmp_path / 'python'
  fake.write_text(_FAKE.format(python=sys.executable, root=str(tmp_path)))
  fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setattr(sys, 'executable', str(fake))
  # The script does not need data.
  splits = sources.Splits(*['some'] * 3)
  monkeypatch.setattr(inputs, 'open_splits', lambda data: splits)
  return _Sweep(tmp_path, program)


def test_a_sweep_and_its_table_and_figures(sweep):
  printed = sweep('--recipe=short', '--data_dir=/a/place')
  folder = sweep.table.parent
  assert sweep.calls() == [
    *(f'{p} {name}' for name in _NAMES for p in ('train', 'evaluate')),
    *(f'benchmark {name}' for name in _NAMES),
  ]
  rows = sweep.rows()
  assert list(rows) == _NAMES
  narrow, gated = rows[_NAMES[0]], rows[_NAMES[2]]
  for name, value in {
    'method': 'dense',
    'budget': '',
    'width_multiplier': '0.5',
    'accuracy': '0.6',
    'accuracy_low': '0.5',
    'gmacs_p95': '0.25',
    'recipe': 'short',
    'training_seconds': '61',
    'latency_ms': '4.0',
    'latency_dense_ms': '4.0',
    'latency_sparse_ms': '',
    'latency_batch_size': '1',
    'latency_machine': '2 cores',
  }.items():
    assert narrow[name] == value, name
  for name, value in {
    'budget': '0.3',
    'width_multiplier': '1',
    'executed_fraction': '0.4',
    'latency_ms': '5.0',
    'latency_dense_ms': '7.5',
    'latency_sparse_ms': '5.0',
  }.items():
    assert gated[name] == value, name
  commits = {row['commit'].removesuffix('-dirty') for row in rows.values()}
  assert len(commits) == 1
  assert commits == {'unknown'} or len(commits.pop()) == 40
  figures = [
    f'accuracy_against_{what}.{kind}'
    for what in ('latency', 'macs')
    for kind in ('png', 'svg')
  ]
  assert sorted(p.name for p in folder.iterdir()) == [
    *figures,
    'flags',
    'predictions',
    'results.csv',
  ]
  for name in (*figures, 'results.csv'):
    assert str(folder / name) in printed
  # The flags reproduce the run, but contain no path of this machine.
  text = (folder / 'flags' / 'dynconv_budget0.3.flags').read_text()
  ran = Config.make(budget=0.3)
  texts = read_flags(ran.to_flags())
  places = operational_options(ran)
  assert read_flags(text) == {k: v for k, v in texts.items() if k not in places}
  assert '/a/place' not in text
  ran = workdir.read_config(sweep.runs / 'dynconv_budget0.3')
  assert ran == Config.make(budget=0.3, data_dir='/a/place')
  for name in _NAMES:
    (row,) = read_results(folder / 'predictions' / f'{name}.csv.gz')
    assert row == {'name': '0', 'label': name}
  # Started again, it has nothing to do.
  before = sweep.table.read_text()
  sweep('--recipe=short')
  assert sweep.calls() == []
  assert sweep.table.read_text() == before


def test_figures_are_drawn_from_the_table_alone(sweep, program, tmp_path):
  sweep()
  moved = tmp_path / 'moved' / 'results.csv'
  moved.parent.mkdir()
  moved.write_text(sweep.table.read_text())
  printed = program('plot', f'--results={moved}')
  for name in ('accuracy_against_macs', 'accuracy_against_latency'):
    png = moved.parent / f'{name}.png'
    assert f'wrote {png} and {png.with_suffix(".svg")}' in printed
    assert png.read_bytes() == (sweep.table.parent / png.name).read_bytes()
  svg = png.with_suffix('.svg').read_text()
  assert 'batch of 1, 2 cores' in svg


def test_only_what_is_missing_is_done(sweep):
  sweep('--latency_batch_size=0')
  assert 'latency_ms' not in sweep.rows()[_NAMES[0]]
  assert len(sweep.calls()) == 8
  # A lost row is evaluated again; a run not known to be trained is trained.
  lines = sweep.table.read_text().splitlines(keepends=True)
  sweep.table.write_text(''.join(lines[:1] + lines[2:]))
  (sweep.runs / _NAMES[2] / 'trained.json').unlink()
  sweep('--latency_batch_size=0')
  assert sweep.calls() == [
    f'evaluate {_NAMES[0]}',
    *(f'train {_NAMES[2]}', f'evaluate {_NAMES[2]}'),
  ]
  # New values, and latency, are added to existing rows.
  sweep('--grid=dynconv:seed=1,2', '--latency_batch_size=4')
  known = _NAMES[:2]
  new = ['dynconv_budget0.3_seed1', 'dynconv_budget0.3_seed2']
  calls = sweep.calls()
  assert [f'train {name}' in calls for name in (*known, *new)] == [0, 0, 1, 1]
  assert f'benchmark {_NAMES[0]}' in calls
  assert sweep.rows()[_NAMES[0]]['latency_batch_size'] == '4'
  sweep('--latency_batch_size=2', '--grid=dynconv:seed=1,2')
  assert len(sweep.calls()) == 6
  assert {
    row['latency_batch_size']
    for name, row in sweep.rows().items()
    if name in (*known, *new)
  } == {'2'}


def test_with_more_epochs_runs_go_on_and_are_measured_again(sweep):
  sweep()
  before, known = sweep.calls(), sweep.rows()
  sweep('--epochs=30')
  assert sweep.calls() == before
  assert sweep.rows() == known
  flags = workdir.read_config(sweep.runs / _NAMES[0])
  assert flags.optimization.epochs == 30
  # Without new latencies, none of the old ones remain.
  sweep('--epochs=40', '--latency_batch_size=0')
  columns = {n for n in known[_NAMES[2]] if n.startswith('latency_')}
  assert len(columns) == 5
  assert {row[n] for row in sweep.rows().values() for n in columns} == {''}


def test_another_checkpoint_or_recipe(sweep):
  sweep('--recipe=short')
  sweep.calls()
  sweep('--recipe=long')
  assert sweep.calls() == []
  assert {row['recipe'] for row in sweep.rows().values()} == {'long'}
  assert {row['checkpoint'] for row in sweep.rows().values()} == {'latest'}
  sweep('--checkpoint=best')
  programs = ('evaluate', 'benchmark')
  again = [f'{p} {name}' for p in programs for name in _NAMES]
  assert sweep.calls() == again
  assert {row['recipe'] for row in sweep.rows().values()} == {'long'}
  assert {row['checkpoint'] for row in sweep.rows().values()} == {'best'}
  sweep('--checkpoint=best')
  # Without the column, the checkpoint is not known.
  sweep.table.write_text(sweep.table.read_text().replace('checkpoint', 'other'))
  sweep()
  assert sweep.calls() == []


def test_only_the_test_split_is_drawn(sweep, tmp_path):
  sweep('--latency_batch_size=0')
  row = {**sweep.rows()[_NAMES[2]], 'split': 'validation', 'accuracy': 0.1}
  svg = sweep.table.parent / 'accuracy_against_macs.svg'
  before = svg.read_text()
  write_result(sweep.table, {**row, 'accuracy_low': 0})
  sweep('--latency_batch_size=0')
  assert svg.read_text() == before


def test_results_of_another_run_of_the_same_name_stay(sweep):
  start = sweep.root / 'a' / 'start'
  workdir.write_flags(start, Config.make())
  sweep(f'--init_from={start}', '--latency_batch_size=0')
  kept = sweep.table.parent / 'flags' / f'{_NAMES[0]}.flags'
  text = kept.read_text()
  kept.write_text(text.replace('normalization=auto', 'normalization=imagenet'))
  files = [p for p in sweep.table.parent.rglob('*') if p.is_file()]
  before = {path: path.read_bytes() for path in files}
  sweep.calls()
  start = start.rename(sweep.root / 'start')
  elsewhere = f'--workdir={sweep.root / "elsewhere"}', f'--init_from={start}'
  with pytest.raises(ValueError) as error:
    sweep(*elsewhere, '--learning_rate=0.2', '--latency_batch_size=0')
  for text in (
    f'another run {_NAMES[0]}; given, not in the results: learning_rate: 0.2, '
    'not 0.05. Choose another --results, or add a --grid',
    f'another run {_NAMES[3]};',
  ):
    assert text in str(error.value)
  with pytest.raises(ValueError, match="init_from: '', not 'start'"):
    sweep(elsewhere[0])
  assert sweep.calls() == []
  assert {path: path.read_bytes() for path in files} == before
  # Runs of the same options may be elsewhere, and go on for longer.
  sweep(*elsewhere, '--epochs=30', '--data_dir=/b', '--latency_batch_size=0')
  assert f'train {_NAMES[0]}' in sweep.calls()
  assert list(sweep.rows()) == _NAMES


def test_a_run_that_another_sweep_adds_meanwhile_stays(sweep, capfd):
  sweep('--latency_batch_size=0')
  kept = sweep.table.parent / 'flags' / f'{_NAMES[0]}.flags'
  other = kept.read_text().replace('learning_rate=0.05', 'learning_rate=0.2')
  kept.unlink()
  (sweep.root / 'other.flags').write_text(other)
  sweep.table.unlink()
  with pytest.raises(SystemExit):
    sweep(f'--workdir={sweep.root / "elsewhere"}', '--latency_batch_size=0')
  assert f'has another run {_NAMES[0]}' in capfd.readouterr().err
  assert kept.read_text() == other
  assert list(sweep.rows()) == _NAMES[1:]


def test_a_failure_is_told_at_the_end_and_ends_nothing_else(sweep, capfd):
  (sweep.root / f'fail_train_{_NAMES[1]}').touch()
  (sweep.root / f'fail_benchmark_{_NAMES[2]}').touch()
  with pytest.raises(SystemExit) as ended:
    sweep()
  assert ended.value.code == 1
  assert list(sweep.rows()) == [_NAMES[0], *_NAMES[2:]]
  assert sweep.rows()[_NAMES[2]]['latency_ms'] == ''
  assert (sweep.table.parent / 'accuracy_against_macs.png').exists()
  errors = capfd.readouterr().err
  assert f'{_NAMES[1]} failed: error: it diverged\n' in errors
  assert f'{_NAMES[2]} failed: latency: error: it diverged\n' in errors
  assert f'2 of 4 runs failed; their output is in {sweep.runs}/' in errors
  log = (sweep.runs / _NAMES[1] / 'sweep.log').read_text()
  assert 'something\nerror: it diverged\n' in log
  assert f'--workdir={sweep.runs / _NAMES[1]}' in log
  for path in sweep.root.glob('fail_*'):
    path.unlink()
  sweep.calls()
  sweep()
  assert sweep.calls() == [
    *(f'train {_NAMES[1]}', f'evaluate {_NAMES[1]}'),
    *(f'benchmark {_NAMES[1]}', f'benchmark {_NAMES[2]}'),
  ]
  assert list(sweep.rows()) == _NAMES


def test_all_fail(sweep):
  for name in _NAMES:
    (sweep.root / f'fail_train_{name}').touch()
  with pytest.raises(SystemExit):
    sweep()
  assert not sweep.table.exists()


def test_stopped_by_a_signal_the_same_command_goes_on(sweep, capfd):
  (sweep.root / 'hang').touch()

  def stop():
    while not (sweep.root / 'up').exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop)
  thread.start()
  with pytest.raises(SystemExit) as ended:
    sweep()
  thread.join()
  assert ended.value.code == 128 + signal.SIGTERM
  assert 'SIGTERM: progress is saved in' in capfd.readouterr().err
  assert sweep.calls() == [f'train {_NAMES[0]}']
  assert not sweep.table.exists()
  (sweep.root / 'hang').unlink()
  sweep()
  assert sweep.calls()[0] == f'train {_NAMES[0]}'
  assert list(sweep.rows()) == _NAMES


def test_runs_wait_for_the_run_that_they_start_from(sweep):
  teacher = sweep.runs / _NAMES[1]
  (sweep.root / f'fail_train_{_NAMES[1]}').touch()
  more = f'--grid=dynconv:distill_from=,{teacher}', '--parallel=3'
  with pytest.raises(SystemExit):
    sweep(*more)
  assert len(sweep.rows()) == 3
  (sweep.root / f'fail_train_{_NAMES[1]}').unlink()
  sweep.calls()
  sweep(*more)
  calls = sweep.calls()
  assert calls[:2] == [f'train {_NAMES[1]}', f'evaluate {_NAMES[1]}']
  rows = sweep.rows()
  assert len(rows) == 6
  recipes = {row['recipe'] for row in rows.values()}
  assert recipes == {'', 'distill_from none', f'distill_from {_NAMES[1]}'}


def test_errors_come_before_anything_runs(sweep, monkeypatch):
  workdir.write_flags(sweep.runs / _NAMES[0], Config.make(batch_size=30))
  with pytest.raises(ValueError) as error:
    sweep('--grid=bugdet=0.3', '--grid=dynconv:seed=a')
  for message in ("has no flag 'bugdet'", "seed must be an integer; got 'a'"):
    assert message in str(error.value)
  with pytest.raises(ValueError, match='batch_size: 64, not 30'):
    sweep()
  with pytest.raises(ValueError, match='results must be a folder, which will'):
    sweep(f'--results={sweep.table}')
  taken = sweep.root / 'taken'
  taken.touch()
  with pytest.raises(ValueError, match='results must be a folder; .*taken is'):
    sweep(f'--results={taken}')
  sweep.table.parent.mkdir(parents=True)
  sweep.table.write_text('run\na,b\n')
  with pytest.raises(ValueError, match='row 1: 2 cells for 1 columns'):
    sweep(f'--workdir={sweep.root / "others"}')
  none = sweep.root / 'none'
  for source in ('init_from', 'distill_from'):
    message = f'{source}: {none} is not the workdir of a run: .*flags.txt .dyn'
    with pytest.raises(ValueError, match=message):
      sweep(f'--workdir={none}', f'--grid=dynconv:{source}=,{none}')
  (sweep.runs / _NAMES[0] / 'flags.txt').unlink()
  sweep.table.unlink()
  splits = sources.Splits('some', 'some', None)
  monkeypatch.setattr(inputs, 'open_splits', lambda data: splits)
  with pytest.raises(ValueError, match='spots with test_split=none has none'):
    sweep('--test_split=none')
  assert sweep.calls() == []


def test_one_sweep_a_workdir(sweep):
  with (
    locked(sweep.runs, 'another sweep'),
    pytest.raises(OSError, match='another sweep'),
  ):
    sweep()
  assert sweep.calls() == []


def test_the_progress_line(tmp_path):
  config = Config.make(epochs=10)

  def epochs(name, number):
    (tmp_path / name).mkdir(exist_ok=True)
    row = {'epoch': number, 'step': 1, 'split': 'train'}
    (tmp_path / name / 'metrics.jsonl').write_text(json.dumps(row) + '\n')

  epochs('b', 5)
  runs = {tmp_path / name: config for name in 'abcd'}
  progress = Progress('trained', runs, before=2)
  assert progress.line(['a'], {}, 5) == (
    '2/6 trained, 0 failed, running: a (epoch 0/10)'
  )
  # Of 3.5 runs, one is done, half of which was done before, plus 0.2: 0.7.
  epochs('a', 2)
  assert progress.line(['a'], {'b': ''}, 70) == (
    '3/6 trained, 0 failed, running: a (epoch 2/10), 5 min left'
  )
  text = progress.line(['c', 'd'], {'b': '', 'a': 'error'}, 15000)
  assert text == (
    '3/6 trained, 1 failed, running: c (epoch 0/10), d (epoch 0/10), '
    '5 h 33 min left'
  )
  timed = Progress('timed', {'a': None, 'b': None}, before=0)
  assert timed.line(['b'], {'a': ''}, 40) == (
    '1/2 timed, 0 failed, running: b, 40 s left'
  )


def test_the_commit_of_the_code(tmp_path, monkeypatch):
  module = sweep_runs
  package = tmp_path / 'dynconv_jax' / 'cli'
  package.mkdir(parents=True)
  file = package / 'sweep_runs.py'
  file.touch()
  (tmp_path / 'experiments').mkdir()
  (tmp_path / 'experiments' / 'a.py').touch()
  monkeypatch.setattr(module, '__file__', str(file))
  monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
  assert module._commit() == 'unknown'
  who = ('-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=0')

  def git(*arguments):
    done = subprocess.run(
      ['git', *who, *arguments],
      cwd=tmp_path,
      check=True,
      capture_output=True,
      text=True,
    )
    return done.stdout.strip()

  git('init')
  git('add', '.')
  git('commit', '-m', 'one')
  assert module._commit() == git('rev-parse', 'HEAD')
  (tmp_path / 'results.csv').touch()
  assert module._commit() == git('rev-parse', 'HEAD')
  file.write_text('changed')
  assert module._commit() == git('rev-parse', 'HEAD') + '-dirty'
  monkeypatch.setenv('PATH', '')
  assert module._commit() == 'unknown'


@pytest.mark.slow
def test_a_real_sweep_in_processes_of_its_own(tmp_path):
  command = [sys.executable, '-m', 'experiments.sweep']
  command += ['--spots_size=24', '--spots_train=64', '--spots_test=20']
  command += ['--image_size=24', '--crop=none', '--width_multiplier=0.25']
  command += ['--batch_size=16', '--epochs=1', f'--data_dir={tmp_path}/data']
  command += ['--grid=method=dense,dynconv', '--grid=seed=0', '--parallel=2']
  command += [f'--results={tmp_path}/results', f'--workdir={tmp_path}/runs']
  done = subprocess.run(
    command,
    cwd=pathlib.Path(processes.__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  with (tmp_path / 'results' / 'results.csv').open() as file:
    rows = {row['run']: row for row in csv.DictReader(file)}
  assert set(rows) == {'dense_seed0', 'dynconv_seed0'}
  for name, row in rows.items():
    path = tmp_path / 'runs' / name / 'evaluation_test.json'
    summary = json.loads(path.read_text())
    for column in ('accuracy', 'gmacs_mean', 'gmacs_p95'):
      assert float(row[column]) == pytest.approx(summary[column], abs=1e-6)
    assert int(row['training_seconds']) >= 0
    assert float(row['latency_ms']) > 0
  assert rows['dynconv_seed0']['executed_fraction']
  assert rows['dynconv_seed0']['latency_sparse_ms']
  assert '0/2 trained' in done.stderr
  assert '2/2 trained' in done.stderr
