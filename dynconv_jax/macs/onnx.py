"""Counts an ONNX model from its graph and ONNX's own shape inference."""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from dynconv_jax.macs import conventions, formulas, report

try:
  import onnx
except ModuleNotFoundError as error:
  raise ImportError(
    'dynconv_jax.macs.onnx needs ONNX:'
    " pip install 'dynconv-jax[onnx]' installs it"
  ) from error

import numpy as np
from google.protobuf.message import DecodeError
from onnx import inliner, numpy_helper

from dynconv_jax.macs import onnx_ops

# Larger constants are weights, whose values no shape depends on.
_LARGEST_SHAPE_CONSTANT = 1024
_NOT_WEIGHTS = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)


def count_macs(
  model: str | os.PathLike[str] | onnx.ModelProto,
  *,
  dimensions: Mapping[str, int] | None = None,
  convention: str | conventions.Convention = 'conv',
  padding: bool = True,
  trip_counts: int | Mapping[str, int] | None = None,
  branch: str = 'max',
) -> report.Report:
  """Returns what an ONNX model costs.

  A `Scan` and a `Loop` count times their number of steps. Layers have the
  names of the modules that an exporter noted, else of the nodes. What is
  computed from constants alone is not counted.

  Args:
    model: a file, whose external weights are not read, or a loaded model.
    dimensions: sizes of the symbolic dimensions of the inputs by name, such as
      {'batch': 1}; a dimension without a name is 'INPUT[AXIS]'.
    convention: a name in `conventions.CONVENTIONS`.
    padding: whether positions of input padding count as work.
    trip_counts: steps of each `Loop` that the model does not fix: one number,
      or {layer name of the loop: number}. A loop without one that does work is
      left out with a warning.
    branch: which branch of an `If` counts: 'max' or 'min' for the dearer or
      cheaper, 'then' or 'else'.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the convention or branch is unknown, the file or model is
      damaged, a dimension is unknown, or a trip count is no count.
  """
  if branch not in ('max', 'min', 'then', 'else'):
    raise ValueError(
      f"branch must be 'max', 'min', 'then' or 'else'; got {branch!r}"
    )
  trips = trip_counts or {}
  for steps in trips.values() if isinstance(trips, Mapping) else [trips]:
    if not _is_int(steps, least=0):
      raise ValueError(f'trip_counts must be integers >= 0; got {steps!r}')
  builder = report.ReportBuilder(convention, padding)
  convention = conventions.get_convention(convention)
  graph = _inferred(_load(model), dict(dimensions or {}))
  counter = _Counter(convention, trip_counts, branch)
  counter.count(graph, _Scope())
  counter.report_to(builder)
  for entry, reason in counter.uncounted.items():
    builder.leave_out(*entry, reason)
  return builder.build()


@dataclasses.dataclass
class _Scope:
  """What is known of the values of a graph and of those around it.

  Attributes:
    shapes: of values, where known.
    constants: small ones, and None for larger ones.
    weights: {value: the initializers that it was computed from}.
  """

  shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  constants: dict[str, Any] = dataclasses.field(default_factory=dict)
  weights: dict[str, frozenset[str]] = dataclasses.field(default_factory=dict)

  def inside(self) -> _Scope:
    return _Scope(dict(self.shapes), dict(self.constants), dict(self.weights))


@dataclasses.dataclass
class _Record:
  name: str
  work: formulas.Work
  output_shape: tuple[int, ...]
  weights: dict[str, int]

  def times(self, steps: int) -> _Record:
    return dataclasses.replace(self, work=self.work * steps)


class _Counter:
  """Records the work of each node under the name of its layer."""

  def __init__(
    self,
    convention: conventions.Convention,
    trip_counts: int | Mapping[str, int] | None,
    branch: str,
  ):
    self.uncounted: dict[report.Uncounted, str] = {}
    self._convention = convention
    self._trip_counts = trip_counts
    self._branch = branch
    self._records: list[_Record] = []
    self._around = ''

  def count(self, graph: onnx.GraphProto, scope: _Scope) -> None:
    """Records the nodes of a graph; its scope then has its values too."""
    for value in (*graph.input, *graph.value_info, *graph.output):
      # An inner graph's values hide those of the same name around it.
      scope.shapes.pop(value.name, None)
      scope.constants.pop(value.name, None)
      if (shape := _shape(value)) is not None:
        scope.shapes[value.name] = shape
    for tensor in graph.initializer:
      self._add_constant(scope, tensor.name, tensor)
    for index, node in enumerate(graph.node):
      self._count_node(index, node, scope)

  def _add_constant(self, scope, name, tensor) -> None:
    scope.shapes[name] = tuple(tensor.dims)
    scope.weights[name] = frozenset(
      () if tensor.data_type in _NOT_WEIGHTS else (name,)
    )
    scope.constants[name] = (
      numpy_helper.to_array(tensor)
      # Of values, only numbers of steps are looked at.
      if tensor.data_type == onnx.TensorProto.INT64
      and _size(tensor) == 1
      and tensor.data_location != onnx.TensorProto.EXTERNAL
      else None
    )

  def _count_node(self, index, node, scope) -> None:
    attributes = {
      attribute.name: onnx.helper.get_attribute_value(attribute)
      for attribute in node.attribute
    }
    if node.op_type == 'Constant' and 'value' in attributes:
      self._add_constant(scope, node.output[0], attributes['value'])
      return
    name = _layer_name(node) or f'{self._around}{node.op_type}_{index}'
    inputs = [value for value in node.input if value]
    if node.op_type in ('If', 'Loop', 'Scan'):
      getattr(self, f'_count_{node.op_type.lower()}')(
        name, node, attributes, scope
      )
      return
    if node.op_type in ('Shape', 'Size') or (
      all(value in scope.constants for value in inputs)
      and not node.op_type.startswith('Random')
    ):
      origins = frozenset().union(
        *(scope.weights.get(value, ()) for value in inputs)
      )
      value = attributes.get('value_int', attributes.get('value_ints'))
      scope.constants[node.output[0]] = value and np.asarray(value)
      scope.weights[node.output[0]] = origins
      return
    if (node.domain or 'ai.onnx') != 'ai.onnx':
      self._leave_out(node, name, f'it is of the domain {node.domain}')
      return
    if node.op_type in onnx_ops.FREE:
      return
    needed = [*inputs, *(value for value in node.output[:1] if value)]
    if unknown := [value for value in needed if value not in scope.shapes]:
      self._leave_out(node, name, f'the shapes of {unknown} depend on values')
      return
    work = onnx_ops.work(
      node.op_type,
      attributes,
      [scope.shapes[v] if v else None for v in node.input],
      scope.shapes[node.output[0]] if node.output[0] else (),
      [scope.constants.get(v) for v in node.input],
    )
    if work is None:
      self._leave_out(node, name, 'its cost is not known')
      return
    used = frozenset().union(
      *(scope.weights.get(v, ()) for v in onnx_ops.parameters(node))
    )
    shape = scope.shapes.get(node.output[0], ())
    sizes = {weight: _product(scope.shapes[weight]) for weight in used}
    self._records.append(_Record(name, work, shape, sizes))

  def _leave_out(self, node, name, reason) -> None:
    self.uncounted.setdefault(report.Uncounted(node.op_type, name), reason)

  def _body(self, graph, scope, name) -> list[_Record]:
    """Returns what one run of the inner graph of the node `name` does."""
    before = self._records, self._around
    self._records, self._around = [], f'{name}.'
    self.count(graph, scope.inside())
    records = self._records
    self._records, self._around = before
    return records

  def _count_if(self, name, node, attributes, scope) -> None:
    del node
    branches = [
      self._body(attributes[branch], scope, name)
      for branch in ('then_branch', 'else_branch')
    ]
    if self._branch in ('then', 'else'):
      self._records += branches[self._branch == 'else']
    else:
      choose = min if self._branch == 'min' else max
      self._records += choose(branches, key=self._price)

  def _price(self, records: list[_Record]) -> int:
    return sum(self._convention(record.work) for record in records)

  def _count_scan(self, name, node, attributes, scope) -> None:
    scanned = node.input[len(node.input) - attributes['num_scan_inputs']]
    if scanned not in scope.shapes:
      self._leave_out(node, name, 'its number of steps depends on values')
      return
    axis = attributes.get('scan_input_axes', [0])[0]
    steps = scope.shapes[scanned][axis]
    body = self._body(attributes['body'], scope, name)
    self._records += [record.times(steps) for record in body]

  def _count_loop(self, name, node, attributes, scope) -> None:
    body = self._body(attributes['body'], scope, name)
    steps = self._fixed_steps(node, attributes['body'], scope)
    if steps is None:
      steps = self._trip_counts
      if isinstance(steps, Mapping):
        steps = steps.get(name)
    if steps is None and self._price(body):
      self._leave_out(
        node, name, 'its trip count is not in the model; see trip_counts'
      )
    self._records += [record.times(steps or 0) for record in body]

  def _fixed_steps(self, node, body, scope) -> int | None:
    """Returns the steps of a loop that always runs to a constant number."""
    most = scope.constants.get(node.input[0]) if node.input[0] else None
    # A loop whose condition is passed through, or constant, never breaks off.
    condition, end = body.input[1].name, body.output[0].name
    passed = {condition} | {
      value
      for inner in body.node
      if inner.op_type in ('Constant', 'Identity')
      and (not inner.input or inner.input[0] == condition)
      for value in inner.output
    }
    passed |= {tensor.name for tensor in body.initializer}
    return None if most is None or end not in passed else int(most.item())

  def report_to(self, builder: report.ReportBuilder) -> None:
    """Adds all that was recorded; a weight belongs to its first use."""
    seen = set()
    for record in self._records:
      new = {w: n for w, n in record.weights.items() if w not in seen}
      priced = self._convention(record.work) > 0
      if priced:
        seen |= new.keys()
      builder.add(
        record.name,
        record.work,
        output_shape=record.output_shape,
        parameters=sum(new.values()),
      )


def _load(model: Any) -> onnx.ModelProto:
  """Returns the model without the data of its weights."""
  name = 'the model'
  if isinstance(model, (str, os.PathLike)):
    name = os.fspath(model)
    if not os.path.isfile(name):
      raise FileNotFoundError(f'there is no file {name}')
    try:
      model = onnx.load(name, load_external_data=False)
    except DecodeError as error:
      raise ValueError(f'{name} is damaged or no ONNX file: {error}') from error
  elif not isinstance(model, onnx.ModelProto):
    raise ValueError(
      f'model must be a file name or an onnx.ModelProto; got {type(model)}'
    )
  if not (model.graph.node and model.opset_import):
    raise ValueError(f'{name} is damaged or no ONNX file: its graph is empty')
  if model.functions:
    model = inliner.inline_local_functions(model)
  slim = onnx.ModelProto(
    ir_version=model.ir_version, opset_import=model.opset_import
  )
  graph = model.graph
  slim.graph.name = graph.name
  for field in ('node', 'input', 'output', 'value_info'):
    getattr(slim.graph, field).extend(getattr(graph, field))
  for tensor in graph.initializer:
    if _size(tensor) <= _LARGEST_SHAPE_CONSTANT:
      slim.graph.initializer.append(tensor)
    else:
      slim.graph.initializer.add(
        name=tensor.name, dims=tensor.dims, data_type=tensor.data_type
      )
  return slim


def _inferred(
  model: onnx.ModelProto, dimensions: dict[str, int]
) -> onnx.GraphProto:
  """Returns the graph with the shapes of its values."""
  for name, size in dimensions.items():
    if not _is_int(size, least=1):
      raise ValueError(
        f'the dimension {name!r} must be a positive int; got {size!r}'
      )
  initializers = {tensor.name for tensor in model.graph.initializer}
  unknown, used = [], set()
  for value in model.graph.input:
    if value.name in initializers or not value.type.HasField('tensor_type'):
      continue
    if not value.type.tensor_type.HasField('shape'):
      raise ValueError(f'the input {value.name!r} has no shape')
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
      if dim.HasField('dim_value') and dim.dim_value >= 0:
        continue
      name = dim.dim_param or f'{value.name}[{axis}]'
      if name in dimensions:
        dim.dim_value = dimensions[name]
        used.add(name)
      elif name not in unknown:
        unknown.append(name)
  if unknown:
    given = ', '.join(f'{name!r}: ...' for name in unknown)
    raise ValueError(
      f'the model has unknown dimensions {unknown}: give their sizes as'
      f' dimensions={{{given}}}'
    )
  if extra := sorted(dimensions.keys() - used):
    raise ValueError(f'the inputs of the model have no dimensions {extra}')
  # Shapes that were noted before the dimensions were known are found anew.
  for values in (model.graph.value_info, model.graph.output):
    for value in values:
      for dim in value.type.tensor_type.shape.dim:
        if not dim.HasField('dim_value'):
          dim.Clear()
  try:
    inferred = onnx.shape_inference.infer_shapes(
      model, check_type=True, strict_mode=True, data_prop=True
    )
  except (onnx.shape_inference.InferenceError, RuntimeError) as error:
    raise ValueError(
      f'the model is damaged, or does not fit its inputs: {error}'
    ) from error
  return inferred.graph


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
  """Returns a tensor's shape, None if any of it is unknown."""
  tensor = value.type.tensor_type
  if not value.type.HasField('tensor_type') or not tensor.HasField('shape'):
    return None
  if not all(dim.HasField('dim_value') for dim in tensor.shape.dim):
    return None
  return tuple(dim.dim_value for dim in tensor.shape.dim)


def _layer_name(node: onnx.NodeProto) -> str:
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


def _is_int(value: Any, least: int) -> bool:
  return type(value) is int and value >= least


def _size(tensor: onnx.TensorProto) -> int:
  return _product(tensor.dims)


def _product(shape) -> int:
  size = 1
  for length in shape:
    size *= length
  return size
