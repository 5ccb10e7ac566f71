"""ONNX Runtime's transformer operators, as standard ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx

from dynconv_jax.macs import onnx_expansion
from dynconv_jax.macs.onnx_expansion import Expansion, Writer

_FLOAT = onnx.TensorProto.FLOAT


def _attend(body, query, key, value, heads, shared=None, mask='', past=()):
  """Adds ONNX's attention of [batch, length, heads * size] tensors."""
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


def attention(quantized: bool) -> Writer:
  """Expands self-attention that includes the input projection."""
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
    body.summed(projected, 2)
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


def multi_head_attention(body: Expansion) -> None:
  """Expands attention of projected queries, keys and values, packed or not."""
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


def group_query_attention(body: Expansion) -> None:
  """Expands attention with shared keys and values and with a cache."""
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
  """Adds two products and a sum per element: ONNX's rotary embedding."""
  products = [body.add('Mul', name, name) for _ in range(2)]
  return body.add('Add', *products)


def rotary(body: Expansion) -> None:
  body.end(_rotate(body, body.inputs[0]))


def skip_norm(simplified: bool, bias: int) -> Writer:
  """Expands a norm of a sum; the sum is an output too."""

  def expansion(body: Expansion) -> None:
    total = body.summed(body.add('Add', *body.inputs[:2]), bias)
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


def rms_norm(body: Expansion) -> None:
  axis = body.params.get('axis', -1)
  inputs = [x for x in body.inputs[:2] if x]
  body.end(body.add('RMSNormalization', *inputs, axis=axis))


def embedding_norm(body: Expansion) -> None:
  """Expands the norm of a sum of two or three embeddings."""
  batch, length = body.shape(0)
  total = body.value((batch, length, body.shape(2)[1]), elem_type=_FLOAT)
  for _ in range(2 if body.has(4) else 1):
    total = body.add('Add', total, total)
  body.declare(1, (batch,))
  body.end(total, 2)
  body.end(_layer_norm(body, total, 5, simplified=False))


def group_norm(skip: bool) -> Writer:
  """Expands a group norm on channels-last tensors."""

  def expansion(body: Expansion) -> None:
    name, rank = body.inputs[0], len(body.shape(0))
    if skip:
      name = body.summed(body.add('Add', name, body.inputs[3]), 4)
      body.end(name, 1)
    last = body.params.get('channels_last', 1)
    if last:
      name = body.add(
        'Transpose', name, perm=onnx_expansion.channels_first(rank)
      )
    groups = body.params['groups']
    done = body.add(
      'GroupNormalization', name, *body.inputs[1:3], num_groups=groups
    )
    if body.params.get('activation', 0):
      done = body.add('Swish', done)
    if last:
      done = body.add(
        'Transpose', done, perm=onnx_expansion.channels_last(rank)
      )
    body.end(done)

  return expansion


def experts(weights: Sequence[int], packs: bool) -> Writer:
  """Expands a mixture of perceptrons of which each row uses k.

  Args:
    weights: indices of the weight inputs, [experts, ...]. The second is the
      last layer; a third has the first layer's shape.
    packs: whether a byte contains more than one element of a weight.
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
      # Each row is multiplied by the weight of one expert.
      weight = body.weight(shape, index, whole=(experts, *shape))
      body.add('MatMul', name, weight)
    body.end(body.value((*rows, hidden)))

  return expansion
