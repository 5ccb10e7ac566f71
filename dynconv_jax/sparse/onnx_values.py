"""Values of an exported network, in the layouts that its nodes want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from dynconv_jax.sparse.onnx_graph import Graph, integers

PLAIN, NCHW, ROWS = 'plain', 'nchw', 'rows'
# Where the axes of a map [N, H, W, C] are in a layout.
AXES = {PLAIN: (0, 1, 2, 3), NCHW: (0, 2, 3, 1)}
TO_NCHW, FROM_NCHW = (0, 3, 1, 2), (0, 2, 3, 1)

Name = str | np.ndarray


class Value:
  """A traced array, by its names in ONNX.

  Attributes:
    shape: its dimensions; that of the batch may be symbolic.
    dtype: in JAX.
    names: by layout: 'plain', as in JAX; 'nchw' of a map [N, H, W, C]; 'rows',
      [N * H * W, C] of one. A constant stands for itself.
    extents: dimensions of its plain tensor: 1 where ONNX broadcasts.
  """

  def __init__(
    self,
    shape: Sequence[Any],
    dtype: Any,
    names: dict[str, Name],
    extents: Sequence[Any] | None = None,
  ):
    self.shape, self.dtype = tuple(shape), np.dtype(dtype)
    self.names = names
    self.extents = self.shape if extents is None else tuple(extents)

  @property
  def layout(self) -> str:
    """The layout that it was written in."""
    return next(iter(self.names))

  @property
  def is_broadcast(self) -> bool:
    """Whether its tensors have extents of 1 that stand for others."""
    return self.extents != self.shape


Operand = Value | np.ndarray


class Writer:
  """Writes nodes, and keeps the layouts of values.

  Attributes:
    graph: what is written to.
    images: the name of the network's input.
    batch: the symbolic number of images, or None.
  """

  def __init__(self, graph: Graph, images: str, batch: Any = None):
    self.graph, self.images, self.batch = graph, images, batch
    self._batch: str | None = None

  def transpose(self, name: Name, perm: Sequence[int]) -> Name:
    """Returns a tensor with its axes in another order."""
    if isinstance(name, np.ndarray):
      return name.transpose(perm)
    return self.graph('Transpose', name, perm=list(perm))

  def reshape(self, name: Name, shape: Sequence[Any]) -> Name:
    """Returns a tensor in another shape.

    Args:
      name: the tensor.
      shape: one of its dimensions may be symbolic, or -1.

    Raises:
      NotImplementedError: more are symbolic.
    """
    if sum(not isinstance(n, int) for n in shape) > 1:
      raise NotImplementedError(f'the shape {shape}')
    shape = [n if isinstance(n, int) else -1 for n in shape]
    if isinstance(name, np.ndarray):
      return name.reshape(shape)
    return self.graph('Reshape', name, integers(*shape))

  def plain(self, value: Operand) -> Name:
    """Returns a value as JAX lays it out; broadcast where it is broadcast."""
    value = self.as_value(value)
    if PLAIN not in value.names:
      if NCHW in value.names:
        name = self.transpose(value.names[NCHW], FROM_NCHW)
      else:
        name = self.reshape(value.names[ROWS], (-1, *value.extents[1:]))
      value.names[PLAIN] = name
    return value.names[PLAIN]

  def full(self, value: Operand) -> Name:
    """Returns a value as JAX lays it out, at its full shape."""
    value = self.as_value(value)
    if value.is_broadcast:
      name = self.plain(value)
      parts = [self.dimension(n) for n in value.shape]
      if all(isinstance(part, np.ndarray) for part in parts):
        shape = np.concatenate(parts)
      else:
        shape = self.graph('Concat', *parts, axis=0)
      value.names = {PLAIN: self.graph('Expand', name, shape)}
      value.extents = value.shape
    return self.plain(value)

  def nchw(self, value: Operand, full: bool = True) -> Name:
    """Returns a map [N, H, W, C] as [N, C, H, W].

    Args:
      value: the map.
      full: whether at its full shape.
    """
    value = self.as_value(value)
    if full and value.is_broadcast:
      self.full(value)
    if NCHW not in value.names:
      value.names[NCHW] = self.transpose(self.plain(value), TO_NCHW)
    return value.names[NCHW]

  def rows(self, value: Operand) -> Name:
    """Returns a map [N, H, W, C] as [N * H * W, C]."""
    value = self.as_value(value)
    if ROWS not in value.names:
      value.names[ROWS] = self.reshape(self.full(value), (-1, value.shape[-1]))
    return value.names[ROWS]

  def as_value(self, value: Operand) -> Value:
    """Returns a constant as a value of the graph."""
    if isinstance(value, Value):
      return value
    return Value(value.shape, value.dtype, {PLAIN: as_onnx(value)})

  def dimension(self, n: Any) -> Name:
    """Returns int64[1], a dimension of a value.

    Args:
      n: a number, or a multiple of the number of images.

    Raises:
      NotImplementedError: it is something else.
    """
    if isinstance(n, int):
      return integers(n)
    if self._batch is None:
      self._batch = self.graph('Shape', self.images, start=0, end=1)
    if n == self.batch:
      return self._batch
    factor = n // self.batch
    if not isinstance(factor, int) or factor * self.batch != n:
      raise NotImplementedError(f'the dimension {n}')
    return self.graph('Mul', self._batch, integers(factor))


def as_onnx(array: np.ndarray) -> np.ndarray:
  """Returns an array in a type of ONNX: floats in float32."""
  array = np.asarray(array)
  return array.astype(
    onnx.helper.tensor_dtype_to_np_dtype(onnx_type(array.dtype))
  )


def onnx_type(dtype: Any) -> int:
  """Returns the type of ONNX for one of JAX; floats are float32.

  Args:
    dtype: of JAX.

  Raises:
    NotImplementedError: there is none.
  """
  dtype = np.dtype(dtype)
  if dtype.kind == 'c' or dtype.name.startswith(('key', 'float0')):
    raise NotImplementedError(f'values of type {dtype}')
  if dtype.kind not in 'biu':
    dtype = np.dtype(np.float32)
  return onnx.helper.np_dtype_to_tensor_dtype(dtype)
