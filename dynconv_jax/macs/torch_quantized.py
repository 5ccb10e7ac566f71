"""The work of PyTorch's quantized operations, whose weights are packed."""

from __future__ import annotations

import types

import torch

from dynconv_jax.macs import formulas, recurrent, torch_formulas


def _unpacked(a) -> tuple[torch.Tensor, torch.Tensor | None]:
  """Returns the weight and bias in the packed argument."""
  return _packed(a).unpack()


def _packed(a) -> torch.ScriptObject:
  values = vars(a).values()
  return next(x for x in values if isinstance(x, torch.ScriptObject))


def _linear(a) -> formulas.Work:
  weight, bias = _unpacked(a)
  inputs = next(x for x in vars(a).values() if isinstance(x, torch.Tensor))
  features, inner = weight.shape
  rows = inputs.numel() // inner
  return formulas.matmul(
    rows, inner, features, bias=bias is not None, positions=rows
  )


def _convolution(a) -> formulas.Work:
  packed = _packed(a)
  weight, bias = packed.unpack()
  inputs = a.qx
  # Operations in one dimension are packed as two-dimensional.
  shape = [*inputs.shape[:-1], 1, inputs.shape[-1]]
  if inputs.dim() == weight.dim():
    shape = inputs.shape
  return torch_formulas.convolution(
    types.SimpleNamespace(
      input=torch.empty(shape, device='meta'),
      weight=weight,
      bias=bias,
      stride=packed.stride(),
      padding=packed.padding(),
      output_padding=packed.output_padding(),
      dilation=packed.dilation(),
      groups=packed.groups(),
      transposed=packed.transpose(),
    )
  )


def _plain_convolution(a) -> formulas.Work:
  """Convolutions whose weights have a special layout but are not packed."""
  a.input = a.qx if hasattr(a, 'qx') else a.X
  a.weight = a.qw if hasattr(a, 'qw') else a.W
  if hasattr(a, 'B'):
    a.bias = a.B
  return torch_formulas.convolution(a)


def _plain_linear(a) -> formulas.Work:
  inputs = a.qx if hasattr(a, 'qx') else getattr(a, 'X', getattr(a, 'x', None))
  bias = a.B if hasattr(a, 'B') else a.bias
  inner, outputs = inputs.shape[-1], a.output.numel()
  rows = inputs.numel() // inner
  return formulas.matmul(
    rows, inner, outputs // rows, bias=bias is not None, positions=rows
  )


def _recurrent(cell: recurrent.Cell):
  """Returns the formula of layers whose packed weights have no shape."""

  def formula(a) -> formulas.Work:
    inputs = a.data if hasattr(a, 'data') else a.input
    directions = 1 + a.bidirectional
    hidden = a.output.shape[-1] // directions
    rows = inputs.numel() // inputs.shape[-1]
    return sum(
      (
        recurrent.layer(
          cell,
          rows,
          inputs=hidden * directions if layer else inputs.shape[-1],
          hidden=hidden,
          bias=a.has_biases,
        )
        * directions
        for layer in range(a.num_layers)
      ),
      formulas.elementwise(0),
    )

  return formula


def _cell(cell: recurrent.Cell):
  """Returns the formula of one step of a cell."""

  def formula(a) -> formulas.Work:
    *_, inputs = a.input.shape
    hidden = a.output.shape[-1]
    rows = a.input.numel() // inputs
    return recurrent.layer(cell, rows, inputs=inputs, hidden=hidden)

  return formula


FORMULAS = {
  **{
    f'quantized::{name}': _linear
    for name in (
      'linear',
      'linear_relu',
      'linear_tanh',
      'linear_leaky_relu',
      'linear_dynamic',
      'linear_relu_dynamic',
      'linear_dynamic_fp16',
      'linear_relu_dynamic_fp16',
      'linear_with_input_q_dq_qweight_dq_output_fp32',
      'linear_with_input_q_dq_qweight_dq_relu_output_fp32',
    )
  },
  **{
    f'quantized::{name}{suffix}': _convolution
    for name in (
      'conv1d',
      'conv2d',
      'conv3d',
      'conv_transpose1d',
      'conv_transpose2d',
      'conv_transpose3d',
    )
    for suffix in ('', '_relu', '_add', '_add_relu', '_dynamic')
  },
  'quantized::matmul': torch_formulas.matmul('qa'),
  **{
    name: _plain_convolution
    for name in (
      'onednn::qconv_pointwise',
      'onednn::qconv1d_pointwise',
      'onednn::qconv2d_pointwise',
      'onednn::qconv3d_pointwise',
      'mkldnn::_convolution_pointwise',
    )
  },
  **{
    name: _plain_linear
    for name in (
      'onednn::qlinear_pointwise',
      'onednn::linear_dynamic_fp16',
      'onednn::linear_relu_dynamic_fp16',
      'mkldnn::_linear_pointwise',
    )
  },
  'quantized_lstm': _recurrent(recurrent.LSTM),
  'quantized_gru': _recurrent(recurrent.GRU),
  'quantized::quantized_lstm_cell_dynamic': _cell(recurrent.LSTM),
  'quantized::quantized_gru_cell_dynamic': _cell(recurrent.GRU),
  'quantized::quantized_rnn_tanh_cell_dynamic': _cell(recurrent.RNN),
  'quantized::quantized_rnn_relu_cell_dynamic': _cell(recurrent.RNN),
}
