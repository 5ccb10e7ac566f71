"""ONNX Runtime's operators on blocks of channels, as standard ONNX operators.

ONNX Runtime's optimizer generates these operators of the domain
com.microsoft.nchwc for CPUs. Tensors have the shape [N, C, ...], with C a
multiple of the machine's block size of 8 or 16 channels.
"""

from __future__ import annotations

import numpy as np
import onnx

from dynconv_jax.macs import onnx_expansion, onnx_values
from dynconv_jax.macs.onnx_expansion import Expansion, Writer

DOMAIN = 'com.microsoft.nchwc'

_BLOCKS = (
  f'Convolutions of {DOMAIN} count with channels padded to whole blocks, as'
  ' ONNX Runtime runs them and stores their weights. For the original channels,'
  ' count the model before this optimization (ORT_ENABLE_EXTENDED or below).'
)


def note(node: onnx.NodeProto) -> str:
  """Returns a note on how a node is counted, '' if there is none."""
  return _BLOCKS if (node.domain, node.op_type) == (DOMAIN, 'Conv') else ''


def _convolution(body: Expansion) -> None:
  keys = ('auto_pad', 'dilations', 'group', 'kernel_shape', 'pads', 'strides')
  params = {k: body.params[k] for k in keys if k in body.params}
  batch, _, *sizes = body.shape(0)
  # Reordered inputs and weights have whole blocks of channels.
  channels = body.shape(1)[1] * params.get('group', 1)
  image = body.value((batch, channels, *sizes))
  done = body.add('Conv', image, *(x for x in body.inputs[1:3] if x), **params)
  if body.has(3):
    done = body.add('Add', done, done)
  body.end(body.activated(done))


def _reorder_input(body: Expansion) -> None:
  name = body.inputs[0]
  if body.params.get('channels_last', 0):
    order = onnx_expansion.channels_first(len(body.shape(0)))
    name = body.add('Transpose', name, perm=order)
  body.end(name)


def _reorder_output(body: Expansion) -> None:
  batch, _, *sizes = body.shape(0)
  channels = body.params['channels']
  shape = (batch, channels, *sizes)
  if body.params.get('channels_last', 0):
    shape = (batch, *sizes, channels)
  body.end(body.value(shape))


def _upsample(body: Expansion) -> None:
  scales = f'{body.outputs[0]}/scales'
  numbers = np.asarray(body.params['scales'], np.float32)
  body.values[scales] = onnx_values.array(numbers)
  mode = body.params.get('mode', b'nearest')
  body.end(body.add('Resize', body.inputs[0], '', scales, mode=mode))


def _standard(operator: str) -> Writer:
  return lambda body: body.end(
    body.add(operator, body.inputs[0], **body.params)
  )


OPERATORS = {
  'Conv': _convolution,
  'ReorderInput': _reorder_input,
  'ReorderOutput': _reorder_output,
  'Upsample': _upsample,
  'MaxPool': _standard('MaxPool'),
  'AveragePool': _standard('AveragePool'),
  'GlobalMaxPool': _standard('GlobalMaxPool'),
  'GlobalAveragePool': _standard('GlobalAveragePool'),
}
