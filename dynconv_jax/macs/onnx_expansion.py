"""Rewrites an operator as equivalent standard ONNX operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx

from dynconv_jax.macs import onnx_values
from dynconv_jax.macs.onnx_values import Value

_FLOAT = onnx.TensorProto.FLOAT


class Expansion:
  """The equivalent of a node: operators of the newest opset, and their inputs.

  Attributes:
    inputs: names of the node's inputs; '' for omitted ones.
    outputs: names of its outputs; '' for omitted ones.
    params: its attributes by name.
    nodes: the nodes added so far.
    values: values that the nodes read in addition to the inputs.
  """

  def __init__(self, node, inputs, params):
    self.inputs = list(node.input)
    self.outputs = list(node.output)
    self.params = params
    self.nodes: list[onnx.NodeProto] = []
    self.values: dict[str, Value] = {}
    self._known = dict(zip(node.input, inputs, strict=True))
    self._prefix = f'{next(x for x in node.output if x)}/'

  def has(self, index: int) -> bool:
    """Returns whether the node has an input at this index."""
    return len(self.inputs) > index and bool(self.inputs[index])

  def shape(self, index: int) -> tuple[int, ...]:
    """Returns the shape of an input."""
    return self._known[self.inputs[index]].shape

  def data(self, index: int) -> np.ndarray | None:
    """Returns the data of an input, or None if unknown."""
    return self._known[self.inputs[index]].data if self.has(index) else None

  def add(
    self, operator: str, *inputs: str, out: str = '', outputs: int = 1, **params
  ) -> str:
    """Adds a node; returns the name of its first output."""
    out = out or f'{self._prefix}{len(self.nodes)}'
    names = [out, *(f'{out}/{i}' for i in range(1, outputs))]
    self.nodes.append(onnx.helper.make_node(operator, inputs, names, **params))
    return out

  def value(
    self,
    shape: Sequence[int],
    like: int = 0,
    elem_type: int | None = None,
    out: str = '',
  ) -> str:
    """Returns the name of a new value of this shape, derived from an input."""
    source = self._known[self.inputs[like]]
    kind = elem_type or source.type.tensor_type.elem_type or _FLOAT
    out = out or f'{self._prefix}value{len(self.values)}'
    self.values[out] = dataclasses.replace(
      source, type=onnx_values.tensor_type(kind, shape), data=None, cause=''
    )
    return out

  def weight(
    self,
    shape: Sequence[int],
    packed: int,
    whole: Sequence[int] | None = None,
  ) -> str:
    """Returns the name of a weight that an input stores in another form.

    Args:
      shape: of the weight.
      packed: index of the input.
      whole: shape of the full set of weights, if this is one of several.
    """
    name = self.value(shape, packed, _FLOAT)
    all_of_it = self.value(whole, packed, _FLOAT) if whole else name
    self.values[name] = dataclasses.replace(
      self.values[name], weights=frozenset((all_of_it,))
    )
    return name

  def dequantize(self, *indices: int) -> int:
    """Makes inputs real-valued; returns the original type of the first one."""
    kinds = [
      self._known[self.inputs[i]].type.tensor_type.elem_type for i in indices
    ]
    for i in indices:
      self.inputs[i] = self.value(self.shape(i), i, _FLOAT)
      self._known[self.inputs[i]] = self.values[self.inputs[i]]
    return kinds[0]

  def end(self, name: str, index: int = 0) -> None:
    """Makes a value an output of the node."""
    if len(self.outputs) > index and self.outputs[index]:
      self.add('Identity', name, out=self.outputs[index])

  def declare(self, index: int, shape: Sequence[int]) -> None:
    """Sets the shape of an additional output."""
    if len(self.outputs) > index and self.outputs[index]:
      self.value(shape, out=self.outputs[index])

  def summed(self, name: str, index: int) -> str:
    """Returns a value plus an input, or the value if there is no such input."""
    return (
      self.add('Add', name, self.inputs[index]) if self.has(index) else name
    )

  def activated(self, name: str) -> str:
    """Applies the node's activation to a value, if it has one."""
    kind = self.params.get('activation', b'').decode()
    kind = 'Swish' if kind == 'Silu' else kind
    return self.add(kind, name) if kind and kind != 'none' else name


# Adds the equivalent of a node to an expansion.
Writer = Callable[[Expansion], None]


def channels_first(rank: int) -> list[int]:
  """Returns the permutation that moves the channels first."""
  return [0, rank - 1, *range(1, rank - 1)]


def channels_last(rank: int) -> list[int]:
  """Returns the permutation that moves the channels last."""
  return [0, *range(2, rank), 1]
