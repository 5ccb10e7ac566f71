"""Counts a JAX function or model from its jaxpr, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from dynconv_jax.macs import conventions, report, scopes
from dynconv_jax.macs.builder import ReportBuilder
from dynconv_jax.macs.walk import Walk


def count_macs(
  f: Callable[..., Any],
  *args: Any,
  kwargs: Mapping[str, Any] | None = None,
  convention: str | conventions.Convention = 'conv+linear',
  padding: bool = True,
  trip_counts: int | Mapping[str, int] | None = None,
  branch: str | int = 'max',
) -> report.Report:
  """Counts the multiply-accumulates of a function or model.

  Layers are named by the `jax.named_scope`s around them, joined by dots. NNX
  and Equinox modules need no scopes: they are named by their path in the model.
  Repeated uses of a layer, including gradients, are one entry. Outside any
  scope, convolutions and matrix products are named `conv_0`, `matmul_0` and so
  on.

  Args:
    f: a function or a callable model. NNX models may be abstract, from
      `nnx.eval_shape`.
    *args: arguments of `f`: NNX models and pytrees of arrays or
      `jax.ShapeDtypeStruct`. Other values are passed through unchanged.
    kwargs: keyword arguments of `f`, of the same types.
    convention: a name in `conventions.CONVENTIONS`, except 'ptflops'.
    padding: whether to count multiply-accumulates on input padding.
    trip_counts: number of iterations of each `while` body: one number, or
      {layer name around the loop: number}. Not needed for a loop that counts by
      a constant to a constant. Any other loop that does work is left out, with
      a warning.
    branch: which branch of a `cond` or `switch` to count: 'max' or 'min' for
      the most or least expensive one, an index (`lax.cond` lists the false
      branch first), or the name of a branch's function (if a `cond` has no such
      branch, its most expensive one counts). For `lax.platform_dependent`, the
      default branch always counts, because the others are the same computation
      written for one platform.

  Returns:
    A report of the work for the whole batch.

  Raises:
    TypeError: if `f` is not callable.
    ValueError: if `f` cannot be traced with these arguments, a size of theirs
      is not an integer >= 0, the convention is unknown or needs modules, or an
      option does not match the program.
  """
  convention = conventions.get_convention(convention)
  if convention.name == 'ptflops':
    raise ValueError(
      "the convention 'ptflops' charges norm, activation and pooling modules,"
      ' which a jaxpr does not contain; use it for PyTorch or ONNX models'
    )
  if not callable(f):
    raise TypeError(f'f must be a function or model; got {type(f).__name__}')
  if isinstance(branch, bool) or not isinstance(branch, int | str):
    raise ValueError(
      f"branch must be 'max', 'min', an index or a name; got {branch!r}"
    )
  for trips in _values(trip_counts):
    if isinstance(trips, bool) or not isinstance(trips, int) or trips < 0:
      raise ValueError(f'trip_counts must be integers >= 0; got {trips!r}')

  kwargs = dict(kwargs or {})
  if inspect.ismethod(f) and scopes.is_nnx(f.__self__):
    f, args = f.__func__, (f.__self__, *args)
  roots = scopes.modules_of(f) + _named(f, args, kwargs)
  jaxpr = _trace(f, args, kwargs)
  walk = Walk(convention, padding, trip_counts, branch)
  walk.program(jaxpr)
  builder = ReportBuilder(convention, padding)
  walk.report_to(builder)
  parameters = scopes.parameters_of(roots)
  for argument in (*args, *kwargs.values()):
    # Linen variables are named like the modules.
    if isinstance(argument, Mapping) and 'params' in argument:
      own = scopes.arrays_of(argument['params'])
      parameters += _below_root(own, walk.layers())
  if parameters:
    sizes: dict[str, int] = {}
    for module, array in parameters:
      sizes[module] = sizes.get(module, 0) + array.size
    size = sum(array.size * array.dtype.itemsize for _, array in parameters)
    builder.set_parameters(sizes, size)
  return builder.build()


def _values(numbers: Any) -> list[Any]:
  if numbers is None:
    return []
  return list(numbers.values()) if isinstance(numbers, Mapping) else [numbers]


def _trace(f, args, kwargs) -> core.ClosedJaxpr:
  """Returns the jaxpr of f(*args, **kwargs), with layers named by scopes."""
  leaves, tree = jax.tree.flatten((f, args, kwargs), is_leaf=scopes.is_nnx)
  nnx = _nnx() if any(map(scopes.is_nnx, leaves)) else None
  split = [nnx.split(x) if scopes.is_nnx(x) else (None, x) for x in leaves]
  arrays, arrays_tree = jax.tree.flatten(
    [x if graph is not None or _is_array(x) else None for graph, x in split]
  )
  for array in filter(_is_array, arrays):
    if any(not isinstance(n, int | np.integer) or n < 0 for n in array.shape):
      raise ValueError(
        f'sizes of arguments must be integers >= 0; got {_describe(array)}'
      )

  def traced(*arrays):
    values = jax.tree.unflatten(arrays_tree, arrays)
    rebuilt = [
      nnx.merge(graph, value)
      if graph is not None
      else x
      if value is None
      else value
      for (graph, x), value in zip(split, values, strict=True)
    ]
    f, args, kwargs = jax.tree.unflatten(tree, rebuilt)
    names.add_roots(scopes.modules_of(f) + _named(f, args, kwargs))
    outputs = jax.tree.leaves(f(*args, **kwargs), is_leaf=scopes.is_nnx)
    return [x for x in outputs if _is_array(x)]

  names = scopes.Scopes()
  try:
    with names.active():
      return jax.make_jaxpr(traced)(*arrays)
  except Exception as error:
    given = [*map(_describe, args), *map(_describe, kwargs.values())]
    hint = '; pass an NNX model as an argument, not through a closure'
    raise ValueError(
      f'{getattr(f, "__name__", type(f).__name__)} cannot be traced with the'
      f' arguments ({", ".join(given)}): {error}'
      + (hint if 'trace level' in str(error) else '')
    ) from error


def _describe(argument: Any) -> str:
  if _is_array(argument):
    return f'{argument.dtype}{list(argument.shape)}'
  return type(argument).__name__


def _below_root(
  parameters: list[tuple[str, Any]], layers: set[str]
) -> list[tuple[str, Any]]:
  """Returns Linen's parameters, prefixed with the root module of `layers`."""
  roots = {'', *(f'{name.partition(".")[0]}.' for name in layers)}
  matches = {
    root: sum(root + name in layers for name, _ in parameters) for root in roots
  }
  root = max(sorted(roots), key=matches.get)
  return [
    ((root + name).removesuffix('.'), array) for name, array in parameters
  ]


def _named(f, args, kwargs) -> list[tuple[str, Any]]:
  """Returns the modules among the arguments, with the arguments' names."""
  given = {f'arg{i}': arg for i, arg in enumerate(args)} | kwargs
  try:
    bound = inspect.signature(f).bind(*args, **kwargs).arguments
  except (TypeError, ValueError):
    bound = given
  # Functions such as nnx.grad's take *args.
  return _modules(bound) or _modules(given)


def _modules(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
  return [(k, v) for k, v in arguments.items() if scopes.is_module(v)]


def _nnx() -> Any:
  from flax import nnx  # Only imported if an NNX model was passed.

  return nnx


def _is_array(value: Any) -> bool:
  return hasattr(value, 'shape') and hasattr(value, 'dtype')
