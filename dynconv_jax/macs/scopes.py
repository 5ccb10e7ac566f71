"""Names the layers of a trace by the path of their module in the model.

JAX keeps a name stack with every operation, which `jax.named_scope` extends.
Linen and Haiku enter a scope for each module. NNX and Equinox do not, so this
module wraps the `__call__` of their modules during tracing to enter one. It
does not import these libraries: a model of theirs can only exist if they are
already imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

# Marks scopes entered here: the paths of the outer module and of the module.
_PATH = '@module:'

# Classes are wrapped process-wide during a trace.
_lock = threading.RLock()

_traces = itertools.count()


def is_nnx(value: Any) -> bool:
  """Returns whether this is an NNX graph node, such as a module or Rngs."""
  nnx = sys.modules.get('flax.nnx')
  return nnx is not None and isinstance(value, nnx.Pytree)


def is_module(value: Any) -> bool:
  """Returns whether this is an NNX or Equinox module."""
  return isinstance(value, tuple(_bases())) and _holds_layers(type(value))


def name_stack(eqn: Any) -> tuple[Any, ...]:
  """Returns the scopes and transformations around an equation.

  JAX repeats the path of a differentiated `remat`; this does not.
  """
  stack = eqn.source_info.name_stack.stack
  if eqn.params.get('differentiated'):
    scopes = [i for i, entry in enumerate(stack) if _is_scope(entry)]
    for start in range(len(scopes) % 2, len(scopes), 2):
      half = (len(scopes) - start) // 2
      first, again = scopes[start:-half], scopes[-half:]
      if [stack[i] for i in first] == [stack[i] for i in again]:
        return stack[: again[0]]
  return stack


def layer_name(*stacks: tuple[Any, ...]) -> str:
  """Returns the layer name for the name stacks around an operation.

  Args:
    *stacks: from `name_stack`, outermost jaxpr first.
  """
  scopes = [
    scope
    for stack in stacks
    for entry in stack
    if _is_scope(entry)
    for scope in _split(entry.name)
    # Equinox enters the class of its layers, jnp.einsum its equation.
    if not scope.startswith('eqx.')
    and '->' not in scope
    and scope != 'rematted_computation'
  ]
  before, path, within = [], None, []
  for scope in scopes:
    if not scope.startswith(_PATH):
      (before if path is None else within).append(scope)
      continue
    # Relative to the outer module: jit may have traced this for another one.
    around, inner = scope.removeprefix(_PATH).split(_PATH)
    if path is None or not (inner == around or _within(around, inner)):
      path = inner
    elif inner != around:
      rest = inner.removeprefix(around).removeprefix('.')
      path = f'{path}.{rest}' if path else rest
    within = []
  return '.'.join(filter(None, [*before, path, *within]))


def is_transposed(*stacks: tuple[Any, ...]) -> bool:
  """Returns whether an operation is part of a gradient's backward pass."""
  return any(
    entry.name == 'transpose' and not _is_scope(entry)
    for stack in stacks
    for entry in stack
  )


def modules_of(f: Callable) -> list[tuple[str, Any]]:
  """Returns the modules that a function refers to, by variable name."""
  while not is_module(f):
    if isinstance(f, functools.partial):
      f = f.func
    elif inspect.ismethod(f):
      return [('self', f.__self__)] if is_module(f.__self__) else []
    elif hasattr(f, '__wrapped__'):
      f = f.__wrapped__
    elif inspect.isfunction(f):
      variables = inspect.getclosurevars(f)
      named = {**variables.globals, **variables.nonlocals}
      return [(k, v) for k, v in named.items() if is_module(v)]
    else:
      return []
  return [('self', f)]


def parameters_of(roots: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
  """Returns (path of the module, array) for each parameter of the modules.

  Parameters are NNX's `Param`s and Equinox's floating-point arrays. Shared
  parameters are returned once.

  Args:
    roots: (name, module), as for `Scopes.add_roots`.
  """
  roots = _unique(roots)
  found: dict[int, tuple[str, Any]] = {}
  for name, module in roots:
    prefix = name if len(roots) > 1 else ''
    for path, array in _arrays(module):
      found.setdefault(
        id(array), ('.'.join(filter(None, [prefix, path])), array)
      )
  return list(found.values())


def arrays_of(tree: Any, prefix: str = '') -> list[tuple[str, Any]]:
  """Returns (path of its container, array) for each array in a pytree."""
  found = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if hasattr(leaf, 'shape') and hasattr(leaf, 'dtype'):
      names = [
        str(getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', ''))))
        for key in path[:-1]
      ]
      found.append(('.'.join(filter(None, [prefix, *names])), leaf))
  return found


def _arrays(module: Any) -> list[tuple[str, Any]]:
  """Returns (path of its module, array) for each parameter."""
  if is_nnx(module):
    nnx = sys.modules['flax.nnx']
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return [
      ('.'.join(map(str, path[:-1])), array)
      for path, variable in params
      for array in jax.tree.leaves(variable)
    ]
  return [
    (path, array)
    for path, array in arrays_of(module)
    if jax.dtypes.issubdtype(array.dtype, np.inexact)
  ]


def _unique(roots: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
  return list({id(module): (name, module) for name, module in roots}.values())


class Scopes:
  """Tracks the paths of the modules that are called in one trace."""

  def __init__(self):
    # id -> (path, module); keeping the module prevents reuse of its id.
    self._paths: dict[int, tuple[str, Any]] = {}
    self._stack: list[str] = []
    self._called: set[str] = set()

  def add_roots(self, roots: Iterable[tuple[str, Any]]) -> None:
    """Registers the modules in each root; prefixes names if several roots."""
    roots = _unique(roots)
    for name, module in roots:
      self._register(name if len(roots) > 1 else '', module)

  @contextlib.contextmanager
  def active(self) -> Iterator[None]:
    """Wraps all module classes while the context is open."""
    # jit and remat reuse earlier traces, which have no names or the names of
    # another count. They trace again if the metadata differs.
    metadata = set_xla_metadata(dynconv_jax_trace=str(next(_traces)))
    with _lock, metadata:
      replaced = []
      try:
        for cls in {c for base in _bases() for c in _subclasses(base)}:
          call = vars(cls).get('__call__')
          if inspect.isfunction(call) and _holds_layers(cls):
            replaced.append((cls, call))
            cls.__call__ = self._named(call)
        yield
      finally:
        for cls, call in replaced:
          cls.__call__ = call

  def _named(self, call: Callable) -> Callable:
    @functools.wraps(call)
    def named_call(module, *args, **kwargs):
      path, around = self._path(module), self._stack[-1] if self._stack else ''
      self._stack.append(path)
      self._called = {p for p in self._called if not _within(path, p)} | {path}
      try:
        with jax.named_scope(f'{_PATH}{around}{_PATH}{path}'):
          return call(module, *args, **kwargs)
      finally:
        self._stack.pop()

    return named_call

  def _path(self, module: Any) -> str:
    if id(module) not in self._paths:
      self._register(self._guess(module), module)
    return self._paths[id(module)][0]

  def _guess(self, module: Any) -> str:
    """Returns the path of the module that this one is probably a copy of.

    Transformations such as grad, nnx.scan and nnx.remat call copies. A copy is
    matched with the first module of its class, inside the outer module, that
    has not been called yet. (If JAX traces a transformed function once and uses
    it for several modules, all of them get the same name.)
    """
    around = self._stack[-1] if self._stack else ''
    alike = [
      path
      for path, known in self._paths.values()
      if type(known) is type(module)
      and (_within(around, path) or not self._stack)
    ]
    fresh = [path for path in alike if path not in self._called]
    return (fresh or alike or [around])[0]

  def _register(self, path: str, value: Any) -> None:
    if id(value) in self._paths:
      return
    if isinstance(value, dict):
      children = value.items()
    elif isinstance(value, list | tuple):
      children = enumerate(value)
    elif is_module(value):
      self._paths[id(value)] = path, value
      children = vars(value).items()
    else:
      return
    for name, child in children:
      if not str(name).startswith('_pytree__'):
        self._register(f'{path}.{name}' if path else str(name), child)


def _is_scope(entry: Any) -> bool:
  # Transformations such as jvp are also entries, of another class.
  return type(entry).__name__ == 'Scope'


def _split(scope: str) -> list[str]:
  return [scope] if scope.startswith(_PATH) else scope.split('/')


def _within(path: str, inner: str) -> bool:
  """Returns whether `inner` is a path strictly inside `path`."""
  return inner != path and inner.startswith(path and f'{path}.')


def _holds_layers(cls: type) -> bool:
  # Equinox also makes modules of transformed functions (equinox.filter_grad).
  return not cls.__module__.startswith('equinox._')


def _bases() -> list[type]:
  libraries = ('flax.nnx', 'equinox')
  loaded = [sys.modules[name] for name in libraries if name in sys.modules]
  # A library that is still being imported has no Module yet.
  return [lib.Module for lib in loaded if hasattr(lib, 'Module')]


def _subclasses(cls: type) -> Iterator[type]:
  for subclass in cls.__subclasses__():
    yield subclass
    yield from _subclasses(subclass)
