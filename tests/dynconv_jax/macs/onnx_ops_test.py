"""Tests of the ONNX front end's operators."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

onnx = pytest.importorskip('onnx', reason='onnx is not installed')

from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_models import (  # noqa: E402
  conv,
  model_of,
  one,
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
  ('stride_one', (1, 100, 1, 1), (100, 512, 4, 4), {}),
  ('stride_one_larger', (1, 4, 5, 6), (4, 6, 3, 3), {}),
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

  @parameterized.product(
    pads=([0] * 4, [1, 0, 1, 2]),
    strides=([1, 1], [2, 3]),
    dilations=([1, 1], [2, 1]),
    group=(1, 2),
  )
  def test_transposed_in_every_way(self, **attributes):
    attributes['output_padding'] = [s - 1 for s in attributes['strides']]
    runtime = pytest.importorskip('onnxruntime', reason='not installed')
    shape, weight = (2, 4, 5, 6), (4, 3, 3, 2)
    model = conv('ConvTranspose', shape, weight, **attributes)
    # ONNX's reference evaluator does not support groups.
    session = runtime.InferenceSession(model.SerializeToString())
    (output,) = session.run(None, {'x': np.ones(shape, np.float32)})
    inside = count_macs(model, padding=False).total
    self.assertEqual(inside, round(float(output.sum(dtype=np.float64))))
    counted = count_macs(model)
    self.assertEqual(counted.total, np.prod(shape) * np.prod(weight[1:]))
    self.assertEqual(counted.by_layer['layer'].output_shape, output.shape)
    self.assertEqual(
      counted.by_layer['layer'].positions, output.size // output.shape[1]
    )

  def test_deformable(self):
    model = one(
      'DeformConv',
      {'x': (2, 4, 7, 8), 'w': (6, 4, 3, 3), 'offset': (2, 18, 5, 6)},
      [ones('b', 6)],
    )
    self.assertEqual(count_macs(model).total, 2 * 6 * 30 * 4 * 9)
    self.assertEqual(
      count_macs(model, convention='conv').total, 2 * 6 * 30 * (4 * 9 + 1)
    )

  @parameterized.parameters(False, True)
  def test_causal(self, with_state):
    shapes = {'x': (2, 4, 7), 'w': (4, 1, 3), 'b': (4,)}
    if with_state:
      shapes['past'] = (2, 4, 2)
    try:
      onnx.defs.get_schema('CausalConvWithState')
    except onnx.defs.SchemaError:
      self.skipTest('this ONNX does not have it')
    model = one('CausalConvWithState', shapes, opset=27, outputs=('y', 'state'))
    self.assertEqual(count_macs(model).total, 2 * 4 * 7 * 3)
    # Without a state, the first two outputs read padding, 2 + 1 taps.
    inside = count_macs(model, padding=False).total
    self.assertEqual(inside, 2 * 4 * (7 * 3 - (0 if with_state else 3)))

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

  @parameterized.parameters(
    ('ij,kl->il', [(3, 4), (5, 6)], 18, 3 * 3 + 6 * 4),
    ('i,j->ij', [(4,), (5,)], 20, 0),
    ('i,j', [(4,), (5,)], 20, 0),
    ('ij,ij->ij', [(4, 5), (4, 5)], 20, 0),
    ('ij,jk,kl->il', [(3, 4), (4, 5), (5, 6)], 60 + 90, 0),
    ('a,b,ab->', [(3,), (4,), (3, 4)], 12 + 12, 0),
    ('i,i,i,i->i', [(5,)] * 4, 3 * 5, 0),
    ('...ij,...jk->...ik', [(7, 1, 3, 4), (1, 2, 4, 5)], 14 * 60, 0),
    ('ij->', [(4, 5)], 0, 19),
    ('ii->i', [(4, 4)], 0, 0),
  )
  def test_einsums(self, equation, shapes, macs, additions):
    inputs = {f'x{i}': shape for i, shape in enumerate(shapes)}
    model = one('Einsum', inputs, equation=equation)
    self.assertEqual(count_macs(model).total, macs)
    self.assertEqual(
      count_macs(model, convention='flops').total, 2 * macs + additions
    )

  def test_einsums_as_in_jax(self):
    jax = pytest.importorskip('jax', reason='JAX is not installed')
    from dynconv_jax.macs import count_macs as count_jax_macs

    for equation, shapes in (
      ('ij,kl->il', [(3, 4), (5, 6)]),
      ('i,j->ij', [(4,), (5,)]),
      ('bij,bjk->bik', [(2, 3, 4), (2, 4, 5)]),
      ('bhn,bhd->bhnd', [(2, 3, 4), (2, 3, 5)]),
    ):
      inputs = {f'x{i}': shape for i, shape in enumerate(shapes)}
      model = one('Einsum', inputs, equation=equation)
      by_jax = count_jax_macs(
        lambda *x, equation=equation: jax.numpy.einsum(equation, *x),
        *(jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes),
      )
      self.assertEqual(count_macs(model).total, by_jax.total, equation)

  def test_attention(self):
    node = helper.make_node(
      'Attention', ['q', 'k', 'v'], ['y'], q_num_heads=6, kv_num_heads=3
    )
    shapes = {'q': (2, 5, 6 * 8), 'k': (2, 7, 3 * 8), 'v': (2, 7, 3 * 4)}
    report = count_macs(
      model_of([node], shapes, opset=23), convention='conv+linear'
    )
    self.assertEqual(report.total, 2 * 6 * 5 * 7 * (8 + 4))

  def test_attention_to_earlier_positions(self):
    model = one(
      'Attention',
      {
        'q': (2, 6, 5, 8),
        'k': (2, 3, 7, 8),
        'v': (2, 3, 7, 4),
        'mask': (5, 16),
        'past_k': (2, 3, 9, 8),
        'past_v': (2, 3, 9, 4),
      },
      opset=23,
      outputs=('y', 'present_k', 'present_v'),
    )
    self.assertEqual(count_macs(model).total, 2 * 6 * 5 * (7 + 9) * (8 + 4))

  def test_linear_attention(self):
    try:
      onnx.defs.get_schema('LinearAttention')
    except onnx.defs.SchemaError:
      self.skipTest('this ONNX does not have it')
    # A state of 8 x 4 for each of two heads, read by four heads.
    shapes = {'q': (3, 5, 4 * 8), 'k': (3, 5, 2 * 8), 'v': (3, 5, 2 * 4)}
    for rule, products, more in (
      ('linear', 2 + 4, False),
      ('delta', 2 * 2 + 4, True),
    ):
      names = [*shapes, *(['', '', 'beta'] if more else [])]
      inputs = shapes | ({'beta': (3, 5, 2)} if more else {})
      model = one(
        'LinearAttention',
        inputs,
        names=names,
        opset=27,
        outputs=('y', 'state'),
        q_num_heads=4,
        kv_num_heads=2,
        update_rule=rule,
      )
      self.assertEqual(count_macs(model).total, 3 * 5 * products * 8 * 4)

  def test_other_products(self):
    grid = one(
      'AffineGrid', {'theta': (2, 2, 3)}, [scalar('size', [2, 3, 5, 6])]
    )
    self.assertEqual(count_macs(grid).total, 2 * 5 * 6 * 2 * 3)
    # LU by hand: 2 x 2 and 1 x 1 products below each pivot.
    determinant = one('Det', {'x': (7, 3, 3)})
    self.assertEqual(count_macs(determinant).total, 7 * (4 + 1))
    linear = one(
      'LinearRegressor',
      {'x': (6, 5)},
      opset=22,
      domain='ai.onnx.ml',
      coefficients=[1.0] * 10,
      intercepts=[1.0] * 2,
      targets=2,
    )
    self.assertEqual(count_macs(linear).total, 6 * 5 * 2)
    self.assertEqual(
      count_macs(linear, convention='flops').total, 6 * 2 * (2 * 5 + 1)
    )

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

  @parameterized.parameters(
    # Everything from axis 1 on is one row, or only the axis.
    ('Softmax', 11, {}, 5 * 24 - 2 * 2),
    ('Softmax', 11, {'axis': 2}, 5 * 24 - 2 * 6),
    ('Softmax', 9, {'axis': 0}, 5 * 24 - 2),
    ('Softmax', 13, {}, 5 * 24 - 2 * 6),
    ('Softmax', 13, {'axis': 1}, 5 * 24 - 2 * 8),
    ('LogSoftmax', 11, {}, 5 * 24 - 2 * 2),
    ('LogSoftmax', 13, {}, 5 * 24 - 2 * 6),
    ('Hardmax', 11, {}, 24 - 2),
    ('Hardmax', 13, {}, 24 - 6),
    ('LpPool', 1, {'kernel_shape': [2]}, 2 * 3 * 3 * (2 + 1 + 1)),
    ('MeanVarianceNormalization', 13, {'axes': [1, 2]}, 5 * 24 + 4 * 2),
    ('Hardmax', 1, {'axis': 2}, 24 - 6),
  )
  def test_defaults_of_each_opset(self, operator, opset, attributes, flops):
    model = one(operator, {'x': (2, 3, 4)}, opset=opset, **attributes)
    self.assertEqual(count_macs(model, convention='flops').total, flops)

  @parameterized.parameters(
    (1, {}, True),
    (6, {}, True),
    (6, {'is_test': 1}, False),
    (9, {}, False),
    (14, {}, False),
  )
  def test_batch_norm_that_trains(self, opset, attributes, trains):
    if opset < 6:
      attributes = {'consumed_inputs': [0, 0, 0, 1, 1]}
    weights = [ones(name, 4) for name in 'sbmv']
    model = one(
      'BatchNormalization', {'x': (2, 4, 6)}, weights, opset, **attributes
    )
    flops = 3 * (48 + 4) + trains * (3 * 48 + 2 * 4)
    self.assertEqual(count_macs(model, convention='flops').total, flops)

  @parameterized.parameters(
    # 48 elements in 12 rows: squares, sums, mean, epsilon, root, products.
    ('RMSNormalization', {'x': (2, 6, 4), 's': (4,)}, {}, 4 * 48 + 2 * 12),
    # One element of four stays unchanged.
    (
      'RotaryEmbedding',
      {'x': (2, 3, 5, 8), 'cos': (2, 5, 3), 'sin': (2, 5, 3)},
      {'rotary_embedding_dim': 6},
      3 * 240 * 6 // 8,
    ),
    # Half of 3 x 8 for real numbers, 5 log2 8 each.
    ('DFT', {'x': (3, 8, 1)}, {}, 12 * 15),
    ('DFT', {'x': (3, 8, 2)}, {}, 24 * 15),
    ('GridSample', {'x': (1, 2, 6, 6), 'g': (1, 3, 3, 2)}, {}, 18 * 7),
    ('LRN', {'x': (1, 5, 2, 2)}, {'size': 3}, 20 * 7),
    ('Shrink', {'x': (5,)}, {}, 15),
  )
  def test_flops(self, operator, inputs, attributes, flops):
    model = one(operator, inputs, opset=23, **attributes)
    self.assertEqual(count_macs(model, convention='flops').total, flops)
    self.assertEqual(count_macs(model).total, 0)

  def test_fourier_transform_of_another_length(self):
    model = one('DFT', {'x': (3, 5, 7, 2)}, [scalar('n', 8), scalar('axis', 1)])
    self.assertEqual(
      count_macs(model, convention='flops').total, 3 * 7 * 8 * 15
    )
    old = one('DFT', {'x': (3, 8, 7, 2)}, opset=17, axis=1)
    self.assertEqual(count_macs(old, convention='flops').total, 3 * 7 * 8 * 15)

  def test_short_time_fourier_transform(self):
    model = one(
      'STFT', {'x': (3, 80, 1)}, [scalar('step', 4), ones('window', 16)]
    )
    # (80 - 16) / 4 + 1 frames of 16 real numbers.
    frames = 3 * 17
    self.assertEqual(
      count_macs(model, convention='flops').total,
      frames * (8 * 5 * 4 + 16),
    )

  def test_largest_of_each_row(self):
    model = one('TopK', {'x': (2, 3, 4)}, opset=1, outputs=('y', 'i'), k=2)
    self.assertEqual(count_macs(model, convention='flops').total, 24 * 2)

  def test_cumulative_sums_have_no_first(self):
    model = one('CumSum', {'x': (3, 8)}, [scalar('axis', 1)])
    self.assertEqual(count_macs(model, convention='flops').total, 3 * 7)

  def test_arithmetic_on_integers_is_none(self):
    model = one(
      'Add', {'x': ((3,), TensorProto.INT32)}, [scalar('w', 1, np.int32)]
    )
    self.assertEqual(count_macs(model, convention='flops').total, 0)

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
