"""Tests of comparing runs: files written by hand, and two trained networks."""

import json
import math
import shutil

import numpy as np
import pytest

from dynconv_jax.cli.predictions import (
  keep_predictions,
  predictions_file,
  split_stem,
)
from dynconv_jax.plotting.results import read_results
from dynconv_jax.statistics import paired_bootstrap

_NAMES = [f'test/{i}' for i in range(40)]
_LABELS = ['disc' if i % 2 else 'ring' for i in range(40)]


def _write(folder, correct, seed=None, names=None, labels=None, **columns):
  """Writes a file of predictions in reverse order, which must not matter."""
  folder.mkdir()
  if seed is not None:
    (folder / 'flags.txt').write_text(f'--seed={seed}\n')
  columns = {
    'name': names or _NAMES,
    'label': labels or _LABELS,
    'correct': [int(value) for value in correct],
    **columns,
  }
  rows = list(zip(*columns.values(), strict=True))
  if seed == 1:
    rows.reverse()
  lines = [columns, *rows]
  text = ''.join(','.join(map(str, line)) + '\n' for line in lines)
  (folder / 'predictions_test.csv').write_text(text)
  return folder


@pytest.fixture
def runs(tmp_path):
  """Correctness of two settings with two seeds each, written as workdirs."""
  rng = np.random.default_rng(0)
  a, b = rng.random((2, 40)) < 0.8, rng.random((2, 40)) < 0.5
  shares = np.round(np.linspace(0.05, 0.5, 40), 4)
  dense, sparse = np.full(40, 4e9), 2e9 + 1e7 * np.arange(40)
  for name, values, macs in (('a', a, sparse), ('b', b, dense)):
    for seed in (0, 1):
      more = {'macs': macs + seed * 1e9, 'object_share': shares}
      _write(tmp_path / f'{name}{seed}', values[seed], seed, **more)
  return a, b, shares


def _last(stdout):
  return json.loads(stdout.splitlines()[-1])


def test_two_settings(program, tmp_path, runs):
  a, b, _ = runs
  stdout = program(
    'compare', f'--runs={tmp_path}/a*', f'--against={tmp_path}/b1,{tmp_path}/b0'
  )
  result, expected = _last(stdout), paired_bootstrap(a, b, paired_seeds=True)
  found = [result[f'difference{end}'] for end in ('', '_low', '_high')]
  points = [100 * v for v in (expected.value, expected.low, expected.high)]
  assert found == pytest.approx(points, rel=1e-9)
  assert result['p'] == expected.p
  assert result['paired_seeds']
  assert result['runs']['accuracy'] == pytest.approx(a.mean())
  assert result['against']['gmacs_mean'] == pytest.approx(4.5)
  assert 'mcnemar' not in result
  # The program prints the values of the last line.
  assert f'difference {points[0]:+.1f} [{points[1]:+.1f}, ' in stdout
  assert f'{100 * a.mean():.1f} [' in stdout


def test_kept_predictions_replace_workdirs(program, tmp_path, runs):
  arguments = '--runs={}/a*', '--against={}/b*'
  before = program('compare', *(a.format(tmp_path) for a in arguments))
  results = tmp_path / 'results'
  for folder in [
    tmp_path / f'{name}{seed}' for name in 'ab' for seed in (0, 1)
  ]:
    keep_predictions(folder, 'test', results)
    (results / 'flags').mkdir(exist_ok=True)
    (folder / 'flags.txt').rename(results / 'flags' / f'{folder.name}.flags')
    shutil.rmtree(folder)
  kept = results / 'predictions'
  assert program('compare', *(a.format(kept) for a in arguments)) == before
  assert _last(before)['paired_seeds']
  # A damaged copy.
  first = kept / 'a0.csv.gz'
  for content in (first.read_bytes()[:-9], b'name,label,correct'):
    first.write_bytes(content)
    with pytest.raises(ValueError, match='a0.csv.gz is not a CSV file'):
      program('compare', *(a.format(kept) for a in arguments))


def test_single_runs_have_mcnemar(program, tmp_path, runs):
  a, b, _ = runs
  stdout = program(
    'compare',
    f'--runs={tmp_path}/a0/predictions_test.csv',
    f'--against={tmp_path}/b1',
  )
  found = _last(stdout)['mcnemar']
  only_a, only_b = int((a[0] & ~b[1]).sum()), int((b[1] & ~a[0]).sum())
  n = only_a + only_b
  tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
  assert (found['only_runs'], found['only_against']) == (only_a, only_b)
  assert found['p'] == pytest.approx(2 * tail / 2**n)
  assert f'{only_a} right only in runs, {only_b} only in against' in stdout
  assert not _last(stdout)['paired_seeds']


def test_runs_of_one_seed_have_a_warning(program, tmp_path, runs, caplog):
  program('compare', f'--runs={tmp_path}/a*', f'--against={tmp_path}/b0')
  assert not caplog.messages
  # A pattern that matches two settings.
  program('compare', f'--runs={tmp_path}/?0', f'--against={tmp_path}/b1')
  (warning,) = caplog.messages
  assert warning.startswith('runs counts several runs of seed 0')
  assert f'{tmp_path}/a0' in warning and f'{tmp_path}/b0' in warning


def test_groups_against_a_baseline(program, tmp_path, runs):
  a, b, _ = runs
  table = tmp_path / 'new' / 'table.csv'
  groups = f'A={tmp_path}/a*;B={tmp_path}/b*;one={tmp_path}/a1'
  stdout = program(
    'compare', f'--groups={groups}', '--baseline=B', f'--table={table}'
  )
  rows = {row['group']: row for row in read_results(table)}
  assert [row['runs'] for row in rows.values()] == ['2', '2', '1']
  assert rows['B']['difference'] == ''
  for name, values, paired in (('A', a, True), ('one', a[1:], False)):
    expected = paired_bootstrap(values, b, paired_seeds=paired)
    for column, value in (
      ('difference', expected.value),
      ('difference_low', expected.low),
      ('difference_high', expected.high),
    ):
      got = float(rows[name][column])
      assert got == pytest.approx(100 * value, rel=1e-5), column
  markdown = table.with_suffix('.md').read_text()
  assert markdown in stdout
  assert f'| A | 2 | {100 * a.mean():.1f} [' in markdown
  # A table is replaced.
  program(
    'compare', f'--groups=C={tmp_path}/a1', '--baseline=C', f'--table={table}'
  )
  assert [row['group'] for row in read_results(table)] == ['C']


def test_gains_by_the_share_of_the_object(program, tmp_path, runs):
  a, b, shares = runs
  table = tmp_path / 'gains.csv'
  pair = (f'--runs={tmp_path}/a*', f'--against={tmp_path}/b*')
  shared = [['--label=y', f'--share={share}'] for share in (0.1, 1)]
  for more in (['--label=x', '--bins=4'], *shared) * 2:
    program('compare', *pair, f'--gains={table}', '--resamples=99', *more)
  rows = read_results(table)
  assert [row['label'] for row in rows] == ['x'] * 4 + ['y'] * 2
  for i, row in enumerate(rows[:4]):
    some = slice(10 * i, 10 * i + 10)
    expected = paired_bootstrap(
      a[:, some], b[:, some], paired_seeds=True, resamples=99
    )
    values = [float(row[name]) for name in ('share', 'difference', 'low')]
    assert values == pytest.approx(
      [shares[some].mean(), 100 * expected.value, 100 * expected.low], rel=1e-4
    )
    assert row['examples'] == '10'
    gmacs = [float(row[name]) for name in ('gmacs', 'gmacs_against')]
    assert gmacs == pytest.approx([2.5 + 0.01 * (10 * i + 4.5), 4.5])
  assert [row['share'] for row in rows[4:]] == ['0.1', '1']
  assert rows[4]['examples'] == '40'


@pytest.mark.parametrize(
  'split, stem',
  [
    ('test', 'test'),
    ('validation', 'validation'),
    ('my_own-split', 'my_own-split'),
    ('test_stochastic', 'test_stochastic'),
    ('test[-10:]', 'test_-10..'),
    ('test[:10%]', 'test_..10pct'),
    ('test[:10]', 'test_..10'),
    ('train[1:3] + test', 'train_1..3+test'),
  ],
)
def test_each_split_has_its_own_files(split, stem):
  assert split_stem(split) == stem
  assert predictions_file(split) == predictions_file(stem)


def _others(folder):
  right = [1] * 40
  _write(folder / 'more', [1] * 41, names=[*_NAMES, 'z'], labels=['a'] * 41)
  _write(folder / 'label', right, labels=['disc', *_LABELS[1:]])
  _write(folder / 'twice', right, names=['test/1', *_NAMES[1:]])
  _write(folder / 'percent', [50] * 40)
  (folder / 'empty').mkdir()
  (folder / 'table.csv').write_text('run,split\na,test\n')


@pytest.mark.parametrize(
  'arguments, message',
  [
    ('--runs={}/a0', 'give --runs and --against, or --groups, --baseline'),
    ('--runs={}/a0 --against={}/b0 --table=t.csv', 'give --runs and'),
    ('--runs={}/a0 --against={}/no*', 'there is no .*/no'),
    ('--runs={}/a0 --against={}/empty', r'dynconv evaluate --workdir='),
    ('--runs={}/a0 --against={}/more', "1 only in .*more.*such as 'z'"),
    (
      '--runs={}/a0 --against={}/label',
      "1 differ in label, such as 'test/0': ring in .*a0.*, disc in .*label",
    ),
    ('--runs={}/a0 --against={}/twice', "lists the example 'test/1' twice"),
    ('--runs={}/a0 --against={}/percent', "must be 0 or 1; got '50'"),
    ('--runs={}/a0,{}/a0 --against={}/b0', 'runs lists a run twice'),
    ('--runs={}/table.csv --against={}/b0', 'it lacks name, label, correct'),
    ('--runs={}/a0 --against={}/b0 --bins=2', '--bins needs --gains'),
    (
      '--runs={}/a0 --against={}/b0 --gains={}/g.csv --bins=21',
      'too many for 40 examples',
    ),
    (
      '--runs={}/label --against={}/label --gains={}/g.csv',
      'does not contain the fraction .*; set --share',
    ),
    (
      '--runs={}/a0 --against={}/b0 --gains={}/table.csv',
      'is not a gains table',
    ),
    ('--groups=a={}/a0 --baseline=b --table=t.csv', "one of a; got 'b'"),
    ('--groups=a --baseline=a --table=t.csv', "NAME=RUNS;...; got 'a'"),
    ('--groups=a={}/a0 --baseline=a --table=t.md', 'must end in .csv'),
    (
      '--groups=a={}/a0 --baseline=a --table={}/table.csv',
      'table.csv is not a table of groups',
    ),
  ],
)
def test_bad_arguments(program, tmp_path, runs, arguments, message):
  _others(tmp_path)
  before = sorted(tmp_path.rglob('*'))
  arguments = [part.replace('{}', str(tmp_path)) for part in arguments.split()]
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    program('compare', *arguments)
  assert sorted(tmp_path.rglob('*')) == before


def test_runs_that_were_evaluated(program, dynconv_run, dense_run, tmp_path):
  accuracies = []
  for name, run in (('dynconv', dynconv_run), ('dense', dense_run)):
    folder = shutil.copytree(run, tmp_path / name)
    stdout = program(
      'evaluate', f'--workdir={folder}', '--split=test', '--num_maps=0'
    )
    accuracies.append(_last(stdout))
  result = _last(
    program(
      'compare', f'--runs={tmp_path}/dynconv', f'--against={tmp_path}/dense'
    )
  )
  assert result['num_examples'] == 20
  for group, summary in zip(('runs', 'against'), accuracies, strict=True):
    for key in ('accuracy', 'gmacs_mean'):
      assert result[group][key] == pytest.approx(summary[key], rel=1e-6)
  only = result['mcnemar']
  points = 100 * (only['only_runs'] - only['only_against']) / 20
  assert result['difference'] == pytest.approx(points)
