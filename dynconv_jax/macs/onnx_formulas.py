"""The work of all ONNX operators except products, by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dynconv_jax.macs import formulas
from dynconv_jax.macs.onnx_products import is_given


def _norm(operation) -> formulas.Work:
  shape, elements = operation.inputs[0].shape, operation.outputs[0].size
  batch, features = (*shape, 1, 1)[:2]
  name, params, given = operation.name, operation.params, False
  if name == 'BatchNormalization':
    given = not _is_training(operation)
    groups = features
    if not params.get('spatial', 1):
      groups = math.prod(shape[1:])
  elif name == 'InstanceNormalization':
    groups = batch * features
  elif name == 'GroupNormalization':
    groups = batch * params['num_groups']
  elif name == 'MeanVarianceNormalization':
    if operation.version >= 9:
      axes = params.get('axes', (0, 2, 3))
    else:
      axes = (1, 2, 3) if params.get('across_channels', 0) else (2, 3)
    axes = {axis % len(shape) for axis in axes}
    groups = math.prod(n for axis, n in enumerate(shape) if axis not in axes)
  else:
    groups = math.prod(shape[: params.get('axis', -1)])
  done = formulas.norm(
    elements,
    groups,
    affine=name != 'MeanVarianceNormalization',
    statistics_groups=0 if given else groups,
  )
  if name == 'LayerNormalization':
    # ptflops ignores the scale and bias of PyTorch's layer norm.
    done = dataclasses.replace(done, ptflops=elements)
  return done


def _is_training(operation) -> bool:
  """Returns whether a batch norm computes its own statistics."""
  if operation.version >= 14:
    return bool(operation.params.get('training_mode', 0))
  if operation.version >= 7:
    return any(output is not None for output in operation.outputs[1:])
  return not operation.params.get('is_test', 0)


def _rms_norm(operation) -> formulas.Work:
  """Squares, their mean and its root; products with the root and a scale."""
  shape, elements = operation.inputs[0].shape, operation.outputs[0].size
  groups = math.prod(shape[: operation.params.get('axis', -1)])
  return formulas.Work(
    'norm', operations=4 * elements + 2 * groups, ptflops=elements
  )


def _lp_norm(operation) -> formulas.Work:
  """Powers, their sums, a root of each, and a quotient."""
  return formulas.Work('norm', operations=3 * operation.outputs[0].size)


def _local_response_norm(operation) -> formulas.Work:
  """A square, the sum of `size` of them, scale, bias, power and quotient."""
  elements = operation.outputs[0].size
  return formulas.Work(
    'norm', operations=(operation.params['size'] + 4) * elements
  )


def _pool(operation) -> formulas.Work:
  name, outputs = operation.name, operation.outputs[0].size
  inputs = operation.inputs[0].size
  if name.startswith('Global'):
    window = math.prod(operation.inputs[0].shape[2:])
  else:
    window = math.prod(operation.params['kernel_shape'])
  mean = name.endswith('AveragePool')
  done = formulas.pool(inputs, outputs, window, mean=mean)
  if name.endswith('LpPool'):  # The powers and a root of their sum.
    done += formulas.elementwise(outputs * (window + 1))
  return dataclasses.replace(done, ptflops=2 * inputs)


def rows_of_softmax(operation: Any) -> int:
  """Returns the number of rows that a Softmax, LogSoftmax or Hardmax has."""
  shape = operation.inputs[0].shape
  if operation.version >= 13:
    axis = operation.params.get('axis', -1)
    return operation.inputs[0].size // max(shape[axis], 1) if shape else 1
  # Before opset 13, all dimensions from the axis on were one row.
  return math.prod(shape[: operation.params.get('axis', 1)])


def _softmax(operation) -> formulas.Work:
  return formulas.softmax(operation.outputs[0].size, rows_of_softmax(operation))


def _softmax_loss(operation) -> formulas.Work:
  shape, elements = operation.inputs[0].shape, operation.inputs[0].size
  rows = elements // max(shape[1], 1)
  done = formulas.softmax(elements, rows)
  return done + formulas.reduction(rows, operation.outputs[0].size)


def _resize(operation) -> formulas.Work:
  mode = operation.params.get('mode', b'nearest')
  source, outputs = operation.inputs[0].shape, operation.outputs[0]
  resized = sum(a != b for a, b in zip(source, outputs.shape, strict=True))
  taps = {b'linear': 2, b'cubic': 4}.get(mode, 1) ** resized
  done = formulas.elementwise(outputs.size * (2 * taps - 1) * (taps > 1))
  return dataclasses.replace(done, ptflops=2 * outputs.size)


def _grid_sample(operation) -> formulas.Work:
  """Counts the weighted sum of the neighboring pixels."""
  mode = operation.params.get('mode', b'linear')
  taps = {b'nearest': 1, b'cubic': 4, b'bicubic': 4}.get(mode, 2)
  dimensions = len(operation.inputs[0].shape) - 2
  return formulas.elementwise(
    operation.outputs[0].size * (2 * taps**dimensions - 1)
  )


def _roi_align(operation) -> formulas.Work | None:
  """The mean or maximum of interpolated samples, four pixels each."""
  samples = operation.params.get('sampling_ratio', 0) ** 2
  if not samples:  # The number of samples depends on the box.
    return None
  return formulas.elementwise(operation.outputs[0].size * 8 * samples)


def _reduction(operation) -> formulas.Work:
  inputs, outputs = operation.inputs[0].size, operation.outputs[0].size
  done = formulas.reduction(inputs, outputs)
  each_input, each_output = _STEPS_OF_REDUCTIONS.get(operation.name, (0, 0))
  return done + formulas.elementwise(
    each_input * inputs + each_output * outputs
  )


def _cumulative(operation) -> formulas.Work:
  """Sums or products along an axis: one step per element but a row's first."""
  elements, shape = operation.inputs[0].size, operation.inputs[0].shape
  axis = operation.inputs[1].value
  length = shape[int(axis.item())] if axis is not None else elements
  return formulas.reduction(elements, elements // max(length, 1))


def _hardmax(operation) -> formulas.Work:
  return formulas.reduction(
    operation.inputs[0].size, rows_of_softmax(operation)
  )


def _top_k(operation) -> formulas.Work:
  axis = operation.params.get('axis', -1)
  values = operation.inputs[0]
  return formulas.sort(values.size, values.shape[axis])


def _unique(operation) -> formulas.Work:
  size = operation.inputs[0].size
  return formulas.sort(size, size)


def _combine_images(operation) -> formulas.Work:
  return formulas.reduction(operation.inputs[0].size, operation.outputs[0].size)


def _of_several(operation) -> formulas.Work:
  """The sum, mean, maximum or minimum of several tensors."""
  steps = len(operation.inputs) - 1 + (operation.name == 'Mean')
  return formulas.elementwise(operation.outputs[0].size * steps)


def _fourier(operation) -> formulas.Work:
  signal, params = operation.inputs[0], operation.params
  axis = params.get('axis', 1)
  if operation.version >= 20:
    axis = -2
    if is_given(operation, 2) and operation.inputs[2].value is not None:
      axis = int(operation.inputs[2].value.item())
  length = signal.shape[axis]
  if is_given(operation, 1) and operation.inputs[1].value is not None:
    length = int(operation.inputs[1].value.item())
  # The last dimension is 1 for real and 2 for complex numbers.
  batch = math.prod(signal.shape[:-1]) // max(signal.shape[axis], 1)
  is_real = signal.shape[-1] == 1 or operation.outputs[0].shape[-1] == 1
  return formulas.fft(batch * length // (2 if is_real else 1), [length])


def _short_time_fourier(operation) -> formulas.Work | None:
  batch, frames = operation.outputs[0].shape[:2]
  signal = operation.inputs[0].shape
  parts = signal[2] if len(signal) > 2 else 1
  windowed = is_given(operation, 2)
  if windowed:
    (length,) = operation.inputs[2].shape
  elif is_given(operation, 3) and operation.inputs[3].value is not None:
    length = int(operation.inputs[3].value.item())
  else:
    return None
  elements = batch * frames * length
  done = formulas.fft(elements * parts // 2, [length])
  return done + formulas.elementwise(elements * parts * windowed)


def _rotary(operation) -> formulas.Work:
  """Two products and a sum per rotated element."""
  x, params = operation.inputs[0], operation.params
  head = x.shape[-1]
  if len(x.shape) == 3:
    head //= params['num_heads']
  rotated = params.get('rotary_embedding_dim', 0) or head
  return formulas.elementwise(3 * x.size * rotated // max(head, 1))


# Operators by their kind of work.
NORMS = {
  'BatchNormalization': _norm,
  'InstanceNormalization': _norm,
  'GroupNormalization': _norm,
  'LayerNormalization': _norm,
  'MeanVarianceNormalization': _norm,
  'RMSNormalization': _rms_norm,
  'LpNormalization': _lp_norm,
  'LRN': _local_response_norm,
}

POOLS = dict.fromkeys(
  (
    'AveragePool',
    'MaxPool',
    'LpPool',
    'GlobalAveragePool',
    'GlobalMaxPool',
    'GlobalLpPool',
  ),
  _pool,
)

# Additional steps per input and per output, besides the reduction itself.
_STEPS_OF_REDUCTIONS = {
  'ReduceMean': (0, 1),
  'ReduceL1': (1, 0),
  'ReduceL2': (1, 1),
  'ReduceSumSquare': (1, 0),
  'ReduceLogSum': (0, 1),
  'ReduceLogSumExp': (1, 1),
}

OTHERS = {
  'Softmax': _softmax,
  'LogSoftmax': _softmax,
  'SoftmaxCrossEntropyLoss': _softmax_loss,
  'NegativeLogLikelihoodLoss': _combine_images,
  'Resize': _resize,
  'Upsample': _resize,
  'GridSample': _grid_sample,
  'RoiAlign': _roi_align,
  'Hardmax': _hardmax,
  'TopK': _top_k,
  'Unique': _unique,
  'Col2Im': _combine_images,
  'CumSum': _cumulative,
  'CumProd': _cumulative,
  'DFT': _fourier,
  'STFT': _short_time_fourier,
  'RotaryEmbedding': _rotary,
  **dict.fromkeys(('Sum', 'Min', 'Max', 'Mean'), _of_several),
  **dict.fromkeys(
    (
      'ArgMax',
      'ArgMin',
      'ReduceMax',
      'ReduceMin',
      'ReduceProd',
      'ReduceSum',
      *_STEPS_OF_REDUCTIONS,
    ),
    _reduction,
  ),
}
