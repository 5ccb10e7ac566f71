"""Walks an ONNX graph, and the graphs within it, and gathers its work."""

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
  onnx_microsoft,
  onnx_ops,
  onnx_values,
  report,
)
from dynconv_jax.macs.onnx_values import Value

# A loop is gone through step by step for as many nodes as this.
_MOST_NODES_OF_A_LOOP = 10000


@dataclasses.dataclass
class Scope:
  """What is known of the values of a graph and of those around it.

  Attributes:
    values: by name.
    noted: types of values of this graph that the model notes.
  """

  values: dict[str, Value] = dataclasses.field(default_factory=dict)
  noted: Mapping[str, onnx.TypeProto] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Record:
  """Work of a layer, or work on constants alone, which nothing repeats."""

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
    uncounted: {operation and layer: why it is not counted}.

  Args:
    opsets: {domain: version of its operator set}, '' for ONNX's own.
    convention: by which the dearest branch is found.
    trip_counts: as in `count_macs`.
    branch: as in `count_macs`.
    folder: where the model lies; None if it is not a file.
  """

  def __init__(
    self,
    opsets: Mapping[str, int],
    convention: conventions.Convention,
    trip_counts: int | Mapping[str, int] | None,
    branch: str,
    folder: pathlib.Path | None,
  ):
    self._inference = onnx_values.Inference(opsets)
    self._newest = onnx_values.Inference({'': onnx.defs.onnx_opset_version()})
    self._convention = convention
    self._trip_counts = trip_counts
    self._branch = branch
    self._folder = folder
    self._records: list[_Record] = []
    self.uncounted: dict[report.Uncounted, str] = {}
    self._loops: dict[str, None] = {}
    self._around = ''
    self._visited = 0

  def graph(
    self,
    graph: onnx.GraphProto,
    scope: Scope,
    initializers: Sequence[onnx.TensorProto] | None = None,
  ) -> list[Value]:
    """Records the nodes of a graph, whose scope has its inputs.

    Args:
      graph: the graph.
      scope: what is known; it then has the graph's values too.
      initializers: its constants, where the graph does not have them itself.

    Returns:
      its outputs.
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
      self._node(node, name, scope, self._inference)
    return [self._read(scope, value.name, graph) for value in graph.output]

  def _read(self, scope, name, owner) -> Value:
    if name not in scope.values:
      raise ValueError(
        'the model is damaged, or does not fit its inputs:'
        f' {owner.name or type(owner).__name__} reads {name!r}, which nothing'
        ' makes'
      )
    return scope.values[name]

  def _node(self, node, name, scope, inference) -> None:
    self._visited += 1
    inputs = {x: self._read(scope, x, node) for x in node.input if x}
    schema = inference.schema(node)
    attributes = onnx_values.attributes(node, schema)
    is_onnx = onnx_values.is_onnx(node.domain)
    if is_onnx and node.op_type == 'Constant':
      value = _constant_value(attributes, node.output[0], self._folder)
      scope.values[node.output[0]] = value
    elif is_onnx and node.op_type in ('If', 'Loop', 'Scan'):
      run = {'If': self._if, 'Loop': self._loop, 'Scan': self._scan}
      outputs = run[node.op_type](name, node, attributes, scope)
      for output, value in zip(node.output, outputs, strict=False):
        if output:
          scope.values[output] = value
    elif not self._expanded(node, name, attributes, scope, inference):
      self._operator(node, name, attributes, inputs, scope, inference)

  def _operator(self, node, name, attributes, inputs, scope, inference):
    """Infers and prices a node that does one thing."""
    operator = _operator_name(node)
    known = inference.schema(node) is not None
    operation = onnx_ops.Operation(
      operator,
      inference.version(node.domain),
      [inputs[x].tensor if x else None for x in node.input],
      [],
      attributes,
    )
    causes = [value.cause for value in inputs.values() if value.cause]
    if not known:
      cause = f'follow from {node.op_type} in {name}, which is not known'
    elif causes:
      cause = causes[0]
    else:
      cause = f'depend on values, by {node.op_type} in {name}'
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
      reason = f'it is of the domain {node.domain}'
      if not node.domain:
        reason = 'it is no operator of ONNX'
    elif unknown and not is_registered:
      causes = [value.cause for value in (*inputs, *outputs) if value.cause]
      reason = f'the shapes of {unknown} {(causes or ["are not known"])[0]}'
    else:
      work = onnx_ops.work(operation)
    if work is None:
      if onnx_ops.may_cost(operator, self._convention) and not constant:
        self._leave_out(node, name, reason)
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
    self._records.append(
      _Record(name, node.op_type, work, output, sizes, constant)
    )

  def _expanded(self, node, name, attributes, scope, inference) -> bool:
    """Counts a node as the ONNX operators that it stands for, if it does."""
    if inference is self._newest:
      return False
    inputs = [scope.values[x] if x else None for x in node.input]
    expansion = onnx_microsoft.expand(node, inputs, attributes)
    if expansion is None:
      return False
    operator = _operator_name(node)
    before, self._records = self._records, []
    scope.values.update(expansion.values)
    for inner in expansion.nodes:
      self._node(inner, name, scope, self._newest)
    records, self._records = self._records, before
    if not onnx_ops.is_registered(operator):
      self._records += records
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

  def _leave_out(self, node, name, reason) -> None:
    entry = report.Uncounted(node.op_type, name)
    self.uncounted.setdefault(entry, reason)

  def _body(
    self, graph, scope, name, inputs: Sequence[Value] = ()
  ) -> tuple[list[_Record], list[Value]]:
    """Returns what one run of the inner graph of the node `name` does."""
    before = self._records, self._around
    self._records, self._around = [], f'{name}.'
    inside = Scope(dict(scope.values), noted_types(graph, {}))
    for declared, value in zip(graph.input, inputs, strict=False):
      kind = onnx_values.merged(value.type, declared.type)
      cause = '' if onnx_values.shape_of(kind) is not None else value.cause
      inside.values[declared.name] = dataclasses.replace(
        value, type=kind, cause=cause
      )
    outputs = self.graph(graph, inside)
    # Weights of the inner graph are known by their names.
    for weight in frozenset().union(*(x.weights for x in outputs)):
      if weight in inside.values:
        scope.values.setdefault(weight, inside.values[weight])
    records = self._records
    self._records, self._around = before
    return records, outputs

  def _if(self, name, node, attributes, scope) -> list[Value]:
    condition = scope.values[node.input[0]]
    names = ('then_branch', 'else_branch')
    if condition.data is not None:
      taken = names[not condition.data.item()]
      records, outputs = self._body(attributes[taken], scope, name)
      self._records += records
      return outputs
    branches = [self._body(attributes[taken], scope, name) for taken in names]
    if self._branch in ('then', 'else'):
      records, outputs = branches[self._branch == 'else']
    else:
      choose = min if self._branch == 'min' else max
      records, outputs = choose(branches, key=lambda x: self._cost(x[0]))
    self._records += records
    return [value.variable() for value in outputs]

  def _cost(self, records: list[_Record]) -> int:
    return sum(self._convention(x.work) for x in records if not x.constant)

  def _scan(self, name, node, attributes, scope) -> list[Value]:
    values = [scope.values[x] if x else None for x in node.input]
    scanned = attributes['num_scan_inputs']
    # Opset 8 has lengths first, and a batch before the steps.
    old = self._inference.version('') < 9
    state = values[1 if old else 0 : len(values) - scanned]
    sequences = values[len(values) - scanned :]
    axes = attributes.get('scan_input_axes') or [1 if old else 0] * scanned
    if any(value.shape is None for value in (*state, *sequences)):
      if self._may_cost(attributes['body']):
        self._leave_out(node, name, 'its number of steps depends on values')
      cause = f'follow from {node.op_type} in {name}, whose steps are not known'
      return [Value(onnx.TypeProto(), cause=cause)] * len(node.output)
    lead = 1 if old else 0
    batch = state[0].shape[0] if old and state else 1
    steps = sequences[0].shape[axes[0]]
    once = [_resized(x, x.shape[lead:]).variable() for x in state]
    for x, axis in zip(sequences, axes, strict=True):
      axis %= len(x.shape)
      shape = (*x.shape[lead:axis], *x.shape[axis + 1 :])
      once.append(_resized(x, shape).variable())
    records, outputs = self._body(attributes['body'], scope, name, once)
    self._records += [record.times(steps * batch) for record in records]
    results = [value.variable() for value in state]
    axes = attributes.get('scan_output_axes') or [0] * len(outputs)
    stacked = outputs[len(state) :]
    for value, axis in zip(stacked, axes, strict=False):
      results.append(_stacked(value, steps, axis, (batch,) * lead))
    return results

  def _may_cost(self, graph: onnx.GraphProto) -> bool:
    """Returns whether the convention may have a price for what a graph does."""
    for node in graph.node:
      if any(self._may_cost(x.g) for x in node.attribute if x.HasField('g')):
        return True
      runs_graphs = any(x.HasField('g') for x in node.attribute)
      operator = _operator_name(node)
      if not runs_graphs and onnx_ops.may_cost(operator, self._convention):
        return True
    return False

  def _loop(self, name, node, attributes, scope) -> list[Value]:
    self._loops[name] = None
    body = attributes['body']
    given = [scope.values[x] if x else None for x in node.input]
    most, condition, *state = (*given, None, None)[: max(len(given), 2)]
    going = onnx_values.array(np.asarray(True))
    if condition is not None and condition.data is not None:
      going = onnx_values.array(condition.data)
    limit = None if most is None or most.data is None else int(most.data.item())
    before = dict(self.uncounted)
    step = Value(onnx_values.tensor_type(onnx.TensorProto.INT64, ()))
    records, outputs = self._body(
      body, scope, name, [step, going, *(x.variable() for x in state)]
    )
    all_known = len(self.uncounted) == len(before)
    # A loop that goes on whatever happens runs to its number of steps.
    goes_on = outputs[0].data is not None and bool(outputs[0].data.item())
    stable = all(
      a.shape == b.shape for a, b in zip(state, outputs[1:], strict=False)
    )
    steps = limit if goes_on else None
    if (limit is not None and limit < 1) or not going.data.item():
      records, steps, self.uncounted = [], 0, before
    elif not (steps and stable and all_known):
      trips = self._trip_counts
      trips = trips.get(name) if isinstance(trips, Mapping) else trips
      uncounted, run = self.uncounted, None
      if limit is not None or (most is None and not goes_on):
        self.uncounted = dict(before)
        run = self._run_loop(name, body, scope, limit, state)
      steps = steps or trips
      if run is None and steps is not None and not stable:
        self.uncounted = dict(before)
        run = self._run_loop(name, body, scope, steps, state, ends=False)
      if run is not None:
        self._records += run[0]
        return run[1]
      self.uncounted = uncounted
      reason = 'its trip count is not in the model; see trip_counts'
      if steps is not None and not stable:
        steps, reason = None, 'the shapes of its values change at each step'
      if steps is None and self._cost(records):
        self._leave_out(node, name, reason)
    self._records += [record.times(steps or 0) for record in records]
    cause = f'depend on the steps of Loop in {name}'
    results = [
      after.variable() if first.shape == after.shape else _unknown(after, cause)
      for first, after in zip(state, outputs[1:], strict=False)
    ]
    stacked = outputs[1 + len(state) :]
    return results + [_stacked(x, steps, 0, cause=cause) for x in stacked]

  def _run_loop(self, name, body, scope, limit, state, ends=True):
    """Goes through a loop step by step; returns its records and outputs.

    Args:
      limit: the most steps; None if it has no limit.
      ends: whether its condition may end it before.

    Returns:
      None if its end depends on values, or if it has too many steps.
    """
    done: list[_Record] = []
    stacks: list[list[Value]] = []
    last = self._visited + _MOST_NODES_OF_A_LOOP
    count, step = len(state), 0
    while limit is None or step < limit:
      inputs = [np.asarray(step), np.asarray(True)]
      records, outputs = self._body(
        body, scope, name, [*map(onnx_values.array, inputs), *state]
      )
      going = outputs[0].data
      if self._visited > last or (going is None and ends):
        return None
      done += records
      state = outputs[1 : 1 + count]
      stacks.append(outputs[1 + count :])
      step += 1
      if ends and not going.item():
        break
    results = list(state)
    for values in zip(*stacks, strict=True):
      same = len({value.shape for value in values}) == 1
      value = values[0] if same else _unknown(values[0])
      results.append(_stacked(value, step, 0))
    return done, results

  def report_to(self, builder: report.ReportBuilder) -> None:
    """Adds all that was recorded; a weight belongs to its first use.

    Raises:
      ValueError: if a trip count names a loop that there is not.
    """
    trips = self._trip_counts
    names = trips.keys() if isinstance(trips, Mapping) else set()
    if unknown := sorted(names - self._loops.keys()):
      raise ValueError(
        f'trip_counts must name loops of the program; got {unknown}, and the'
        f' loops are {list(self._loops)}'
      )
    seen: set[str] = set()
    for record in self._records:
      if record.constant:
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
    if note := self._constant_work():
      builder.note(note)

  def _constant_work(self) -> str:
    """Returns what is done on constants alone, '' if there is nothing."""
    products, others = [], 0
    for record in self._records:
      price = self._convention(record.work) if record.constant else 0
      if price and record.work.kind in ('conv', 'matmul'):
        products.append(f'{record.operator} in {record.layer} {price:,}')
      else:
        others += price
    if others:
      products.append(f'other operators {others:,}')
    if not products:
      return ''
    return (
      f'Not in the total, because it depends on constants alone'
      f' ({self._convention.unit}): {", ".join(products)}.'
    )


def noted_types(
  graph: onnx.GraphProto, dimensions: Mapping[str, int]
) -> dict[str, onnx.TypeProto]:
  """Returns the types that a graph notes of its values.

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
  """Returns the path of the module that a node comes from, or its name."""
  weight = node.input[1] if len(node.input) > 1 else ''
  if node.op_type in ('Conv', 'ConvTranspose', 'Gemm') and weight.endswith(
    '.weight'
  ):
    return weight.removesuffix('.weight')
  for entry in node.metadata_props:
    if entry.key == 'pkg.torch.onnx.name_scopes':
      return ast.literal_eval(entry.value)[-2]
  if not node.name.startswith('/'):
    return node.name
  path: list[str] = []
  for part in node.name.split('/')[1:-1]:
    # In a sequence an exporter writes 'layer1/layer1.0' for 'layer1.0'.
    if path and part.startswith(f'{path[-1]}.'):
      path.pop()
    path.append(part)
  return '.'.join(path)


def _operator_name(node: onnx.NodeProto) -> str:
  if onnx_values.is_onnx(node.domain):
    return node.op_type
  return f'{node.domain}::{node.op_type}'


def _is_known(scope: Scope, name: str) -> bool:
  """Returns whether a value has all the shape that a formula may need."""
  value = scope.values[name]
  return (
    value.shape is not None
    or not value.type.HasField('tensor_type')
    and (value.type.WhichOneof('value') is not None)
  )


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


def _resized(value: Value, shape: Sequence[int] | None) -> Value:
  kind = onnx_values.tensor_type(value.type.tensor_type.elem_type, shape)
  return dataclasses.replace(value, type=kind)


def _unknown(value: Value, cause: str = '') -> Value:
  """Returns a value of which no more than the type is known."""
  cause = value.cause or cause or 'depend on values'
  if not value.type.HasField('tensor_type'):
    return dataclasses.replace(value.variable(), cause=cause)
  return dataclasses.replace(_resized(value, None).variable(), cause=cause)


def _stacked(value, steps, axis, lead=(), cause='') -> Value:
  """Returns what a loop makes of a value of each step."""
  if value.shape is None or steps is None:
    return _unknown(value, cause)
  axis %= len(value.shape) + 1
  shape = (*value.shape[:axis], steps, *value.shape[axis:])
  return _resized(value, (*lead, *shape)).variable()
