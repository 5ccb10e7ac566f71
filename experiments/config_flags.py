"""Command-line flags of a training run, one a field of `Config`."""

from __future__ import annotations

import dataclasses
import typing

from absl import flags

from dynconv_jax.training.config import Config


def define(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines a flag for every field of `Config`.

  Args:
    flag_values: where to; by default the program's.
  """
  types = typing.get_type_hints(Config)
  for field in dataclasses.fields(Config):
    kind, help_text = types[field.name], field.metadata['help']
    default = field.default
    if kind is bool:
      define_one = flags.DEFINE_bool
    elif kind is int:
      define_one = flags.DEFINE_integer
    elif kind in (float, float | None):
      define_one = flags.DEFINE_float
    elif kind is str:
      define_one = flags.DEFINE_string
    else:
      define_one, default = flags.DEFINE_list, [str(v) for v in default]
    define_one(field.name, default, help_text, flag_values=flag_values)


def read(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
  """Returns the configuration that the flags give.

  Args:
    flag_values: parsed; by default the program's.

  Raises:
    ValueError: an entry of a list of numbers is not one.
  """
  types = typing.get_type_hints(Config)
  values = {}
  for field in dataclasses.fields(Config):
    value = flag_values[field.name].value
    if types[field.name] == tuple[str, ...]:
      value = tuple(value)
    elif types[field.name] in (tuple[float, ...], tuple[int, ...]):
      kind, _ = typing.get_args(types[field.name])
      try:
        value = tuple(kind(v) for v in value)
      except ValueError:
        numbers = 'integers' if kind is int else 'numbers'
        raise ValueError(
          f'{field.name} must be {numbers}, with commas between; got {value}'
        ) from None
    values[field.name] = value
  return Config(**values)
