"""Creation of networks from an architecture and a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dynconv_jax import options as options_lib
from dynconv_jax.layers import streams
from dynconv_jax.methods.method import METHODS, Method, load_method
from dynconv_jax.models import registry


def create_model(
  name: str | registry.Factory,
  *,
  method: str | Method = 'dense',
  num_classes: int = 1000,
  width_multiplier: float = 1.0,
  dtype: jnp.dtype = jnp.float32,
  rngs: nnx.Rngs,
  **options,
) -> nnx.Module:
  """Returns a freshly initialized network.

  Args:
    name: a name such as 'resnet50' or 'cifar_resnet32'; package.module:factory;
      or a factory, see `registry`.
    method: a name such as 'dynconv'; package.module:METHOD; or a Method.
    num_classes: number of outputs, at least 1.
    width_multiplier: scales the channels of stem and stages, > 0.
    dtype: compute dtype, float32 or bfloat16.
    rngs: random streams; uses `params`.
    **options: options of the network and of the method, such as DynConv's
      `mask_kernel_size`. Options of other methods are ignored.

  Raises:
    ValueError: the name, the method, or an option is unknown, a value is out of
      range, or the method's options do not fit the network.
  """
  factory, method = registry.load_factory(name), load_method(method)
  model_type = registry.options_type(factory)
  allowed = {
    **options_lib.options_of(model_type),
    **options_lib.options_of(method.options),
  }
  if unknown := [n for n in options if n not in {**allowed, **_of_others()}]:
    raise ValueError(
      f'unknown options {", ".join(unknown)}; {method.name} has '
      f'{", ".join(allowed) or "none"}'
    )
  model_options = options_lib.make(model_type, options)
  method_options = options_lib.make(method.options, options)
  if errors := [
    *options_lib.errors_of(model_options),
    *options_lib.errors_of(method_options),
  ]:
    raise ValueError('; '.join(errors))
  return assemble(
    factory,
    model_options,
    method,
    method_options,
    num_classes=num_classes,
    width_multiplier=width_multiplier,
    dtype=dtype,
    rngs=rngs,
  )


def assemble(
  factory: registry.Factory,
  model_options: Any,
  method: Method,
  method_options: Any,
  *,
  width_multiplier: float,
  rngs: nnx.Rngs,
  **kwargs,
) -> nnx.Module:
  """Returns a freshly initialized network with its gates.

  Args:
    factory: creates the network.
    model_options: options of the network.
    method: creates the gates.
    method_options: options of the method.
    width_multiplier: scales the channels, > 0.
    rngs: random streams; uses `params`.
    **kwargs: other arguments of `registry.create`.

  Raises:
    ValueError: the options do not fit the network.
  """

  def no_gate(site):
    del site

  gate, rngs = no_gate, streams.linear(rngs)
  if method.gated:
    sites = registry.gate_sites(factory, model_options, width_multiplier)
    gate = method.make_gates(method_options, sites, rngs)
  return registry.create(
    factory,
    model_options,
    gate=gate,
    width_multiplier=width_multiplier,
    rngs=rngs,
    **kwargs,
  )


def _of_others() -> Mapping[str, Any]:
  options = {}
  for name in METHODS:
    options |= options_lib.options_of(load_method(name).options)
  return options
