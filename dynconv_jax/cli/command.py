"""The command `dynconv`: runs a program of this package.

Imports nothing that takes long: a program's help is kept as text.
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

# What is typed, and the module of this folder that runs.
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
  """Runs the program that the command line names."""
  arguments = sys.argv[1:]
  if arguments[:1] == ['--version']:
    from importlib import metadata

    print(metadata.version('dynconv-jax'))
    return
  words = 0
  while (
    words < len(arguments) and ' '.join(arguments[: words + 1]) in _beginnings()
  ):
    words += 1
  given, rest = ' '.join(arguments[:words]), arguments[words:]
  if given in COMMANDS:
    run(COMMANDS[given], rest)
  elif not rest or rest[0] in HELP:
    print(_overview(given))
    sys.exit(0 if rest else 2)
  else:
    allowed = {name.removeprefix(f'{given} ') for name in _beginnings()}
    fail(f'unknown command {rest[0]!r}', rest[0], allowed)


def run(
  name: str, arguments: Sequence[str] | None = None, *, live: bool = False
) -> None:
  """Runs a program.

  Args:
    name: of its module, such as 'count_macs'.
    arguments: of the program; None: those of the command line.
    live: whether its help is made of its flags, which takes as long as its
      imports, rather than read.
  """
  arguments = sys.argv[1:] if arguments is None else arguments
  command = next(k for k, module in COMMANDS.items() if module == name)
  # As `python -m` has it: --method=package.module:METHOD may lie here.
  if '' not in sys.path and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  # What others expect of a program named on the command line adds flags.
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
  """Returns the file of a program's help; `dynconv_jax.cli.flag_help` writes.

  Args:
    name: of its module.
  """
  return _FOLDER / f'help/{name}.txt'


def find_flag_files(arguments: Sequence[str]) -> list[str]:
  """Returns arguments in which flag files of this package are full paths.

  A name that is no file in the current folder is one of this package's:
  --flagfile=spots_dynconv.

  Args:
    arguments: of a command line.
  """
  found = list(arguments)
  for i, argument in enumerate(found):
    if argument in ('--flagfile', '-flagfile') and i + 1 < len(found):
      found[i + 1] = _flag_file(found[i + 1])
    elif argument.startswith(('--flagfile=', '-flagfile=')):
      flag, _, given = argument.partition('=')
      found[i] = f'{flag}={_flag_file(given)}'
  return found


def fail(message: str, given: str, allowed: Iterable[str]) -> NoReturn:
  """Ends the program with one line, which names the nearest, and status 2.

  Args:
    message: what is wrong.
    given: the name that was given.
    allowed: names.
  """
  near = difflib.get_close_matches(given, allowed, n=1)
  hint = f'; did you mean {near[0]}?' if near else ''
  print(f'error: {message}{hint}', file=sys.stderr)
  sys.exit(2)


def _flag_file(given: str) -> str:
  path = pathlib.Path(given).expanduser()
  if path.exists() or len(path.parts) != 1:
    return given
  ours = {file.stem: str(file) for file in _FOLDER.glob('flags/*.flags')}
  stem = given.removesuffix('.flags')
  if stem not in ours:
    fail(f'there is no flag file {given}', stem, ours)
  return ours[stem]


def _beginnings() -> set[str]:
  """Returns the commands and what they begin with: 'export'."""
  return {*COMMANDS, *(name.split()[0] for name in COMMANDS)}


def _overview(group: str = '') -> str:
  """Returns a line for each command."""
  lines = [f'dynconv {group or "COMMAND"} ... [--flag=value ...]', '']
  for command, name in COMMANDS.items():
    if command.startswith(group) and (file := help_file(name)).exists():
      about, *_ = file.read_text().splitlines()
      lines.append(f'  {command:18}{about}')
  lines += ['', 'dynconv COMMAND --help shows the flags of a command.']
  return '\n'.join(lines)
