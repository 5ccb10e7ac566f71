"""Values of an exported network, in the layouts that its nodes want."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from dynconv_jax.sparse.onnx_graph import Graph, integers

PLAIN, NCHW, ROWS = 'plain', 'nchw', 'rows'


class Value:
  """A traced array, by its names in ONNX.

  Attributes:
    shape: its dimensions; that of the batch may be symbolic.
    dtype: in JAX.
    names: by layout: 'plain', as in JAX; 'nchw' of a map [N, H, W, C]; 'rows',
      [N * H * W, C] of one.
    is_broadcast: whether its tensors have extents of 1 that stand for others.
  """

  def __init__(
    self,
    shape: tuple[Any, ...],
    dtype: Any,
    names: dict[str, str],
    is_broadcast: bool = False,
  ):
    self.shape, self.dtype = tuple(shape), np.dtype(dtype)
    self.names, self.is_broadcast = names, is_broadcast

  @property
  def layout(self) -> str:
    """The layout that it was written in."""
    return next(iter(self.names))


Operand = Value | np.ndarray


class Writer:
  """Writes nodes, and keeps the layouts of values.

  Attributes:
    graph: what is written to.
  """

  def __init__(self, graph: Graph):
    self.graph = graph
    self._batch: str | None = None
    self.images = ''

  def plain(self, value: Operand) -> str | np.ndarray:
    """Returns a value as JAX lays it out; broadcast where it is broadcast."""
    if isinstance(value, np.ndarray):
      return as_onnx(value)
    if PLAIN not in value.names:
      g, (_, h, w, c) = self.graph, value.shape
      if NCHW in value.names:
        name = g('Transpose', value.names[NCHW], perm=[0, 2, 3, 1])
      else:
        name = g('Reshape', value.names[ROWS], integers(-1, h, w, c))
      value.names[PLAIN] = name
    return value.names[PLAIN]

  def full(self, value: Operand) -> str | np.ndarray:
    """Returns a value as JAX lays it out, at its full shape."""
    if isinstance(value, np.ndarray) or not value.is_broadcast:
      return self.plain(value)
    parts = [
      integers(n) if isinstance(n, int) else self.batch() for n in value.shape
    ]
    g = self.graph
    shape = g('Concat', *parts, axis=0) if parts else integers()
    value.names = {PLAIN: g('Expand', self.plain(value), shape)}
    value.is_broadcast = False
    return value.names[PLAIN]

  def nchw(self, value: Operand) -> str:
    """Returns a map [N, H, W, C] as [N, C, H, W]."""
    value = self.as_value(value)
    if NCHW not in value.names:
      name = self.graph('Transpose', self.full(value), perm=[0, 3, 1, 2])
      value.names[NCHW] = name
    return value.names[NCHW]

  def rows(self, value: Operand) -> str:
    """Returns a map [N, H, W, C] as [N * H * W, C]."""
    value = self.as_value(value)
    if ROWS not in value.names:
      shape = integers(-1, value.shape[-1])
      value.names[ROWS] = self.graph('Reshape', self.full(value), shape)
    return value.names[ROWS]

  def as_value(self, value: Operand) -> Value:
    """Returns a constant as a value of the graph."""
    if isinstance(value, Value):
      return value
    name = self.graph('Identity', as_onnx(value))
    return Value(value.shape, value.dtype, {PLAIN: name})

  def batch(self) -> str:
    """Returns int64[1], the number of images."""
    if self._batch is None:
      shape = self.graph('Shape', self.images, start=0, end=1)
      self._batch = shape
    return self._batch


def as_onnx(array: np.ndarray) -> np.ndarray:
  """Returns an array in a type of ONNX: floats in float32."""
  array = np.asarray(array)
  if array.dtype.kind not in 'biu' and array.dtype != np.float32:
    return array.astype(np.float32)
  return array


def onnx_type(dtype: Any) -> int:
  """Returns the type of ONNX for one of JAX; floats are float32."""
  dtype = np.dtype(dtype)
  if dtype.kind not in 'biu':
    dtype = np.dtype(np.float32)
  return onnx.helper.np_dtype_to_tensor_dtype(dtype)
