"""Operators of ONNX Runtime, as the ONNX operators that they stand for.

What ONNX Runtime's optimizer and quantizer write, of the domain com.microsoft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from dynconv_jax.macs import formulas, onnx_values
from dynconv_jax.macs.onnx_expansion import Expansion
from dynconv_jax.macs.onnx_values import Value

_Writer = Callable[[Expansion], None]
_FLOAT = onnx.TensorProto.FLOAT


def expand(
  node: onnx.NodeProto,
  inputs: Sequence[Value | None],
  attributes: dict[str, Any],
) -> Expansion | None:
  """Returns what a node stands for.

  Args:
    node: of any domain.
    inputs: what is known of its inputs; None for those that are left out.
    attributes: by name.

  Returns:
    None if it is an operator of ONNX, or is not known, or if the shapes of its
    inputs are not.
  """
  write = _expansion(node)
  unknown = any(value is not None and value.shape is None for value in inputs)
  if write is None or unknown:
    return None
  body = Expansion(node, inputs, attributes)
  write(body)
  return body


def possible_work(node: onnx.NodeProto) -> formulas.Work | None:
  """Returns an example of what a node may do; None if it is not known here."""
  if _expansion(node) is None:
    return None
  kind = 'elementwise'
  if node.op_type in _CONVOLUTIONS:
    kind = 'conv'
  elif node.op_type in _PRODUCTS:
    kind = 'matmul'
  macs = kind != 'elementwise'
  return formulas.Work(kind, macs, macs, operations=1)


def _expansion(node: onnx.NodeProto) -> _Writer | None:
  if node.domain == 'com.microsoft':
    tables = (_CONVOLUTIONS, _PRODUCTS, _OTHERS)
  elif onnx_values.is_onnx(node.domain):
    tables = (_WITHOUT_DOMAIN,)
  else:
    return None
  name = node.op_type
  return next((table[name] for table in tables if name in table), None)


def _activated(body: Expansion, name: str) -> str:
  kind = body.params.get('activation', b'').decode()
  if kind == 'Silu':
    kind = 'Swish'
  return body.add(kind, name) if kind and kind != 'none' else name


def _summed(body: Expansion, name: str, index: int) -> str:
  return body.add('Add', name, body.inputs[index]) if body.has(index) else name


def _standard(operator: str, *kept: int, but: Sequence[str] = ()) -> _Writer:
  """Returns the expansion to one operator that takes some of the inputs."""

  def expansion(body: Expansion) -> None:
    inputs = [body.inputs[i] if body.has(i) else '' for i in kept]
    params = {k: v for k, v in body.params.items() if k not in but}
    body.end(body.add(operator, *inputs, **params))

  return expansion


def _quantized(operator: str, *kept: int, but: Sequence[str] = ()) -> _Writer:
  """Returns the expansion to an operator on the numbers that integers mean."""

  def expansion(body: Expansion) -> None:
    kind = body.dequantize(*kept)
    inputs = [body.inputs[i] for i in kept]
    params = {k: v for k, v in body.params.items() if k not in but}
    channels_last = params.pop('channels_last', 0)
    rank = len(body.shape(0))
    if channels_last:
      inputs[0] = body.add('Transpose', inputs[0], perm=_first(rank))
    done = body.add(operator, *inputs, **params)
    if channels_last:
      done = body.add('Transpose', done, perm=_last(rank))
    body.end(body.add('Cast', done, to=kind))

  return expansion


_WINDOW = ('auto_pad', 'dilations', 'group', 'kernel_shape', 'pads')


def _fused_convolution(body: Expansion) -> None:
  params = {
    k: body.params[k] for k in (*_WINDOW, 'strides') if k in body.params
  }
  inputs = [x for x in body.inputs[:3] if x]
  done = body.add('Conv', *inputs, **params)
  body.end(_activated(body, _summed(body, done, 3)))


def _channels_last(operator: str, always: bool = True) -> _Writer:
  """Returns the expansion of an operator on channels that come last."""

  def expansion(body: Expansion) -> None:
    params = {k: v for k, v in body.params.items() if k != 'channels_last'}
    params.pop('activation', None)
    inputs = [x for x in body.inputs if x]
    last = always or body.params.get('channels_last', 0)
    rank = len(body.shape(0))
    if last:
      inputs[0] = body.add('Transpose', inputs[0], perm=_first(rank))
    if operator == 'Conv':
      inputs = inputs[:3]
    done = body.add(operator, *inputs, **params)
    if operator == 'Conv':
      done = _activated(body, _summed(body, done, 3))
    if last:
      done = body.add('Transpose', done, perm=_last(rank))
    body.end(done)

  return expansion


def _first(rank: int) -> list[int]:
  """Returns the order that puts the channels first."""
  return [0, rank - 1, *range(1, rank - 1)]


def _last(rank: int) -> list[int]:
  return [0, *range(2, rank), 1]


def _gemm(left: int, right: int, bias: int) -> _Writer:
  """Returns the expansion to Gemm, given the numbers of its inputs."""

  def expansion(body: Expansion) -> None:
    body.dequantize(*(i for i in (left, right, bias) if body.has(i)))
    params = {
      k: body.params[k]
      for k in ('alpha', 'beta', 'transA', 'transB')
      if k in body.params
    }
    inputs = [body.inputs[left], body.inputs[right]]
    if body.has(bias):
      inputs.append(body.inputs[bias])
    body.end(_activated(body, body.add('Gemm', *inputs, **params)))

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
  body.end(_activated(body, body.add('MatMul', *operands)))


def _quantized_weight(body: Expansion) -> None:
  """Products with weights that are packed: N outputs of K inputs."""
  weight = body.weight((body.params['K'], body.params['N']), packed=1)
  done = body.add('MatMul', body.inputs[0], weight)
  body.end(_summed(body, done, 5))


def _integer_to_float(bias: int, quantized: bool) -> _Writer:
  """Returns the expansion of a product of integers that is scaled after."""

  def expansion(body: Expansion) -> None:
    left = body.inputs[0]
    if not quantized:
      left = body.add('DynamicQuantizeLinear', left, outputs=3)
    done = body.add('MatMulInteger', left, body.inputs[1])
    done = body.add('Cast', done, to=_FLOAT)
    scaled = body.add('Mul', done, body.inputs[3 if quantized else 2])
    body.end(_summed(body, scaled, bias))

  return expansion


def _attend(body, query, key, value, heads, shared=None, mask='', past=()):
  """Adds ONNX's attention of [batch, length, heads x size]."""
  return body.add(
    'Attention',
    query,
    key,
    value,
    mask,
    *past,
    q_num_heads=heads,
    kv_num_heads=shared or heads,
  )


def _attention(quantized: bool) -> _Writer:
  """Returns the expansion of self-attention that projects its input."""
  mask, past = (99, 8) if quantized else (5, 4)

  def expansion(body: Expansion) -> None:
    batch, length, _ = body.shape(0)
    heads = body.params['num_heads']
    sizes = body.params.get('qkv_hidden_sizes')
    sizes = sizes or [body.shape(1)[1] // 3] * 3
    operator = 'MatMulInteger' if quantized else 'MatMul'
    projected = body.add(operator, *body.inputs[:2])
    if quantized:
      projected = body.add('Cast', projected, to=_FLOAT)
    _summed(body, projected, 2)
    kind = _FLOAT if quantized else None
    parts = [body.value((batch, length, n), elem_type=kind) for n in sizes]
    earlier, total = [], length
    if body.has(past):
      cached = body.shape(past)[1:]
      total += cached[2]
      earlier = [body.value(cached, past) for _ in range(2)]
    masked = body.inputs[mask] if body.has(mask) else ''
    body.declare(1, (2, batch, heads, total, sizes[1] // heads))
    body.end(_attend(body, *parts, heads, mask=masked, past=earlier))

  return expansion


def _multi_head_attention(body: Expansion) -> None:
  """Attention of projected queries, keys and values, packed or not."""
  heads = body.params['num_heads']
  shape = body.shape(0)
  batch, length = shape[:2]
  packed = len(shape) == 5  # [batch, length, heads, 3, size]
  query_size = shape[4] * heads if packed else shape[2]
  keys, value_size = length, query_size
  if body.has(1):
    key = body.shape(1)
    keys = key[2] if len(key) == 4 else key[1]
    if body.has(2):
      value = body.shape(2)
      value_size = value[1] * value[3] if len(value) == 4 else value[2]
  sizes = (query_size, query_size, value_size)
  query, key, value = (
    body.value((batch, n, size))
    for n, size in zip((length, keys, keys), sizes, strict=True)
  )
  if body.has(3):
    query, key, value = (
      body.add('Add', name, body.value((size,), 3))
      for name, size in zip((query, key, value), sizes, strict=True)
    )
  past, total = [], keys
  if body.has(6) and body.has(7):
    past = body.inputs[6:8]
    total += body.shape(6)[2]
  mask = body.inputs[5] if body.has(5) else ''
  body.declare(1, (batch, heads, total, query_size // heads))
  body.declare(2, (batch, heads, total, value_size // heads))
  body.end(_attend(body, query, key, value, heads, None, mask, past))


def _group_query_attention(body: Expansion) -> None:
  """Attention whose keys and values several heads share, with a cache."""
  heads, shared = body.params['num_heads'], body.params['kv_num_heads']
  batch, length, features = body.shape(0)
  size = features // heads if body.has(1) else features // (heads + 2 * shared)
  total = length
  if body.has(3):
    total += body.shape(3)[2]
  cached = total
  if (known := body.data(6)) is not None and known.size == 1:
    total = int(known.item())
    cached = max(total, body.shape(3)[2] if body.has(3) else 0)
  query = body.value((batch, length, heads * size))
  if body.params.get('do_rotary', 0):
    for count in (heads, shared):
      rotated = body.value((batch, length, count * size))
      _rotate(body, rotated)
  keys = [body.value((batch, total, shared * size)) for _ in range(2)]
  for index in (1, 2):
    body.declare(index, (batch, shared, cached, size))
  body.end(_attend(body, query, *keys, heads, shared))


def _rotate(body: Expansion, name: str) -> str:
  """Two products and a sum an element, as ONNX's rotary embedding."""
  products = [body.add('Mul', name, name) for _ in range(2)]
  return body.add('Add', *products)


def _rotary(body: Expansion) -> None:
  body.end(_rotate(body, body.inputs[0]))


def _skip_norm(simplified: bool, bias: int) -> _Writer:
  """Returns the expansion of a norm of a sum, which is an output too."""

  def expansion(body: Expansion) -> None:
    total = _summed(body, body.add('Add', *body.inputs[:2]), bias)
    body.end(total, 3)
    body.end(_layer_norm(body, total, 2, simplified))

  return expansion


def _layer_norm(
  body: Expansion, name: str, scale: int, simplified: bool
) -> str:
  if simplified:
    return body.add('RMSNormalization', name, body.inputs[scale])
  shift = [body.inputs[scale + 1]] if body.has(scale + 1) else []
  return body.add('LayerNormalization', name, body.inputs[scale], *shift)


def _rms_norm(body: Expansion) -> None:
  axis = body.params.get('axis', -1)
  inputs = [x for x in body.inputs[:2] if x]
  body.end(body.add('RMSNormalization', *inputs, axis=axis))


def _embedding_norm(body: Expansion) -> None:
  """The norm of a sum of two or three embeddings."""
  batch, length = body.shape(0)
  total = body.value((batch, length, body.shape(2)[1]), elem_type=_FLOAT)
  for _ in range(2 if body.has(4) else 1):
    total = body.add('Add', total, total)
  body.declare(1, (batch,))
  body.end(total, 2)
  body.end(_layer_norm(body, total, 5, simplified=False))


def _group_norm(skip: bool) -> _Writer:
  """Returns the expansion of a group norm on channels that come last."""

  def expansion(body: Expansion) -> None:
    name, rank = body.inputs[0], len(body.shape(0))
    if skip:
      name = _summed(body, body.add('Add', name, body.inputs[3]), 4)
      body.end(name, 1)
    last = body.params.get('channels_last', 1)
    if last:
      name = body.add('Transpose', name, perm=_first(rank))
    groups = body.params['groups']
    done = body.add(
      'GroupNormalization', name, *body.inputs[1:3], num_groups=groups
    )
    if body.params.get('activation', 0):
      done = body.add('Swish', done)
    if last:
      done = body.add('Transpose', done, perm=_last(rank))
    body.end(done)

  return expansion


def _biased(activation: str, bias: int = 1) -> _Writer:
  """Returns the expansion of an activation of a sum with a bias."""

  def expansion(body: Expansion) -> None:
    body.end(body.add(activation, _summed(body, body.inputs[0], bias)))

  return expansion


def _bias_split_gelu(body: Expansion) -> None:
  body.add('Add', *body.inputs[:2])
  *shape, features = body.shape(0)
  half = body.value((*shape, features // 2))
  body.end(body.add('Mul', half, body.add('Gelu', half)))


def _bias_add(body: Expansion) -> None:
  body.end(_summed(body, body.add('Add', *body.inputs[:2]), 2))


def _experts(weights: Sequence[int], packs: bool) -> _Writer:
  """Returns the expansion of perceptrons of which k are chosen for each row.

  Args:
    weights: numbers of the inputs that are weights, [experts, ...]; the second
      is the last layer, a third has the first layer's shape.
    packs: whether a byte has more than one element of a weight.
  """

  def expansion(body: Expansion) -> None:
    *rows, hidden = body.shape(0)
    chosen = math.prod(rows) * body.params.get('k', 1)
    packing = 8 // body.params.get('expert_weight_bits', 4) if packs else 1
    for index in weights:
      if not body.has(index):
        continue
      experts, *shape = body.shape(index)
      inner = packing * math.prod(shape) // hidden
      shape = (inner, hidden) if index == weights[1] else (hidden, inner)
      name = body.value((chosen, shape[0]))
      if index == weights[1]:
        name = body.add('Swish', name)
      # A row meets the weight of one of the experts.
      weight = body.weight(shape, index, whole=(experts, *shape))
      body.add('MatMul', name, weight)
    body.end(body.value((*rows, hidden)))

  return expansion


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
  'Attention': _attention(quantized=False),
  'QAttention': _attention(quantized=True),
  'MultiHeadAttention': _multi_head_attention,
  'GroupQueryAttention': _group_query_attention,
  'MoE': _experts((2, 4, 6), packs=False),
  'QMoE': _experts((2, 5, 8), packs=True),
}

_OTHERS = {
  'NhwcMaxPool': _channels_last('MaxPool'),
  'QLinearAveragePool': _quantized('AveragePool', 0),
  'QLinearGlobalAveragePool': _quantized('GlobalAveragePool', 0),
  'RotaryEmbedding': _rotary,
  'SimplifiedLayerNormalization': _rms_norm,
  'SkipLayerNormalization': _skip_norm(simplified=False, bias=4),
  'SkipSimplifiedLayerNormalization': _skip_norm(simplified=True, bias=3),
  'EmbedLayerNormalization': _embedding_norm,
  'GroupNorm': _group_norm(skip=False),
  'SkipGroupNorm': _group_norm(skip=True),
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

# Written without their domain.
_WITHOUT_DOMAIN = {'SimplifiedLayerNormalization': _rms_norm}
