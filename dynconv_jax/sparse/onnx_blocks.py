"""ONNX nodes of folded convolutions and gated blocks."""

from __future__ import annotations

import itertools

import numpy as np
import onnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv
from dynconv_jax.sparse.onnx_graph import integers
from dynconv_jax.sparse.onnx_values import NCHW, ROWS, Value, Writer

Size = tuple[int, int]


def activate(w: Writer, name: str, activation: str | None) -> str:
  """Returns an activated value."""
  g = w.graph
  if activation is None:
    return name
  if activation == 'relu':
    return g('Relu', name)
  if activation == 'relu6':
    return g('Clip', name, np.float32(0), np.float32(6))
  if activation == 'silu':
    return g('Mul', name, g('Sigmoid', name))
  if activation == 'gelu':  # The tanh approximation, as in Flax.
    cube = g('Mul', name, g('Mul', name, name))
    inner = g('Add', name, g('Mul', cube, np.float32(0.044715)))
    inner = g('Tanh', g('Mul', inner, np.float32((2 / np.pi) ** 0.5)))
    half = g('Mul', name, np.float32(0.5))
    return g('Mul', half, g('Add', inner, np.float32(1)))
  raise NotImplementedError(f'the activation {activation!r}')


def convolve(w: Writer, x: str, layer: FoldedConv, size: Size) -> str:
  """Returns the activated convolution of a map [N, C, H, W].

  Args:
    w: the writer.
    x: the map.
    layer: the folded convolution.
    size: (H, W).
  """
  conv = layer.conv
  (top, bottom), (left, right) = map(conv.pads, size)
  y = w.graph(
    'Conv',
    x,
    _array(layer.kernel).transpose(3, 2, 0, 1),
    _array(layer.bias),
    kernel_shape=[conv.kernel_size] * 2,
    strides=[conv.strides] * 2,
    pads=[top, left, bottom, right],
    group=conv.groups,
  )
  return activate(w, y, conv.activation)


def dense_block(
  w: Writer, block: FoldedBlock, x: Value, hard: Value | None, out
) -> Value:
  """Returns a block's output, computed everywhere and multiplied by the mask.

  Args:
    w: the writer.
    block: the folded block.
    x: float[N, H, W, C].
    hard: float[N, h, w] of {0, 1}; None for everywhere.
    out: has the shape and dtype of the result.
  """
  g, branch, size = w.graph, block.branch, x.shape[1:3]
  y = w.nchw(x)
  for layer, layer_size in zip(
    block.convs, (size, *branch.sizes(size)), strict=False
  ):
    y = convolve(w, y, layer, layer_size)
  if hard is not None:
    y = g('Mul', y, g('Unsqueeze', w.plain(hard), integers(1)))
  if block.projection is not None:
    y = g('Add', y, convolve(w, w.nchw(x), block.projection, size))
  elif branch.shortcut == 'identity':
    y = g('Add', y, w.nchw(x))
  y = activate(w, y, branch.activation)
  return Value(out.shape, out.dtype, {NCHW: y})


def sparse_block(
  w: Writer, block: FoldedBlock, x: Value, hard: Value, out
) -> Value:
  """Returns a block's output, with the branch computed at active positions.

  See `dense_block` for the arguments.
  """
  g, branch, size = w.graph, block.branch, x.shape[1:3]
  rows = w.rows(x)
  maps = _masks(w, branch, w.full(hard), size)
  sizes = branch.level_sizes(size)
  positions = [_positions(w, mask) for mask in maps]
  y, level_before, size_before = rows, None, size
  pairs = zip(branch.levels, block.convs, strict=True)
  for level, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
    for i, (_, layer) in enumerate(group):
      conv, windows = layer.conv, None
      if i == 0 and level_before is None:
        if conv.is_pointwise:
          y = g('Gather', y, positions[level], axis=0)
        else:
          windows = _gather_input(w, y, conv, positions[level], size)
      elif i == 0:
        numbers = _numbers(w, maps[level_before], conv, size_before)
        index = _windows(w, conv, positions[level], size_before)
        index = g('Gather', numbers, index, axis=0)
        # Windows read zeros, row 0, outside the mask.
        zero = np.zeros((1, conv.in_features), np.float32)
        windows = g('Gather', g('Concat', zero, y, axis=0), index, axis=0)
      y = _multiply(w, y, windows, layer)
      y = activate(w, y, conv.activation)
    level_before, size_before = level, sizes[level]
  active = positions[0]
  if block.projection is not None:
    shortcut = _project(w, rows, block.projection, size)
  elif branch.shortcut == 'identity':
    shortcut = rows
  else:
    count = g('Shape', g('Reshape', maps[0], integers(-1)))
    shape = g('Concat', count, integers(branch.features), axis=0)
    shortcut = g('Expand', np.zeros((1, 1), np.float32), shape)
  y = g('Add', y, g('Gather', shortcut, active, axis=0))
  at = g('Unsqueeze', active, integers(1))
  if branch.stays:
    y = g('ScatterND', shortcut, at, activate(w, y, branch.activation))
  else:
    y = activate(w, g('ScatterND', shortcut, at, y), branch.activation)
  return Value(out.shape, out.dtype, {ROWS: y})


def mask_logits(w: Writer, squeeze, x: Value, out) -> Value:
  """Returns the output of a mask unit's `Squeeze`, float32[N, h, w].

  Its convolution and its map of the average are both linear. One pass over the
  features computes the products of all taps and of the average, which are added
  up afterwards.

  Args:
    w: the writer.
    squeeze: a `mask_unit.Squeeze`.
    x: float[N, H, W, C].
    out: has the shape and dtype of the result.
  """
  g, conv = w.graph, squeeze.conv
  kernel, k = _array(conv.kernel), conv.kernel_size[0]
  n, height, width, features = x.shape
  taps = kernel.transpose(2, 0, 1, 3).reshape(features, k * k)
  matrix = np.hstack([taps, _array(squeeze.fc.kernel)])
  if ROWS in x.names:
    y = g('MatMul', w.rows(x), matrix)
    y = g('Reshape', y, integers(-1, height, width, k * k + 1))
    products = g('Transpose', y, perm=[0, 3, 1, 2])
  else:
    products = g(
      'Conv', w.nchw(x), matrix.T[:, :, None, None], kernel_shape=[1, 1]
    )
  if squeeze.pool > 1:
    products = g(
      'AveragePool',
      products,
      kernel_shape=[squeeze.pool] * 2,
      strides=[squeeze.pool] * 2,
      ceil_mode=1,
    )
  one_hot = np.zeros((1, k * k + 1, k * k), np.float32)
  one_hot[0, : k * k] = np.eye(k * k)
  strides = conv.strides
  strides = strides if isinstance(strides, int) else strides[0]
  logits = g(
    'Conv',
    products,
    one_hot.reshape(1, k * k + 1, k, k),
    _array(conv.bias) + _array(squeeze.fc.bias),
    kernel_shape=[k, k],
    strides=[strides, strides],
    pads=[k // 2] * 4,
  )
  last = g('Slice', products, integers(k * k), integers(k * k + 1), integers(1))
  logits = g('Add', logits, g('GlobalAveragePool', last))
  name = g('Squeeze', logits, integers(1))
  return Value(out.shape, out.dtype, {'plain': name})


def _masks(w, branch: Branch, hard: str, size: Size) -> list[str]:
  """Returns the mask of each level, float[N, h, w]."""
  maps = [hard]
  for conv, level_size in zip(
    branch.reads, branch.level_sizes(size)[1:], strict=True
  ):
    maps.append(_dilate(w, maps[-1], conv, level_size))
  return maps


def _dilate(w, mask: str, conv: Conv, size: Size) -> str:
  """Returns a dilated mask; see `masks.dilate`."""
  g, k, s = w.graph, conv.kernel_size, conv.strides
  mask = g('Unsqueeze', mask, integers(1))
  lows = [conv.pads(n)[0] for n in size]
  stuffed = [conv.output_size(n) * s for n in size]
  if s > 1:  # Insert zeros after each position.
    mask = g('Unsqueeze', mask, integers(3, 5))
    pads = integers(0, 0, 0, 0, 0, 0, 0, 0, 0, s - 1, 0, s - 1)
    mask = g('Pad', mask, pads)
    mask = g('Reshape', mask, integers(-1, 1, *stuffed))
  # Crop or pad after the last position that is read.
  ends = [n - m + low for n, m, low in zip(size, stuffed, lows, strict=True)]
  if min(ends) < 0:
    limits = [m + min(e, 0) for m, e in zip(stuffed, ends, strict=True)]
    mask = g('Slice', mask, integers(0, 0), integers(*limits), integers(2, 3))
  if k > 1:
    mask = g(
      'MaxPool',
      mask,
      kernel_shape=[k, k],
      strides=[1, 1],
      pads=[k - 1 - low for low in lows] + [max(e, 0) for e in ends],
    )
  return g('Squeeze', mask, integers(1))


def _positions(w, mask: str) -> str:
  """Returns int64[K], the flat active positions, in order."""
  g = w.graph
  flat = g('Reshape', mask, integers(-1))
  flat = g('Cast', flat, to=onnx.TensorProto.BOOL)
  return g('Squeeze', g('NonZero', flat), integers(0))


def _numbers(w, mask: str, conv: Conv, size: Size) -> str:
  """Returns int32[N * H' * W'] of the padded map.

  Active positions are numbered from 1; others are 0.

  Args:
    w: the writer.
    mask: float[N, H, W].
    conv: the convolution that reads the map.
    size: (H, W).
  """
  g = w.graph
  (top, bottom), (left, right) = map(conv.pads, size)
  flat = g('Reshape', mask, integers(-1))
  flat = g('Cast', flat, to=onnx.TensorProto.INT32)
  numbers = g('Mul', g('CumSum', flat, np.int32(0)), flat)
  numbers = g('Reshape', numbers, integers(-1, *size))
  numbers = g('Pad', numbers, integers(0, top, left, 0, bottom, right))
  return g('Reshape', numbers, integers(-1))


def _windows(w, conv: Conv, positions: str, size: Size) -> str:
  """Returns int64[K, k * k], the positions of the padded map in each window.

  Args:
    w: the writer.
    conv: the convolution.
    positions: int64[K], flat output positions.
    size: (H, W) of the input.
  """
  g, k, s = w.graph, conv.kernel_size, conv.strides
  h, width = map(conv.output_size, size)
  rows, columns = (n + sum(conv.pads(n)) for n in size)
  corners = np.add.outer(np.arange(h) * columns, np.arange(width)) * s
  offsets = np.add.outer(np.arange(k) * columns, np.arange(k))
  table = np.add.outer(corners.reshape(-1), offsets.reshape(-1))
  image = g('Div', positions, integers(h * width))
  position = g('Sub', positions, g('Mul', image, integers(h * width)))
  start = g('Mul', image, integers(rows * columns))
  offsets = g('Gather', table.astype(np.int64), position, axis=0)
  return g('Add', offsets, g('Unsqueeze', start, integers(1)))


def _gather_input(w, rows: str, conv: Conv, positions: str, size: Size) -> str:
  """Returns float[K, k * k, C], the windows of a block's first convolution."""
  g, features = w.graph, conv.in_features
  (top, bottom), (left, right) = map(conv.pads, size)
  table = g('Reshape', rows, integers(-1, *size, features))
  if any((top, bottom, left, right)):
    pads = integers(0, top, left, 0, 0, bottom, right, 0)
    table = g('Pad', table, pads)
  table = g('Reshape', table, integers(-1, features))
  return g('Gather', table, _windows(w, conv, positions, size), axis=0)


def _multiply(w, rows: str, windows: str | None, layer: FoldedConv) -> str:
  """Returns float[K, features], a convolution of rows or of windows."""
  g, conv = w.graph, layer.conv
  kernel, bias = _array(layer.kernel), _array(layer.bias)
  taps, depth = conv.kernel_size**2, conv.in_features // conv.groups
  if conv.groups == 1:
    if windows is not None:
      rows = g('Reshape', windows, integers(-1, taps * depth))
    return g('Gemm', rows, kernel.reshape(-1, conv.features), bias)
  if windows is None:
    windows = g('Unsqueeze', rows, integers(1))
  if depth == 1 and conv.features == conv.groups:
    y = g('Mul', windows, kernel.reshape(taps, -1))
    y = g('ReduceSum', y, integers(1), keepdims=0)
    return g('Add', y, bias)
  shape = integers(-1, taps, conv.groups, depth)
  windows = g('Reshape', windows, shape)
  kernel = kernel.reshape(taps, depth, conv.groups, -1)
  y = g('Einsum', windows, kernel, equation='ktgd,tdgf->kgf')
  return g('Add', g('Reshape', y, integers(-1, conv.features)), bias)


def _project(w, rows: str, layer: FoldedConv, size: Size) -> str:
  """Returns the rows of a strided 1x1 projection."""
  g, s, features = w.graph, layer.conv.strides, layer.conv.in_features
  if s > 1:
    x = g('Reshape', rows, integers(-1, *size, features))
    x = g(
      'Slice',
      x,
      integers(0, 0),
      integers(*size),
      integers(1, 2),
      integers(s, s),
    )
    rows = g('Reshape', x, integers(-1, features))
  return _multiply(w, rows, None, layer)


def _array(parameter) -> np.ndarray:
  return np.asarray(parameter[...], np.float32)
