"""The work of ONNX's convolutions, matrix products and composite layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from dynconv_jax.macs import einsum, formulas, linalg, recurrent


def is_given(operation: Any, index: int) -> bool:
  """Returns whether an operation has an input at this index."""
  inputs = operation.inputs
  return len(inputs) > index and inputs[index] is not None


def convolution(
  operation: Any, data: int = 0, weight: int = 1, bias: int = 2
) -> formulas.Work:
  """Returns the work of a convolution, given the indices of its inputs."""
  batch, in_features, *input_size = operation.inputs[data].shape
  out_features, _, *kernel_size = operation.inputs[weight].shape
  params = operation.params
  ones = [1] * len(input_size)
  strides = params.get('strides') or ones
  dilations = params.get('dilations') or ones
  return formulas.convolution(
    batch=batch,
    in_features=in_features,
    out_features=out_features,
    input_size=input_size,
    kernel_size=kernel_size,
    strides=strides,
    padding=_padding(
      params,
      # The total padding for an output of size ceil(input / stride).
      [
        max((-(-size // stride) - 1) * stride + step * (taps - 1) + 1 - size, 0)
        for size, taps, stride, step in zip(
          input_size, kernel_size, strides, dilations, strict=True
        )
      ],
    ),
    kernel_dilation=dilations,
    feature_groups=params.get('group', 1),
    bias=is_given(operation, bias),
  )


def _transposed_convolution(operation) -> formulas.Work:
  batch, in_features, *input_size = operation.inputs[0].shape
  _, features, *kernel_size = operation.inputs[1].shape
  params = operation.params
  ones = [1] * len(input_size)
  groups = params.get('group', 1)
  strides = params.get('strides') or ones
  dilations = params.get('dilations') or ones
  extra = params.get('output_padding') or [0] * len(input_size)
  whole = [
    stride * (size - 1) + more + step * (taps - 1) + 1
    for size, taps, stride, step, more in zip(
      input_size, kernel_size, strides, dilations, extra, strict=True
    )
  ]
  # An explicit output shape overrides the padding.
  size = operation.outputs[0].shape[2:]
  cropped = [max(a - b, 0) for a, b in zip(whole, size, strict=True)]
  if 'output_shape' in params:
    mode = params.get('auto_pad', b'NOTSET')
    mode = b'SAME_UPPER' if mode == b'SAME_UPPER' else b'SAME_LOWER'
    params = params | {'auto_pad': mode}
  return formulas.transposed_convolution(
    batch=batch,
    in_features=in_features,
    out_features=features * groups,
    input_size=input_size,
    kernel_size=kernel_size,
    strides=strides,
    padding=_padding(params, cropped),
    output_padding=extra,
    kernel_dilation=dilations,
    feature_groups=groups,
    bias=is_given(operation, 2),
  )


def _padding(params, automatic: Sequence[int]) -> list[tuple[int, int]]:
  """Returns (low, high) per dimension; `automatic` contains their sums."""
  mode = params.get('auto_pad', b'NOTSET')
  if mode == b'SAME_UPPER':
    return [(total // 2, total - total // 2) for total in automatic]
  if mode == b'SAME_LOWER':
    return [(total - total // 2, total // 2) for total in automatic]
  dimensions = len(automatic)
  pads = params.get('pads') or [0] * 2 * dimensions
  if mode == b'VALID':
    pads = [0] * 2 * dimensions
  return list(zip(pads[:dimensions], pads[dimensions:], strict=True))


def _deformable_convolution(operation) -> formulas.Work:
  """Taps read between pixels; which of them read padding is unknown."""
  output, weight = operation.outputs[0], operation.inputs[1]
  macs = output.size * math.prod(weight.shape[1:])
  return formulas.Work(
    'conv',
    macs,
    macs,
    bias=output.size if is_given(operation, 3) else 0,
    positions=output.size // weight.shape[0],
    outputs=output.size,
  )


def _causal_convolution(operation) -> formulas.Work:
  """A depthwise convolution over the inputs and the state before them."""
  batch, features, length = operation.inputs[0].shape
  taps = operation.inputs[1].shape[-1]
  earlier = taps - 1 if is_given(operation, 3) else 0
  done = formulas.convolution(
    batch=batch,
    in_features=features,
    out_features=features,
    input_size=[length + earlier],
    kernel_size=[taps],
    padding=[(taps - 1 - earlier, 0)],
    feature_groups=features,
    bias=is_given(operation, 2),
  )
  if operation.params.get('activation', b'none') != b'none':
    done += formulas.activation(operation.outputs[0].size, 2)
  return done


def _gemm(operation) -> formulas.Work:
  rows, inner = operation.inputs[0].shape
  if operation.params.get('transA', 0):
    rows, inner = inner, rows
  columns = operation.outputs[0].shape[1]
  bias = is_given(operation, 2)
  return formulas.matmul(rows, inner, columns, bias=bias, positions=rows)


def matmul(operation: Any, left: int = 0, right: int = 1) -> formulas.Work:
  """Returns the work of a matrix product, given the indices of its inputs."""
  output = operation.outputs[0].shape
  outputs, rank = math.prod(output), len(operation.inputs[right].shape)
  columns = output[-1] if rank > 1 and output else 1
  rows = outputs // max(columns, 1)
  return formulas.matmul(
    rows,
    operation.inputs[left].shape[-1],
    columns,
    # A 2-D operand is the weight of a linear layer, not part of a batch.
    positions=rows if rank == 2 else 0,
  )


def _einsum(operation) -> formulas.Work:
  return einsum.work(
    operation.params['equation'].decode(), [x.shape for x in operation.inputs]
  )


def _affine_grid(operation) -> formulas.Work:
  batch, rows, inner = operation.inputs[0].shape
  positions = operation.outputs[0].size // max(batch * rows, 1)
  return formulas.matmul(positions, inner, rows, batch=batch)


def _attention(operation) -> formulas.Work:
  query, key, value = (x.shape for x in operation.inputs[:3])
  if len(query) == 3:
    heads = operation.params['q_num_heads']
    shared = operation.params['kv_num_heads']
    sizes = query[2] // heads, value[2] // shared
  else:
    heads, sizes = query[1], (query[3], value[3])
  keys, queries = key[-2], query[-2]
  if is_given(operation, 4):  # Cached keys of earlier positions.
    keys += operation.inputs[4].shape[2]
  done = formulas.attention(query[0] * heads, queries, keys, *sizes)
  if is_given(operation, 3):
    done += formulas.elementwise(query[0] * heads * queries * keys)
  if operation.params.get('softcap', 0):
    done += formulas.elementwise(3 * query[0] * heads * queries * keys)
  return done


def _flexible_attention(operation) -> formulas.Work | None:
  if {'score_mod', 'prob_mod'} & operation.params.keys():
    return None
  return _attention(operation)


def _linear_attention(operation) -> formulas.Work:
  """Each token updates one state per head, and each query reads one."""
  batch, tokens, features = operation.inputs[0].shape
  params = operation.params
  heads, shared = params['q_num_heads'], params['kv_num_heads']
  state = features // heads * (operation.inputs[2].shape[2] // shared)
  rule = params.get('update_rule', b'gated_delta')
  products = heads + shared * (2 if rule.endswith(b'delta') else 1)
  decays = shared * state if rule.startswith(b'gated') else 0
  done = formulas.matmul(batch * tokens * products, state, 1)
  done = dataclasses.replace(done, outputs=operation.outputs[0].size)
  return done + formulas.elementwise(batch * tokens * decays)


def _recurrent(cell: recurrent.Cell) -> Callable[[Any], formulas.Work]:
  """Returns the formula for a recurrent layer."""

  def formula(operation) -> formulas.Work:
    *steps_and_batch, inputs = operation.inputs[0].shape
    directions, _, hidden = operation.inputs[2].shape
    rows = math.prod(steps_and_batch)
    bias = is_given(operation, 3)
    done = recurrent.layer(cell, rows, inputs=inputs, hidden=hidden, bias=bias)
    if is_given(operation, 7):  # An LSTM's peepholes: 3 times 2 steps.
      done += formulas.elementwise(6 * rows * hidden)
    return done * directions

  return formula


def _determinant(operation) -> formulas.Work:
  *batch, rows, columns = operation.inputs[0].shape
  return linalg.lu(rows, columns) * math.prod(batch)


CONVOLUTIONS = {
  'Conv': convolution,
  'ConvInteger': lambda operation: convolution(operation, bias=99),
  'QLinearConv': lambda operation: convolution(operation, weight=3, bias=8),
  'ConvTranspose': _transposed_convolution,
  'DeformConv': _deformable_convolution,
  'CausalConvWithState': _causal_convolution,
}

PRODUCTS = {
  'Gemm': _gemm,
  'MatMul': matmul,
  'MatMulInteger': matmul,
  'QLinearMatMul': lambda operation: matmul(operation, right=3),
  'Einsum': _einsum,
  'AffineGrid': _affine_grid,
  'Attention': _attention,
  'ai.onnx.preview::FlexAttention': _flexible_attention,
  'LinearAttention': _linear_attention,
  'RNN': _recurrent(recurrent.RNN),
  'GRU': _recurrent(recurrent.GRU),
  'LSTM': _recurrent(recurrent.LSTM),
  'Det': _determinant,
}
