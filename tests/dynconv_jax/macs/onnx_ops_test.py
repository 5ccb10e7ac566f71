"""Tests of what the ONNX front end makes of operators."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

onnx = pytest.importorskip('onnx', reason='onnx is not installed')

from onnx import helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_models import (  # noqa: E402
  conv,
  model_of,
  ones,
  scalar,
  sum_of_ones,
)

from dynconv_jax.macs.onnx import count_macs  # noqa: E402

CONVOLUTIONS = (
  ('plain', (2, 4, 7, 9), (6, 4, 3, 3), {}),
  ('one_sided', (1, 4, 7, 9), (6, 4, 3, 3), {'pads': [0, 2, 1, 0]}),
  ('strided', (2, 4, 8, 9), (6, 4, 3, 3), {'strides': [2, 2], 'pads': [1] * 4}),
  ('dilated', (1, 4, 8, 9), (6, 4, 3, 3), {'dilations': [3, 2]}),
  ('grouped', (2, 4, 5, 6), (6, 2, 3, 3), {'group': 2, 'pads': [1] * 4}),
  ('depthwise', (1, 4, 5, 6), (4, 1, 3, 3), {'group': 4, 'pads': [1] * 4}),
  ('one_dimension', (2, 4, 9), (6, 4, 4), {'pads': [2, 1]}),
  ('three_dimensions', (1, 4, 3, 4, 5), (6, 4, 2, 2, 2), {'pads': [1] * 6}),
  (
    'same_upper',
    (1, 4, 8, 9),
    (6, 4, 4, 3),
    {'auto_pad': 'SAME_UPPER', 'strides': [2, 2]},
  ),
  ('same_lower', (1, 4, 8, 9), (6, 4, 4, 2), {'auto_pad': 'SAME_LOWER'}),
  ('valid', (1, 4, 8, 9), (6, 4, 3, 3), {'auto_pad': 'VALID'}),
)

TRANSPOSED = (
  ('stride', (1, 4, 5, 6), (4, 6, 3, 3), {'strides': [2, 3]}),
  (
    'pads',
    (1, 4, 5, 6),
    (4, 6, 3, 3),
    {'strides': [2, 2], 'pads': [1] * 4, 'output_padding': [1, 1]},
  ),
  ('spread', (1, 4, 5, 6), (4, 6, 2, 2), {'strides': [3, 3]}),
)


class ConvolutionTest(parameterized.TestCase):
  @parameterized.named_parameters(*CONVOLUTIONS)
  def test_inside_macs_are_the_products_of_ones(
    self, shape, weight, attributes
  ):
    model = conv('Conv', shape, weight, **attributes)
    report = count_macs(model, padding=False)
    self.assertEqual(report.total, sum_of_ones(model, x=shape))

  @parameterized.named_parameters(*CONVOLUTIONS)
  def test_padding_counts(self, shape, weight, attributes):
    model = conv('Conv', shape, weight, **attributes)
    report = count_macs(model)
    (output,) = ReferenceEvaluator(model).run(
      None, {'x': np.ones(shape, np.float32)}
    )
    self.assertEqual(report.total, output.size * np.prod(weight[1:]))
    layer = report.by_layer['layer']
    self.assertEqual(layer.output_shape, output.shape)
    self.assertEqual(layer.parameters, np.prod(weight))

  @parameterized.named_parameters(*TRANSPOSED)
  def test_transposed(self, shape, weight, attributes):
    model = conv('ConvTranspose', shape, weight, **attributes)
    inside = count_macs(model, padding=False).total
    self.assertEqual(inside, sum_of_ones(model, x=shape))
    self.assertEqual(
      count_macs(model).total, np.prod(shape) * np.prod(weight[1:])
    )

  @parameterized.parameters(
    ({}, (6, 3, 5, 5), 2),
    ({'output_shape': [9, 12]}, (4, 6, 3, 3), 1),
    ({'output_shape': [9, 12], 'auto_pad': 'SAME_UPPER'}, (4, 6, 3, 3), 1),
    ({'auto_pad': 'SAME_LOWER'}, (4, 6, 3, 3), 1),
  )
  def test_transposed_as_the_shape_that_onnx_infers(
    self, attributes, weight, group
  ):
    shape = (1, weight[0], 5, 6)
    model = conv(
      'ConvTranspose', shape, weight, strides=[2, 2], group=group, **attributes
    )
    layer = count_macs(model).by_layer['layer']
    self.assertEqual(layer.positions, np.prod(layer.output_shape[2:]))
    self.assertEqual(layer.macs, np.prod(shape) * np.prod(weight[1:]))

  def test_bias_is_one_an_output(self):
    node = helper.make_node('Conv', ['x', 'w', 'b'], ['y'])
    model = model_of(
      [node], {'x': (2, 4, 5, 5)}, [ones('w', 6, 4, 3, 3), ones('b', 6)]
    )
    self.assertEqual(
      count_macs(model, convention='conv').total, 2 * 6 * 9 * (4 * 9 + 1)
    )
    self.assertEqual(
      count_macs(model, convention='conv+linear').total, 2 * 6 * 9 * 4 * 9
    )


class MatmulTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('matrices', 'MatMul', {'a': (5, 4), 'b': (4, 3)}, 60, {}),
    ('batched', 'MatMul', {'a': (2, 1, 5, 4), 'b': (7, 4, 3)}, 14 * 60, {}),
    ('vector', 'MatMul', {'a': (4,), 'b': (4, 3)}, 12, {}),
    (
      'gemm',
      'Gemm',
      {'a': (4, 5), 'b': (3, 4)},
      60,
      {'transA': 1, 'transB': 1},
    ),
    (
      'einsum',
      'Einsum',
      {'a': (2, 5, 4), 'b': (2, 3, 4)},
      120,
      {'equation': 'bij,bkj->ik'},
    ),
    (
      'ellipsis',
      'Einsum',
      {'a': (7, 2, 5, 4), 'b': (1, 2, 3, 4)},
      7 * 120,
      {'equation': '...ij, ...kj -> ...ik'},
    ),
  )
  def test_products(self, operator, inputs, macs, attributes):
    node = helper.make_node(operator, list(inputs), ['y'], **attributes)
    model = model_of([node], inputs)
    self.assertEqual(count_macs(model, convention='conv+linear').total, macs)
    self.assertEqual(sum_of_ones(model, **inputs), macs)
    self.assertEqual(count_macs(model, convention='conv').total, 0)

  def test_attention(self):
    node = helper.make_node(
      'Attention', ['q', 'k', 'v'], ['y'], q_num_heads=6, kv_num_heads=3
    )
    shapes = {'q': (2, 5, 6 * 8), 'k': (2, 7, 3 * 8), 'v': (2, 7, 3 * 4)}
    report = count_macs(
      model_of([node], shapes, opset=23), convention='conv+linear'
    )
    self.assertEqual(report.total, 2 * 6 * 5 * 7 * (8 + 4))

  @parameterized.parameters(('RNN', 1), ('GRU', 3), ('LSTM', 4))
  def test_recurrent_layers(self, operator, gates):
    node = helper.make_node(
      operator, ['x', 'w', 'r'], ['y'], hidden_size=3, direction='bidirectional'
    )
    model = model_of(
      [node],
      {'x': (7, 2, 5)},
      [ones('w', 2, gates * 3, 5), ones('r', 2, gates * 3, 3)],
    )
    report = count_macs(model, convention='conv+linear')
    self.assertEqual(report.total, 7 * 2 * 2 * gates * 3 * (5 + 3))


class ElementwiseTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('relu', 'Relu', {}, 288, 2 * 288),
    ('sigmoid', 'Sigmoid', {}, 288, 0),
    (
      'max_pool',
      'MaxPool',
      {'kernel_shape': [3, 3], 'strides': [3, 3]},
      32 * 8,
      2 * 288,
    ),
    ('mean', 'GlobalAveragePool', {}, 288, 2 * 288),
    ('reduce', 'ReduceMean', {}, 288, 0),
    ('softmax', 'Softmax', {}, 5 * 288 - 2 * 48, 288),
    ('move', 'Transpose', {}, 0, 0),
  )
  def test_one_input(self, operator, attributes, flops, ptflops):
    node = helper.make_node(operator, ['x'], ['y'], **attributes)
    model = model_of([node], {'x': (2, 4, 6, 6)})
    self.assertEqual(count_macs(model, convention='flops').total, flops)
    if operator != 'Softmax':
      self.assertEqual(count_macs(model, convention='ptflops').total, ptflops)

  def test_batch_norm(self):
    node = helper.make_node(
      'BatchNormalization', ['x', 's', 'b', 'm', 'v'], ['y']
    )
    weights = [ones(name, 4) for name in 'sbmv']
    model = model_of([node], {'x': (2, 4, 6, 6)}, weights)
    report = count_macs(model, convention='flops')
    self.assertEqual(report.total, 3 * (288 + 4))
    self.assertEqual(report.parameters, 8)
    self.assertEqual(count_macs(model, convention='ptflops').total, 2 * 288)

  def test_what_depends_on_constants_alone_costs_nothing(self):
    nodes = [
      helper.make_node('Transpose', ['w'], ['wt']),
      helper.make_node('Mul', ['wt', 'wt'], ['square']),
      helper.make_node('MatMul', ['x', 'square'], ['z']),
      helper.make_node('Shape', ['z'], ['shape']),
      helper.make_node('Mul', ['shape', 'one'], ['same']),
      helper.make_node('Reshape', ['z', 'same'], ['y']),
    ]
    model = model_of(
      nodes, {'x': (2, 4)}, [ones('w', 3, 4), scalar('one', [1])]
    )
    report = count_macs(model, convention='flops')
    self.assertEqual(report.total, 2 * 2 * 4 * 3)
    self.assertEqual(report.parameters, 12)


if __name__ == '__main__':
  absltest.main()
