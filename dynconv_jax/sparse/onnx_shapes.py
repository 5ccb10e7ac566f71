"""ONNX nodes of JAX's primitives that move elements; see `onnx_ops`."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from dynconv_jax.sparse.onnx_graph import integers
from dynconv_jax.sparse.onnx_ops import Op
from dynconv_jax.sparse.onnx_values import (
  AXES,
  FROM_NCHW,
  NCHW,
  PLAIN,
  TO_NCHW,
  Name,
  Operand,
  Value,
  Writer,
)


def plain(out: Any, name: Name) -> Value:
  """Returns a value in JAX's layout.

  Args:
    out: has the shape and dtype of the value.
    name: name of the value.
  """
  return Value(out.shape, out.dtype, {PLAIN: name})


def placed(w: Writer, x: Operand) -> tuple[Name, str]:
  """Returns a value at its full shape, and its layout, NCHW or PLAIN."""
  x = w.as_value(x)
  if x.layout == NCHW and not x.is_broadcast:
    return x.names[NCHW], NCHW
  return w.full(x), PLAIN


def axis_in(layout: str, axis: int) -> int:
  """Returns the index of an axis in a layout."""
  return axis if layout == PLAIN else AXES[layout][axis]


def _static(*values: Any) -> np.ndarray:
  if not all(isinstance(v, int | np.integer) for v in values):
    raise NotImplementedError('slices that depend on the number of images')
  return integers(*values)


def _reshape(w, xs, outs, **_):
  return [plain(outs[0], w.reshape(w.full(xs[0]), outs[0].shape))]


def _transpose(w, xs, outs, permutation, **_):
  x, permutation = w.as_value(xs[0]), tuple(permutation)
  if permutation == TO_NCHW and x.layout == NCHW and not x.is_broadcast:
    return [plain(outs[0], x.names[NCHW])]
  if permutation == FROM_NCHW:
    return [Value(outs[0].shape, outs[0].dtype, {NCHW: w.full(x)})]
  return [plain(outs[0], w.transpose(w.full(x), permutation))]


def _broadcast_in_dim(w, xs, outs, shape, broadcast_dimensions, **_):
  x, out = w.as_value(xs[0]), outs[0]
  if tuple(broadcast_dimensions) == (0, 1, 2, 3) == tuple(range(len(shape))):
    # ONNX operators broadcast implicitly.
    names = {k: v for k, v in x.names.items() if k in AXES}
    names = names or {PLAIN: w.plain(x)}
    return [Value(out.shape, out.dtype, names, x.extents)]
  extents = [1] * len(shape)
  for axis, n in zip(broadcast_dimensions, x.extents, strict=True):
    extents[axis] = n
  name = w.reshape(w.plain(x), extents)
  return [Value(out.shape, out.dtype, {PLAIN: name}, extents)]


def _concatenate(w, xs, outs, dimension, **_):
  in_nchw = any(isinstance(x, Value) and x.layout == NCHW for x in xs)
  layout, get = (NCHW, w.nchw) if in_nchw else (PLAIN, w.full)
  axis = axis_in(layout, dimension)
  name = w.graph('Concat', *map(get, xs), axis=axis)
  return [Value(outs[0].shape, outs[0].dtype, {layout: name})]


def _tile(w, xs, outs, reps, **_):
  name = w.graph('Tile', w.full(xs[0]), _static(*reps))
  return [plain(outs[0], name)]


def _stack(w, xs, outs, axis, **_):
  axis = axis % len(outs[0].shape)
  parts = [w.graph('Unsqueeze', w.full(x), integers(axis)) for x in xs]
  return [plain(outs[0], w.graph('Concat', *parts, axis=axis))]


def _cut(w, x, starts, limits, strides=None) -> tuple[Name, str]:
  """Returns a slice of a value, and its layout."""
  name, layout = placed(w, x)
  strides = strides or (1,) * len(starts)
  cuts = [
    (axis_in(layout, axis), *cut)
    for axis, cut in enumerate(zip(starts, limits, strides, strict=True))
    if not (cut[0] == 0 and cut[1] == x.shape[axis] and cut[2] == 1)
  ]
  if cuts:
    axes, starts, limits, steps = (_static(*v) for v in zip(*cuts, strict=True))
    name = w.graph('Slice', name, starts, limits, axes, steps)
  return name, layout


def _slice(w, xs, outs, start_indices, limit_indices, strides, **_):
  name, layout = _cut(w, xs[0], start_indices, limit_indices, strides)
  return [Value(outs[0].shape, outs[0].dtype, {layout: name})]


def _split(w, xs, outs, sizes, axis, **_):
  results, start = [], 0
  for size, out in zip(sizes, outs, strict=True):
    starts, limits = [0] * len(out.shape), list(xs[0].shape)
    starts[axis], limits[axis] = start, start + size
    results += _slice(w, xs, [out], starts, limits, None)
    start += size
  return results


def _inside(starts, shape, sizes, mode) -> list[int]:
  """Returns the start indices of a slice, clamped to the shape as in JAX."""
  moved = [
    min(max(start, 0), n - size)
    if isinstance(n, int) and isinstance(size, int)
    else start
    for start, n, size in zip(starts, shape, sizes, strict=True)
  ]
  if moved != starts and mode != jax.lax.GatherScatterMode.CLIP:
    raise NotImplementedError('indices that are out of bounds')
  if any(
    start and not isinstance(n, int)
    for start, n in zip(starts, shape, strict=True)
  ):
    raise NotImplementedError('indexing into the batch')
  return moved


def _limits(starts, sizes) -> list[Any]:
  return [
    start + size if start else size
    for start, size in zip(starts, sizes, strict=True)
  ]


def _dynamic_slice(w, xs, outs, slice_sizes, **_):
  x, *starts = xs
  if not all(isinstance(start, np.ndarray) for start in starts):
    raise NotImplementedError('indexing by values')
  mode = jax.lax.GatherScatterMode.CLIP
  starts = _inside(list(map(int, starts)), x.shape, slice_sizes, mode)
  return _slice(w, xs, outs, starts, _limits(starts, slice_sizes), None)


def _gather(w, xs, outs, dimension_numbers, slice_sizes, mode, **params):
  """Supports constant indices: `x[:, :n]`, `x[..., 0]`, `x[:, [2, 0, 1]]`."""
  x, indices = xs
  if not isinstance(indices, np.ndarray):
    raise NotImplementedError('indexing by values')
  numbers, shape, out = dimension_numbers, x.shape, outs[0]
  axes, dropped = numbers.start_index_map, numbers.collapsed_slice_dims
  if indices.ndim == 1 and not numbers.operand_batching_dims:
    starts = [0] * len(shape)
    for axis, start in zip(axes, indices, strict=True):
      starts[axis] = int(start)
    starts = _inside(starts, shape, slice_sizes, mode)
    limits = _limits(starts, slice_sizes)
    name, layout = _cut(w, x, starts, limits)
    if not dropped:
      return [Value(out.shape, out.dtype, {layout: name})]
    if layout == NCHW:
      name = w.transpose(name, FROM_NCHW)
    return [plain(out, w.graph('Squeeze', name, integers(*dropped)))]
  # Find which elements of an image are read.
  if slice_sizes[0] != shape[0] or numbers.offset_dims[:1] != (0,):
    raise NotImplementedError('indexing into the batch')
  count = math.prod(shape[1:])
  sources = jax.lax.gather_p.bind(
    np.arange(count, dtype=np.int32).reshape(1, *shape[1:]),
    indices,
    dimension_numbers=numbers,
    slice_sizes=(1, *slice_sizes[1:]),
    mode=mode,
    **{**params, 'fill_value': -1},
  )
  sources = np.asarray(sources).reshape(-1)
  if sources.size and sources.min() < 0:
    raise NotImplementedError('indices that are out of bounds')
  name = w.reshape(w.full(x), (shape[0], count))
  name = w.graph('Gather', name, sources.astype(np.int64), axis=1)
  return [plain(out, w.reshape(name, out.shape))]


def _pad(w, xs, outs, padding_config, **_):
  name, layout = placed(w, xs[0])
  value, rank = w.plain(xs[1]), len(padding_config)
  order = sorted(range(rank), key=lambda axis: axis_in(layout, axis))
  shape = [xs[0].shape[axis] for axis in order]
  lows, highs, inner = zip(*(padding_config[i] for i in order), strict=True)
  highs = list(highs)
  if stuffed := [axis for axis in range(rank) if inner[axis]]:
    # Pad after each element, including the last, in an additional axis.
    if not all(isinstance(shape[axis], int) for axis in stuffed):
      raise NotImplementedError(f'padding by {padding_config}')
    new = [axis + 1 + i for i, axis in enumerate(stuffed)]
    pads = np.zeros((2, rank + len(new)), np.int64)
    pads[1, new] = [inner[axis] for axis in stuffed]
    name = w.graph('Unsqueeze', name, integers(*new))
    name = w.graph('Pad', name, pads.reshape(-1), value)
    for axis in stuffed:
      shape[axis] *= 1 + inner[axis]
      highs[axis] -= inner[axis]
    name = w.reshape(name, shape)
  if any((*lows, *highs)):  # Negative padding crops.
    name = w.graph('Pad', name, _static(*lows, *highs), value)
  return [Value(outs[0].shape, outs[0].dtype, {layout: name})]


def _rev(w, xs, outs, dimensions, **_):
  name, layout = placed(w, xs[0])
  axes = [axis_in(layout, axis) for axis in dimensions]
  ends = np.full(len(axes), np.iinfo(np.int64).min)
  backwards = integers(*[-1] * len(axes))
  name = w.graph('Slice', name, backwards, ends, integers(*axes), backwards)
  return [Value(outs[0].shape, outs[0].dtype, {layout: name})]


OPS: dict[str, Op] = {
  'broadcast_in_dim': _broadcast_in_dim,
  'concatenate': _concatenate,
  'dynamic_slice': _dynamic_slice,
  'expand_dims': _reshape,
  'gather': _gather,
  'pad': _pad,
  'reshape': _reshape,
  'rev': _rev,
  'slice': _slice,
  'split': _split,
  'squeeze': _reshape,
  'stack': _stack,
  'tile': _tile,
  'transpose': _transpose,
}
