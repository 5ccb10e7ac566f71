"""ONNX's operators: their work, and which of them are free."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynconv_jax.macs import (
  conventions,
  formulas,
  onnx_formulas,
  onnx_products,
)

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """What is known about an input or output.

  Attributes:
    shape: None if unknown.
    dtype: NumPy dtype; None if unknown or not a tensor.
    value: data of a small tensor that does not depend on the model's inputs.
  """

  shape: Shape | None
  dtype: np.dtype | None = None
  value: np.ndarray | None = None

  @property
  def size(self) -> int:
    """Its number of elements."""
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Operation:
  """A node, as passed to formulas.

  Attributes:
    name: the operator; 'domain::OpType' unless it is ONNX's own.
    version: of the operator set of its domain.
    inputs: None for omitted ones.
    outputs: None for omitted ones.
    params: attributes by name, with the defaults of that version. Strings are
      bytes.
  """

  name: str
  version: int
  inputs: Sequence[Tensor | None]
  outputs: Sequence[Tensor | None]
  params: dict[str, Any]


Formula = Callable[[Operation], formulas.Work]
_REGISTERED: dict[str, tuple[Formula, Callable | None]] = {}


def register_onnx(
  name: str, outputs: Callable[[Operation], Sequence[Shape]] | None = None
) -> Callable[[Formula], Formula]:
  """Returns a decorator that registers a function as an operator's formula.

  The function takes an `Operation` and returns a `macs.Work`. It takes
  precedence over built-in formulas, and is also called if the shapes of the
  outputs are unknown.

  Args:
    name: 'domain::OpType', or 'OpType' alone for ONNX's own.
    outputs: a function that takes the `Operation` (with empty `outputs`) and
      returns the shapes of its outputs. Needed if ONNX does not know the
      operator and the model does not declare the shapes. The outputs have the
      dtype of the first input.

  Raises:
    ValueError: if `name` is not an operator's name.
  """
  if not re.fullmatch(r'([\w.]+::)?\w+', name):
    raise ValueError(f"name must be 'domain::OpType' or 'OpType'; got {name!r}")

  def decorator(formula: Formula) -> Formula:
    _REGISTERED[name.removeprefix('ai.onnx::')] = formula, outputs
    return formula

  return decorator


def is_registered(name: str) -> bool:
  """Returns whether a user registered a formula for the operator."""
  return name in _REGISTERED


def registered_shapes(operation: Operation) -> list[Shape]:
  """Returns output shapes by the user's function; [] if there is none."""
  _, outputs = _REGISTERED.get(operation.name, (None, None))
  return [tuple(shape) for shape in outputs(operation)] if outputs else []


def is_free(name: str) -> bool:
  """Returns whether an operator does no work in any convention."""
  return name in FREE and name not in _REGISTERED


def possible_work(name: str) -> formulas.Work:
  """Returns an example of an operator's work.

  An unknown operator may do any work.
  """
  for kind, table in _KINDS.items():
    if name in table and name not in _REGISTERED:
      macs = kind in ('conv', 'matmul')
      charged = not macs and (kind != 'elementwise' or name in _CHARGED)
      return formulas.Work(kind, macs, macs, operations=1, ptflops=charged)
  return formulas.Work('conv', 1, 1, bias=1, operations=1, ptflops=1)


def may_cost(name: str, convention: conventions.Convention) -> bool:
  """Returns whether a convention may count an operator's work."""
  return not is_free(name) and convention(possible_work(name)) > 0


def work(operation: Operation) -> formulas.Work | None:
  """Returns the work of an operator; None if unknown."""
  name = operation.name
  if name in _REGISTERED:
    done = _REGISTERED[name][0](operation)
    if not isinstance(done, formulas.Work):
      raise TypeError(
        f'the formula registered for {name!r} must return a macs.Work; got'
        f' {type(done).__name__}'
      )
    return done
  for table in (onnx_products.CONVOLUTIONS, onnx_products.PRODUCTS, _LEARNED):
    if name in table:
      return table[name](operation)
  tensors = [x for x in (*operation.inputs, *operation.outputs) if x]
  if not any(is_floating(x.dtype) for x in tensors):
    # Arithmetic on indices and masks alone does not count.
    return formulas.elementwise(0)
  for table in (onnx_formulas.NORMS, onnx_formulas.POOLS, onnx_formulas.OTHERS):
    if name in table:
      return table[name](operation)
  if name in _ACTIVATIONS:
    steps, charge = _ACTIVATIONS[name]
    elements = operation.outputs[0].size
    done = formulas.activation(elements, steps)
    return dataclasses.replace(done, ptflops=charge * elements)
  if name in _ELEMENTWISE:
    return formulas.elementwise(operation.outputs[0].size * _ELEMENTWISE[name])
  return None


def parameters(op_type: str, inputs: Sequence[str]) -> list[str]:
  """Returns the inputs of a node that are weights if constant."""
  if op_type == 'BatchNormalization':
    return list(inputs[1:3])
  return [value for value in inputs if value]


def is_floating(dtype: np.dtype | None) -> bool:
  """Returns whether a dtype is floating-point or complex."""
  # Extension types such as bfloat16 have the kind 'V'.
  return dtype is not None and dtype.kind in 'fcV'


def _linear_model(operation) -> formulas.Work:
  """A classifier or regressor: one product of each row and coefficients."""
  params, shape = operation.params, operation.inputs[0].shape
  rows = math.prod(shape[:-1])
  bias = bool(params.get('intercepts'))
  columns = len(params['coefficients']) // max(shape[-1], 1)
  return formulas.matmul(rows, shape[-1], columns, bias=bias, positions=rows)


def _support_vectors(operation) -> formulas.Work:
  """Products of rows and support vectors, then of kernels and coefficients."""
  params, shape = operation.params, operation.inputs[0].shape
  rows = math.prod(shape[:-1])
  vectors = len(params.get('support_vectors', ())) // max(shape[-1], 1)
  products = formulas.matmul(rows, shape[-1], max(vectors, 1))
  if not vectors:
    return products
  kernel = formulas.elementwise(2 * rows * vectors)
  macs = rows * len(params['coefficients'])
  return products + kernel + formulas.matmul(macs, 1, 1)


# Operators of the domain ai.onnx.ml.
_LEARNED = {
  'ai.onnx.ml::LinearClassifier': _linear_model,
  'ai.onnx.ml::LinearRegressor': _linear_model,
  'ai.onnx.ml::SVMClassifier': _support_vectors,
  'ai.onnx.ml::SVMRegressor': _support_vectors,
}

# Steps per element, and what ptflops 0.7.5 counts for PyTorch's module.
_ACTIVATIONS = {
  'Relu': (1, 2),
  'LeakyRelu': (2, 1),
  'PRelu': (2, 2),
  'Elu': (3, 2),
  'Gelu': (5, 2),
  'Swish': (2, 1),
  'SwiGLU': (3, 1),
  'Clip': (2, 0),
  'Sigmoid': (1, 0),
  'Tanh': (1, 0),
  'Selu': (4, 0),
  'Celu': (4, 0),
  'HardSigmoid': (3, 0),
  'HardSwish': (4, 0),
  'Mish': (4, 0),
  'Shrink': (3, 0),
  'Softplus': (2, 0),
  'Softsign': (3, 0),
  'ThresholdedRelu': (1, 0),
}


def words(text: str) -> frozenset[str]:
  """Splits a text into a set of names."""
  return frozenset(text.split())


# Steps per element.
_ELEMENTWISE = {
  'QuantizeLinear': 2,
  'DequantizeLinear': 2,
  'DynamicQuantizeLinear': 4,
  'HannWindow': 4,
  'HammingWindow': 4,
  'BlackmanWindow': 7,
  'MelWeightMatrix': 4,
  'ai.onnx.ml::Binarizer': 1,
  'ai.onnx.ml::Normalizer': 3,
  'ai.onnx.ml::Scaler': 2,
} | dict.fromkeys(
  words("""
  Abs Acos Acosh Add Asin Asinh Atan Atanh Ceil Cos Cosh Div Equal Erf Exp Floor
  Greater GreaterOrEqual Less LessOrEqual Log Mod Mul Neg Pow Reciprocal Round
  Sin Sinh Sqrt Sub Tan
  """),
  1,
)

# Operators whose work depends on values. None of them is a product.
_DATA_DEPENDENT = words("""
  MaxRoiPool NonMaxSuppression ai.onnx.ml::TreeEnsemble
  ai.onnx.ml::TreeEnsembleClassifier ai.onnx.ml::TreeEnsembleRegressor
  ai.onnx.preview.training::Adagrad ai.onnx.preview.training::Adam
  ai.onnx.preview.training::Momentum
""")

# Operators that only create, move or select data.
FREE = words("""
  And Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
  Cast CastLike CenterCropPad Compress Concat ConcatFromSequence Constant
  ConstantOfShape DepthToSpace Dropout Expand EyeLike Flatten Gather
  GatherElements GatherND Identity ImageDecoder IsInf IsNaN MaxUnpool
  Multinomial NonZero Not OneHot Optional OptionalGetElement OptionalHasElement
  Or Pad RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
  RegexFullMatch Reshape ReverseSequence Scatter ScatterElements ScatterND
  SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
  SequenceLength Shape Sign Size Slice SpaceToDepth Split SplitToSequence
  Squeeze StringConcat StringNormalizer StringSplit TensorScatter
  TfIdfVectorizer Tile Transpose Trilu Unsqueeze Where Xor
  ai.onnx.ml::ArrayFeatureExtractor ai.onnx.ml::CastMap
  ai.onnx.ml::CategoryMapper ai.onnx.ml::DictVectorizer
  ai.onnx.ml::FeatureVectorizer ai.onnx.ml::Imputer ai.onnx.ml::LabelEncoder
  ai.onnx.ml::OneHotEncoder ai.onnx.ml::ZipMap
""")

# Operators whose results differ from run to run.
RANDOM = words("""
  Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform
  RandomUniformLike
""")

# Operators without a kind of their own that ptflops counts.
_CHARGED = ('Softmax', 'LogSoftmax', 'Resize', 'Upsample')

_KINDS = {
  'conv': onnx_products.CONVOLUTIONS,
  'matmul': onnx_products.PRODUCTS | _LEARNED,
  'norm': onnx_formulas.NORMS,
  'pool': onnx_formulas.POOLS,
  'activation': _ACTIVATIONS,
  'elementwise': onnx_formulas.OTHERS
  | _ELEMENTWISE
  | dict.fromkeys(_DATA_DEPENDENT),
}
