"""The `dynconv` command, which runs the programs of this package.

This module imports nothing slow. The help of each program is stored as text.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pathlib
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from dynconv_jax import extras

_FOLDER = pathlib.Path(__file__).parent
HELP = ('--help', '-h', '-help', '--helpshort', '--helpfull')

# Command names and their modules in this package.
COMMANDS = {
  'train': 'train',
  'evaluate': 'evaluate',
  'predict': 'predict',
  'sweep': 'sweep',
  'compare': 'compare',
  'plot': 'plot',
  'count': 'count_macs',
  'benchmark': 'benchmark',
  'demo': 'demo',
  'import': 'import_weights',
  'export onnx': 'export_onnx',
  'export stablehlo': 'export_stablehlo',
  'export weights': 'export_weights',
  'export web': 'export_web',
  'export zoo': 'export_zoo',
}


def main() -> None:
  """Runs the program named on the command line."""
  arguments = sys.argv[1:]
  if arguments[:1] == ['--version']:
    from importlib import metadata

    print(metadata.version('dynconv-jax'))
    return
  words = 0
  while (
    words < len(arguments) and ' '.join(arguments[: words + 1]) in _prefixes()
  ):
    words += 1
  command, rest = ' '.join(arguments[:words]), arguments[words:]
  if command in COMMANDS:
    run(COMMANDS[command], rest)
  elif not rest or rest[0] in HELP:
    print(_overview(command))
    sys.exit(0 if rest else 2)
  else:
    allowed = {name.removeprefix(f'{command} ') for name in _prefixes()}
    fail(f'unknown command {rest[0]!r}', rest[0], allowed)


def run(
  name: str, arguments: Sequence[str] | None = None, *, live: bool = False
) -> None:
  """Runs a program.

  Args:
    name: name of the program's module, such as 'count_macs'.
    arguments: the program's arguments. None: those of the command line.
    live: whether to generate help from the flags, which imports the program,
      instead of reading the stored text.
  """
  arguments = sys.argv[1:] if arguments is None else arguments
  command = next(k for k, module in COMMANDS.items() if module == name)
  # As with `python -m`, so that --method=package.module:METHOD can be local.
  if '' not in sys.path and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  # Components given as package.module:NAME may add flags.
  live |= any(':' in argument for argument in arguments)
  live |= not help_file(name).exists()
  if not live and any(argument in HELP for argument in arguments):
    print(help_file(name).read_text(), end='')
    return
  sys.argv = [f'dynconv {command}', *find_flag_files(arguments)]
  try:
    module = importlib.import_module(f'{__package__}.{name}')
    from dynconv_jax.cli import program
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except extras.MissingError as error:
    sys.exit(f'error: {error}')
  program.run(module.main)


def help_file(name: str) -> pathlib.Path:
  """Returns the path of a program's help, written by `cli.flag_help`.

  Args:
    name: name of the program's module.
  """
  return _FOLDER / f'help/{name}.txt'


def find_flag_files(arguments: Sequence[str]) -> list[str]:
  """Returns arguments with names of bundled flag files replaced by paths.

  A name that is not a file in the current folder, as in
  --flagfile=spots_dynconv, refers to a flag file of this package.

  Args:
    arguments: command-line arguments.
  """
  resolved = list(arguments)
  for i, argument in enumerate(resolved):
    if argument in ('--flagfile', '-flagfile') and i + 1 < len(resolved):
      resolved[i + 1] = _flag_file(resolved[i + 1])
    elif argument.startswith(('--flagfile=', '-flagfile=')):
      flag, _, name = argument.partition('=')
      resolved[i] = f'{flag}={_flag_file(name)}'
  return resolved


def fail(message: str, given: str, allowed: Iterable[str]) -> NoReturn:
  """Prints an error with a suggestion and exits with status 2.

  Args:
    message: the error message.
    given: the invalid name.
    allowed: the allowed names, of which the closest is suggested.
  """
  near = difflib.get_close_matches(given, allowed, n=1)
  hint = f'; did you mean {near[0]}?' if near else ''
  print(f'error: {message}{hint}', file=sys.stderr)
  sys.exit(2)


def _flag_file(name: str) -> str:
  path = pathlib.Path(name).expanduser()
  if path.exists() or len(path.parts) != 1:
    return name
  bundled = {file.stem: str(file) for file in _FOLDER.glob('flags/*.flags')}
  stem = name.removesuffix('.flags')
  if stem not in bundled:
    fail(f'there is no flag file {name}', stem, bundled)
  return bundled[stem]


def _prefixes() -> set[str]:
  """Returns the commands and their first words, such as 'export'."""
  return {*COMMANDS, *(name.split()[0] for name in COMMANDS)}


def _overview(group: str = '') -> str:
  """Returns a list of commands with one line each."""
  lines = [f'dynconv {group or "COMMAND"} ... [--flag=value ...]', '']
  for command, name in COMMANDS.items():
    if command.startswith(group) and (file := help_file(name)).exists():
      about, *_ = file.read_text().splitlines()
      lines.append(f'  {command:18}{about}')
  lines += ['', 'dynconv COMMAND --help shows the flags of a command.']
  return '\n'.join(lines)
