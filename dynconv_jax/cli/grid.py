"""The runs of a sweep: the product of grids of flags, each run once."""

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

# What a figure shows by itself, beside what a method's curve moves along; other
# flags that vary are told apart by the recipe of a run.
_SHOWN = ('method', 'model', 'width_multiplier', 'seed')


@dataclasses.dataclass(frozen=True)
class Axis:
  """The values of one flag.

  Attributes:
    name: of an option of a run.
    values: of its type.
    method: the only method that they are for, or '' for all.
  """

  name: str
  values: tuple[Any, ...]
  method: str = ''

  @property
  def named(self) -> bool:
    """Whether names of runs say the value; one for one method is a setting."""
    return not self.method or len(self.values) > 1


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    name: unique in the sweep, fit for a folder.
    config: everything about it.
    settings: the flags of the grids, as text; '' where one does not matter to
      the method.
    recipe: what tells its curve from others of its method, or ''.
  """

  name: str
  config: Config
  settings: dict[str, str]
  recipe: str


def matters(name: str, method: str) -> bool:
  """Returns whether an option of a run changes a run of a method.

  Args:
    name: of the option.
    method: its name.
  """
  others = (options_of(load_method(m).options) for m in METHODS)
  if not any(name in options for options in others):
    return True
  return name in options_of(load_method(method).options)


def make_runs(base: Mapping[str, Any], grids: Sequence[str]) -> list[Run]:
  """Returns the runs of a product of grids, seed by seed.

  A flag that does not matter to a method does not multiply its runs.

  Args:
    base: the values of the flags that are in no grid, by name.
    grids: each 'NAME=VALUE,VALUE' or, for one method alone and in place of the
      grid for all, 'METHOD:NAME=VALUE,VALUE'. Values of a flag that is a list
      are separated by semicolons.

  Raises:
    ValueError: a grid is not of this form, or a run would not be valid; names
      every error.
  """
  axes, errors = [], []
  options = _options(base, grids)
  for text in grids:
    try:
      axis = _parse(text, options)
      if any((a.name, a.method) == (axis.name, axis.method) for a in axes):
        raise ValueError(f'--grid={text}: there is another grid of this flag')
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
      errors.append(f'{axis.name} does not matter to {axis.method}')
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
  for name, found in named.items():
    for text in [f'{name}={base.get(name, "")}', *grids]:
      left, _, values = text.partition('=')
      if left.strip().rpartition(':')[2] == name:
        found += [v.strip() for v in values.split(',') if ':' in v]
  return all_options(**{f'{name}s': found for name, found in named.items()})


def _known(method: str) -> bool:
  try:
    load_method(method)
  except ValueError:
    return False
  return True


def _parse(text: str, options: Mapping[str, Any]) -> Axis:
  """Returns the axis of a grid; raises ValueError naming what is wrong."""
  left, equals, right = text.partition('=')
  method, colon, name = left.strip().rpartition(':')
  if not equals or bool(method) != bool(colon):
    raise ValueError(
      f'--grid={text}: must be NAME=VALUE,VALUE or METHOD:NAME=VALUE,VALUE'
    )
  if name not in options:
    raise ValueError(f'--grid={text}: {name!r} is no flag of a training run')
  option = options[name]
  if option.operational:
    raise ValueError(f'--grid={text}: {name} changes nothing about a run')
  if name == 'method' and method:
    raise ValueError(f'--grid={text}: method cannot be for one method alone')
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
    shown.add('image_size')  # What a curve moves along, if nothing else does.
  options = [
    (method,) if axis.name == 'method' else axis.values for axis in used
  ]
  for values in itertools.product(*options):
    chosen = dict(zip((axis.name for axis in used), values, strict=True))
    config = Config.make(**{**base, 'method': method, **chosen})
    flat = config.flat()
    # An option of another network or data set changes nothing here.
    labels = [
      _label(axis.name, chosen[axis.name])
      for axis in used
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
  """Returns a value as in a flag, whole numbers without a point."""
  parts = value if isinstance(value, tuple) else (value,)
  return ','.join(to_text(part).removesuffix('.0') for part in parts)


def _short(value: Any) -> str:
  """Returns a value as text, of a path the last part."""
  return _text(value).rstrip('/').rpartition('/')[2]


def _label(name: str, value: Any) -> str:
  """Returns 'budget0.3', or 'crop-none' for text, fit for a file name."""
  text = re.sub(r'[^\w.+-]+', '-', _short(value)).strip('-') or 'none'
  if name in ('method', 'model'):
    return text
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return f'{name}{text}' if number else f'{name}-{text}'


def _unique(runs: Sequence[Run]) -> list[Run]:
  """Returns the runs, numbered where two have the same name."""
  known, unique = {}, []
  for run in runs:
    number = known[run.name] = known.get(run.name, 0) + 1
    if number > 1:
      run = dataclasses.replace(run, name=f'{run.name}-{number}')
    unique.append(run)
  return unique


def _invalid(runs: Sequence[Run]) -> list[str]:
  """Returns each error of the configurations once, with the runs it is of."""
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
