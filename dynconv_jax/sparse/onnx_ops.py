"""ONNX nodes of JAX's element-wise primitives.

Each primitive has a function of the writer, the operands, the types of the
results (anything with `shape` and `dtype`), and the primitive's parameters. The
function returns the results, or raises NotImplementedError with a description
of the unsupported operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dynconv_jax.sparse.onnx_values import (
  NCHW,
  PLAIN,
  ROWS,
  Operand,
  Value,
  Writer,
  onnx_type,
)

Op = Callable[..., list[Operand]]

_UNARY = {
  'abs': 'Abs',
  'acos': 'Acos',
  'asin': 'Asin',
  'atan': 'Atan',
  'ceil': 'Ceil',
  'cos': 'Cos',
  'cosh': 'Cosh',
  'erf': 'Erf',
  'exp': 'Exp',
  'floor': 'Floor',
  'log': 'Log',
  'logistic': 'Sigmoid',
  'neg': 'Neg',
  'sign': 'Sign',
  'sin': 'Sin',
  'sinh': 'Sinh',
  'sqrt': 'Sqrt',
  'tan': 'Tan',
  'tanh': 'Tanh',
}
_BINARY = {
  'add': 'Add',
  'add_any': 'Add',
  'div': 'Div',
  'eq': 'Equal',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'lt': 'Less',
  'mul': 'Mul',
  'pow': 'Pow',
}
# By whether the operands are bool.
_LOGICAL = {
  'and': ('BitwiseAnd', 'And'),
  'max': ('Max', 'Or'),
  'min': ('Min', 'And'),
  'not': ('BitwiseNot', 'Not'),
  'or': ('BitwiseOr', 'Or'),
  'xor': ('BitwiseXor', 'Xor'),
}
# Primitives that do not change values in evaluation.
_SAME = (
  'copy',
  'copy_p',
  'optimization_barrier',
  'reduce_precision',
  'sharding_constraint',
  'stop_gradient',
)


def elementwise(
  w: Writer, op: str, xs: list[Operand], out: Any, **attributes
) -> Value:
  """Returns the result of an element-wise ONNX operator.

  The result is in [N, C, H, W] layout if an operand is. It is in rows if an
  operand is and all others are available as rows. Otherwise it is plain.

  Args:
    w: the writer.
    op: the operator.
    xs: the operands, each with the result's shape or with one element.
    out: has the shape and dtype of the result.
    **attributes: attributes of the operator.
  """
  values = [w.as_value(x) for x in xs]
  numbers = [all(n == 1 for n in v.shape) for v in values]
  maps = [
    v
    for v, number in zip(values, numbers, strict=True)
    if not number and not v.is_broadcast
  ]
  rank = len(out.shape)
  extents = [
    n
    if any(len(v.shape) == rank and not _is_one(v.extents[i]) for v in values)
    else 1
    for i, n in enumerate(out.shape)
  ]
  layout = PLAIN
  if any(v.layout == NCHW for v in maps):
    layout = NCHW
  elif any(v.layout == ROWS for v in maps) and all(
    number or ROWS in v.names or all(map(_is_one, v.extents[:-1]))
    for v, number in zip(values, numbers, strict=True)
  ):
    layout = ROWS

  def operand(value, number):
    if number:
      shape = () if maps else (1,) * rank
      name = w.plain(value)
      return name if value.shape == shape else w.reshape(name, shape)
    if layout == NCHW:
      return w.nchw(value, full=False)
    if layout == ROWS:
      if value.is_broadcast:
        return w.reshape(w.plain(value), (1, value.extents[-1]))
      return w.rows(value)
    return w.plain(value)

  names = [operand(*pair) for pair in zip(values, numbers, strict=True)]
  name = w.graph(op, *names, **attributes)
  return Value(out.shape, out.dtype, {layout: name}, extents)


def _is_one(n: Any) -> bool:
  return isinstance(n, int) and n == 1


def _chain(*steps: tuple[str, float | None]) -> Op:
  """Returns a chain of operators, with optional constant second operands."""

  def write(w, xs, outs, **_):
    x = xs[0]
    for op, constant in steps:
      others = [] if constant is None else [np.float32(constant).reshape(())]
      x = elementwise(w, op, [x, *others], outs[0])
    return [x]

  return write


def _simple(op: str) -> Op:
  return lambda w, xs, outs, **_: [elementwise(w, op, xs, outs[0])]


def _logical(number_op: str, bool_op: str) -> Op:
  def write(w, xs, outs, **_):
    op = bool_op if xs[0].dtype == bool else number_op
    return [elementwise(w, op, xs, outs[0])]

  return write


def _same(w, xs, outs, **_):
  return [w.as_value(x) for x in xs]


def _sub(w, xs, outs, **_):
  x, y = xs
  if isinstance(y, np.ndarray) and y.dtype.kind not in 'iub':
    # Runtimes fuse additions of constants into a preceding convolution.
    return [elementwise(w, 'Add', [x, -y], outs[0])]
  return [elementwise(w, 'Sub', xs, outs[0])]


def _ne(w, xs, outs, **_):
  equal = elementwise(w, 'Equal', xs, outs[0])
  return [elementwise(w, 'Not', [equal], outs[0])]


def _square(w, xs, outs, **_):
  return [elementwise(w, 'Mul', [xs[0], xs[0]], outs[0])]


def _integer_pow(w, xs, outs, y, **_):
  exponent = np.asarray(y, np.float32)
  return [elementwise(w, 'Pow', [xs[0], exponent], outs[0])]


def _rem(w, xs, outs, **_):
  return [elementwise(w, 'Mod', xs, outs[0], fmod=1)]


def _round(w, xs, outs, rounding_method, **_):
  if rounding_method != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
    raise NotImplementedError('rounding away from zero')
  return [elementwise(w, 'Round', xs, outs[0])]


def _is_finite(w, xs, outs, **_):
  # Only infinities and NaN are not less than infinity.
  size = jax.ShapeDtypeStruct(outs[0].shape, np.float32)
  size = elementwise(w, 'Abs', xs, size)
  infinity = np.asarray(np.inf, np.float32)
  return [elementwise(w, 'Less', [size, infinity], outs[0])]


def _clamp(w, xs, outs, **_):
  low, x, high = xs
  at_least = elementwise(w, 'Max', [x, low], outs[0])
  return [elementwise(w, 'Min', [at_least, high], outs[0])]


def _select_n(w, xs, outs, **_):
  which, *cases = xs
  if len(cases) != 2:
    raise NotImplementedError('a choice of more than two cases')
  if which.dtype != bool:
    which = cast(w, which, bool)
  return [elementwise(w, 'Where', [which, cases[1], cases[0]], outs[0])]


def cast(w: Writer, x: Operand, dtype: Any) -> Value:
  """Returns a value in another dtype.

  Args:
    w: the writer.
    x: the value.
    dtype: JAX dtype.
  """
  x, dtype = w.as_value(x), np.dtype(dtype)
  if onnx_type(x.dtype) == onnx_type(dtype):
    return Value(x.shape, dtype, x.names, x.extents)
  layout = x.layout
  name = w.graph('Cast', x.names[layout], to=onnx_type(dtype))
  return Value(x.shape, dtype, {layout: name}, x.extents)


def _convert_element_type(w, xs, outs, new_dtype, **_):
  return [cast(w, xs[0], new_dtype)]


def _dim_as_value(w, xs, outs, dim, **_):
  name = w.graph('Squeeze', w.dimension(dim), np.zeros(1, np.int64))
  value = Value((), np.int64, {PLAIN: name})
  return [cast(w, value, outs[0].dtype)]


OPS: dict[str, Op] = {
  **{name: _simple(op) for name, op in {**_UNARY, **_BINARY}.items()},
  **{name: _logical(*ops) for name, ops in _LOGICAL.items()},
  **dict.fromkeys(_SAME, _same),
  'clamp': _clamp,
  'convert_element_type': _convert_element_type,
  'dim_as_value': _dim_as_value,
  'erfc': _chain(('Erf', None), ('Neg', None), ('Add', 1)),
  'exp2': _chain(('Mul', np.log(2)), ('Exp', None)),
  'expm1': _chain(('Exp', None), ('Add', -1)),
  'integer_pow': _integer_pow,
  'is_finite': _is_finite,
  'log1p': _chain(('Add', 1), ('Log', None)),
  'ne': _ne,
  'rem': _rem,
  'round': _round,
  'rsqrt': _chain(('Sqrt', None), ('Reciprocal', None)),
  'select_n': _select_n,
  'square': _square,
  'sub': _sub,
}
