"""Tests of the expansions of ONNX Runtime's own operators."""

import numpy as np
import pytest
from absl.testing import absltest, parameterized

onnx = pytest.importorskip('onnx', reason='onnx is not installed')

from onnx import TensorProto, helper  # noqa: E402
from onnx_models import model_of, one, ones, value  # noqa: E402

from dynconv_jax.macs import report as report_lib  # noqa: E402
from dynconv_jax.macs.onnx import count_macs  # noqa: E402

_DTYPES = {
  TensorProto.FLOAT: np.float32,
  TensorProto.UINT8: np.uint8,
  TensorProto.INT8: np.int8,
  TensorProto.INT32: np.int32,
  TensorProto.INT64: np.int64,
}

_ATTENTION = {'x': (2, 5, 16), 'w': (16, 48), 'b': (48,)}
_KEYS = {'q': (2, 5, 16), 'k': (2, 7, 16), 'v': (2, 7, 16)}

# Operator, shapes, MACs computed by hand, attributes.
PRODUCTS = (
  ('FusedMatMul', {'a': (2, 3, 4, 5), 'b': (2, 3, 6, 5)}, 720, {'transB': 1}),
  ('FusedMatMul', {'a': (2, 3, 5, 4), 'b': (2, 3, 5, 6)}, 720, {'transA': 1}),
  (
    'FusedMatMul',
    {'a': (5, 2, 3, 4), 'b': (2, 3, 5, 6)},
    720,
    {'transA': 1, 'transBatchA': 1},
  ),
  (
    'FusedConv',
    {'x': (1, 4, 7, 7), 'w': (6, 4, 3, 3), 'b': (6,), 'z': (1, 6, 5, 5)},
    25 * 6 * 36,
    {'activation': 'Relu', 'kernel_shape': [3, 3]},
  ),
  (
    'FusedGemm',
    {'a': (3, 4), 'b': (5, 4), 'c': (5,)},
    60,
    {'transB': 1, 'activation': 'Relu'},
  ),
  (
    'MatMulNBits',
    {'a': (2, 3, 32), 'b:uint8': (8, 1, 16), 's': (8,)},
    2 * 3 * 32 * 8,
    {'K': 32, 'N': 8, 'bits': 4, 'block_size': 32},
  ),
  (
    'Attention',
    _ATTENTION,
    2 * 5 * 16 * 48 + 2 * 5 * 5 * (16 + 16),
    {'num_heads': 4},
  ),
  (
    'Attention',
    _ATTENTION | {'': (), 'past': (2, 2, 4, 3, 4)},
    2 * 5 * 16 * 48 + 2 * 5 * 8 * (16 + 16),
    {'num_heads': 4, 'outputs': ('y', 'present')},
  ),
  ('MultiHeadAttention', _KEYS, 2 * 5 * 7 * (16 + 16), {'num_heads': 4}),
  (
    'MultiHeadAttention',
    _KEYS
    | {'b': (48,), '': (), ' ': (), 'pk': (2, 4, 3, 4), 'pv': (2, 4, 3, 4)},
    2 * 5 * 10 * (16 + 16),
    {'num_heads': 4, 'outputs': ('y', 'keys', 'values')},
  ),
  (
    'GroupQueryAttention',
    {
      'q': (1, 5, 4 * 8),
      'k': (1, 5, 2 * 8),
      'v': (1, 5, 2 * 8),
      'pk': (1, 2, 0, 8),
      'pv': (1, 2, 0, 8),
      'last:int32=4': (1,),
      'total:int32=5': (1,),
    },
    5 * 5 * (32 + 32),
    {'num_heads': 4, 'kv_num_heads': 2, 'outputs': ('y', 'keys', 'values')},
  ),
  (
    'DynamicQuantizeMatMul',
    {'a': (3, 4), 'b:int8': (4, 5), 's': (1,)},
    60,
    {},
  ),
  (
    'DynamicQuantizeLSTM',
    {
      'x': (7, 2, 4),
      'w:int8': (2, 4, 32),
      'r:int8': (2, 8, 32),
      'b': (2, 64),
      '': (),
      'h': (2, 2, 8),
      'c': (2, 2, 8),
      'p': (2, 24),
      's': (2,),
      'zw:int8': (2,),
      't': (2,),
      'zr:int8': (2,),
    },
    7 * 2 * 2 * 32 * (4 + 8),
    {'hidden_size': 8, 'direction': 'bidirectional'},
  ),
  (
    'MatMulIntegerToFloat',
    {'a:uint8': (3, 4), 'b:int8': (4, 5), 's': (), 't': ()},
    60,
    {},
  ),
  (
    'QAttention',
    {
      'x:uint8': (2, 5, 16),
      'w:uint8': (16, 48),
      'b': (48,),
      's': (),
      't': (),
      '': (),
      'zx:uint8': (),
      'zw:uint8': (),
    },
    2 * 5 * 16 * 48 + 2 * 5 * 5 * (16 + 16),
    {'num_heads': 4},
  ),
  (
    'QGemm',
    {
      'a:uint8': (3, 4),
      's': (),
      'za:uint8': (),
      'b:uint8': (4, 5),
      't': (),
      'zb:uint8': (),
    },
    60,
    {},
  ),
  (
    'MoE',
    {
      'x': (6, 16),
      'r': (6, 4),
      'w': (4, 32, 16),
      'b': (4, 32),
      'v': (4, 16, 32),
    },
    6 * 2 * 2 * 16 * 32,
    {'k': 2, 'activation_type': 'relu'},
  ),
  (
    'QMoE',
    {
      'x': (6, 32),
      'r': (6, 4),
      'w:uint8': (4, 64, 16),
      's': (4, 64),
      '': (),
      'v:uint8': (4, 32, 32),
      't': (4, 32),
    },
    6 * 2 * 2 * 32 * 64,
    {'k': 2, 'activation_type': 'relu'},
  ),
)

# Operator, shapes, FLOPs computed by hand, attributes.
OTHERS = (
  # A sum, and a norm of 160 elements in 10 rows.
  (
    'SkipLayerNormalization',
    {'x': (2, 5, 16), 's': (2, 5, 16), 'g': (16,), 'b': (16,)},
    160 + 3 * 170 + 3 * 160 + 2 * 10,
    {},
  ),
  (
    'SkipSimplifiedLayerNormalization',
    {'x': (2, 5, 16), 's': (2, 5, 16), 'g': (16,)},
    160 + 4 * 160 + 2 * 10,
    {},
  ),
  (
    'SimplifiedLayerNormalization',
    {'x': (2, 5, 16), 'g': (16,)},
    4 * 160 + 2 * 10,
    {'domain': ''},
  ),
  (
    'EmbedLayerNormalization',
    {
      'i:int32': (2, 5),
      'j:int32': (2, 5),
      'w': (9, 16),
      'p': (9, 16),
      't': (2, 16),
      'g': (16,),
      'b': (16,),
    },
    2 * 160 + 3 * 170 + 3 * 160 + 2 * 10,
    {'outputs': ('y', 'mask')},
  ),
  ('BiasGelu', {'x': (2, 5), 'b': (5,)}, 60, {}),
  ('FastGelu', {'x': (2, 5)}, 50, {}),
  ('QuickGelu', {'x': (2, 5)}, 20, {}),
  (
    'RotaryEmbedding',
    {'x': (2, 5, 16), 'p:int64=0': (1,), 'c': (8, 2), 's': (8, 2)},
    3 * 160,
    {'num_heads': 4},
  ),
  (
    'QLinearAdd',
    {
      'a:uint8': (3, 4),
      's': (),
      'z:uint8': (),
      'b:uint8': (3, 4),
      't': (),
      'zb:uint8': (),
      'u': (),
      'zy:uint8': (),
    },
    12,
    {},
  ),
  (
    'QLinearAveragePool',
    {'a:uint8': (1, 3, 4, 4), 's': (), 'z:uint8': (), 'u': (), 'zy:uint8': ()},
    12 * 4,
    {'kernel_shape': [2, 2], 'strides': [2, 2]},
  ),
  (
    'QLinearGlobalAveragePool',
    {'a:uint8': (1, 4, 4, 3), 's': (), 'z:uint8': (), 'u': (), 'zy:uint8': ()},
    3 * 16,
    {'channels_last': 1},
  ),
  (
    'QLinearConcat',
    {
      'u': (),
      'zy:uint8': (),
      'a:uint8': (3, 4),
      's': (),
      'z:uint8': (),
      'b:uint8': (3, 2),
      't': (),
      'zb:uint8': (),
    },
    0,
    {'axis': 1},
  ),
)


def parse(inputs):
  """Returns {name: (shape, kind)}, input indices, and names to read."""
  types, fill, names = {}, {}, []
  for text, shape in inputs.items():
    name, _, number = text.partition('=')
    name, _, kind = name.strip().partition(':')
    names.append(name)
    if name:
      kind = getattr(TensorProto, (kind or 'float').upper())
      types[name] = shape, kind
      fill[name] = np.full(shape, int(number or 1), _DTYPES[kind])
  return types, fill, names


def model_for(operator, inputs, attributes):
  types, fill, names = parse(inputs)
  options = {'domain': 'com.microsoft', 'outputs': ('y',)} | attributes
  model = one(operator, types, opset=21, names=names, **options)
  if operator.startswith('QLinear'):
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
  return model, fill


class ExpansionTest(parameterized.TestCase):
  @parameterized.parameters(*PRODUCTS)
  def test_products(self, operator, inputs, macs, attributes):
    model, _ = model_for(operator, inputs, attributes)
    report = count_macs(model)
    self.assertEqual(report.total, macs)
    self.assertEqual(list(report.by_layer), ['layer'])

  @parameterized.parameters(*OTHERS)
  def test_flops(self, operator, inputs, flops, attributes):
    model, _ = model_for(operator, inputs, attributes)
    self.assertEqual(count_macs(model, convention='flops').total, flops)
    self.assertEqual(count_macs(model).total, 0)

  @parameterized.parameters(*PRODUCTS, *OTHERS)
  def test_what_follows_has_the_shape_that_onnx_runtime_makes(
    self, operator, inputs, _, attributes
  ):
    runtime = pytest.importorskip('onnxruntime', reason='not installed')
    model, fill = model_for(operator, inputs, attributes)
    options = runtime.SessionOptions()
    options.graph_optimization_level = (
      runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    session = runtime.InferenceSession(model.SerializeToString(), options)
    output = session.run(None, fill)[0]
    model.graph.node.append(
      helper.make_node('Cast', ['y'], ['z'], to=TensorProto.FLOAT)
    )
    model.graph.node.append(helper.make_node('Neg', ['z'], ['minus'], 'after'))
    layer = count_macs(model, convention='flops').by_layer['after']
    self.assertEqual(layer.output_shape, output.shape)

  def test_weights_have_the_size_that_they_stand_for(self):
    packed = onnx.numpy_helper.from_array(np.ones((8, 1, 16), np.uint8), 'b')
    model = one(
      'MatMulNBits',
      {'a': (2, 3, 32)},
      [packed, ones('s', 8)],
      domain='com.microsoft',
      K=32,
      N=8,
      bits=4,
      block_size=32,
    )
    self.assertEqual(count_macs(model).parameters, 32 * 8)

  @parameterized.parameters('NhwcFusedConv', 'NhwcConv', 'QLinearConv')
  def test_channels_last(self, operator):
    inputs = {'x': (1, 7, 7, 4), 'w': (6, 4, 3, 3)}
    attributes = {}
    if operator == 'QLinearConv':
      inputs = {
        'x:uint8': (1, 7, 7, 4),
        's': (),
        'z:uint8': (),
        'w:uint8': (6, 4, 3, 3),
        't': (),
        'zw:uint8': (),
        'u': (),
        'zy:uint8': (),
      }
      attributes = {'channels_last': 1}
    model, _ = model_for(operator, inputs, attributes)
    model.graph.node.append(helper.make_node('Shape', ['y'], ['shape']))
    model.graph.node.append(
      helper.make_node('ConstantOfShape', ['shape'], ['zeros'])
    )
    model.graph.node.append(
      helper.make_node('MatMul', ['zeros', 'v'], ['p'], 'after')
    )
    model.graph.input.append(value('v', (6, 2)))
    # Its product reads constants and an input.
    report = count_macs(model)
    self.assertEqual(report.by_layer['layer'].macs, 25 * 6 * 36)
    self.assertEqual(report.by_layer['after'].macs, 25 * 6 * 2)


class UnknownTest(parameterized.TestCase):
  def test_what_is_known_but_for_its_shape(self):
    nodes = [
      helper.make_node('NonZero', ['x'], ['n'], 'positions'),
      helper.make_node('Cast', ['n'], ['m'], to=TensorProto.FLOAT),
      helper.make_node('QuickGelu', ['m'], ['g'], domain='com.microsoft'),
      helper.make_node('FusedMatMul', ['w', 'g'], ['y'], 'product'),
    ]
    nodes[-1].domain = 'com.microsoft'
    model = model_of(
      nodes, {'x': (2, 4)}, [ones('w', 3, 2)], domains=['com.microsoft']
    )
    self.assertEmpty(count_macs(model, convention='conv').uncounted)
    with pytest.warns(
      report_lib.UncountedWarning,
      match=r"FusedMatMul in product .* \['g', 'y'\] depend on tensor values"
      r' \(NonZero in positions',
    ) as caught:
      count_macs(model)
    self.assertLen(caught, 1)

  def model(self, *more):
    nodes = [
      helper.make_node('Own', ['x'], ['a'], 'own', domain='com.microsoft'),
      helper.make_node('Relu', ['a'], ['b'], 'relu'),
      helper.make_node('MatMul', ['b', 'w'], ['y'], 'product'),
      *more,
    ]
    return model_of(
      nodes, {'x': (2, 4)}, [ones('w', 4, 3)], domains=['com.microsoft']
    )

  def test_what_follows_is_not_blamed(self):
    with pytest.warns(report_lib.UncountedWarning) as caught:
      report = count_macs(self.model())
    self.assertEqual(
      [str(warning.message) for warning in caught],
      [
        'Own in own is not counted: it is unknown in the domain com.microsoft',
        "MatMul in product is not counted: the shapes of ['b', 'y'] depend on"
        ' Own in own, which is not known',
      ],
    )
    self.assertEqual(
      [tuple(entry) for entry in report.uncounted],
      [('Own', 'own'), ('MatMul', 'product')],
    )

  def test_what_follows_is_counted_where_a_shape_is_stated(self):
    nodes = [
      helper.make_node('Own', ['x'], ['a'], 'own', domain='com.microsoft'),
      helper.make_node('Reshape', ['a', 'shape'], ['b']),
      helper.make_node('MatMul', ['b', 'w'], ['y'], 'product'),
    ]
    shape = onnx.numpy_helper.from_array(np.array([5, 4]), 'shape')
    model = model_of(
      nodes, {'x': (2, 10)}, [ones('w', 4, 3), shape], domains=['com.microsoft']
    )
    with pytest.warns(report_lib.UncountedWarning, match='Own in own'):
      report = count_macs(model)
    self.assertEqual(report.total, 5 * 4 * 3)
    self.assertEqual([tuple(e) for e in report.uncounted], [('Own', 'own')])

  def test_what_follows_is_counted_where_the_model_notes_a_shape(self):
    model = self.model()
    model.graph.value_info.append(value('a', (7, 4)))
    with pytest.warns(report_lib.UncountedWarning, match='Own in own'):
      report = count_macs(model)
    self.assertEqual(report.total, 7 * 4 * 3)


if __name__ == '__main__':
  absltest.main()
