"""The work of PyTorch's recurrent layers and cells."""

from __future__ import annotations

from dynconv_jax.macs import formulas, recurrent


def _recurrent(cell: recurrent.Cell):
  """Returns the formula of recurrent layers or of one step of their cell."""

  def formula(a) -> formulas.Work:
    if hasattr(a, 'w_ih'):
      inputs, group, bias = a.input, 2, a.b_ih is not None
      weights = [a.w_ih, a.w_hh]
    else:
      inputs = a.data if hasattr(a, 'data') else a.input
      weights, bias = a.params, a.has_biases
      group = len(weights) // (a.num_layers * (1 + a.bidirectional))
    return _recurrent_layers(cell, inputs, weights, group, bias)

  return formula


def _recurrent_layers(cell, inputs, weights, group, bias) -> formulas.Work:
  """Returns the work of layers with `group` weights per direction."""
  rows = inputs.numel() // max(inputs.shape[-1], 1)
  return sum(
    (
      recurrent.layer(
        cell,
        rows,
        inputs=weights[start].shape[1],
        hidden=weights[start].shape[0] // cell.gates,
        # If the number of weights is odd, the last is an LSTM's projection.
        projection=weights[start + 1].shape[1] if group % 2 else None,
        bias=bias,
      )
      for start in range(0, len(weights), group)
    ),
    formulas.elementwise(0),
  )


# Indexed by the mode of oneDNN and cuDNN.
_CELLS = (recurrent.RNN, recurrent.RNN, recurrent.LSTM, recurrent.GRU)


def onednn_recurrent(a) -> formulas.Work:
  """The work of one layer in one direction."""
  weights = [a.weight0, a.weight1]
  return _recurrent_layers(_CELLS[a.mode], a.input, weights, 2, a.has_biases)


def cudnn_recurrent(a) -> formulas.Work:
  group = a.weight_stride0
  bias = group >= 4
  return _recurrent_layers(_CELLS[a.mode], a.input, a.weight, group, bias)


def _cell_units(cell: recurrent.Cell):
  """Returns the formula of a step whose products are separate operations."""

  def formula(a) -> formulas.Work:
    return formulas.elementwise(cell.operations * a.output.numel())

  return formula


# {operator: formula}
FORMULAS = {
  **dict.fromkeys(('lstm', 'lstm_cell'), _recurrent(recurrent.LSTM)),
  **dict.fromkeys(('gru', 'gru_cell'), _recurrent(recurrent.GRU)),
  **dict.fromkeys(
    ('rnn_tanh', 'rnn_tanh_cell', 'rnn_relu', 'rnn_relu_cell'),
    _recurrent(recurrent.RNN),
  ),
  'mkldnn_rnn_layer': onednn_recurrent,
  '_cudnn_rnn': cudnn_recurrent,
  '_thnn_fused_lstm_cell': _cell_units(recurrent.LSTM),
  '_thnn_fused_gru_cell': _cell_units(recurrent.GRU),
}
