"""Command-line flags of a training run, one a field of `Config`."""

from __future__ import annotations

import dataclasses
import typing

from absl import flags

from dynconv_jax.training.config import Config


def define() -> None:
  """Defines a flag for every field of `Config`."""
  types = typing.get_type_hints(Config)
  for field in dataclasses.fields(Config):
    kind, help_text = types[field.name], field.metadata['help']
    default = field.default
    if kind is bool:
      flags.DEFINE_bool(field.name, default, help_text)
    elif kind is int:
      flags.DEFINE_integer(field.name, default, help_text)
    elif kind in (float, float | None):
      flags.DEFINE_float(field.name, default, help_text)
    elif kind is str:
      flags.DEFINE_string(field.name, default, help_text)
    else:
      flags.DEFINE_list(field.name, [str(v) for v in default], help_text)


def read() -> Config:
  """Returns the configuration that the flags give.

  Raises:
    ValueError: an entry of a list of numbers is not a number.
  """
  types = typing.get_type_hints(Config)
  values = {}
  for field in dataclasses.fields(Config):
    value = flags.FLAGS[field.name].value
    if types[field.name] == tuple[str, ...]:
      value = tuple(value)
    elif types[field.name] == tuple[float, ...]:
      try:
        value = tuple(float(v) for v in value)
      except ValueError:
        raise ValueError(
          f'{field.name} must be numbers, with commas between; got {value}'
        ) from None
    values[field.name] = value
  return Config(**values)
