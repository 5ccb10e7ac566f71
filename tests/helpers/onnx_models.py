"""Small ONNX models for tests. Import only if ONNX is installed."""

import io
import warnings

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def value(name, shape=None, kind=TensorProto.FLOAT):
  return helper.make_tensor_value_info(name, kind, shape)


def tensor(name, array, kind=None):
  return onnx.numpy_helper.from_array(np.asarray(array, kind), name)


def ones(name, *shape):
  return tensor(name, np.ones(shape, np.float32))


def scalar(name, number, kind=np.int64):
  return tensor(name, number, kind)


def graph_of(nodes, inputs, outputs, weights=()):
  """Returns the graph of a body or branch, from value infos."""
  return helper.make_graph(nodes, 'body', inputs, outputs, weights)


def model_of(
  nodes, inputs, weights=(), outputs=('y',), opset=22, domains=(), noted=()
):
  """Returns a model with these nodes.

  Inputs are {name: shape} or {name: (shape, kind)}; `domains` are those of
  nodes outside ONNX.
  """
  infos = [
    value(name, *shape) if _has_kind(shape) else value(name, shape)
    for name, shape in inputs.items()
  ]
  graph = helper.make_graph(
    nodes, 'graph', infos, [value(name) for name in outputs], weights
  )
  graph.value_info.extend(noted)
  opsets = [helper.make_opsetid('', opset)]
  opsets += [helper.make_opsetid(domain, 1) for domain in domains]
  return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _has_kind(shape):
  return bool(shape) and isinstance(shape[0], (tuple, list))


def one(
  operator,
  inputs,
  weights=(),
  opset=22,
  outputs=('y',),
  names=(),
  **attributes,
):
  """Returns a model with one node.

  The node reads `names`, by default the inputs and then the weights.
  """
  names = names or [*inputs, *(weight.name for weight in weights)]
  domain = attributes.pop('domain', '')
  node = helper.make_node(
    operator, names, list(outputs), 'layer', domain=domain, **attributes
  )
  domains = [domain] if domain else []
  return model_of([node], inputs, weights, outputs[:1], opset, domains)


def conv(operator, shape, weight, **attributes):
  return one(operator, {'x': shape}, [ones('w', *weight)], **attributes)


def sum_of_ones(model, **shapes):
  """Returns the sum of the output for ones, i.e. the number of products."""
  inputs = {k: np.ones(shape, np.float32) for k, shape in shapes.items()}
  (output,) = ReferenceEvaluator(model).run(None, inputs)
  return round(float(output.sum(dtype=np.float64)))


def exported(module, example, opset=17, dynamic=None):
  """Returns a module exported by PyTorch's tracing exporter.

  Args:
    module: called in evaluation mode.
    example: its input.
    opset: operator set version.
    dynamic: {axis: name} of the input, 'x'; by default, all axes are fixed.
  """
  import torch

  file = io.BytesIO()
  options = {'dynamic_axes': {'x': dynamic}} if dynamic else {}
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    torch.onnx.export(
      module.eval(),
      (example,),
      file,
      dynamo=False,
      opset_version=opset,
      input_names=['x'],
      **options,
    )
  return onnx.load_model_from_string(file.getvalue())
