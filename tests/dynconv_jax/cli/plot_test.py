"""Tests of the program in its own process, because it defines common flags."""

import json
import subprocess
import sys

_HEADER = 'model,method,budget,seed,accuracy,gmacs_mean\n'


def _start(*arguments):
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.plot', *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_draws_results_and_names_the_files(tmp_path):
  results = tmp_path / 'results.csv'
  results.write_text(
    _HEADER + 'resnet18,dynconv,0.5,0,0.62,0.08\nresnet18,dense,,0,0.7,0.15\n'
  )
  png, svg = tmp_path / 'new' / 'fig.png', tmp_path / 'new' / 'fig.svg'
  process = _start(f'--results={results}', f'--output={png}', '--chance=0.167')
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  assert stdout == f'wrote {png} and {svg}\n'
  assert png.stat().st_size
  assert svg.stat().st_size


def test_draws_several_tables_together(tmp_path):
  one, two = tmp_path / 'one.csv', tmp_path / 'two.csv'
  one.write_text(_HEADER + 'resnet18,dynconv,0.5,0,0.62,0.08\n')
  row = 'resnet18,dynconv,0.5,0,0.7,0.07,inherited\n'
  two.write_text(_HEADER.replace('\n', ',recipe\n') + row)
  svg = tmp_path / 'fig.svg'
  process = _start(
    f'--results={one},{two}', f'--output={svg}', '--series=recipe'
  )
  _, stderr = process.communicate()
  assert process.returncode == 0, stderr
  text = svg.read_text()
  assert 'DynConv -->' in text
  assert 'DynConv, inherited -->' in text


def test_an_error_ends_the_program_with_status_one(tmp_path):
  process = _start(f'--results={tmp_path}/none.csv', '--output=fig.png')
  stdout, stderr = process.communicate()
  assert process.returncode == 1
  assert stdout == ''
  assert stderr == f"error: there is no file '{tmp_path}/none.csv'\n"


def test_workdirs_and_errors(tmp_path):
  rows = [
    {'step': 10 * i, 'epoch': i, 'split': 'train', 'loss': 1 / i}
    for i in (1, 2)
  ]
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'metrics.jsonl').write_text(lines + '{"step": 30, "ep')
  empty = tmp_path / 'empty.csv'
  empty.touch()
  bad = tmp_path / 'bad.csv'
  bad.write_text(_HEADER + 'resnet18,dynconv,0.5,0,high,0.08\n')
  gains = tmp_path / 'gains.csv'
  gains.write_text('share,difference,low,high\n0.1,2,1,3\n')
  timed = tmp_path / 'timed.csv'
  timed.write_text(
    'run,model,method,image_size,accuracy\na_seed0,resnet18,drop,64,0.7\n'
  )
  benchmark = tmp_path / 'benchmark.json'
  times = {'batch_size': 8, 'sparse_ms': 3, 'sparse_over_fastest_dense': 0.5}
  network = {'workdir': 'a_seed0', 'model': 'resnet18', 'image_size': 64}
  benchmark.write_text(
    json.dumps({**network, **times, 'runtimes': {}, 'cpu': 'a CPU'})
  )
  latency = [f'--results={timed}', f'--latency={benchmark}']
  latency += [f'--output={tmp_path / "latency.png"}']
  splits = tmp_path / 'splits.csv'
  row = 'resnet18,dynconv,0.5,0,0.7,0.07,'
  splits.write_text(
    _HEADER.replace('\n', ',split\n')
    + f'{row}test\n{row.replace(",0,", ",1,")}validation\n'
  )
  both = f'--results={splits}'
  drawn = f'--output={tmp_path / "splits.png"}'
  output = f'--output={tmp_path / "fig.png"}'
  curves = run / 'learning_curves'
  cases = [
    ([f'--workdir={run}'], f'wrote {curves}.png and {curves}.svg'),
    ([], 'set one of --results=FILE.csv, --gains=FILE.csv, and'),
    ([f'--results={bad}', f'--workdir={run}'], 'set one of --results'),
    (['--results='], '--results names no file'),
    ([f'--results={bad}', '--x=ms'], '--x needs --output=FIG.png'),
    ([f'--results={bad}'], "row 1, column 'accuracy': 'high' is not"),
    ([f'--results={empty}', output], 'is empty: it has no header'),
    ([f'--results={bad}', output], "row 1, column 'accuracy': 'high' is not"),
    ([f'--results={bad}', output, '--x=ms'], "gmacs_mean; got 'ms'"),
    ([f'--results={bad}', '--output=fig.pdf'], 'written as .png and .svg'),
    ([f'--workdir={tmp_path}'], 'is not the workdir of a run'),
    ([f'--workdir={run}', '--x=ms'], '--x needs --results'),
    ([f'--gains={gains}'], f'wrote {gains.with_suffix(".png")} and'),
    ([f'--gains={bad}'], 'gains need the columns share, difference, low'),
    ([f'--gains={gains}', '--chance=0.1'], '--chance needs --results'),
    ([f'--workdir={run}', '--against=dense'], '--against needs --gains'),
    ([f'--workdir={run}', '--latency=a.json'], '--latency needs --results'),
    ([*latency, '--x=latency_ratio_batch_8'], 'wrote'),
    ([*latency, '--x=latency_ratio_batch_1'], 'latency_ratio_batch_8; got'),
    ([both, output], 'are of the splits test, validation; keep those of'),
    (
      [both, output, '--split=val'],
      'one of test, validation in --results; got',
    ),
    ([both, drawn, '--split=test'], 'wrote'),
    ([both, drawn, '--series=split'], 'wrote'),
    ([f'--workdir={run}', '--split=test'], '--split needs --results'),
    (['fig.png'], 'unknown arguments: fig.png'),
  ]
  # One process runs them all, because importing the package takes seconds.
  code = (
    'import json, sys\n'
    'from absl import flags\n'
    'from dynconv_jax.cli import plot\n'
    'for arguments in json.loads(sys.argv[1]):\n'
    '  flags.FLAGS.unparse_flags()\n'
    '  for name in ("results", "gains", "workdir", "output", "x", "chance", '
    '"latency", "split", "series"):\n'
    '    flags.FLAGS[name].unparse()\n'
    '  try:\n'
    '    plot.main(flags.FLAGS(["plot", *arguments]))\n'
    '  except (OSError, ValueError) as error:\n'
    '    print(error)\n'
  )
  stdout = subprocess.check_output(
    [sys.executable, '-c', code, json.dumps([case for case, _ in cases])],
    text=True,
  )
  for line, (case, message) in zip(stdout.splitlines(), cases, strict=True):
    assert message in line, case
  assert {path.name for path in run.iterdir()} == {
    'metrics.jsonl',
    'learning_curves.png',
    'learning_curves.svg',
  }
  assert not (tmp_path / 'fig.png').exists()
  assert '8 images' in (tmp_path / 'latency.svg').read_text()
