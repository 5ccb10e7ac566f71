"""The work of ONNX's operators."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Sequence
from typing import Any

import onnx

from dynconv_jax.macs import formulas, recurrent

Shape = tuple[int, ...]


def work(
  op_type: str,
  attributes: dict[str, Any],
  inputs: Sequence[Shape | None],
  output: Shape,
  constants: Sequence[Any],
) -> formulas.Work | None:
  """Returns what an operator does; None if that is not known.

  Args:
    op_type: the operator, of the domain ai.onnx.
    attributes: by name.
    inputs: shapes of the inputs, None for those left out.
    output: shape of the first output.
    constants: values of the inputs, where known.
  """
  elements = math.prod(output)
  node = types.SimpleNamespace(
    op_type=op_type,
    inputs=inputs,
    output=output,
    elements=elements,
    attributes=attributes,
    constants=constants,
  )
  if op_type in _FORMULAS:
    return _FORMULAS[op_type](node)
  if op_type in _ACTIVATIONS:
    steps, charge = _ACTIVATIONS[op_type]
    return dataclasses.replace(
      formulas.activation(elements, steps), ptflops=charge * elements
    )
  if op_type in _ELEMENTWISE:
    return formulas.elementwise(elements * _ELEMENTWISE[op_type])
  if op_type in ('Sum', 'Min', 'Max', 'Mean'):
    divisions = op_type == 'Mean'
    return formulas.elementwise(elements * (len(inputs) - 1 + divisions))
  if op_type.startswith(('Reduce', 'Arg')):
    return _reduction(node)
  return None


def parameters(node: onnx.NodeProto) -> list[str]:
  """Returns the inputs that are weights if they are constant."""
  if node.op_type == 'BatchNormalization':
    return list(node.input[1:3])
  return [value for value in node.input if value]


def _bias(node, index: int) -> bool:
  return len(node.inputs) > index and node.inputs[index] is not None


def _convolution(node, data: int = 0, weight: int = 1, bias: int = 2):
  batch, in_features, *input_size = node.inputs[data]
  out_features, _, *kernel_size = node.inputs[weight]
  attributes = node.attributes
  ones = [1] * len(input_size)
  strides = attributes.get('strides', ones)
  dilations = attributes.get('dilations', ones)
  return formulas.convolution(
    batch=batch,
    in_features=in_features,
    out_features=out_features,
    input_size=input_size,
    kernel_size=kernel_size,
    strides=strides,
    padding=_padding(
      attributes,
      # What is missing for an output of size ceil(input / stride).
      [
        max((-(-size // stride) - 1) * stride + step * (taps - 1) + 1 - size, 0)
        for size, taps, stride, step in zip(
          input_size, kernel_size, strides, dilations, strict=True
        )
      ],
    ),
    kernel_dilation=dilations,
    feature_groups=attributes.get('group', 1),
    bias=_bias(node, bias),
  )


def _transposed_convolution(node) -> formulas.Work:
  batch, in_features, *input_size = node.inputs[0]
  _, features, *kernel_size = node.inputs[1]
  attributes = node.attributes
  ones = [1] * len(input_size)
  groups = attributes.get('group', 1)
  strides = attributes.get('strides', ones)
  dilations = attributes.get('dilations', ones)
  extra = attributes.get('output_padding', [0] * len(input_size))
  whole = [
    stride * (size - 1) + more + step * (taps - 1) + 1
    for size, taps, stride, step, more in zip(
      input_size, kernel_size, strides, dilations, extra, strict=True
    )
  ]
  # An output shape that is asked for takes the place of the padding.
  cropped = [max(a - b, 0) for a, b in zip(whole, node.output[2:], strict=True)]
  if 'output_shape' in attributes:
    mode = attributes.get('auto_pad', b'NOTSET')
    mode = b'SAME_UPPER' if mode == b'SAME_UPPER' else b'SAME_LOWER'
    attributes = attributes | {'auto_pad': mode}
  return formulas.transposed_convolution(
    batch=batch,
    in_features=in_features,
    out_features=features * groups,
    input_size=input_size,
    kernel_size=kernel_size,
    strides=strides,
    padding=_padding(attributes, cropped),
    output_padding=extra,
    kernel_dilation=dilations,
    feature_groups=groups,
    bias=_bias(node, 2),
  )


def _padding(attributes, automatic: Sequence[int]) -> list[tuple[int, int]]:
  """Returns (low, high) of each dimension, `automatic` being their sums."""
  mode = attributes.get('auto_pad', b'NOTSET')
  if mode == b'SAME_UPPER':
    return [(total // 2, total - total // 2) for total in automatic]
  if mode == b'SAME_LOWER':
    return [(total - total // 2, total // 2) for total in automatic]
  dimensions = len(automatic)
  pads = attributes.get('pads', [0] * 2 * dimensions)
  if mode == b'VALID':
    pads = [0] * 2 * dimensions
  return list(zip(pads[:dimensions], pads[dimensions:], strict=True))


def _gemm(node) -> formulas.Work:
  rows, inner = node.inputs[0]
  if node.attributes.get('transA', 0):
    rows, inner = inner, rows
  return formulas.matmul(rows, inner, node.output[1], bias=_bias(node, 2))


def _matmul(node) -> formulas.Work:
  return formulas.matmul(node.elements, node.inputs[0][-1], 1)


def _einsum(node) -> formulas.Work | None:
  equation = node.attributes['equation'].decode().replace(' ', '')
  if len(node.inputs) > 2:
    return None
  sizes: dict[Any, int] = {}
  for term, shape in zip(
    equation.partition('->')[0].split(','), node.inputs, strict=True
  ):
    before, ellipsis, after = term.partition('...')
    middle = len(shape) - len(before) - len(after) if ellipsis else 0
    # An ellipsis is aligned at its end, as in broadcasting.
    labels = [*before, *range(-middle, 0), *after]
    for label, size in zip(labels, shape, strict=True):
      sizes[label] = max(sizes.get(label, 1), size)
  terms = math.prod(sizes.values())
  if len(node.inputs) == 1:
    return formulas.reduction(terms, node.elements)
  inner = terms // node.elements if node.elements else 0
  return formulas.matmul(node.elements, inner, 1)


def _attention(node) -> formulas.Work:
  query, key, value = node.inputs[:3]
  if len(query) == 3:
    heads = node.attributes['q_num_heads']
    shared = node.attributes['kv_num_heads']
    sizes = query[2] // heads, value[2] // shared
  else:
    heads, sizes = query[1], (query[3], value[3])
  keys = key[-2]
  if _bias(node, 4):  # Keys of earlier positions.
    keys += node.inputs[4][2]
  queries = query[-2]
  done = formulas.attention(query[0] * heads, queries, keys, *sizes)
  if _bias(node, 3):
    done += formulas.elementwise(query[0] * heads * queries * keys)
  return done


def _recurrent(cell: recurrent.Cell):
  """Returns the formula of a recurrent layer."""

  def formula(node) -> formulas.Work:
    *steps_and_batch, inputs = node.inputs[0]
    directions, _, hidden = node.inputs[2]
    rows = math.prod(steps_and_batch)
    done = recurrent.layer(
      cell, rows, inputs=inputs, hidden=hidden, bias=_bias(node, 3)
    )
    if _bias(node, 7):  # An LSTM's peepholes: a product and a sum a gate.
      done += formulas.elementwise(6 * rows * hidden)
    return done * directions

  return formula


def _norm(node) -> formulas.Work:
  shape, elements = node.inputs[0], node.elements
  batch, features = (*shape, 1)[:2]
  given = False
  if node.op_type == 'BatchNormalization':
    given = not node.attributes.get('training_mode', 0)
    groups = features
  elif node.op_type == 'InstanceNormalization':
    groups = batch * features
  elif node.op_type == 'GroupNormalization':
    groups = batch * node.attributes['num_groups']
  else:
    axis = node.attributes.get('axis', -1)
    groups = math.prod(shape[:axis])
  done = formulas.norm(
    elements, groups, statistics_groups=0 if given else groups
  )
  if node.op_type == 'LayerNormalization':
    # ptflops does not see scale and bias of PyTorch's layer norm.
    done = dataclasses.replace(done, ptflops=elements)
  return done


def _pool(node) -> formulas.Work:
  inputs = math.prod(node.inputs[0])
  if node.op_type.startswith('Global'):
    window = math.prod(node.inputs[0][2:])
  else:
    window = math.prod(node.attributes['kernel_shape'])
  mean = node.op_type.endswith('AveragePool')
  done = formulas.pool(inputs, node.elements, window, mean=mean)
  return dataclasses.replace(done, ptflops=2 * inputs)


def _softmax(node) -> formulas.Work:
  axis = node.attributes.get('axis', -1)
  return formulas.softmax(
    node.elements, node.elements // max(node.output[axis], 1)
  )


def _resize(node) -> formulas.Work:
  mode = node.attributes.get('mode', b'nearest')
  resized = sum(
    a != b for a, b in zip(node.inputs[0], node.output, strict=True)
  )
  taps = {b'linear': 2, b'cubic': 4}.get(mode, 1) ** resized
  done = formulas.elementwise(node.elements * (2 * taps - 1) * (taps > 1))
  return dataclasses.replace(done, ptflops=2 * node.elements)


def _reduction(node) -> formulas.Work:
  inputs = math.prod(node.inputs[0])
  done = formulas.reduction(inputs, node.elements)
  if node.op_type == 'ReduceMean':
    done += formulas.elementwise(node.elements)
  elif node.op_type in ('ReduceL2', 'ReduceSumSquare', 'ReduceL1'):
    done += formulas.elementwise(inputs)
  return done


def _top_k(node) -> formulas.Work:
  axis = node.attributes.get('axis', -1)
  return formulas.sort(math.prod(node.inputs[0]), node.inputs[0][axis])


_FORMULAS = {
  'TopK': _top_k,
  'Conv': _convolution,
  'ConvInteger': lambda node: _convolution(node, bias=99),
  'QLinearConv': lambda node: _convolution(node, weight=3, bias=8),
  'ConvTranspose': _transposed_convolution,
  'Gemm': _gemm,
  'MatMul': _matmul,
  'MatMulInteger': _matmul,
  'QLinearMatMul': _matmul,
  'Einsum': _einsum,
  'Attention': _attention,
  'RNN': _recurrent(recurrent.RNN),
  'GRU': _recurrent(recurrent.GRU),
  'LSTM': _recurrent(recurrent.LSTM),
  'BatchNormalization': _norm,
  'InstanceNormalization': _norm,
  'GroupNormalization': _norm,
  'LayerNormalization': _norm,
  'AveragePool': _pool,
  'MaxPool': _pool,
  'GlobalAveragePool': _pool,
  'GlobalMaxPool': _pool,
  'Softmax': _softmax,
  'LogSoftmax': _softmax,
  'Resize': _resize,
  'Upsample': _resize,
}

# Steps for each element, and what ptflops 0.7.5 charges for PyTorch's module.
_ACTIVATIONS = {
  'Relu': (1, 2),
  'LeakyRelu': (2, 1),
  'PRelu': (2, 2),
  'Elu': (3, 2),
  'Gelu': (5, 2),
  'Swish': (2, 1),
  'Clip': (2, 0),
  'Sigmoid': (1, 0),
  'Tanh': (1, 0),
  'Selu': (4, 0),
  'Celu': (4, 0),
  'HardSigmoid': (3, 0),
  'HardSwish': (4, 0),
  'Mish': (4, 0),
  'Softplus': (2, 0),
  'Softsign': (3, 0),
  'ThresholdedRelu': (1, 0),
}


def _words(text: str) -> frozenset[str]:
  return frozenset(text.split())


# Steps for each element.
_ELEMENTWISE = {
  'QuantizeLinear': 2,
  'DequantizeLinear': 2,
  'DynamicQuantizeLinear': 4,
} | dict.fromkeys(
  _words("""
  Abs Acos Acosh Add Asin Asinh Atan Atanh Ceil Cos Cosh CumSum Div Equal Erf
  Exp Floor Greater GreaterOrEqual Less LessOrEqual Log Mod Mul Neg Pow
  Reciprocal Round Sin Sinh Sqrt Sub Tan
  """),
  1,
)

# Operators that only make, move or choose.
FREE = _words("""
  And Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
  CastLike CenterCropPad Compress Concat ConcatFromSequence Constant
  ConstantOfShape DepthToSpace Dropout Expand EyeLike Flatten Gather
  GatherElements GatherND Hardmax Identity IsInf IsNaN Multinomial NonZero Not
  OneHot Optional OptionalGetElement OptionalHasElement Or Pad RandomNormal
  RandomNormalLike RandomUniform RandomUniformLike Range Reshape
  ReverseSequence Scatter ScatterElements ScatterND SequenceAt
  SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
  Shape Sign Size Slice SpaceToDepth Split SplitToSequence Squeeze
  TensorScatter Tile Transpose Trilu Unsqueeze Where Xor
""")
