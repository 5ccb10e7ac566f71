"""What is known about the values of an ONNX graph without running it.

ONNX's shape inference runs node by node. It receives the values that shapes
depend on: small constants, and what ONNX's reference evaluator computes from
these and from known shapes. Shapes that the model computes from the shape of
its input are therefore known like shapes that it declares.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TypeProto, numpy_helper, shape_inference

from dynconv_jax.macs import onnx_ops

# Shapes depend on integers and on a few floats that scale them; larger arrays
# of floats are weights.
_LARGEST_INTEGERS = 65536
_LARGEST_FLOATS = 64
_NOT_WEIGHTS = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Value:
  """What is known about a value.

  Attributes:
    type: the type, as far as known; empty if unknown.
    data: the data of a small value that does not depend on the model's inputs.
    constant: whether it does not depend on the model's inputs, except on their
      shapes.
    weights: the initializers that it was computed from.
    cause: why its shape is unknown; '' if it is known.
  """

  type: TypeProto
  data: np.ndarray | None = None
  constant: bool = False
  weights: frozenset[str] = frozenset()
  cause: str = ''

  @functools.cached_property
  def shape(self) -> Shape | None:
    """The shape of a tensor; None if any dimension is unknown."""
    return shape_of(self.type)

  @functools.cached_property
  def tensor(self) -> onnx_ops.Tensor:
    """The value as passed to formulas."""
    return onnx_ops.Tensor(self.shape, dtype_of(self.type), self.data)

  def variable(self) -> Value:
    """Returns the value as one that varies between the steps of a loop."""
    return dataclasses.replace(self, data=None, constant=False)


def shape_of(kind: TypeProto) -> Shape | None:
  """Returns the shape of a tensor type; None if any dimension is unknown."""
  tensor = kind.tensor_type
  if not kind.HasField('tensor_type') or not tensor.HasField('shape'):
    return None
  if not all(dim.HasField('dim_value') for dim in tensor.shape.dim):
    return None
  return tuple(dim.dim_value for dim in tensor.shape.dim)


def dtype_of(kind: TypeProto) -> np.dtype | None:
  """Returns the NumPy dtype of a tensor type; None if unknown."""
  if not kind.HasField('tensor_type') or not kind.tensor_type.elem_type:
    return None
  return onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)


def tensor_type(elem_type: int, shape: Sequence[int] | None) -> TypeProto:
  """Returns a tensor type."""
  return onnx.helper.make_tensor_type_proto(elem_type, shape)


def constant(
  tensor: onnx.TensorProto, name: str, folder: pathlib.Path | None
) -> Value:
  """Returns an initializer or constant, with its data if it is small.

  Args:
    tensor: the constant; its data may be in an external file.
    name: of the value.
    folder: directory of the model's file; None if there is none.
  """
  dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
  is_weight = tensor.data_type not in _NOT_WEIGHTS
  return Value(
    tensor_type(tensor.data_type, tensor.dims),
    _data(tensor, dtype, folder),
    constant=True,
    weights=frozenset((name,) if is_weight else ()),
  )


def array(
  data: np.ndarray,
  weights: frozenset[str] = frozenset(),
  constant: bool = True,
) -> Value:
  """Returns the value of a known array."""
  kind = onnx.helper.np_dtype_to_tensor_dtype(data.dtype)
  return Value(tensor_type(kind, data.shape), data, constant, weights)


def _data(tensor, dtype, folder) -> np.ndarray | None:
  if not _is_small(tensor.dims, dtype):
    return None
  if tensor.data_location == onnx.TensorProto.EXTERNAL:
    if folder is None:
      return None
    tensor = onnx.TensorProto.FromString(tensor.SerializeToString())
    try:
      onnx.external_data_helper.load_external_data_for_tensor(
        tensor, str(folder)
      )
    except (OSError, ValueError, onnx.checker.ValidationError):
      return None  # Files of weights may be missing.
  try:
    return numpy_helper.to_array(tensor)
  except (TypeError, ValueError):
    return None  # Weights may be stripped.


def _is_small(shape: Sequence[int], dtype: np.dtype) -> bool:
  if dtype.kind == 'f':
    return math.prod(shape) <= _LARGEST_FLOATS
  # Smaller integers are quantized weights.
  is_integer = dtype.kind in 'iu' and dtype.itemsize >= 4
  is_integer |= dtype.kind == 'b'
  return is_integer and math.prod(shape) <= _LARGEST_INTEGERS


class Inference:
  """Infers the outputs of nodes.

  Args:
    opsets: {domain: version of its operator set}, '' for ONNX's own.
  """

  def __init__(self, opsets: Mapping[str, int]):
    self._opsets = dict(opsets)
    self._imports = [
      onnx.helper.make_opsetid(*opset) for opset in opsets.items()
    ]
    self._folded: dict[Any, list[np.ndarray] | None] = {}

  def outputs(
    self,
    node: onnx.NodeProto,
    inputs: Mapping[str, Value],
    noted: Mapping[str, TypeProto],
    cause: str,
  ) -> dict[str, Value]:
    """Returns the outputs of a node.

    Args:
      node: any node without a subgraph.
      inputs: the inputs that the node has, by name.
      noted: types that the graph declares for its values.
      cause: why the shapes of outputs are unknown, if they are.

    Raises:
      ValueError: if the node does not fit its inputs.
    """
    given = list(inputs.values())
    is_shape = node.op_type in ('Shape', 'Size') and is_onnx(node.domain)
    is_constant = is_shape or (
      all(value.constant for value in given)
      and not (is_onnx(node.domain) and node.op_type in onnx_ops.RANDOM)
    )
    weights = frozenset()
    if is_constant and not is_shape:
      weights = weights.union(*(value.weights for value in given))
    types = self._types(node, inputs)
    data = [None] * len(node.output)
    if is_shape and given[0].shape is not None:
      data = [_shape_data(node, given[0].shape)]
    elif is_onnx(node.domain) and node.op_type not in onnx_ops.RANDOM:
      data = self._fold(node, inputs, types) or data
    result = {}
    for name, known in zip(node.output, data, strict=False):
      if not name:
        continue
      if known is not None:
        result[name] = array(known, weights, is_constant)
        continue
      kind = merged(types.get(name, TypeProto()), noted.get(name))
      unknown = shape_of(kind) is None and kind.HasField('tensor_type')
      unknown |= not kind.WhichOneof('value')
      result[name] = Value(
        kind, None, is_constant, weights, cause if unknown else ''
      )
    return result

  def schema(self, node: onnx.NodeProto) -> onnx.defs.OpSchema | None:
    """Returns ONNX's definition of an operator; None if there is none."""
    return _schema(node.op_type, self.version(node.domain), node.domain)

  def version(self, domain: str) -> int:
    """Returns the operator set version that the model uses for a domain."""
    domain = '' if is_onnx(domain) else domain
    return self._opsets.get(domain, 1)

  def _types(self, node, inputs) -> dict[str, TypeProto]:
    schema = self.schema(node)
    if schema is None:
      return {}
    if schema.has_type_and_shape_inference_function:
      return self._inferred(schema, node, inputs)
    return _types_without_inference(
      node, [inputs[x].type if x else None for x in node.input]
    )

  def _inferred(self, schema, node, inputs) -> dict[str, TypeProto]:
    # An operator after an unknown one may still determine its output shape.
    guess = tensor_type(onnx.TensorProto.FLOAT, None)
    try:
      return shape_inference.infer_node_outputs(
        schema,
        node,
        {
          name: value.type if value.type.WhichOneof('value') else guess
          for name, value in inputs.items()
        },
        {
          name: numpy_helper.from_array(value.data, name)
          for name, value in inputs.items()
          if value.data is not None
        },
        opset_imports=self._imports,
      )
    except _REFUSALS as error:
      # The missing inputs may be needed to infer more, and an operator that
      # costs nothing need not be valid.
      all_known = all(value.shape is not None for value in inputs.values())
      if not all_known or onnx_ops.is_free(node.op_type):
        return {}
      raise ValueError(
        f'the model is damaged, or does not fit its inputs: {node.op_type}'
        f' {node.name!r}: {error}'
      ) from error

  def _fold(self, node, inputs, types) -> list[np.ndarray] | None:
    """Evaluates a node on small constants; None if that is not possible."""
    values = list(inputs.values())
    if not values or any(value.data is None for value in values):
      return None
    if any(attribute.HasField('g') for attribute in node.attribute):
      return None
    for kind in types.values():
      shape, dtype = shape_of(kind), dtype_of(kind)
      if dtype is None or (shape is not None and not _is_small(shape, dtype)):
        return None
    key = (
      node.op_type,
      tuple(map(bool, node.input)),
      tuple(list(inputs).index(x) for x in node.input if x),
      len(node.output),
      tuple(x.SerializeToString() for x in node.attribute),
      tuple((x.data.dtype, x.data.shape, x.data.tobytes()) for x in values),
    )
    if key not in self._folded:
      self._folded[key] = self._evaluate(node, inputs)
    return self._folded[key]

  def _evaluate(self, node, inputs) -> list[np.ndarray] | None:
    from onnx.reference import ReferenceEvaluator

    try:
      outputs = ReferenceEvaluator(node, opsets={'': self.version('')}).run(
        None, {name: value.data for name, value in inputs.items()}
      )
    except Exception:  # noqa: BLE001
      # Treat results as unknown if the evaluator fails; its errors have no
      # common base class.
      return None
    if not all(isinstance(output, np.ndarray) for output in outputs):
      return None
    if not all(_is_small(x.shape, x.dtype) for x in outputs):
      return None
    return outputs


def merged(kind: TypeProto, noted: TypeProto | None) -> TypeProto:
  """Returns a type, with unknown sizes taken from the declared type."""
  if noted is None or shape_of(kind) is not None:
    return kind
  if not kind.WhichOneof('value'):
    return noted
  mine, other = kind.tensor_type, noted.tensor_type
  if not kind.HasField('tensor_type') or not other.HasField('shape'):
    return kind
  sizes = [_size(dim) for dim in other.shape.dim]
  if mine.HasField('shape'):
    if len(mine.shape.dim) != len(sizes):
      return kind
    known = map(_size, mine.shape.dim)
    sizes = [b if a is None else a for a, b in zip(known, sizes, strict=True)]
  return tensor_type(mine.elem_type, sizes)


def _size(dim: Any) -> int | None:
  return dim.dim_value if dim.HasField('dim_value') else None


def _types_without_inference(node, types) -> dict[str, TypeProto]:
  """Returns output types of operators without an inference function.

  These are the first versions of operators, which broadcast to the first input
  only, and norms that ONNX defines as functions.
  """
  name, first = node.op_type, types[0]
  if name in _LIKE_THEIR_FIRST:
    return {node.output[0]: first}
  if node.domain == 'ai.onnx.ml' and (shape := shape_of(first)) is not None:
    given = attributes(node, None)
    targets = given.get('targets', given.get('n_targets', 1))
    kind = onnx.TensorProto.FLOAT
    return {node.output[0]: tensor_type(kind, (*shape[:-1], targets))}
  # Try the newest version of the operator, with the attributes it still has.
  schema = _schema(name, onnx.defs.onnx_opset_version(), node.domain)
  if schema is None or not schema.has_type_and_shape_inference_function:
    return {}
  newer = onnx.NodeProto()
  newer.CopyFrom(node)
  del newer.attribute[:]
  newer.attribute.extend(
    x for x in node.attribute if x.name in schema.attributes
  )
  known = dict(zip(node.input, types, strict=True))
  try:
    return shape_inference.infer_node_outputs(
      schema, newer, {x: kind for x, kind in known.items() if x}
    )
  except _REFUSALS:
    return {}


_LIKE_THEIR_FIRST = onnx_ops.words("""
  Abs Add BatchNormalization Ceil Clip Div Dropout Elu Exp Floor
  GroupNormalization HardSigmoid Imputer InstanceNormalization LeakyRelu Log Max
  Mean MeanVarianceNormalization Min Mul Neg Normalizer PRelu Reciprocal Relu
  Scaler Selu Sigmoid Sqrt Sub Sum Tanh
""")

_REFUSALS = (
  shape_inference.InferenceError,
  onnx.checker.ValidationError,
  RuntimeError,
  ValueError,
)


def attributes(
  node: onnx.NodeProto, schema: onnx.defs.OpSchema | None
) -> dict[str, Any]:
  """Returns the attributes of a node by name, with the schema's defaults."""
  given = {
    attribute.name: onnx.helper.get_attribute_value(attribute)
    for attribute in node.attribute
  }
  return (_defaults(schema) if schema is not None else {}) | given


def is_onnx(domain: str) -> bool:
  """Returns whether a domain is that of ONNX's own operators."""
  return domain in ('', 'ai.onnx')


def _shape_data(node: onnx.NodeProto, shape: Shape) -> np.ndarray:
  if node.op_type == 'Size':
    return np.asarray(math.prod(shape), np.int64)
  ends = {attribute.name: attribute.i for attribute in node.attribute}
  kept = shape[ends.get('start', 0) : ends.get('end')]
  return np.asarray(kept, np.int64)


@functools.cache
def _schema(op_type: str, version: int, domain: str):
  domain = '' if is_onnx(domain) else domain
  # ONNX Runtime uses some operators before they are in an opset of ONNX.
  for known in ((version, domain), (domain,)):
    try:
      return onnx.defs.get_schema(op_type, *known)
    except onnx.defs.SchemaError:
      continue
  return None


def _defaults(schema: onnx.defs.OpSchema) -> dict[str, Any]:
  key = schema.domain, schema.name, schema.since_version
  if key not in _DEFAULTS:
    _DEFAULTS[key] = {
      name: onnx.helper.get_attribute_value(attribute.default_value)
      for name, attribute in schema.attributes.items()
      if attribute.default_value.name
    }
  return _DEFAULTS[key]


_DEFAULTS: dict[tuple[str, str, int], dict[str, Any]] = {}
