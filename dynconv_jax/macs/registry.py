"""Formulas of users for operations that the counter does not know."""

from __future__ import annotations

import importlib
from collections.abc import Callable

# Where each front end keeps its table, and the function that adds to it.
_TABLES = {
  'jax': ('primitives', 'register_jax'),
  'torch': ('torch_ops', 'register_torch'),
  'onnx': ('onnx_ops', 'register_onnx'),
}


def register(
  name: str, framework: str = 'jax'
) -> Callable[[Callable], Callable]:
  """Returns a decorator that registers a function as an operation's formula.

  The formula says what one run of the operation does, and takes precedence over
  ours:

      @macs.register('my_kernel')
      def my_kernel(operation):
        rows, inner = operation.inputs[0].shape
        return macs.formulas.matmul(rows, inner, operation.outputs[0].shape[1])

  It takes one object that describes the operation and returns a `macs.Work`.
  The object has `inputs` and `outputs`, lists of what has a shape, and
  `params`, what else there is by name.

  Args:
    name: of the operation. JAX: a primitive, a Pallas kernel, or a function
      that is jitted, called back or has custom derivatives. PyTorch:
      'namespace::operator'. ONNX: 'domain::OpType', or 'OpType' alone for
      ONNX's own.
    framework: 'jax', 'torch' or 'onnx'.

  Raises:
    ValueError: if there is no such framework, or the name is empty.
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
