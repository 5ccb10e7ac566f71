"""Walks an ONNX graph and its subgraphs and collects their work."""

from __future__ import annotations

import ast
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from dynconv_jax.macs import (
  conventions,
  formulas,
  onnx_control,
  onnx_microsoft,
  onnx_ops,
  onnx_values,
  report,
)
from dynconv_jax.macs.builder import ReportBuilder
from dynconv_jax.macs.onnx_values import Value


@dataclasses.dataclass
class Scope:
  """What is known about the values of a graph and of its outer graphs.

  Attributes:
    values: known values by name.
    noted: types that the model declares for values of this graph.
  """

  values: dict[str, Value] = dataclasses.field(default_factory=dict)
  noted: Mapping[str, onnx.TypeProto] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Record:
  """Work of a layer; work on constants alone does not repeat in loops."""

  layer: str
  operator: str
  work: formulas.Work
  output: onnx_ops.Tensor | None
  weights: dict[str, int]
  constant: bool

  def times(self, steps: int) -> _Record:
    if self.constant:
      return self
    return dataclasses.replace(self, work=self.work * steps)


class Counter:
  """Records the work of each node under the name of its layer.

  Attributes:
    records: the work so far.
    uncounted: {operation and layer: why it is not counted}.
    loops: the names of the loops so far.
    visited: number of nodes visited; nodes in loops count once per step.
    inference: shape inference for the model's operators.
    trip_counts: the argument.
    branch: the argument.

  Args:
    opsets: {domain: version of its operator set}, '' for ONNX's own.
    convention: used to find the most expensive branch.
    trip_counts: number of iterations of loops.
    branch: which branch of an `If` to count.
    folder: directory of the model's file; None if there is none.
    constants: whether to count work on constants alone.
  """

  def __init__(
    self,
    opsets: Mapping[str, int],
    convention: conventions.Convention,
    trip_counts: int | Mapping[str, int] | None,
    branch: str,
    folder: pathlib.Path | None,
    constants: bool = False,
  ):
    self.inference = onnx_values.Inference(opsets)
    self._newest = onnx_values.Inference({'': onnx.defs.onnx_opset_version()})
    self._convention = convention
    self.trip_counts = trip_counts
    self.branch = branch
    self._folder = folder
    self._constants = constants
    self.records: list[_Record] = []
    self.uncounted: dict[report.Uncounted, str] = {}
    self.loops: dict[str, None] = {}
    self._notes: dict[str, None] = {}
    self._around = ''
    self.visited = 0

  def graph(
    self,
    graph: onnx.GraphProto,
    scope: Scope,
    initializers: Sequence[onnx.TensorProto] | None = None,
  ) -> list[Value]:
    """Records the nodes of a graph; `scope` must contain the graph's inputs.

    Args:
      graph: the graph.
      scope: known values; the values of the graph are added to it.
      initializers: the constants, if the graph itself does not contain them.

    Returns:
      the outputs of the graph.
    """
    tensors = graph.initializer if initializers is None else initializers
    for tensor in tensors:
      scope.values[tensor.name] = onnx_values.constant(
        tensor, tensor.name, self._folder
      )
    for sparse in graph.sparse_initializer:
      name = sparse.values.name
      scope.values[name] = Value(
        onnx_values.tensor_type(sparse.values.data_type, sparse.dims),
        constant=True,
        weights=frozenset((name,)),
      )
    for index, node in enumerate(graph.node):
      name = layer_name(node) or f'{self._around}{node.op_type}_{index}'
      self._node(node, name, scope, self.inference)
    return [self._read(scope, value.name, graph) for value in graph.output]

  def _read(self, scope, name, owner) -> Value:
    if name not in scope.values:
      raise ValueError(
        'the model is damaged, or does not fit its inputs:'
        f' {owner.name or type(owner).__name__} reads {name!r}, which no node'
        ' computes'
      )
    return scope.values[name]

  def _node(self, node, name, scope, inference) -> None:
    self.visited += 1
    inputs = {x: self._read(scope, x, node) for x in node.input if x}
    schema = inference.schema(node)
    attributes = onnx_values.attributes(node, schema)
    is_onnx = onnx_values.is_onnx(node.domain)
    if is_onnx and node.op_type == 'Constant':
      value = _constant_value(attributes, node.output[0], self._folder)
      scope.values[node.output[0]] = value
    elif is_onnx and node.op_type in onnx_control.RUN:
      run = onnx_control.RUN[node.op_type]
      outputs = run(self, name, node, attributes, scope)
      for output, value in zip(node.output, outputs, strict=False):
        if output:
          scope.values[output] = value
    elif not self._expanded(node, name, attributes, scope, inference):
      self._operator(node, name, attributes, inputs, scope, inference)

  def _operator(self, node, name, attributes, inputs, scope, inference):
    """Infers the outputs of a single operator and records its work."""
    operator = _operator_name(node)
    known = inference.schema(node) is not None
    known |= onnx_microsoft.possible_work(node) is not None
    operation = onnx_ops.Operation(
      operator,
      inference.version(node.domain),
      [inputs[x].tensor if x else None for x in node.input],
      [],
      attributes,
    )
    causes = [value.cause for value in inputs.values() if value.cause]
    if not known:
      cause = f'depend on {node.op_type} in {name}, which is not known'
    elif causes:
      cause = causes[0]
    else:
      cause = f'depend on tensor values ({node.op_type} in {name})'
    noted = scope.noted
    if shapes := onnx_ops.registered_shapes(operation):
      noted = _noted_shapes(node, shapes, inputs)
    outputs = inference.outputs(node, inputs, noted, cause)
    scope.values.update(outputs)
    tensors = [outputs[x].tensor if x else None for x in node.output]
    operation = dataclasses.replace(operation, outputs=tensors)
    self._price(operation, node, name, scope, known)

  def _price(self, operation, node, name, scope, known) -> None:
    operator = operation.name
    if onnx_ops.is_free(operator):
      return
    is_registered = onnx_ops.is_registered(operator)
    inputs = [scope.values[x] for x in node.input if x]
    outputs = [scope.values[x] for x in node.output[:1] if x]
    constant = all(value.constant for value in outputs)
    work, reason = None, 'its cost is not known'
    unknown = [
      x
      for x in (*node.input, *node.output[:1])
      if x and not _is_known(scope, x)
    ]
    if not known and not is_registered:
      reason = f'it is unknown in the domain {node.domain}'
      if not node.domain:
        reason = 'it is not an ONNX operator'
    elif unknown and not is_registered:
      causes = [value.cause for value in (*inputs, *outputs) if value.cause]
      reason = f'the shapes of {unknown} {(causes or ["are not known"])[0]}'
    else:
      work = onnx_ops.work(operation)
    if work is None:
      if self.may_cost(node) and not constant:
        self.leave_out(node, name, reason)
      return
    used = frozenset().union(
      *(
        scope.values[x].weights
        for x in onnx_ops.parameters(node.op_type, node.input)
      )
    )
    sizes = {
      weight: math.prod(scope.values[weight].shape or ())
      for weight in used
      if weight in scope.values
    }
    output = operation.outputs[0] if operation.outputs else None
    self.records.append(
      _Record(name, node.op_type, work, output, sizes, constant)
    )

  def _expanded(self, node, name, attributes, scope, inference) -> bool:
    """Counts a node through its equivalent operators; False if it has none."""
    if inference is self._newest:
      return False
    inputs = [scope.values[x] if x else None for x in node.input]
    expansion = onnx_microsoft.expand(node, inputs, attributes)
    if expansion is None:
      return False
    operator = _operator_name(node)
    before, self.records = self.records, []
    scope.values.update(expansion.values)
    for inner in expansion.nodes:
      self._node(inner, name, scope, self._newest)
    records, self.records = self.records, before
    if not onnx_ops.is_registered(operator):
      self.records += records
      if any(self._convention(record.work) for record in records):
        self._notes[onnx_microsoft.note(node)] = None
      return True
    operation = onnx_ops.Operation(
      operator,
      inference.version(node.domain),
      [x.tensor if x else None for x in inputs],
      [
        scope.values[x].tensor if x in scope.values else None
        for x in node.output
      ],
      attributes,
    )
    self._price(operation, node, name, scope, True)
    return True

  def leave_out(self, node: onnx.NodeProto, name: str, reason: str) -> None:
    """Records that a node of a layer is not counted."""
    entry = report.Uncounted(node.op_type, name)
    self.uncounted.setdefault(entry, reason)

  def body(
    self, graph, scope, name, inputs: Sequence[Value] = ()
  ) -> tuple[list[_Record], list[Value]]:
    """Returns the work and the outputs of one run of a subgraph of `name`."""
    before = self.records, self._around
    self.records, self._around = [], f'{name}.'
    inside = Scope(dict(scope.values), noted_types(graph, {}))
    for declared, value in zip(graph.input, inputs, strict=False):
      kind = onnx_values.merged(value.type, declared.type)
      cause = '' if onnx_values.shape_of(kind) is not None else value.cause
      inside.values[declared.name] = dataclasses.replace(
        value, type=kind, cause=cause
      )
    outputs = self.graph(graph, inside)
    # Weights of the subgraph are identified by their names.
    for weight in frozenset().union(*(x.weights for x in outputs)):
      if weight in inside.values:
        scope.values.setdefault(weight, inside.values[weight])
    records = self.records
    self.records, self._around = before
    return records, outputs

  def cost(self, records: list[_Record]) -> int:
    """Returns the count of records, without work on constants alone."""
    return sum(self._convention(x.work) for x in records if not x.constant)

  def may_cost(self, node: onnx.NodeProto) -> bool:
    """Returns whether the convention may count the work of a node."""
    graphs = [x.g for x in node.attribute if x.HasField('g')]
    if graphs:
      return any(self.may_cost(inner) for x in graphs for inner in x.node)
    operator = _operator_name(node)
    stands_for = onnx_microsoft.possible_work(node)
    if stands_for is not None and not onnx_ops.is_registered(operator):
      return self._convention(stands_for) > 0
    return onnx_ops.may_cost(operator, self._convention)

  def report_to(self, builder: ReportBuilder) -> None:
    """Adds all records to the report; a weight belongs to its first use.

    Raises:
      ValueError: if `trip_counts` names a loop that does not exist.
    """
    trips = self.trip_counts
    names = trips.keys() if isinstance(trips, Mapping) else set()
    if unknown := sorted(names - self.loops.keys()):
      raise ValueError(
        f'trip_counts must name loops of the program; got {unknown}, and the'
        f' loops are {list(self.loops)}'
      )
    seen: set[str] = set()
    for record in self.records:
      if record.constant and not self._constants:
        continue
      new = {w: n for w, n in record.weights.items() if w not in seen}
      if self._convention(record.work) > 0:
        seen |= new.keys()
      output = record.output
      builder.add(
        record.layer,
        record.work,
        output_shape=(output and output.shape) or (),
        parameters=sum(new.values()),
        itemsize=output.dtype.itemsize if output and output.dtype else 0,
      )
    for note in filter(None, (self._constant_work(), *self._notes)):
      builder.note(note)

  def _constant_work(self) -> str:
    """Returns a note on the work left out as constant, '' if there is none."""
    if self._constants:
      return ''
    prices: dict[str, int] = {}
    for record in self.records:
      price = self._convention(record.work) if record.constant else 0
      name = 'other operators'
      if record.work.kind in ('conv', 'matmul'):
        name = f'{record.operator} in {record.layer}'
      if price:
        prices[name] = prices.get(name, 0) + price
    if not prices:
      return ''
    parts = [f'{name} {price:,}' for name, price in prices.items()]
    return (
      f'Not in the total, because it depends only on constants'
      f' ({self._convention.unit}): {", ".join(parts)};'
      f' {sum(prices.values()):,} in total. Count it with constants=True.'
    )


def noted_types(
  graph: onnx.GraphProto, dimensions: Mapping[str, int]
) -> dict[str, onnx.TypeProto]:
  """Returns the types that a graph declares for its values.

  Args:
    graph: the graph.
    dimensions: sizes of symbolic dimensions.
  """
  noted = {}
  for value in (*graph.value_info, *graph.output):
    kind = onnx.TypeProto()
    kind.CopyFrom(value.type)
    for dim in (
      kind.tensor_type.shape.dim if kind.HasField('tensor_type') else ()
    ):
      if dim.dim_param in dimensions:
        dim.dim_value = dimensions[dim.dim_param]
      elif not dim.HasField('dim_value') or dim.dim_value < 0:
        dim.Clear()
    if kind.WhichOneof('value'):
      noted[value.name] = kind
  return noted


def layer_name(node: onnx.NodeProto) -> str:
  """Returns the path of the module that a node belongs to, or its name."""
  weight = node.input[1] if len(node.input) > 1 else ''
  if node.op_type in ('Conv', 'ConvTranspose', 'Gemm') and weight.endswith(
    '.weight'
  ):
    return weight.removesuffix('.weight')
  for entry in node.metadata_props:
    if entry.key == 'pkg.torch.onnx.name_scopes':
      # The last name is the node's own; outside of modules, the only one.
      return ['', *ast.literal_eval(entry.value)][-2]
  if not node.name.startswith('/'):
    return node.name
  path: list[str] = []
  for part in node.name.split('/')[1:-1]:
    # In a sequence, an exporter writes 'layer1/layer1.0' for 'layer1.0'.
    if path and part.startswith(f'{path[-1]}.'):
      path.pop()
    path.append(part)
  return '.'.join(path)


def _operator_name(node: onnx.NodeProto) -> str:
  if onnx_values.is_onnx(node.domain):
    return node.op_type
  return f'{node.domain}::{node.op_type}'


def _is_known(scope: Scope, name: str) -> bool:
  """Returns whether the shape of a value is known, or it is not a tensor."""
  value = scope.values[name]
  kind = value.type.WhichOneof('value')
  return value.shape is not None or kind not in (None, 'tensor_type')


def _noted_shapes(node, shapes, inputs) -> dict[str, onnx.TypeProto]:
  first = next(iter(inputs.values()), None)
  kind = first.type.tensor_type.elem_type if first else 0
  kind = kind or onnx.TensorProto.FLOAT
  return {
    name: onnx_values.tensor_type(kind, shape)
    for name, shape in zip(node.output, shapes, strict=False)
  }


def _constant_value(attributes, name, folder) -> Value:
  for key, dtype in (
    ('value_int', np.int64),
    ('value_ints', np.int64),
    ('value_float', np.float32),
    ('value_floats', np.float32),
  ):
    if key in attributes:
      return onnx_values.array(np.asarray(attributes[key], dtype))
  if 'value' in attributes:
    return onnx_values.constant(attributes['value'], name, folder)
  if 'sparse_value' in attributes:
    sparse = attributes['sparse_value']
    kind = onnx_values.tensor_type(sparse.values.data_type, sparse.dims)
    return Value(kind, constant=True, weights=frozenset((name,)))
  text = attributes.get('value_strings')
  shape = () if text is None else (len(text),)
  kind = onnx_values.tensor_type(onnx.TensorProto.STRING, shape)
  return Value(kind, constant=True)
