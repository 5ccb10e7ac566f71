"""The program in processes of its own: it defines flags that others define."""

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


def test_redraws_the_learning_curves_of_a_workdir(tmp_path):
  rows = [
    {'step': 10 * i, 'epoch': i, 'split': 'train', 'loss': 1 / i}
    for i in (1, 2)
  ]
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / 'metrics.jsonl').write_text(lines + '{"step": 30, "ep')
  process = _start(f'--workdir={tmp_path}')
  stdout, stderr = process.communicate()
  assert process.returncode == 0, stderr
  png = tmp_path / 'learning_curves.png'
  assert stdout == f'wrote {png} and {png.with_suffix(".svg")}\n'
  assert png.stat().st_size


def test_errors_are_one_line(tmp_path):
  empty = tmp_path / 'empty.csv'
  empty.touch()
  bad = tmp_path / 'bad.csv'
  bad.write_text(_HEADER + 'resnet18,dynconv,0.5,0,high,0.08\n')
  output = f'--output={tmp_path / "fig.png"}'
  cases = [
    ([], 'give one of --results=FILE.csv and --workdir=DIR'),
    ([f'--results={bad}', f'--workdir={tmp_path}'], 'give one of --results'),
    ([f'--results={bad}'], '--results needs --output=FIG.png'),
    ([f'--results={tmp_path}/none.csv', output], 'there is no file'),
    ([f'--results={empty}', output], 'is empty: it has no header'),
    ([f'--results={bad}', output], "row 1, column 'accuracy': 'high' is not"),
    ([f'--results={bad}', output, '--x=ms'], "gmacs_mean; got 'ms'"),
    ([f'--results={bad}', '--output=fig.pdf'], 'written as .png and .svg'),
    ([f'--workdir={tmp_path}'], 'is no workdir of a run'),
    ([f'--workdir={tmp_path}', '--x=ms'], '--x belongs to --results'),
    (['fig.png'], 'unknown arguments: fig.png'),
  ]
  # One process runs them all: each import of the package takes seconds.
  code = (
    'import json, sys\n'
    'from absl import flags\n'
    'from experiments import plot\n'
    'for arguments in json.loads(sys.argv[1]):\n'
    '  flags.FLAGS.unparse_flags()\n'
    '  for name in ("results", "workdir", "output", "x"):\n'
    '    flags.FLAGS[name].unparse()\n'
    '  try:\n'
    '    plot.main(flags.FLAGS(["plot", *arguments]))\n'
    '    print("no error")\n'
    '  except (OSError, ValueError) as error:\n'
    '    print(error)\n'
  )
  program = [sys.executable, '-c', code]
  arguments = json.dumps([case for case, _ in cases])
  stdout = subprocess.check_output([*program, arguments], text=True)
  for line, (case, message) in zip(stdout.splitlines(), cases, strict=True):
    assert message in line, case
  assert not (tmp_path / 'fig.png').exists()


def test_an_error_ends_the_program_with_status_one(tmp_path):
  process = _start(f'--results={tmp_path}/none.csv', '--output=fig.png')
  stdout, stderr = process.communicate()
  assert process.returncode == 1
  assert stdout == ''
  assert stderr == f"error: there is no file '{tmp_path}/none.csv'\n"
