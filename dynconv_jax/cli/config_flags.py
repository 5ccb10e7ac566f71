"""Command-line flags for the options of a training run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from dynconv_jax.cli.flag_help import GROUP
from dynconv_jax.options import Option, Range, options_of, to_text
from dynconv_jax.training import config as config_lib
from dynconv_jax.training.config import Config

# Flags that may name external components, whose options become flags.
_CHOICES = {'dataset': 'datasets', 'model': 'models', 'method': 'methods'}


def define(
  flag_values: flags.FlagValues = flags.FLAGS,
  argv: Sequence[str] | None = None,
) -> None:
  """Defines a flag for every option of a run.

  This includes the options of external components named by --dataset, --model,
  and --method, which are looked up before flags are parsed.

  Args:
    flag_values: flags to add to; by default those of the program.
    argv: the command line; by default `sys.argv`.
  """
  argv = sys.argv if argv is None else argv
  outside = _outside(argv[1:])
  try:
    options = config_lib.all_options(**outside)
  except ValueError as error:
    # The program does not yet handle errors at this point.
    sys.exit(f'error: {error}')
  for name, option in options.items():
    default = option.default
    if option.kind is bool:
      define_one = flags.DEFINE_bool
    elif option.kind is int:
      define_one = flags.DEFINE_integer
    elif option.kind in (float, float | None):
      define_one = flags.DEFINE_float
    elif option.kind is str:
      define_one = flags.DEFINE_string
    else:
      define_one = flags.DEFINE_list
      default = None if default is None else [to_text(v) for v in default]
    define_one(name, default, _help(option), flag_values=flag_values)
  for title, names in _groups(**outside):
    for name in names:
      flag_values.register_flag_by_module(title, flag_values[name])


def define_places(flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Defines flags that override the data locations used in training.

  Args:
    flag_values: flags to add to; by default those of the program.

  Returns:
    The names of the flags.
  """
  names = config_lib.places_of(*config_lib.DATASETS)
  for name in names:
    flags.DEFINE_string(
      name,
      None,
      f'Overrides the {name} used in training.',
      flag_values=flag_values,
    )
  return names


def values(flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
  """Returns the values of all options that are set by flags, by name.

  Args:
    flag_values: parsed flags; by default those of the program.

  Raises:
    ValueError: an entry of a list of numbers is not a number.
  """
  result = {}
  references = {
    plural: [flag_values[name].value]
    for name, plural in _CHOICES.items()
    if ':' in flag_values[name].value
  }
  for name, option in config_lib.all_options(**references).items():
    value = flag_values[name].value
    if isinstance(value, list):
      value = option.parse(','.join(value))
    if value is not None:
      result[name] = value
  return result


def read(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
  """Returns the configuration set by the flags.

  Args:
    flag_values: parsed flags; by default those of the program.

  Raises:
    ValueError: as `values`.
  """
  return Config.make(**values(flag_values))


def without_effect(config: Config, argv: Sequence[str]) -> list[str]:
  """Returns the options in a command line that a configuration does not have.

  Options in flag files are left out, because a flag file may serve several
  methods.

  Args:
    config: configuration read from the flags.
    argv: the command line.
  """
  unused = config_lib.all_options().keys() - config.flat().keys()
  typed = [a.lstrip('-').partition('=')[0] for a in argv if a[:1] == '-']
  negated = {f'no{name}': name for name in unused}
  names = (negated.get(name, name) for name in typed)
  return [name for name in dict.fromkeys(names) if name in unused]


def _help(option: Option) -> str:
  """Returns an option's help with its allowed values."""
  allowed = option.allowed
  if isinstance(allowed, Range):
    stated, text = allowed.text.lower() in option.help.lower(), allowed.text
  else:
    stated = all(name in option.help for name in allowed or ())
    text = f'one of {", ".join(allowed or ())}'
  return option.help if stated else f'{option.help.removesuffix(".")}; {text}.'


def _groups(
  datasets: Sequence[str] = (),
  models: Sequence[str] = (),
  methods: Sequence[str] = (),
) -> Iterator[tuple[str, list[str]]]:
  """Yields (title, names of options) for each group of options.

  Args:
    datasets: names in addition to those of this package.
    models: as `datasets`.
    methods: as `datasets`.
  """
  choices = config_lib.choices(datasets, models, methods)
  for part, kind in config_lib.PARTS.items():
    yield f'{GROUP}the {part}', list(options_of(kind))
    users = {}
    for choice in choices.get(kind, ()):
      for name in options_of(kind.options_type(choice)):
        users.setdefault(name, []).append(choice)
    titles = {}
    for name, names in users.items():
      titles.setdefault(f'{GROUP}{", ".join(names)}', []).append(name)
    yield from titles.items()


def _outside(arguments: Sequence[str]) -> dict[str, list[str]]:
  """Returns the package.module:NAME references in arguments, by kind."""
  try:
    arguments = flags.FLAGS.read_flags_from_files(
      list(arguments), force_gnu=False
    )
  except flags.Error:  # Reported when flags are parsed.
    return {}
  values = {}
  for argument, after in zip(arguments, [*arguments[1:], ''], strict=False):
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name in _CHOICES:
      value = value if equals else after
      values[name] = value
    elif name == 'grid' and equals:
      # A grid of a sweep may name several components.
      name, _, text = value.partition('=')
      if name in _CHOICES:
        values[f'{name}s'] = text
  references = {}
  for name, text in values.items():
    plural = _CHOICES.get(name, name)
    references.setdefault(plural, [])
    references[plural] += [v for v in text.split(',') if ':' in v]
  return references
