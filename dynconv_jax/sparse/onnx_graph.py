"""A minimal ONNX graph writer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

_OPSET = 18
_IR_VERSION = 10


class Graph:
  """An ONNX graph under construction.

  Attributes:
    scope: prefix of the names of new nodes and constants, such as 'layer1.0'.
  """

  def __init__(self):
    self.scope = ''
    self._nodes, self._constants, self._inputs = [], [], []

  def __call__(self, op: str, *inputs: str | np.ndarray, **attributes) -> str:
    """Returns the name of a new node's output.

    Args:
      op: an operator of the standard operator set.
      *inputs: names of values, or constants.
      **attributes: attributes of the operator.
    """
    return self.many(op, *inputs, outputs=1, **attributes)[0]

  def many(
    self, op: str, *inputs: str | np.ndarray, outputs: int, **attributes
  ) -> list[str]:
    """Returns the names of a new node's outputs; see `__call__`."""
    node = f'{self.scope}/{op}_{len(self._nodes)}'
    names = [
      value if isinstance(value, str) else self._constant(value)
      for value in inputs
    ]
    produced = [f'{node}:{i}' if i else node for i in range(outputs)]
    self._nodes.append(
      helper.make_node(op, names, produced, node, **attributes)
    )
    return produced

  def input(self, name: str, shape: Sequence[int | str]) -> str:
    """Returns the name of a new float32 input of the graph."""
    self._inputs.append(_float(name, shape))
    return name

  def model(
    self, outputs: dict[str, tuple[str | np.ndarray, Sequence[int | str]]]
  ) -> onnx.ModelProto:
    """Returns the checked model, with only the nodes that its outputs need.

    Args:
      outputs: name -> (float32 value, shape). A value may be a constant.
    """
    results = []
    for name, (value, _) in outputs.items():
      if isinstance(value, np.ndarray):
        value = self._constant(value)
      results.append(helper.make_node('Identity', [value], [name]))
    needed, nodes = set(outputs), []
    for node in reversed([*self._nodes, *results]):
      if needed.intersection(node.output):
        needed.update(node.input)
        nodes.append(node)
    graph = helper.make_graph(
      nodes[::-1],
      'dynconv_jax',
      self._inputs,
      [_float(name, shape) for name, (_, shape) in outputs.items()],
      [c for c in self._constants if c.name in needed],
    )
    model = helper.make_model(
      graph,
      producer_name='dynconv_jax',
      opset_imports=[helper.make_opsetid('', _OPSET)],
      ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return model

  def _constant(self, value: np.ndarray) -> str:
    name = f'{self.scope}/constant_{len(self._constants)}'
    value = np.asarray(value, order='C')
    self._constants.append(numpy_helper.from_array(value, name))
    return name


def integers(*values: int) -> np.ndarray:
  """Returns int64 values, the type of shapes, axes, and indices."""
  return np.array(values, np.int64)


def _float(name, shape):
  return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
