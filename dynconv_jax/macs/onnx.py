"""Counts an ONNX model from its graph and ONNX's own shape inference."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dynconv_jax.macs import conventions, report
from dynconv_jax.macs.builder import ReportBuilder

try:
  import onnx
except ModuleNotFoundError as error:
  raise ImportError(
    'dynconv_jax.macs.onnx needs ONNX:'
    " pip install 'dynconv-jax[onnx]' installs it"
  ) from error

from google.protobuf.message import DecodeError

from dynconv_jax.macs import onnx_graph, onnx_values


def count_macs(
  model: str | os.PathLike[str] | onnx.ModelProto,
  *,
  dimensions: Mapping[str, int] | None = None,
  convention: str | conventions.Convention = 'conv+linear',
  padding: bool = True,
  trip_counts: int | Mapping[str, int] | None = None,
  branch: str = 'max',
  constants: bool = False,
) -> report.Report:
  """Counts the multiply-accumulates of an ONNX model.

  The bodies of `Scan` and `Loop` count once per iteration. Layers are named by
  the modules that the exporter recorded, or else by the nodes.

  Args:
    model: a file name or a loaded model. External weight files may be missing;
      small integer tensors, which shapes may depend on, are read if present.
    dimensions: sizes of the symbolic input dimensions by name, such as
      {'batch': 1}; a dimension without a name is 'INPUT[AXIS]'.
    convention: a name in `conventions.CONVENTIONS`.
    padding: whether to count multiply-accumulates on input padding.
    trip_counts: number of iterations of each `Loop` whose number the model does
      not fix: one number, or {layer name of the loop: number}. A loop without
      one that does work is left out, with a warning.
    branch: which branch of an `If` to count if its condition is unknown: 'max'
      or 'min' for the more or less expensive one, 'then' or 'else'.
    constants: whether to count work on constants alone, which a runtime does
      once and PyTorch does at each call. If False, a note lists this work.

  Returns:
    A report of the work for the whole batch.

  Raises:
    FileNotFoundError: if the file does not exist.
    ValueError: if the convention or branch is unknown, the file or model is
      damaged, a dimension is unknown, or `trip_counts` is negative or names a
      loop that does not exist.
  """
  if branch not in ('max', 'min', 'then', 'else'):
    raise ValueError(
      f"branch must be 'max', 'min', 'then' or 'else'; got {branch!r}"
    )
  trips = trip_counts or {}
  for steps in trips.values() if isinstance(trips, Mapping) else [trips]:
    if not _is_int(steps, least=0):
      raise ValueError(f'trip_counts must be integers >= 0; got {steps!r}')
  builder = ReportBuilder(convention, padding)
  convention = conventions.get_convention(convention)
  dimensions = dict(dimensions or {})
  model, folder = _load(model)
  inputs = _inputs(model.graph, dimensions)
  opsets = {opset.domain: opset.version for opset in model.opset_import}
  opsets[''] = opsets.get('', opsets.get('ai.onnx', 1))
  counter = onnx_graph.Counter(
    opsets, convention, trip_counts, branch, folder, constants
  )
  graph = _inlined(model)
  noted = onnx_graph.noted_types(graph, dimensions)
  counter.graph(graph, onnx_graph.Scope(inputs, noted), model.graph.initializer)
  counter.report_to(builder)
  for entry, reason in counter.uncounted.items():
    builder.leave_out(*entry, reason)
  return builder.build()


def _load(model: Any) -> tuple[onnx.ModelProto, pathlib.Path | None]:
  """Returns the model and the directory of its file (None without a file)."""
  name, folder = 'the model', None
  if isinstance(model, (str, os.PathLike)):
    name = os.fspath(model)
    folder = pathlib.Path(name).absolute().parent
    if not os.path.isfile(name):
      raise FileNotFoundError(f'{name} does not exist')
    try:
      model = onnx.load(name, load_external_data=False)
    except DecodeError as error:
      raise ValueError(
        f'{name} is damaged or not an ONNX file: {error}'
      ) from error
  elif not isinstance(model, onnx.ModelProto):
    raise ValueError(
      f'model must be a file name or an onnx.ModelProto; got {type(model)}'
    )
  if not (model.graph.node and model.opset_import):
    raise ValueError(f'{name} is damaged or not an ONNX file: empty graph')
  return model, folder


def _inlined(model: onnx.ModelProto) -> onnx.GraphProto:
  """Returns the graph with the model's functions inlined.

  Its initializers have no data.
  """
  if not model.functions:
    return model.graph
  from onnx import inliner

  slim = onnx.ModelProto(
    ir_version=model.ir_version,
    opset_import=model.opset_import,
    functions=model.functions,
  )
  kept = ('node', 'input', 'output', 'value_info', 'sparse_initializer')
  for field, _ in model.graph.ListFields():
    if field.name in kept:
      getattr(slim.graph, field.name).extend(getattr(model.graph, field.name))
  slim.graph.name = model.graph.name
  for tensor in model.graph.initializer:
    slim.graph.initializer.add(
      name=tensor.name, dims=tensor.dims, data_type=tensor.data_type
    )
  return inliner.inline_local_functions(slim).graph


def _inputs(
  graph: onnx.GraphProto, dimensions: Mapping[str, int]
) -> dict[str, onnx_values.Value]:
  """Returns what is known about the model's inputs.

  Raises:
    ValueError: if a size is not a positive int, a dimension of the model has no
      size, or the model has no dimension with a given name.
  """
  for name, size in dimensions.items():
    if not _is_int(size, least=1):
      raise ValueError(
        f'the dimension {name!r} must be a positive int; got {size!r}'
      )
  constants = {tensor.name for tensor in graph.initializer}
  constants |= {sparse.values.name for sparse in graph.sparse_initializer}
  inputs, used = {}, set()
  unknown: dict[str, None] = {}
  for value in graph.input:
    if value.name in constants:
      continue
    kind = onnx.TypeProto()
    kind.CopyFrom(value.type)
    inputs[value.name] = onnx_values.Value(kind)
    if not kind.HasField('tensor_type'):
      continue
    if not kind.tensor_type.HasField('shape'):
      raise ValueError(f'the input {value.name!r} has no shape')
    for axis, dim in enumerate(kind.tensor_type.shape.dim):
      if dim.HasField('dim_value') and dim.dim_value >= 0:
        continue
      name = dim.dim_param or f'{value.name}[{axis}]'
      if name in dimensions:
        dim.dim_value = dimensions[name]
        used.add(name)
      else:
        unknown[name] = None
  if unknown:
    example = ', '.join(f'{name!r}: ...' for name in unknown)
    raise ValueError(
      f'the model has unknown dimensions {list(unknown)}: pass their'
      f' sizes, dimensions={{{example}}}'
    )
  if extra := sorted(dimensions.keys() - used):
    raise ValueError(f'the inputs of the model have no dimensions {extra}')
  return inputs


def _is_int(value: Any, least: int) -> bool:
  return type(value) is int and value >= least
