"""Help texts of programs, with all their flags in groups.

`python -m dynconv_jax.cli.flag_help` writes them to help/, where the command
`dynconv` reads them without importing the program.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

from absl import flags

from dynconv_jax.cli import command

# Prefix of the names of flag groups, which `config_flags` registers.
GROUP = 'Options of '
_COMMON = {
  'flagfile': 'Reads flags from a file, a path or a name like spots_dynconv.',
  'verbosity': 'Log level; 1 and above shows tracebacks and debug messages.',
}
_WIDTH, _COLUMN = 80, 28


def text(doc: str, flag_values: flags.FlagValues = flags.FLAGS) -> str:
  """Returns the help of the program whose flags are defined.

  Args:
    doc: docstring of the program's module.
    flag_values: the program's flags.
  """
  by_module = flag_values.flags_by_module_dict()
  groups = {
    name: group for name, group in by_module.items() if name.startswith(GROUP)
  }
  grouped = {flag.name for group in groups.values() for flag in group}
  own = [
    flag
    for name, group in by_module.items()
    if name == sys.argv[0] or name.startswith(f'{__package__}.')
    for flag in group
    if flag.name not in grouped
  ]
  defined = list(flag_values)
  own.sort(key=lambda flag: defined.index(flag.name))
  lines = [doc.strip()]
  for title, group in {'Flags': own, **groups}.items():
    if group:
      lines += ['', textwrap.fill(f'{title}:', _WIDTH), *map(_entry, group)]
  lines += ['', 'Flags of all programs:']
  lines += [_columns(f'--{name}=...', about) for name, about in _COMMON.items()]
  return '\n'.join(lines) + '\n'


def _entry(flag: flags.Flag) -> str:
  notes = []
  if flag.boolean:
    name = f'--[no]{flag.name}'
  else:
    name = f'--{flag.name}=...'
    syntax = getattr(flag.parser, 'syntactic_help', '')
    if isinstance(flag.parser, flags.EnumParser):
      notes.append(f'one of {", ".join(flag.parser.enum_values)}')
    elif syntax not in ('', 'a number', 'an integer', 'a comma separated list'):
      notes.append(syntax)
  if any('other than None' in check.message for check in flag.validators):
    notes.append('required')
  if flag.default not in (None, '', []):
    default = flag.default
    if isinstance(default, list):
      default = ','.join(map(str, default))
    default = str(default).lower() if flag.boolean else default
    notes.append(f'default: {default}')
  about = ' '.join(flag.help.split())
  return _columns(name, f'{about} ({"; ".join(notes)})' if notes else about)


def _columns(name: str, about: str) -> str:
  lines = textwrap.wrap(about, _WIDTH - _COLUMN)
  first = f'  {name}'
  if len(first) < _COLUMN:
    first = first.ljust(_COLUMN) + lines.pop(0)
  return '\n'.join([first, *(' ' * _COLUMN + line for line in lines)])


def main() -> None:
  """Writes the help of all programs, importing each in its own process."""
  for name in command.COMMANDS.values():
    code = (
      'from dynconv_jax.cli import command; '
      f"command.run({name!r}, ['--help'], live=True)"
    )
    made = subprocess.check_output([sys.executable, '-c', code], text=True)
    path = command.help_file(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(made)
    print(f'wrote {path}')


if __name__ == '__main__':
  main()
