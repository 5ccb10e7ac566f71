"""The runs of a sweep: the product of grids of flags, each run once."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from dynconv_jax.training.config import Config, parse_value

# Fields that matter to these methods only; all others matter to every one.
METHODS_OF = {
  'budget': ('dynconv', 'convnet_aig'),
  'budget_warmup': ('dynconv', 'skipnet'),
  'gumbel_milestones': ('dynconv', 'convnet_aig'),
  'gumbel_noise_until': ('dynconv', 'convnet_aig'),
  'gumbel_temperatures': ('dynconv', 'convnet_aig'),
  'mask_bias': ('dynconv', 'skipnet'),
  'mask_granularity': ('dynconv',),
  'mask_kernel_size': ('dynconv',),
  'ponder_weight': ('sact', 'act'),
  'reinforce_weight': ('skipnet',),
  'skip_gate': ('skipnet',),
  'skip_temperature': ('skipnet',),
  'skip_training': ('skipnet',),
  'skip_weight': ('skipnet',),
  'sparsity_weight': ('dynconv',),
  'target_rate_weight': ('convnet_aig',),
  'target_rates': ('convnet_aig',),
}
# What a figure shows by itself; other flags that vary are told apart by the
# recipe of a run.
_KNOBS = ('budget', 'skip_weight', 'ponder_weight')
_SHOWN = (*_KNOBS, 'method', 'model', 'width_multiplier', 'seed')
_KINDS = {
  int: 'an integer',
  float: 'a number',
  float | None: 'a number or empty',
  bool: 'true or false',
  tuple[float, ...]: 'numbers with commas between',
  tuple[int, ...]: 'integers with commas between',
}


@dataclasses.dataclass(frozen=True)
class Axis:
  """The values of one flag.

  Attributes:
    name: of a field of Config.
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
  """Returns whether a field of Config changes a run of a method.

  Args:
    name: of the field.
    method: a key of METHODS.
  """
  return method in METHODS_OF.get(name, (method,))


def make_runs(base: Config, grids: Sequence[str]) -> list[Run]:
  """Returns the runs of a product of grids, seed by seed.

  A flag that does not matter to a method does not multiply its runs.

  Args:
    base: gives the flags that are in no grid.
    grids: each 'NAME=VALUE,VALUE' or, for one method alone and in place of the
      grid for all, 'METHOD:NAME=VALUE,VALUE'. Values of a flag that is a list
      are separated by semicolons.

  Raises:
    ValueError: a grid is not of this form, or a run would not be valid; names
      every error.
  """
  axes, errors = [], []
  for text in grids:
    try:
      axis = _parse(text)
      if any((a.name, a.method) == (axis.name, axis.method) for a in axes):
        raise ValueError(f'--grid={text}: there is another grid of this flag')
      axes.append(axis)
    except ValueError as error:
      errors.append(str(error))
  methods = next((a.values for a in axes if a.name == 'method'), (base.method,))
  for axis in axes:
    if axis.method and axis.method not in methods:
      errors.append(
        f'{axis.method}:{axis.name}: the sweep has no runs of {axis.method!r}, '
        f'only of {", ".join(methods)}'
      )
    elif axis.method and not matters(axis.name, axis.method):
      errors.append(f'{axis.name} does not matter to {axis.method}')
  runs = {}
  for method in methods:
    for run in _product(base, axes, method):
      runs.setdefault(run.config, run)
  runs = _unique(runs.values())
  errors += _invalid(runs)
  if errors:
    raise ValueError('; '.join(errors))
  seeds = list(dict.fromkeys(run.config.seed for run in runs))
  return sorted(runs, key=lambda run: seeds.index(run.config.seed))


def _parse(text: str) -> Axis:
  """Returns the axis of a grid; raises ValueError naming what is wrong."""
  left, equals, right = text.partition('=')
  method, colon, name = left.strip().rpartition(':')
  if not equals or bool(method) != bool(colon):
    raise ValueError(
      f'--grid={text}: must be NAME=VALUE,VALUE or METHOD:NAME=VALUE,VALUE'
    )
  types = typing.get_type_hints(Config)
  if name not in types:
    raise ValueError(f'--grid={text}: {name!r} is no flag of a training run')
  fields = {field.name: field for field in dataclasses.fields(Config)}
  if fields[name].metadata['operational']:
    raise ValueError(f'--grid={text}: {name} changes nothing about a run')
  if name == 'method' and method:
    raise ValueError(f'--grid={text}: method cannot be for one method alone')
  kind = types[name]
  values = []
  for cell in right.split(';' if typing.get_origin(kind) is tuple else ','):
    try:
      values.append(parse_value(kind, cell.strip()))
    except (KeyError, ValueError):
      raise ValueError(
        f'--grid={text}: {cell.strip()!r} is not {_KINDS[kind]}'
      ) from None
  return Axis(name, tuple(dict.fromkeys(values)), method)


def _product(base: Config, axes: Sequence[Axis], method: str) -> Iterator[Run]:
  """Yields the runs of one method."""
  own = {axis.name for axis in axes if axis.method == method}
  used = [
    axis
    for axis in axes
    if axis.method == method
    or (not axis.method and axis.name not in own and matters(axis.name, method))
  ]
  varied = [axis.name for axis in used if len(axis.values) > 1]
  shown = set(_SHOWN)
  if not set(varied) & set(_KNOBS):
    shown.add('image_size')  # What a curve moves along, if nothing else does.
  options = [
    (method,) if axis.name == 'method' else axis.values for axis in used
  ]
  for values in itertools.product(*options):
    chosen = dict(zip((axis.name for axis in used), values, strict=True))
    config = dataclasses.replace(base, **chosen)
    labels = [
      _label(axis.name, chosen[axis.name]) for axis in used if axis.named
    ]
    recipe = [
      f'{name} {_short(chosen[name]) or "none"}'
      for name in varied
      if name not in shown
    ]
    settings = {
      name: _text(getattr(config, name)) if matters(name, method) else ''
      for name in dict.fromkeys(axis.name for axis in axes)
    }
    name = '_'.join(labels) or method
    yield Run(name, config, settings, ', '.join(recipe))


def _text(value: Any) -> str:
  """Returns a value as in a flag, whole numbers without a point."""
  if isinstance(value, tuple):
    return ','.join(map(_text, value))
  if isinstance(value, bool):
    return str(value).lower()
  return '' if value is None else str(value).removesuffix('.0')


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
