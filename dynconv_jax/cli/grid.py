"""Runs of a sweep: the product of grids of flags, without duplicates."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dynconv_jax.methods.method import METHODS, load_method
from dynconv_jax.options import options_of, to_text
from dynconv_jax.training.config import Config, all_options

# Flags that figures distinguish by themselves, in addition to each method's
# `knob`. Other varying flags become part of a run's recipe.
_SHOWN = ('method', 'model', 'width_multiplier', 'seed')


@dataclasses.dataclass(frozen=True)
class Axis:
  """The values of one flag.

  Attributes:
    name: name of an option of a run.
    values: values of the option's type.
    method: the only method that the values apply to, or '' for all.
  """

  name: str
  values: tuple[Any, ...]
  method: str = ''

  @property
  def named(self) -> bool:
    """Whether run names include the value.

    A single value for a single method is a fixed setting and is not included.
    """
    return not self.method or len(self.values) > 1


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    name: name that is unique in the sweep and valid as a folder name.
    config: configuration of the run.
    settings: the flags of the grids, as text; '' for flags that do not affect
      the method.
    recipe: text that distinguishes its curve from others of the same method,
      or ''.
  """

  name: str
  config: Config
  settings: dict[str, str]
  recipe: str


def matters(name: str, method: str) -> bool:
  """Returns whether an option affects runs of a method.

  Args:
    name: name of the option.
    method: name of the method.
  """
  others = (options_of(load_method(m).options) for m in METHODS)
  if not any(name in options for options in others):
    return True
  return name in options_of(load_method(method).options)


def make_runs(base: Mapping[str, Any], grids: Sequence[str]) -> list[Run]:
  """Returns the runs of a product of grids, ordered by seed.

  Flags that do not affect a method do not multiply its runs.

  Args:
    base: values of the flags that are in no grid, by name.
    grids: grids as 'NAME=VALUE,VALUE', or 'METHOD:NAME=VALUE,VALUE' to replace
      the common grid for one method. Values of list flags are separated by
      semicolons.

  Raises:
    ValueError: a grid does not have this form, or a run is invalid. The message
      lists every error.
  """
  axes, errors = [], []
  options = _options(base, grids)
  for text in grids:
    try:
      axis = _parse(text, options)
      if any((a.name, a.method) == (axis.name, axis.method) for a in axes):
        raise ValueError(f'--grid={text}: this flag already has a grid')
      axes.append(axis)
    except ValueError as error:
      errors.append(str(error))
  methods = next((a.values for a in axes if a.name == 'method'), None)
  methods = methods or (Config.make(**base).method.method,)
  for axis in axes:
    if axis.method and axis.method not in methods:
      errors.append(
        f'{axis.method}:{axis.name}: the sweep has no runs of {axis.method!r}, '
        f'only of {", ".join(methods)}'
      )
    elif (
      axis.method
      and _known(axis.method)
      and not matters(axis.name, axis.method)
    ):
      errors.append(f'{axis.name} does not affect {axis.method}')
  runs = {}
  for method in methods:
    for run in _product(base, axes, method):
      runs.setdefault(run.config, run)
  runs = _unique(runs.values())
  errors += _invalid(runs)
  if errors:
    raise ValueError('; '.join(errors))
  seeds = list(dict.fromkeys(run.config.run.seed for run in runs))
  return sorted(runs, key=lambda run: seeds.index(run.config.run.seed))


def _options(base: Mapping[str, Any], grids: Sequence[str]):
  """Returns the options of all runs by name."""
  named = {'dataset': [], 'model': [], 'method': []}
  for name, references in named.items():
    for text in [f'{name}={base.get(name, "")}', *grids]:
      left, _, values = text.partition('=')
      if left.strip().rpartition(':')[2] == name:
        references += [v.strip() for v in values.split(',') if ':' in v]
  return all_options(**{f'{name}s': refs for name, refs in named.items()})


def _known(method: str) -> bool:
  try:
    load_method(method)
  except ValueError:
    return False
  return True


def _parse(text: str, options: Mapping[str, Any]) -> Axis:
  """Returns the axis of a grid.

  Raises:
    ValueError: the grid is invalid.
  """
  left, equals, right = text.partition('=')
  method, colon, name = left.strip().rpartition(':')
  if not equals or bool(method) != bool(colon):
    raise ValueError(
      f'--grid={text}: must be NAME=VALUE,VALUE or METHOD:NAME=VALUE,VALUE'
    )
  if name not in options:
    raise ValueError(f'--grid={text}: a training run has no flag {name!r}')
  option = options[name]
  if option.operational:
    raise ValueError(f'--grid={text}: {name} does not affect the result')
  if name == 'method' and method:
    raise ValueError(f'--grid={text}: method cannot be set for one method')
  is_list = typing.get_origin(option.kind) is tuple
  values = []
  for cell in right.split(';' if is_list else ','):
    try:
      values.append(option.parse(cell))
    except ValueError as error:
      raise ValueError(f'--grid={text}: {error}') from None
  return Axis(name, tuple(dict.fromkeys(values)), method)


def _product(
  base: Mapping[str, Any], axes: Sequence[Axis], method: str
) -> Iterator[Run]:
  """Yields the runs of one method."""
  own = {axis.name for axis in axes if axis.method == method}
  used = [
    axis
    for axis in axes
    if axis.method == method
    or (
      not axis.method
      and axis.name not in own
      and (not _known(method) or matters(axis.name, method))
    )
  ]
  varied = [axis.name for axis in used if len(axis.values) > 1]
  knobs = {load_method(m).knob for m in {*METHODS, method} if _known(m)}
  shown = {*_SHOWN, *knobs}
  if not set(varied) & knobs:
    shown.add('image_size')  # Varies along a curve if no knob does.
  options = [
    (method,) if axis.name == 'method' else axis.values for axis in used
  ]
  for values in itertools.product(*options):
    chosen = dict(zip((axis.name for axis in used), values, strict=True))
    config = Config.make(**{**base, 'method': method, **chosen})
    flat = config.flat()
    # Options of other networks or datasets do not apply. The seed comes last.
    labels = [
      _label(axis.name, chosen[axis.name])
      for axis in sorted(used, key=lambda axis: axis.name == 'seed')
      if axis.named and axis.name in flat
    ]
    recipe = [
      f'{name} {_short(chosen[name]) or "none"}'
      for name in varied
      if name not in shown and name in flat
    ]
    settings = {
      name: _text(flat.get(name))
      for name in dict.fromkeys(axis.name for axis in axes)
    }
    name = '_'.join(labels) or method
    yield Run(name, config, settings, ', '.join(recipe))


def _text(value: Any) -> str:
  """Returns a value as in a flag, without '.0' in whole numbers."""
  parts = value if isinstance(value, tuple) else (value,)
  ends = ['.0' if isinstance(part, float) else '' for part in parts]
  texts = map(to_text, parts)
  return ','.join(map(str.removesuffix, texts, ends))


def _short(value: Any) -> str:
  """Returns a value as text, shortened to the last part of a path."""
  return _text(value).rstrip('/').rpartition('/')[2]


def _label(name: str, value: Any) -> str:
  """Returns a label for file names, such as 'budget0.3' or 'crop-none'."""
  text = re.sub(r'[^\w.+-]+', '-', _short(value)).strip('-') or 'none'
  if name in ('method', 'model'):
    return text
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return f'{name}{text}' if number else f'{name}-{text}'


def _unique(runs: Sequence[Run]) -> list[Run]:
  """Returns the runs, with numbers appended to duplicate names."""
  known, unique = {}, []
  for run in runs:
    number = known[run.name] = known.get(run.name, 0) + 1
    if number > 1:
      run = dataclasses.replace(run, name=f'{run.name}-{number}')
    unique.append(run)
  return unique


def _invalid(runs: Sequence[Run]) -> list[str]:
  """Returns each distinct configuration error with the runs that have it."""
  names: dict[str, list[str]] = {}
  for run in runs:
    try:
      run.config.check()
    except ValueError as error:
      names.setdefault(str(error), []).append(run.name)
  return [
    f'{error} ({those[0]}'
    + (f' and {len(those) - 1} more)' if len(those) > 1 else ')')
    for error, those in names.items()
  ]
