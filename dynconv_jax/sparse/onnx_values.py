"""Values of an exported network, in the layouts that its nodes need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from dynconv_jax.sparse.onnx_graph import Graph, integers

PLAIN, NCHW, ROWS = 'plain', 'nchw', 'rows'
# Index of each axis of a map [N, H, W, C] in a layout.
AXES = {PLAIN: (0, 1, 2, 3), NCHW: (0, 2, 3, 1)}
TO_NCHW, FROM_NCHW = (0, 3, 1, 2), (0, 2, 3, 1)

Name = str | np.ndarray


class Value:
  """A traced array and its ONNX names.

  Attributes:
    shape: shape of the array; the batch dimension may be symbolic.
    dtype: dtype in JAX.
    names: layout -> name of the tensor, or the constant itself. Layouts are
      'plain', as in JAX; 'nchw', [N, C, H, W] of a map [N, H, W, C]; and
      'rows', [N * H * W, C] of a map.
    extents: shape of the plain tensor, with 1 for dimensions that ONNX
      broadcasts.
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
    """The layout in which the value was written first."""
    return next(iter(self.names))

  @property
  def is_broadcast(self) -> bool:
    """Whether ONNX broadcasts a dimension of the value's tensors."""
    return self.extents != self.shape


Operand = Value | np.ndarray


class Writer:
  """Writes nodes and caches the layouts of values.

  Attributes:
    graph: the graph to write to.
    images: name of the network's input.
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
      shape: the new shape; one dimension may be symbolic or -1.

    Raises:
      NotImplementedError: more than one dimension is symbolic.
    """
    if sum(not isinstance(n, int) for n in shape) > 1:
      raise NotImplementedError(f'the shape {shape}')
    shape = [n if isinstance(n, int) else -1 for n in shape]
    if isinstance(name, np.ndarray):
      return name.reshape(shape)
    return self.graph('Reshape', name, integers(*shape))

  def plain(self, value: Operand) -> Name:
    """Returns a value in JAX's layout, with extents of 1 if it is broadcast."""
    value = self.as_value(value)
    if PLAIN not in value.names:
      if NCHW in value.names:
        name = self.transpose(value.names[NCHW], FROM_NCHW)
      else:
        name = self.reshape(value.names[ROWS], (-1, *value.extents[1:]))
      value.names[PLAIN] = name
    return value.names[PLAIN]

  def full(self, value: Operand) -> Name:
    """Returns a value in JAX's layout, at its full shape."""
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
      full: whether to expand broadcast dimensions.
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
    """Returns a `Value`, converting constants."""
    if isinstance(value, Value):
      return value
    return Value(value.shape, value.dtype, {PLAIN: as_onnx(value)})

  def dimension(self, n: Any) -> Name:
    """Returns a dimension as int64[1].

    Args:
      n: an integer, or a multiple of the symbolic number of images.

    Raises:
      NotImplementedError: the dimension is another symbolic expression.
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
  """Returns an array in its ONNX type; floats become float32."""
  array = np.asarray(array)
  return array.astype(
    onnx.helper.tensor_dtype_to_np_dtype(onnx_type(array.dtype))
  )


def onnx_type(dtype: Any) -> int:
  """Returns the ONNX type of a JAX dtype; floats become float32.

  Args:
    dtype: JAX dtype.

  Raises:
    NotImplementedError: ONNX has no such type.
  """
  dtype = np.dtype(dtype)
  if dtype.kind == 'c' or dtype.name.startswith(('key', 'float0')):
    raise NotImplementedError(f'values of type {dtype}')
  if dtype.kind not in 'biu':
    dtype = np.dtype(np.float32)
  return onnx.helper.np_dtype_to_tensor_dtype(dtype)
