"""Primitives of JAX as nodes of ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dynconv_jax.sparse.onnx_graph import integers
from dynconv_jax.sparse.onnx_values import (
  NCHW,
  PLAIN,
  Operand,
  Value,
  Writer,
  onnx_type,
)

Op = Callable[..., list[Value]]

_UNARY = {
  'neg': 'Neg',
  'exp': 'Exp',
  'log': 'Log',
  'tanh': 'Tanh',
  'logistic': 'Sigmoid',
  'sqrt': 'Sqrt',
  'abs': 'Abs',
  'sign': 'Sign',
  'floor': 'Floor',
  'ceil': 'Ceil',
  'erf': 'Erf',
  'sin': 'Sin',
  'cos': 'Cos',
  'not': 'Not',
}
_BINARY = {
  'add': 'Add',
  'sub': 'Sub',
  'mul': 'Mul',
  'div': 'Div',
  'max': 'Max',
  'min': 'Min',
  'pow': 'Pow',
  'eq': 'Equal',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'lt': 'Less',
  'and': 'And',
  'or': 'Or',
  'add_any': 'Add',
}
_REDUCE = {
  'reduce_sum': 'ReduceSum',
  'reduce_max': 'ReduceMax',
  'reduce_min': 'ReduceMin',
  'reduce_prod': 'ReduceProd',
}
# What does nothing to values.
_SAME = (
  *(
    'stop_gradient',
    'copy',
    'copy_p',
    'reduce_precision',
    'optimization_barrier',
  ),
  *('sharding_constraint', 'pvary'),
)


def find_op(name: str) -> Op | None:
  """Returns what writes a primitive, or None.

  It takes the writer, the operands, the shapes and dtypes of the results
  (anything with `shape` and `dtype`), and the primitive's parameters.

  Args:
    name: of the primitive.
  """
  if name in _UNARY:
    return lambda w, xs, outs, **_: [_elementwise(w, _UNARY[name], xs, outs[0])]
  if name in _BINARY:
    return lambda w, xs, outs, **_: [
      _elementwise(w, _BINARY[name], xs, outs[0])
    ]
  if name in _REDUCE:
    return lambda w, xs, outs, axes, **_: [
      _reduce(w, _REDUCE[name], xs[0], outs[0], axes)
    ]
  if name in _SAME:
    return lambda w, xs, outs, **_: [w.as_value(x) for x in xs]
  return _OTHERS.get(name)


def _plain(out: Any, name: str, is_broadcast: bool = False) -> Value:
  return Value(out.shape, out.dtype, {PLAIN: name}, is_broadcast)


def _elementwise(w: Writer, op: str, xs: list[Operand], out: Any) -> Value:
  """In the layout of an operand, if the others are numbers or have it too."""
  values = [x for x in xs if isinstance(x, Value)]
  others = [x for x in xs if not isinstance(x, Value)]
  broadcast = all(v.is_broadcast for v in values) and not any(
    x.shape == tuple(out.shape) and x.ndim for x in others
  )
  layout = values[0].layout
  alike = all(layout in v.names and not v.is_broadcast for v in values)
  if layout != PLAIN and alike and all(x.size == 1 for x in others):
    names = [
      x.names[layout] if isinstance(x, Value) else w.plain(x.reshape(()))
      for x in xs
    ]
    return Value(out.shape, out.dtype, {layout: w.graph(op, *names)})
  return _plain(out, w.graph(op, *map(w.plain, xs)), broadcast)


def _ne(w, xs, outs, **_):
  equal = _elementwise(w, 'Equal', xs, outs[0])
  return [_elementwise(w, 'Not', [equal], outs[0])]


def _rsqrt(w, xs, outs, **_):
  root = _elementwise(w, 'Sqrt', xs, outs[0])
  return [_elementwise(w, 'Reciprocal', [root], outs[0])]


def _square(w, xs, outs, **_):
  return [_elementwise(w, 'Mul', [xs[0], xs[0]], outs[0])]


def _integer_pow(w, xs, outs, y, **_):
  return [_elementwise(w, 'Pow', [xs[0], np.float32(y)[()]], outs[0])]


def _round(w, xs, outs, **_):
  return [_elementwise(w, 'Round', xs, outs[0])]


def _clamp(w, xs, outs, **_):
  low, x, high = xs
  at_least = _elementwise(w, 'Max', [x, low], outs[0])
  return [_elementwise(w, 'Min', [at_least, high], outs[0])]


def _select_n(w, xs, outs, **_):
  if len(xs) != 3:
    raise NotImplementedError('select_n of more than two cases')
  return [_elementwise(w, 'Where', [xs[0], xs[2], xs[1]], outs[0])]


def _convert_element_type(w, xs, outs, **_):
  x, out = w.as_value(xs[0]), outs[0]
  if onnx_type(x.dtype) == onnx_type(out.dtype):
    return [Value(out.shape, out.dtype, x.names, x.is_broadcast)]
  layout = x.layout
  name = w.graph('Cast', x.names[layout], to=onnx_type(out.dtype))
  return [Value(out.shape, out.dtype, {layout: name}, x.is_broadcast)]


def _static(shape) -> np.ndarray:
  """A shape for Reshape, whose batch follows from the rest."""
  if sum(not isinstance(n, int) for n in shape) > 1:
    raise NotImplementedError(f'the shape {shape}')
  return integers(*(n if isinstance(n, int) else -1 for n in shape))


def _reshape(w, xs, outs, **_):
  shape = _static(outs[0].shape)
  return [_plain(outs[0], w.graph('Reshape', w.full(xs[0]), shape))]


_squeeze = _expand_dims = _reshape


def _transpose(w, xs, outs, permutation, **_):
  name = w.graph('Transpose', w.full(xs[0]), perm=list(permutation))
  return [_plain(outs[0], name)]


def _broadcast_in_dim(w, xs, outs, shape, broadcast_dimensions, **_):
  x = w.as_value(xs[0])
  # Operators of ONNX broadcast by themselves: extents of 1 are put in only.
  target = [1] * len(shape)
  for axis, n in zip(broadcast_dimensions, x.shape, strict=True):
    target[axis] = n
  name = w.graph('Reshape', w.full(x), _static(target))
  grown = any(a is not b and a != b for a, b in zip(target, shape, strict=True))
  return [_plain(outs[0], name, grown)]


def _concatenate(w, xs, outs, dimension, **_):
  name = w.graph('Concat', *map(w.full, xs), axis=dimension)
  return [_plain(outs[0], name)]


def _stack(w, xs, outs, axis, **_):
  axis = axis % len(outs[0].shape)
  parts = [w.graph('Unsqueeze', w.full(x), integers(axis)) for x in xs]
  return [_plain(outs[0], w.graph('Concat', *parts, axis=axis))]


def _slice(w, xs, outs, start_indices, limit_indices, strides, **_):
  shape = xs[0].shape
  strides = strides or (1,) * len(shape)
  cut = [
    (axis, start, limit, step)
    for axis, (start, limit, step) in enumerate(
      zip(start_indices, limit_indices, strides, strict=True)
    )
    if not (start == 0 and limit == shape[axis] and step == 1)
  ]
  if not cut:
    return [w.as_value(xs[0])]
  axes, starts, limits, steps = zip(*cut, strict=True)
  name = w.graph(
    'Slice',
    w.full(xs[0]),
    *(integers(*v) for v in (starts, limits, axes, steps)),
  )
  return [_plain(outs[0], name)]


def _gather(w, xs, outs, dimension_numbers, slice_sizes, **_):
  """Slices at constant places, as `x[:, :n]` and `x[..., 0]` are traced."""
  numbers, start = dimension_numbers, xs[1]
  if not isinstance(start, np.ndarray) or start.ndim != 1:
    raise NotImplementedError('indexing by values')
  axes = list(numbers.start_index_map)
  name = w.full(xs[0])
  if axes:
    starts = [int(i) for i in start]
    limits = [i + slice_sizes[a] for i, a in zip(starts, axes, strict=True)]
    arguments = (integers(*v) for v in (starts, limits, axes))
    name = w.graph('Slice', name, *arguments)
  if dropped := numbers.collapsed_slice_dims:
    name = w.graph('Squeeze', name, integers(*dropped))
  return [_plain(outs[0], name)]


def _dynamic_slice(w, xs, outs, slice_sizes, **_):
  if not all(isinstance(x, np.ndarray) for x in xs[1:]):
    raise NotImplementedError('slicing at places that depend on values')
  starts = [int(x) for x in xs[1:]]
  limits = tuple(i + n for i, n in zip(starts, slice_sizes, strict=True))
  return _slice(w, xs, outs, tuple(starts), limits, None)


def _pad(w, xs, outs, padding_config, **_):
  if any(low < 0 or high < 0 or inner for low, high, inner in padding_config):
    raise NotImplementedError(f'padding by {padding_config}')
  lows, highs, _ = zip(*padding_config, strict=True)
  name = w.graph('Pad', w.full(xs[0]), integers(*lows, *highs), w.plain(xs[1]))
  return [_plain(outs[0], name)]


def _split(w, xs, outs, sizes, axis, **_):
  starts = np.cumsum([0, *sizes])
  return [
    _plain(
      out,
      w.graph(
        'Slice',
        w.full(xs[0]),
        integers(starts[i]),
        integers(starts[i + 1]),
        integers(axis),
      ),
    )
    for i, out in enumerate(outs)
  ]


def _reduce(w, op, x, out, axes):
  value = w.as_value(x)
  if value.layout == NCHW and not value.is_broadcast and 3 not in axes:
    # Sums over positions of a map need no transposition.
    moved = {0: 0, 1: 2, 2: 3}
    if set(axes) == {1, 2}:
      name = w.graph(
        op, value.names[NCHW], integers(*(moved[a] for a in axes)), keepdims=0
      )
      return _plain(out, name)
  name = w.graph(op, w.full(value), integers(*axes), keepdims=0)
  return _plain(out, name)


def _reduce_and(w, xs, outs, axes, **_):
  return [_reduce_bool(w, 'ReduceMin', xs[0], outs[0], axes)]


def _reduce_or(w, xs, outs, axes, **_):
  return [_reduce_bool(w, 'ReduceMax', xs[0], outs[0], axes)]


def _reduce_bool(w, op, x, out, axes):
  number = w.graph('Cast', w.full(x), to=onnx_type(np.int32))
  name = w.graph(op, number, integers(*axes), keepdims=0)
  return _plain(out, w.graph('Cast', name, to=onnx_type(bool)))


def _argmax(w, xs, outs, axes, index_dtype, **_):
  name = w.graph('ArgMax', w.full(xs[0]), axis=axes[0], keepdims=0)
  name = w.graph('Cast', name, to=onnx_type(index_dtype))
  return [_plain(outs[0], name)]


def _top_k(w, xs, outs, k, **_):
  values, indices = w.graph.many(
    'TopK', w.full(xs[0]), integers(k), outputs=2, axis=-1
  )
  indices = w.graph('Cast', indices, to=onnx_type(np.int32))
  return [_plain(outs[0], values), _plain(outs[1], indices)]


def _cumsum(w, xs, outs, axis, reverse, **_):
  name = w.graph('CumSum', w.full(xs[0]), np.int64(axis), reverse=int(reverse))
  return [_plain(outs[0], name)]


def _dot_general(w, xs, outs, dimension_numbers, **_):
  (left, right), (left_batch, right_batch) = dimension_numbers
  letters = iter('abcdefghijklmnopqrstuvwxyz')
  names = [[None] * len(x.shape) for x in xs]
  for a, b in zip((*left_batch, *left), (*right_batch, *right), strict=True):
    names[0][a] = names[1][b] = next(letters)
  names = [[n or next(letters) for n in operand] for operand in names]
  batch = [names[0][a] for a in left_batch]
  free = [
    n
    for operand, taken in (
      (names[0], {*left, *left_batch}),
      (names[1], {*right, *right_batch}),
    )
    for axis, n in enumerate(operand)
    if axis not in taken
  ]
  first, second = map(w.full, xs)
  last = (len(xs[0].shape) - 1,)
  if not batch and (left, right) == (last, (0,)) and len(xs[1].shape) == 2:
    return [_plain(outs[0], w.graph('MatMul', first, second))]
  equation = ','.join(map(''.join, names)) + '->' + ''.join(batch + free)
  name = w.graph('Einsum', first, second, equation=equation)
  return [_plain(outs[0], name)]


def _conv_general_dilated(
  w,
  xs,
  outs,
  window_strides,
  padding,
  lhs_dilation,
  rhs_dilation,
  dimension_numbers,
  feature_group_count,
  batch_group_count,
  **_,
):
  if any(d != 1 for d in lhs_dilation) or batch_group_count != 1:
    raise NotImplementedError('a transposed convolution')
  numbers, rank = dimension_numbers, len(window_strides)
  if numbers.lhs_spec == (0, 3, 1, 2):
    x = w.nchw(xs[0])
  else:
    x = w.graph('Transpose', w.full(xs[0]), perm=list(numbers.lhs_spec))
  kernel = w.full(xs[1])
  perm = list(numbers.rhs_spec)
  if isinstance(kernel, np.ndarray):
    kernel = kernel.transpose(perm)
  else:
    kernel = w.graph('Transpose', kernel, perm=perm)
  y = w.graph(
    'Conv',
    x,
    kernel,
    kernel_shape=[xs[1].shape[a] for a in numbers.rhs_spec[2:]],
    strides=list(window_strides),
    dilations=list(rhs_dilation),
    pads=[low for low, _ in padding] + [high for _, high in padding],
    group=feature_group_count,
  )
  if numbers.out_spec == (0, 3, 1, 2) and rank == 2:
    return [Value(outs[0].shape, outs[0].dtype, {NCHW: y})]
  back = np.argsort(numbers.out_spec).tolist()
  return [_plain(outs[0], w.graph('Transpose', y, perm=back))]


def _pool(w, op, x, out, window_dimensions, window_strides, padding, **kwargs):
  maps = (window_dimensions[0], window_dimensions[-1]) == (1, 1)
  if len(window_dimensions) != 4 or not maps:
    raise NotImplementedError(f'a window of {window_dimensions}')
  name = w.graph(
    op,
    w.nchw(x),
    kernel_shape=list(window_dimensions[1:3]),
    strides=list(window_strides[1:3]),
    pads=[low for low, _ in padding[1:3]] + [high for _, high in padding[1:3]],
    **kwargs,
  )
  return Value(out.shape, out.dtype, {NCHW: name})


def _reduce_window_max(
  w, xs, outs, window_dimensions, window_strides, padding, **_
):
  geometry = (window_dimensions, window_strides, padding)
  return [_pool(w, 'MaxPool', xs[0], outs[0], *geometry)]


def _reduce_window_sum(
  w, xs, outs, window_dimensions, window_strides, padding, **_
):
  geometry = (window_dimensions, window_strides, padding)
  mean = _pool(w, 'AveragePool', xs[0], outs[0], *geometry, count_include_pad=1)
  area = np.asarray(math.prod(window_dimensions), np.float32)
  return [_elementwise(w, 'Mul', [mean, area], outs[0])]


_OTHERS = {
  'ne': _ne,
  'rsqrt': _rsqrt,
  'square': _square,
  'integer_pow': _integer_pow,
  'round': _round,
  'clamp': _clamp,
  'select_n': _select_n,
  'convert_element_type': _convert_element_type,
  'reshape': _reshape,
  'squeeze': _squeeze,
  'expand_dims': _expand_dims,
  'transpose': _transpose,
  'broadcast_in_dim': _broadcast_in_dim,
  'concatenate': _concatenate,
  'stack': _stack,
  'slice': _slice,
  'gather': _gather,
  'dynamic_slice': _dynamic_slice,
  'pad': _pad,
  'split': _split,
  'reduce_and': _reduce_and,
  'reduce_or': _reduce_or,
  'argmax': _argmax,
  'top_k': _top_k,
  'cumsum': _cumsum,
  'dot_general': _dot_general,
  'conv_general_dilated': _conv_general_dilated,
  'reduce_window_max': _reduce_window_max,
  'reduce_window_sum': _reduce_window_sum,
}
