"""Tests of the command `dynconv`, its help, and its flag files."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from dynconv_jax.cli import command
from dynconv_jax.training import config as config_lib

ROOT = pathlib.Path(command.__file__).parents[2]


def _dynconv(*arguments, cwd=None):
  return subprocess.run(
    [sys.executable, '-m', 'dynconv_jax.cli', *arguments],
    cwd=cwd,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_help_lists_every_command_in_a_line():
  done = _dynconv('--help')
  assert (done.returncode, done.stderr) == (0, '')
  listed = re.findall(r'^  (\w+(?: \w+)?)  +[A-Z].*\.$', done.stdout, re.M)
  assert listed == list(command.COMMANDS)
  assert _dynconv().returncode == 2
  assert _dynconv('export').returncode == 2
  assert '--workdir' in _dynconv('train').stderr
  exports = [name for name in listed if name.startswith('export ')]
  shown = _dynconv('export', '--help').stdout
  assert re.findall(r'^  (\w+ \w+)', shown, re.M) == exports


@pytest.mark.parametrize(
  'arguments, line',
  [
    (['trian'], "unknown command 'trian'; did you mean train?"),
    (['export', 'onyx'], "unknown command 'onyx'; did you mean onnx?"),
    (['--model=resnet18'], "unknown command '--model=resnet18'"),
    (['count', '--modle=x'], 'unknown flag --modle; did you mean --model?'),
    (['count', '--depth=x'], 'flag --depth=x: invalid literal'),
    (['plot', '--flagfile=spots'], 'there is no flag file spots; did you mean'),
  ],
)
def test_mistakes_are_one_line_and_status_2(arguments, line):
  done = _dynconv(*arguments)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith(f'error: {line}')
  assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('name', command.COMMANDS.values())
def test_help_is_that_of_the_flags(program, name):
  program.load(name)
  assert command.help_file(name).read_text() == program.help[name], (
    'python -m dynconv_jax.cli.flag_help writes the help anew'
  )


def test_help_has_every_option_of_a_run():
  shown = command.help_file('train').read_text()
  own, rest = shown.split('\nFlags:\n')[1].split('\nOptions of ', 1)
  rest = rest.split('\nFlags of all programs:\n')[0]
  found = re.findall(r'^  --(?:\[no\])?(\w+)(?: |=\.\.\.)', rest, re.M)
  assert sorted(found) == sorted(config_lib.all_options())
  assert re.search(r'--workdir=.*\(required\)', own)


def test_help_takes_no_imports():
  code = (
    'import sys; from dynconv_jax.cli import command; '
    "command.run('train', ['--help']); "
    "print({'absl', 'jax', 'numpy'} & set(sys.modules))"
  )
  lines = subprocess.check_output([sys.executable, '-c', code], text=True)
  assert lines.startswith('Trains a network.\n')
  assert lines.endswith('\nset()\n')


def test_help_of_what_is_named_outside_the_package(tmp_path):
  """The module is found in the current folder, and help shows its options."""
  source = (ROOT / 'examples/top_k_gate.py').read_text()
  (tmp_path / 'mine.py').write_text(source)
  done = _dynconv('train', '--method=mine:METHOD', '--help', cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert re.search(r'Options of mine:METHOD:\n  --keep=', done.stdout)


def test_flag_files_are_found_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = ROOT / 'experiments/flags/spots_dynconv.flags'
  for arguments in (
    ['--flagfile=spots_dynconv'],
    ['-flagfile=spots_dynconv.flags'],
    ['--seed=1', '--flagfile', 'spots_dynconv'],
  ):
    *_, found = command.find_flag_files(arguments)
    assert pathlib.Path(found.split('=')[-1]).samefile(path)
  assert command.find_flag_files(['--seed', 'spots_dynconv', '--flagfile']) == [
    *('--seed', 'spots_dynconv', '--flagfile')
  ]
  # A file with this name takes precedence; a path is a path.
  (tmp_path / 'spots_dynconv').touch()
  for given in ('spots_dynconv', 'flags/spots_dynconv'):
    arguments = [f'--flagfile={given}']
    assert command.find_flag_files(arguments) == arguments
