"""Options: fields of frozen dataclasses that can be written as flags.

Each option has a help text and, optionally, a range of allowed values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dynconv_jax.checks import check_choice

_KINDS = {
  int: 'an integer',
  float: 'a number',
  float | None: 'a number or empty',
  bool: 'true or false',
  tuple[float, ...]: 'numbers separated by commas',
  tuple[int, ...]: 'integers separated by commas',
}


class Range(typing.NamedTuple):
  """A predicate for allowed values, and its text for error messages."""

  holds: Callable[[Any], bool]
  text: str


POSITIVE = Range(lambda v: v > 0, '> 0')
NOT_NEGATIVE = Range(lambda v: v >= 0, '>= 0')
SHARE = Range(lambda v: 0 <= v <= 1, 'in [0, 1]')
BELOW_ONE = Range(lambda v: 0 <= v < 1, 'in [0, 1)')
RISING = Range(
  lambda v: list(v) == sorted(set(v)) and all(0 < m < 1 for m in v),
  'increasing fractions in (0, 1)',
)


def between(low: float, high: float) -> Range:
  """Returns the range from `low` to `high`, both included."""
  return Range(lambda v: low <= v <= high, f'in [{low}, {high}]')


def option(
  default: Any,
  help: str,
  *,
  operational: bool = False,
  allowed: Range | Sequence[str] | None = None,
  before: Any = None,
) -> Any:
  """Returns a field of a dataclass of options.

  Args:
    default: the default value.
    help: one sentence for users.
    operational: whether the option affects only paths or output, not results.
      It may then change when a run resumes.
    allowed: the allowed values: a range, or a list of names.
    before: the value for runs that are older than the option, whose flag files
      lack it. None if flag files must contain the option.
  """
  metadata = dict(
    help=help, operational=operational, allowed=allowed, before=before
  )
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """No options."""


@dataclasses.dataclass(frozen=True)
class Option:
  """An option of a dataclass.

  Attributes:
    name: name of the field and its flag.
    kind: type of the values.
    default: the default value.
    help: one sentence for users.
    operational: see `option`.
    allowed: see `option`.
    before: see `option`.
  """

  name: str
  kind: Any
  default: Any
  help: str = ''
  operational: bool = False
  allowed: Range | Sequence[str] | None = None
  before: Any = None

  def parse(self, text: str) -> Any:
    """Parses a value.

    Raises:
      ValueError: the text does not have the option's type.
    """
    try:
      return _parse(self.kind, text.strip())
    except (KeyError, ValueError):
      kind = _KINDS.get(self.kind, f'of type {self.kind}')
      raise ValueError(f'{self.name} must be {kind}; got {text!r}') from None

  def check(self, value: Any) -> None:
    """Raises ValueError unless a value is finite, allowed, and of the type."""
    if value is not None and not _fits(self.kind, value):
      is_tuple = typing.get_origin(self.kind) is tuple
      kind = None if is_tuple else _KINDS.get(self.kind)
      kind = kind or f'of type {self.kind}'
      raise ValueError(f'{self.name} must be {kind}; got {value!r}')
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
      raise ValueError(f'{self.name} must be finite; got {value}')
    if self.allowed is None or value is None:
      return
    if not isinstance(self.allowed, Range):
      check_choice(self.name, value, self.allowed)
    elif not self.allowed.holds(value):
      raise ValueError(f'{self.name} must be {self.allowed.text}; got {value}')


@functools.cache
def options_of(kind: type) -> Mapping[str, Option]:
  """Returns the options of a dataclass by name, without its other fields."""
  types = typing.get_type_hints(kind)
  return {
    field.name: Option(
      field.name, types[field.name], field.default, **field.metadata
    )
    for field in dataclasses.fields(kind)
    if 'help' in field.metadata
  }


def values_of(options: Any) -> dict[str, Any]:
  """Returns the values of a dataclass's options by name."""
  return {name: getattr(options, name) for name in options_of(type(options))}


def make(kind: type, values: Mapping[str, Any]) -> Any:
  """Returns a dataclass with its options taken from `values`."""
  known = options_of(kind)
  return kind(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in values.items()
      if name in known
    }
  )


def parse(kind: type, texts: Mapping[str, str]) -> dict[str, Any]:
  """Parses the values of a dataclass's options; returns them by name.

  Options with the default None or an empty list, and options with `before`, may
  be missing.

  Raises:
    ValueError: options are missing or have the wrong type; the message names
      each of them.
  """
  values, errors = {}, []
  for name, known in options_of(kind).items():
    if name in texts:
      try:
        values[name] = known.parse(texts[name])
      except ValueError as error:
        errors.append(str(error))
    elif known.before is not None:
      values[name] = known.before
    elif known.default not in (None, ()):
      errors.append(f'{name} is missing')
  if errors:
    raise ValueError('; '.join(errors))
  return values


def errors_of(options: Any) -> list[str]:
  """Returns the error messages of a dataclass's options."""
  return errors(
    functools.partial(known.check, getattr(options, name))
    for name, known in options_of(type(options)).items()
  )


def errors(checks: Iterable[Callable[[], Any]]) -> list[str]:
  """Returns the messages of the checks that fail.

  Args:
    checks: raise ValueError or FileNotFoundError on failure.
  """
  messages = []
  for check in checks:
    try:
      check()
    except (FileNotFoundError, ValueError) as error:
      messages.append(str(error))
  return messages


def to_text(value: Any) -> str:
  """Formats a value for a flag; `Option.parse` is the inverse."""
  if isinstance(value, tuple):
    return ','.join(map(to_text, value))
  if isinstance(value, bool):
    return str(value).lower()
  return '' if value is None else str(value)


def _fits(kind: Any, value: Any) -> bool:
  """Returns False for text or a list where a number is needed, and so on."""
  if typing.get_origin(kind) is tuple:
    part, _ = typing.get_args(kind)
    return isinstance(value, list | tuple) and all(
      _fits(part, v) for v in value
    )
  return kind not in _KINDS or not isinstance(value, list | str | tuple)


def _parse(kind: Any, text: str) -> Any:
  if kind is bool:
    return {'true': True, 'false': False}[text]
  if typing.get_origin(kind) is tuple:
    part, _ = typing.get_args(kind)
    # Empty entries are rejected by later checks.
    return tuple(_parse(part, t) for t in text.split(',')) if text else ()
  if kind == float | None:
    return float(text) if text else None
  return kind(text)
