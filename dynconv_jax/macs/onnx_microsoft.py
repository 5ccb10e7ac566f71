"""ONNX Runtime's own operators, expressed as standard ONNX operators.

These are operators of the domains com.microsoft and com.microsoft.nchwc that
ONNX Runtime's optimizer and quantizer generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from dynconv_jax.macs import (
  formulas,
  onnx_expansion,
  onnx_nchwc,
  onnx_transformers,
  onnx_values,
)
from dynconv_jax.macs.onnx_expansion import Expansion, Writer
from dynconv_jax.macs.onnx_values import Value

_FLOAT = onnx.TensorProto.FLOAT


def expand(
  node: onnx.NodeProto,
  inputs: Sequence[Value | None],
  attributes: dict[str, Any],
) -> Expansion | None:
  """Returns the standard operators that a node is equivalent to.

  Args:
    node: of any domain.
    inputs: what is known about its inputs; None for omitted ones.
    attributes: by name.

  Returns:
    None if the node is a standard operator, or it or the shapes of its inputs
    are unknown.
  """
  write = _expansion(node)
  unknown = any(value is not None and value.shape is None for value in inputs)
  if write is None or unknown:
    return None
  body = Expansion(node, inputs, attributes)
  write(body)
  return body


def possible_work(node: onnx.NodeProto) -> formulas.Work | None:
  """Returns an example of a node's work; None if the operator is unknown."""
  if _expansion(node) is None:
    return None
  kind = 'elementwise'
  if node.op_type in _CONVOLUTIONS or node.op_type == 'Conv':
    kind = 'conv'
  elif node.op_type in _PRODUCTS:
    kind = 'matmul'
  macs = kind != 'elementwise'
  return formulas.Work(kind, macs, macs, operations=1)


def note(node: onnx.NodeProto) -> str:
  """Returns a note on how a node is counted, '' if there is none."""
  return onnx_nchwc.note(node)


def _expansion(node: onnx.NodeProto) -> Writer | None:
  if node.domain == 'com.microsoft':
    tables = (_CONVOLUTIONS, _PRODUCTS, _OTHERS)
  elif node.domain == onnx_nchwc.DOMAIN:
    tables = (onnx_nchwc.OPERATORS,)
  elif onnx_values.is_onnx(node.domain):
    tables = (_WITHOUT_DOMAIN,)
  else:
    return None
  name = node.op_type
  return next((table[name] for table in tables if name in table), None)


def _standard(operator: str, *kept: int, but: Sequence[str] = ()) -> Writer:
  """Expands to one operator that takes the inputs at the `kept` indices."""

  def expansion(body: Expansion) -> None:
    inputs = [body.inputs[i] if body.has(i) else '' for i in kept]
    params = {k: v for k, v in body.params.items() if k not in but}
    body.end(body.add(operator, *inputs, **params))

  return expansion


def _quantized(operator: str, *kept: int, but: Sequence[str] = ()) -> Writer:
  """Expands to a real-valued operator, with quantized inputs and output."""

  def expansion(body: Expansion) -> None:
    kind = body.dequantize(*kept)
    inputs = [body.inputs[i] for i in kept]
    params = {k: v for k, v in body.params.items() if k not in but}
    channels_last = params.pop('channels_last', 0)
    rank = len(body.shape(0))
    if channels_last:
      inputs[0] = body.add(
        'Transpose', inputs[0], perm=onnx_expansion.channels_first(rank)
      )
    done = body.add(operator, *inputs, **params)
    if channels_last:
      done = body.add(
        'Transpose', done, perm=onnx_expansion.channels_last(rank)
      )
    body.end(body.add('Cast', done, to=kind))

  return expansion


_WINDOW = ('auto_pad', 'dilations', 'group', 'kernel_shape', 'pads')


def _fused_convolution(body: Expansion) -> None:
  params = {
    k: body.params[k] for k in (*_WINDOW, 'strides') if k in body.params
  }
  inputs = [x for x in body.inputs[:3] if x]
  done = body.add('Conv', *inputs, **params)
  body.end(body.activated(body.summed(done, 3)))


def _channels_last(operator: str, always: bool = True) -> Writer:
  """Expands an operator on channels-last tensors."""

  def expansion(body: Expansion) -> None:
    params = {k: v for k, v in body.params.items() if k != 'channels_last'}
    params.pop('activation', None)
    inputs = [x for x in body.inputs if x]
    last = always or body.params.get('channels_last', 0)
    rank = len(body.shape(0))
    if last:
      inputs[0] = body.add(
        'Transpose', inputs[0], perm=onnx_expansion.channels_first(rank)
      )
    if operator == 'Conv':
      inputs = inputs[:3]
    done = body.add(operator, *inputs, **params)
    if operator == 'Conv':
      done = body.activated(body.summed(done, 3))
    if last:
      done = body.add(
        'Transpose', done, perm=onnx_expansion.channels_last(rank)
      )
    body.end(done)

  return expansion


def _gemm(left: int, right: int, bias: int) -> Writer:
  """Expands to Gemm; the arguments are indices of its inputs."""

  def expansion(body: Expansion) -> None:
    kind = body.dequantize(*(i for i in (left, right, bias) if body.has(i)))
    params = {
      k: body.params[k]
      for k in ('alpha', 'beta', 'transA', 'transB')
      if k in body.params
    }
    inputs = [body.inputs[left], body.inputs[right]]
    if body.has(bias):
      inputs.append(body.inputs[bias])
    done = body.activated(body.add('Gemm', *inputs, **params))
    # The output of QGemm is quantized if it has a zero point.
    body.end(body.add('Cast', done, to=kind) if body.has(8) else done)

  return expansion


def _fused_matmul(body: Expansion) -> None:
  operands = []
  for index, side in enumerate('AB'):
    rank, name = len(body.shape(index)), body.inputs[index]
    order = list(range(rank))
    if body.params.get(f'transBatch{side}', 0) and rank > 2:
      order = [*order[1:-1], 0, order[-1]]
    if body.params.get(f'trans{side}', 0) and rank > 1:
      order[-2:] = reversed(order[-2:])
    if order != list(range(rank)):
      name = body.add('Transpose', name, perm=order)
    operands.append(name)
  body.end(body.activated(body.add('MatMul', *operands)))


def _quantized_weight(body: Expansion) -> None:
  """Expands a product with packed weights: N outputs of K inputs."""
  weight = body.weight((body.params['K'], body.params['N']), packed=1)
  done = body.add('MatMul', body.inputs[0], weight)
  body.end(body.summed(done, 5))


def _integer_to_float(bias: int, quantized: bool) -> Writer:
  """Expands an integer product whose result is then scaled."""

  def expansion(body: Expansion) -> None:
    left = body.inputs[0]
    if not quantized:
      left = body.add('DynamicQuantizeLinear', left, outputs=3)
    done = body.add('MatMulInteger', left, body.inputs[1])
    done = body.add('Cast', done, to=_FLOAT)
    scaled = body.add('Mul', done, body.inputs[3 if quantized else 2])
    body.end(body.summed(scaled, bias))

  return expansion


def _recurrent(body: Expansion) -> None:
  """Expands an LSTM with quantized weights, [directions, inputs, outputs]."""
  body.dequantize(1, 2)
  for index in (1, 2):
    body.inputs[index] = body.add(
      'Transpose', body.inputs[index], perm=[0, 2, 1]
    )
  done = body.add('LSTM', *body.inputs[:8], outputs=3, **body.params)
  for index, name in enumerate((done, f'{done}/1', f'{done}/2')):
    body.end(name, index)


def _biased(activation: str, bias: int = 1) -> Writer:
  """Expands an activation of a sum with a bias."""

  def expansion(body: Expansion) -> None:
    body.end(body.add(activation, body.summed(body.inputs[0], bias)))

  return expansion


def _bias_split_gelu(body: Expansion) -> None:
  body.add('Add', *body.inputs[:2])
  *shape, features = body.shape(0)
  half = body.value((*shape, features // 2))
  body.end(body.add('Mul', half, body.add('Gelu', half)))


def _bias_add(body: Expansion) -> None:
  body.end(body.summed(body.add('Add', *body.inputs[:2]), 2))


def _concatenated(body: Expansion) -> None:
  parts = body.inputs[2::3]
  body.end(body.add('Concat', *parts, axis=body.params['axis']))


def _reduced_mean(body: Expansion) -> None:
  kind = body.dequantize(0)
  name, axes = body.inputs[0], body.params.get('axes')
  if axes:
    axes_name = f'{name}/axes/{body.outputs[0]}'
    body.values[axes_name] = onnx_values.array(np.asarray(axes, np.int64))
  keep = body.params.get('keepdims', 1)
  extra = [axes_name] if axes else []
  done = body.add('ReduceMean', name, *extra, keepdims=keep)
  body.end(body.add('Cast', done, to=kind))


_CONVOLUTIONS = {
  'FusedConv': _fused_convolution,
  'NhwcFusedConv': _channels_last('Conv'),
  'NhwcConv': _channels_last('Conv'),
  'QLinearConv': _channels_last('QLinearConv', always=False),
}

_PRODUCTS = {
  'FusedGemm': _gemm(0, 1, 2),
  'QGemm': _gemm(0, 3, 6),
  'FusedMatMul': _fused_matmul,
  'FusedMatMulActivation': _fused_matmul,
  'TransposeMatMul': _fused_matmul,
  'MatMulNBits': _quantized_weight,
  'MatMulBnb4': _quantized_weight,
  'MatMulIntegerToFloat': _integer_to_float(6, quantized=True),
  'DynamicQuantizeMatMul': _integer_to_float(4, quantized=False),
  'DynamicQuantizeLSTM': _recurrent,
  'Attention': onnx_transformers.attention(quantized=False),
  'QAttention': onnx_transformers.attention(quantized=True),
  'MultiHeadAttention': onnx_transformers.multi_head_attention,
  'GroupQueryAttention': onnx_transformers.group_query_attention,
  'MoE': onnx_transformers.experts((2, 4, 6), packs=False),
  'QMoE': onnx_transformers.experts((2, 5, 8), packs=True),
}

_OTHERS = {
  'NhwcMaxPool': _channels_last('MaxPool'),
  'QLinearAveragePool': _quantized('AveragePool', 0),
  'QLinearGlobalAveragePool': _quantized('GlobalAveragePool', 0),
  'RotaryEmbedding': onnx_transformers.rotary,
  'SimplifiedLayerNormalization': onnx_transformers.rms_norm,
  'SkipLayerNormalization': onnx_transformers.skip_norm(
    simplified=False, bias=4
  ),
  'SkipSimplifiedLayerNormalization': onnx_transformers.skip_norm(
    simplified=True, bias=3
  ),
  'EmbedLayerNormalization': onnx_transformers.embedding_norm,
  'GroupNorm': onnx_transformers.group_norm(skip=False),
  'SkipGroupNorm': onnx_transformers.group_norm(skip=True),
  'Gelu': _standard('Gelu', 0),
  'BiasGelu': _biased('Gelu'),
  'FastGelu': _biased('Gelu'),
  'QuickGelu': _standard('Swish', 0, but=('alpha',)),
  'BiasSplitGelu': _bias_split_gelu,
  'BiasAdd': _bias_add,
  'BiasSoftmax': _biased('Softmax'),
  'QLinearAdd': _quantized('Add', 0, 3),
  'QLinearMul': _quantized('Mul', 0, 3),
  'QLinearSigmoid': _quantized('Sigmoid', 0),
  'QLinearLeakyRelu': _quantized('LeakyRelu', 0),
  'QLinearSoftmax': _quantized('Softmax', 0, but=('axis', 'opset')),
  'QLinearConcat': _concatenated,
  'QLinearReduceMean': _reduced_mean,
  'QuantizeLinear': _standard('QuantizeLinear', 0, 1, 2),
  'DequantizeLinear': _standard('DequantizeLinear', 0, 1, 2),
  'Pad': _standard('Pad', 0, 1, 2),
  'Trilu': _standard('Trilu', 0, 1),
  'Unique': _standard('Unique', 0),
}

# Operators that ONNX Runtime writes without their domain.
_WITHOUT_DOMAIN = {'SimplifiedLayerNormalization': onnx_transformers.rms_norm}
