"""Registration of user-defined formulas for operations."""

from __future__ import annotations

import importlib
from collections.abc import Callable

# The module of each front end's table, and the function that adds to it.
_TABLES = {
  'jax': ('primitives', 'register_jax'),
  'torch': ('torch_ops', 'register_torch'),
  'onnx': ('onnx_ops', 'register_onnx'),
}


def register(
  name: str, framework: str = 'jax'
) -> Callable[[Callable], Callable]:
  """Returns a decorator that registers a function as an operation's formula.

  The formula returns the work of one execution of the operation. It takes
  precedence over the built-in formula:

      @macs.register('my_kernel')
      def my_kernel(operation):
        rows, inner = operation.inputs[0].shape
        return macs.formulas.matmul(rows, inner, operation.outputs[0].shape[1])

  Its argument is an object that describes the operation, with `inputs` and
  `outputs` (lists of objects with a shape) and `params` (other arguments by
  name). It returns a `macs.Work`.

  Args:
    name: name of the operation. JAX: a primitive, a Pallas kernel, a callback,
      or a function that is jitted or has custom derivatives. PyTorch:
      'namespace::operator'. ONNX: 'domain::OpType', or 'OpType' alone for
      ONNX's own.
    framework: 'jax', 'torch' or 'onnx'.

  Raises:
    ValueError: if the framework is unknown or the name is empty.
  """
  if framework not in _TABLES:
    raise ValueError(
      f'framework must be one of {sorted(_TABLES)}; got {framework!r}'
    )
  if not isinstance(name, str) or not name:
    raise ValueError(f'name must be the name of an operation; got {name!r}')
  module, function = _TABLES[framework]
  table = importlib.import_module(f'dynconv_jax.macs.{module}')
  return getattr(table, function)(name)
