"""Tests of files written by ONNX Runtime's optimizer and quantizer."""

import functools
import logging
import pathlib
import warnings

import numpy as np
import pytest
from absl.testing import absltest, parameterized

onnx = pytest.importorskip('onnx', reason='onnx is not installed')
torch = pytest.importorskip('torch', reason='PyTorch is not installed')
runtime = pytest.importorskip('onnxruntime', reason='not installed')

from onnx import helper  # noqa: E402
from onnx_models import exported, ones, value  # noqa: E402

from dynconv_jax.macs import onnx_nchwc  # noqa: E402
from dynconv_jax.macs.onnx import count_macs  # noqa: E402

LEVELS = ('BASIC', 'EXTENDED', 'LAYOUT', 'ALL')


class Network(torch.nn.Module):
  """Convolutions of whole blocks of channels, a norm, attention, a head."""

  def __init__(self):
    super().__init__()
    self.stem = torch.nn.Conv2d(3, 32, 3, 2, 1)
    self.norm = torch.nn.BatchNorm2d(32)
    self.depthwise = torch.nn.Conv2d(32, 32, 3, 1, 1, groups=32)
    self.project = torch.nn.Conv2d(32, 64, 1)
    self.block = torch.nn.TransformerEncoderLayer(
      64, 4, 32, 0.0, 'gelu', batch_first=True, norm_first=True
    )
    self.up = torch.nn.ConvTranspose2d(64, 16, 2, 2)
    self.head = torch.nn.Linear(64, 10)

  def forward(self, x):
    x = self.norm(self.stem(x)).relu()
    x = torch.nn.functional.hardswish(x + self.depthwise(x))
    x = torch.max_pool2d(self.project(x).sigmoid(), 2)
    tokens = self.block(x.flatten(2).transpose(1, 2))
    return self.head(tokens.mean(1)), self.up(x).mean((2, 3))


@functools.cache
def network() -> onnx.ModelProto:
  return exported(Network(), torch.zeros(1, 3, 16, 16))


def optimized(path: str, level: str) -> str:
  """Returns the file that ONNX Runtime runs instead of another."""
  options = runtime.SessionOptions()
  options.log_severity_level = 3
  options.optimized_model_filepath = f'{path}.optimized.onnx'
  options.graph_optimization_level = getattr(
    runtime.GraphOptimizationLevel, f'ORT_ENABLE_{level}'
  )
  runtime.InferenceSession(path, options)
  return options.optimized_model_filepath


def operators(path: str) -> set[str]:
  return {
    f'{node.domain}::{node.op_type}' for node in onnx.load(path).graph.node
  }


class Images:
  """Calibration data for a quantizer."""

  def __init__(self, name):
    random = np.random.default_rng(0)
    self._images = [
      {name: random.random((1, 3, 16, 16), np.float32)} for _ in range(2)
    ]

  def get_next(self):
    return self._images.pop() if self._images else None


def quantized(path: str, kind: str, **options) -> str:
  """Returns a file with integers instead of real numbers."""
  quantization = pytest.importorskip('onnxruntime.quantization')
  output = f'{path}.{kind}.onnx'
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    try:
      if kind == 'dynamic':
        quantization.quantize_dynamic(path, output)
      else:
        images = Images(network().graph.input[0].name)
        quantization.quantize_static(
          path,
          output,
          images,
          quant_format=quantization.QuantFormat[kind],
          **options,
        )
    finally:
      logging.disable(logging.NOTSET)
  return output


class RuntimeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = str(pathlib.Path(self.create_tempdir().full_path) / 'n.onnx')
    onnx.save(network(), self.path)

  @parameterized.parameters(*LEVELS)
  def test_optimized_files_have_the_same_count(self, level):
    path = optimized(self.path, level)
    report, expected = count_macs(path), count_macs(network())
    self.assertEqual(report.total, expected.total)
    self.assertEmpty(report.uncounted)
    kinds = {
      'BASIC': '::Conv',
      'EXTENDED': 'com.microsoft::FusedMatMul',
    }
    blocks = 'com.microsoft.nchwc::Conv'
    self.assertIn(kinds.get(level, blocks), operators(path))
    # A note mentions the blocks of channels.
    self.assertLen(report.notes, int(blocks in operators(path)))

  @parameterized.product(
    kind=('QDQ', 'QOperator', 'dynamic'), level=('', 'EXTENDED', 'ALL')
  )
  def test_quantized_files_have_the_same_count(self, kind, level):
    path = quantized(self.path, kind)
    path = optimized(path, level) if level else path
    report = count_macs(path)
    self.assertEqual(report.total, count_macs(network()).total)
    self.assertEmpty(report.uncounted)

  def test_quantized_by_channel(self):
    path = quantized(self.path, 'QDQ', per_channel=True)
    for file in (path, optimized(path, 'EXTENDED')):
      self.assertEqual(count_macs(file).total, count_macs(network()).total)


class Recurrent(torch.nn.Module):
  """A recurrent network whose three outputs are all multiplied."""

  def __init__(self):
    super().__init__()
    self.lstm = torch.nn.LSTM(4, 8, 2, bidirectional=True, batch_first=True)
    self.head = torch.nn.Linear(16, 3)
    self.hidden, self.cell = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)

  def forward(self, x):
    y, (hidden, cell) = self.lstm(x)
    return self.head(y[:, -1]) + self.hidden(hidden[-1]) + self.cell(cell[-1])


class RecurrentTest(absltest.TestCase):
  def test_quantized(self):
    model = exported(Recurrent(), torch.zeros(2, 7, 4))
    path = str(pathlib.Path(self.create_tempdir().full_path) / 'n.onnx')
    onnx.save(model, path)
    quantized_path = quantized(path, 'dynamic')
    self.assertIn(
      'com.microsoft::DynamicQuantizeLSTM', operators(quantized_path)
    )
    report = count_macs(quantized_path)
    first, second = 7 * 2 * 2 * 32 * (4 + 8), 7 * 2 * 2 * 32 * (16 + 8)
    heads = 2 * (16 + 8 + 8) * 3
    self.assertEqual(report.total, first + second + heads)
    self.assertEmpty(report.uncounted)
    expected = count_macs(model).by_layer['lstm']
    self.assertEqual(report.by_layer['lstm'], expected)


class BlocksTest(parameterized.TestCase):
  def model(self, *nodes, outputs=('y',)):
    for node in nodes:
      node.domain = node.domain or onnx_nchwc.DOMAIN
    return helper.make_model(
      helper.make_graph(
        [*nodes, helper.make_node('Neg', [outputs[0]], ['z'], 'after')],
        'blocks',
        [value('x', (1, 20, 6, 6))],
        [value('z', None)],
        [ones('w', 32, 32, 3, 3), ones('b', 32)],
      ),
      opset_imports=[
        helper.make_opsetid('', 17),
        helper.make_opsetid(onnx_nchwc.DOMAIN, 1),
      ],
    )

  @parameterized.parameters(0, 1)
  def test_convolutions_count_whole_blocks(self, channels_last):
    convolution = helper.make_node(
      'Conv', ['r', 'w', 'b', 'r'], ['c'], 'conv', pads=[1] * 4
    )
    report = count_macs(
      self.model(
        helper.make_node('ReorderInput', ['x'], ['r']),
        convolution,
        helper.make_node(
          'ReorderOutput',
          ['c'],
          ['y'],
          channels=20,
          channels_last=channels_last,
        ),
      ),
      convention='flops',
    )
    # Each output has a bias, and an addition to it.
    outputs = 32 * 36
    macs = outputs * 9 * 32
    self.assertEqual(report.by_layer['conv'].macs, 2 * macs + 2 * outputs)
    shape = (1, 6, 6, 20) if channels_last else (1, 20, 6, 6)
    self.assertEqual(report.by_layer['after'].output_shape, shape)
    self.assertIn('padded to whole blocks', report.notes[0])

  def test_enlarged(self):
    node = helper.make_node('Upsample', ['x'], ['y'], scales=[1, 1, 2, 3])
    report = count_macs(self.model(node), convention='flops')
    layer = report.by_layer['after']
    self.assertEqual(layer.output_shape, (1, 20, 12, 18))
    self.assertEmpty(report.notes)


if __name__ == '__main__':
  absltest.main()
