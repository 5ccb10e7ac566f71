"""Registry of networks by name.

A factory creates a network. Factories outside the package are named
package.module:factory. A factory is called as
  factory(*, num_classes, gate, dtype, rngs, width_multiplier=1.0, **options)
and returns an nnx.Module whose
  __call__(images, *, rngs, temperature, gumbel_noise, masks)
returns logits and execution masks. The factory's other keyword arguments must
have defaults; they are the options of the network. An option has the type in
its annotation if that is bool, float, int, str, one of these or None, or a
tuple such as tuple[int, ...]; otherwise, that of its default. The annotation
Annotated[kind, {...}] also passes arguments of `options.option`, such as a help
text. If the flag file of an older run lacks an option, the default applies.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dynconv_jax import references
from dynconv_jax.checks import check_choice
from dynconv_jax.layers import streams
from dynconv_jax.methods.gate import GateSite
from dynconv_jax.options import make, option, values_of

# Modules of this package. ARCHITECTURES is a dict of factories by name; TITLES
# contains the display names of networks and families.
_FAMILIES = ('resnet', 'mobilenet', 'efficientnet_lite')
# Annotations and types of options, as pairs: some annotations have no hash.
_KINDS = [
  pair
  for kind in (bool, float, int, str)
  for pair in ((kind, kind), (kind | None, kind), (tuple[kind, ...],) * 2)
]
_GIVEN = ('num_classes', 'gate', 'dtype', 'rngs', 'width_multiplier')

Factory = Callable[..., nnx.Module]


def architectures() -> Mapping[str, Factory]:
  """Returns the factories of this package by name."""
  factories = {}
  for family in _FAMILIES:
    module = importlib.import_module(f'{__package__}.{family}')
    factories |= module.ARCHITECTURES
  return factories


def title(model: str) -> str:
  """Returns the display name of a network or family, or an unknown name."""
  titles = {}
  for family in _FAMILIES:
    titles |= importlib.import_module(f'{__package__}.{family}').TITLES
  return titles.get(model, model)


def load_factory(model: str | Factory) -> Factory:
  """Returns the factory of a network.

  Args:
    model: a name such as 'resnet50', package.module:factory, or a factory.

  Raises:
    ValueError: the factory does not exist.
  """
  if not isinstance(model, str):
    return model
  if ':' in model:
    return references.load(model, Callable, 'model')
  known = architectures()
  check_choice('model', model, known)
  return known[model]


def reference(factory: Factory) -> str:
  """Returns the name package.module:factory of a factory."""
  return f'{factory.__module__}:{getattr(factory, "__qualname__", factory)}'


@functools.lru_cache(maxsize=256)
def options_type(factory: Factory) -> type:
  """Returns a frozen dataclass of the options of a network."""
  try:
    signature = inspect.signature(factory, eval_str=True)
  except NameError:  # A type that is imported only for type checkers.
    signature = inspect.signature(factory)
  fields = []
  for name, parameter in signature.parameters.items():
    default = parameter.default
    if name in _GIVEN or default is parameter.empty:
      continue
    kind = str if default is None else type(default)
    if isinstance(default, tuple):
      kind = tuple[type(default[0]) if default else str, ...]
    given = parameter.annotation
    (extra,) = getattr(given, '__metadata__', ({},))
    given = given.__origin__ if extra else given
    kind = next((own for form, own in _KINDS if form == given), kind)
    extra = {'help': f'{name} of the network.', 'before': default, **extra}
    fields.append((name, kind, option(default, **extra)))
  return dataclasses.make_dataclass('Options', fields, frozen=True)


def create(
  factory: Factory,
  options: Any,
  *,
  num_classes: int,
  gate: Callable[[GateSite], Any],
  width_multiplier: float = 1.0,
  dtype: jnp.dtype = jnp.float32,
  rngs: nnx.Rngs,
) -> nnx.Module:
  """Returns a freshly initialized network.

  Args:
    factory: creates the network.
    options: an instance of its `options_type`.
    num_classes: number of outputs, at least 1.
    gate: returns the gate of a site, or None.
    width_multiplier: scales the channels, > 0.
    dtype: compute dtype.
    rngs: random streams; uses `params`.
  """
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1; got {num_classes}')
  if not (width_multiplier > 0 and math.isfinite(width_multiplier)):
    raise ValueError(f'width_multiplier must be > 0; got {width_multiplier}')
  return factory(
    num_classes=num_classes,
    gate=gate,
    dtype=dtype,
    rngs=rngs,
    width_multiplier=width_multiplier,
    **values_of(options),
  )


@functools.lru_cache(maxsize=256)
def gate_sites(
  factory: Factory, options: Any, width_multiplier: float = 1.0
) -> tuple[GateSite, ...]:
  """Returns a network's sites for gates, in order, without creating weights.

  Args:
    factory: creates the network.
    options: an instance of its `options_type`; None for the defaults.
    width_multiplier: scales the channels, > 0.
  """
  sites = []
  options = make(options_type(factory), {}) if options is None else options
  nnx.eval_shape(
    lambda: create(
      factory,
      options,
      num_classes=1,
      gate=sites.append,
      width_multiplier=width_multiplier,
      rngs=streams.linear(nnx.Rngs(0)),
    )
  )
  return tuple(sites)
