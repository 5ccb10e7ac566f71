"""ONNX nodes of reductions, pooling, matrix products, and convolutions.

See `onnx_ops`.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from dynconv_jax.sparse.onnx_graph import integers
from dynconv_jax.sparse.onnx_ops import Op, cast, elementwise
from dynconv_jax.sparse.onnx_shapes import axis_in, placed, plain
from dynconv_jax.sparse.onnx_values import NCHW, PLAIN, Value, onnx_type


def _reduce(w, xs, outs, axes, *, op, **_):
  x, out = w.as_value(xs[0]), outs[0]
  if not axes:
    return [x]
  name, layout = placed(w, x)
  kept = [axis_in(layout, a) for a in range(len(x.shape)) if a not in axes]
  if kept != sorted(kept):
    name, layout = w.full(x), PLAIN
  axes = integers(*(axis_in(layout, a) for a in axes))
  if x.dtype == bool:
    name = w.graph('Cast', name, to=onnx_type(np.int32))
  name = w.graph(op, name, axes, keepdims=0)
  if x.dtype == bool:
    name = w.graph('Cast', name, to=onnx_type(bool))
  return [plain(out, name)]


def _arg(w, xs, outs, axes, index_dtype, *, op, **_):
  x = cast(w, xs[0], np.int32) if xs[0].dtype == bool else xs[0]
  name = w.graph(op, w.full(x), axis=axes[0], keepdims=0)
  return [cast(w, Value(outs[0].shape, np.int64, {PLAIN: name}), index_dtype)]


def _top_k(w, xs, outs, k, axis, **_):
  if not isinstance(k, int):
    raise NotImplementedError('top_k with a k that is not constant')
  values, indices = w.graph.many(
    'TopK', w.full(xs[0]), integers(k), outputs=2, axis=axis
  )
  indices = Value(outs[1].shape, np.int64, {PLAIN: indices})
  return [plain(outs[0], values), cast(w, indices, outs[1].dtype)]


def _cumsum(w, xs, outs, axis, reverse, **_):
  name = w.graph('CumSum', w.full(xs[0]), np.int64(axis), reverse=int(reverse))
  return [plain(outs[0], name)]


def _dot_general(w, xs, outs, dimension_numbers, **_):
  (left, right), (left_batch, right_batch) = dimension_numbers
  if xs[0].dtype.kind == 'b' or xs[0].dtype != xs[1].dtype:
    raise NotImplementedError(f'a product of {xs[0].dtype} and {xs[1].dtype}')
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
  if (tuple(left), tuple(right)) == (last, (0,)) and len(xs[1].shape) == 2:
    return [plain(outs[0], w.graph('MatMul', first, second))]
  equation = ','.join(map(''.join, names)) + '->' + ''.join(batch + free)
  name = w.graph('Einsum', first, second, equation=equation)
  return [plain(outs[0], name)]


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
  if any(n < 0 for pads in padding for n in pads):
    raise NotImplementedError(f'a convolution with padding {padding}')
  numbers, maps = dimension_numbers, (0, 3, 1, 2)
  if numbers.lhs_spec == maps:
    x = w.nchw(xs[0])
  else:
    x = w.transpose(w.full(xs[0]), numbers.lhs_spec)
  y = w.graph(
    'Conv',
    x,
    w.transpose(w.full(xs[1]), numbers.rhs_spec),
    kernel_shape=[xs[1].shape[a] for a in numbers.rhs_spec[2:]],
    strides=list(window_strides),
    dilations=list(rhs_dilation),
    pads=[low for low, _ in padding] + [high for _, high in padding],
    group=feature_group_count,
  )
  if numbers.out_spec == maps:
    return [Value(outs[0].shape, outs[0].dtype, {NCHW: y})]
  back = np.argsort(numbers.out_spec).tolist()
  return [plain(outs[0], w.transpose(y, back))]


def _pool(
  w,
  xs,
  outs,
  window_dimensions,
  window_strides,
  padding,
  base_dilation,
  window_dilation,
  *,
  op,
  **_,
):
  rank = len(window_dimensions)
  along = (window_dimensions, window_strides, base_dilation, window_dilation)
  if (
    rank != 4
    or any(v[a] != 1 for v in along for a in (0, 3))
    or any(d != 1 for d in (*base_dilation, *window_dilation))
    or any(n for a in (0, 3) for n in padding[a])
    or xs[0].dtype.kind in 'biu'
  ):
    raise NotImplementedError(
      f'{xs[0].dtype} pooling with window {window_dimensions}, strides '
      f'{window_strides}, and dilations {base_dilation} and {window_dilation}'
    )
  name = w.graph(
    op,
    w.nchw(xs[0]),
    kernel_shape=list(window_dimensions[1:3]),
    strides=list(window_strides[1:3]),
    pads=[low for low, _ in padding[1:3]] + [high for _, high in padding[1:3]],
    **({'count_include_pad': 1} if op == 'AveragePool' else {}),
  )
  y = Value(outs[0].shape, outs[0].dtype, {NCHW: name})
  if op == 'AveragePool':  # Convert means to sums.
    area = np.asarray(math.prod(window_dimensions), np.float32)
    y = elementwise(w, 'Mul', [y, area], outs[0])
  return [y]


def _with(write: Op, op: str) -> Op:
  return functools.partial(write, op=op)


OPS: dict[str, Op] = {
  'argmax': _with(_arg, 'ArgMax'),
  'argmin': _with(_arg, 'ArgMin'),
  'conv_general_dilated': _conv_general_dilated,
  'cumsum': _cumsum,
  'dot_general': _dot_general,
  'reduce_and': _with(_reduce, 'ReduceMin'),
  'reduce_max': _with(_reduce, 'ReduceMax'),
  'reduce_min': _with(_reduce, 'ReduceMin'),
  'reduce_or': _with(_reduce, 'ReduceMax'),
  'reduce_prod': _with(_reduce, 'ReduceProd'),
  'reduce_sum': _with(_reduce, 'ReduceSum'),
  'reduce_window_max': _with(_pool, 'MaxPool'),
  'reduce_window_sum': _with(_pool, 'AveragePool'),
  'top_k': _top_k,
}
