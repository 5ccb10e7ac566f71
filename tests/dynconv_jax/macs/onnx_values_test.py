"""Tests of the ONNX counter's knowledge of values and their shapes."""

import pathlib
import warnings

import numpy as np
import pytest
from absl.testing import absltest, parameterized

onnx = pytest.importorskip('onnx', reason='onnx is not installed')

from onnx import TensorProto, helper  # noqa: E402
from onnx_models import (  # noqa: E402
  exported,
  graph_of,
  model_of,
  one,
  ones,
  scalar,
  tensor,
  value,
)

from dynconv_jax.macs import report as report_lib  # noqa: E402
from dynconv_jax.macs.onnx import count_macs  # noqa: E402

_DYNAMIC = {0: 'batch', 2: 'height', 3: 'width'}


class ConstantsTest(parameterized.TestCase):
  def indexed(self, count):
    """Rows selected by an array of integers, times a matrix."""
    nodes = [
      helper.make_node('Unsqueeze', ['index', 'axis'], ['row']),
      helper.make_node('Squeeze', ['row', 'axis'], ['flat']),
      helper.make_node('Gather', ['x', 'flat'], ['rows']),
      helper.make_node('MatMul', ['rows', 'w'], ['y'], 'product'),
    ]
    weights = [
      tensor('index', np.zeros(count), np.int64),
      scalar('axis', [0]),
      ones('w', 4, 8),
    ]
    return model_of(nodes, {'x': (5, 4)}, weights)

  @parameterized.parameters(3, 1025, 100_000)
  def test_integers_of_any_number(self, count):
    path = pathlib.Path(self.create_tempdir().full_path) / 'model.onnx'
    onnx.save(self.indexed(count), path)
    self.assertEqual(count_macs(path).total, count * 32)

  def reshaped(self):
    nodes = [
      helper.make_node('Reshape', ['x', 'shape'], ['rows']),
      helper.make_node('MatMul', ['rows', 'w'], ['y'], 'product'),
    ]
    return model_of(
      nodes, {'x': (6, 10)}, [scalar('shape', [-1, 4]), ones('w', 4, 8)]
    )

  def save_externally(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    onnx.save(
      self.reshaped(),
      folder / 'model.onnx',
      save_as_external_data=True,
      location='weights.bin',
      size_threshold=0,
      convert_attribute=False,
    )
    return folder

  def test_shapes_in_a_file_of_their_own(self):
    path = self.save_externally() / 'model.onnx'
    self.assertTrue(
      onnx.load(path, load_external_data=False)
      .graph.initializer[0]
      .external_data
    )
    self.assertEqual(count_macs(path).total, 15 * 32)

  def test_shapes_in_a_file_that_is_not_there(self):
    folder = self.save_externally()
    (folder / 'weights.bin').unlink()
    with pytest.warns(
      report_lib.UncountedWarning, match=r'depend on tensor values \(Reshape'
    ):
      report = count_macs(folder / 'model.onnx')
    self.assertEqual(report.total, 0)

  def test_work_on_constants_is_noted(self):
    nodes = [
      helper.make_node('Conv', ['grid', 'k'], ['encoded'], 'position'),
      helper.make_node('MatMul', ['grid', 'grid'], ['square'], 'square'),
      helper.make_node('Relu', ['encoded'], ['rectified']),
      helper.make_node('Add', ['x', 'rectified'], ['y'], 'sum'),
    ]
    model = model_of(
      nodes,
      {'x': (1, 6, 4, 5)},
      [ones('grid', 1, 2, 5, 5), ones('k', 6, 2, 2, 1)],
      outputs=('y', 'square'),
    )
    report = count_macs(model)
    self.assertEqual(report.total, 0)
    self.assertEqual(
      report.notes,
      (
        'Not in the total, because it depends only on constants (MACs):'
        ' Conv in position 480, MatMul in square 250; 730 in total. Count it'
        ' with constants=True.',
      ),
    )
    self.assertIn('Conv in position 480', str(report))
    report = count_macs(model, convention='flops')
    self.assertEqual(report.total, 6 * 4 * 5)
    self.assertIn('other operators 120', report.notes[0])
    report = count_macs(model, constants=True)
    self.assertEqual(report.total, 480 + 250)
    self.assertEqual(report.by_layer['position'].macs, 480)
    self.assertEmpty(report.notes)
    self.assertEmpty(count_macs(self.reshaped()).notes)


class FoldingTest(parameterized.TestCase):
  """Shapes that a model computes from the shape of its input."""

  def model(self, nodes, **weights):
    """A map whose channels `nodes` reshape to rows of 4, times a matrix."""
    nodes = [
      helper.make_node('Shape', ['x'], ['all']),
      *nodes,
      helper.make_node('Reshape', ['x', 'shape'], ['rows']),
      helper.make_node('MatMul', ['rows', 'w'], ['y'], 'product'),
    ]
    constants = [scalar(name, number) for name, number in weights.items()]
    return model_of(
      nodes, {'x': ('n', 6, 4)}, [ones('w', 4, 8), *constants], opset=17
    )

  @parameterized.named_parameters(
    (
      'modulo',
      [
        helper.make_node('Gather', ['all', 'zero'], ['n']),
        helper.make_node('Mod', ['n', 'seven'], ['left']),
        helper.make_node('Sub', ['seven', 'left'], ['more']),
        helper.make_node('Mod', ['more', 'seven'], ['two']),
        helper.make_node('Mul', ['two', 'three'], ['six']),
        helper.make_node('Mul', ['six', 'n'], ['count']),
        helper.make_node('Div', ['count', 'two'], ['half']),
        helper.make_node('Mul', ['half', 'two'], ['whole']),
        helper.make_node('Unsqueeze', ['whole', 'axis'], ['first']),
        helper.make_node('Concat', ['first', 'four'], ['shape'], axis=0),
      ],
      {'zero': 0, 'seven': 7, 'three': 3, 'axis': [0], 'four': [4]},
    ),
    (
      'floats',
      [
        helper.make_node('Cast', ['all'], ['f'], to=TensorProto.FLOAT),
        helper.make_node('ReduceProd', ['f'], ['product'], keepdims=0),
        helper.make_node('Sqrt', ['product'], ['root']),
        helper.make_node('Mul', ['root', 'root'], ['square']),
        helper.make_node('Ceil', ['square'], ['up']),
        helper.make_node('Cast', ['up'], ['i'], to=TensorProto.INT64),
        helper.make_node('Min', ['i', 'most'], ['size']),
        helper.make_node('Div', ['size', 'four'], ['rows_of_four']),
        helper.make_node('Concat', ['rows_of_four', 'four'], ['shape'], axis=0),
      ],
      {'most': [120], 'four': [4]},
    ),
    (
      'conditions',
      [
        helper.make_node('Slice', ['all', 'zero', 'one'], ['n']),
        helper.make_node('Equal', ['n', 'five'], ['is_five']),
        helper.make_node('Where', ['is_five', 'thirty', 'zero'], ['count']),
        helper.make_node('Concat', ['count', 'four'], ['shape'], axis=0),
      ],
      {'zero': [0], 'one': [1], 'five': [5], 'thirty': [30], 'four': [4]},
    ),
    (
      'ranges',
      [
        helper.make_node('Size', ['x'], ['size']),
        helper.make_node('Range', ['zero', 'size', 'four'], ['steps']),
        helper.make_node('Shape', ['steps'], ['count']),
        helper.make_node('Concat', ['count', 'fours'], ['shape'], axis=0),
      ],
      {'zero': 0, 'four': 4, 'fours': [4]},
    ),
  )
  def test_arithmetic(self, nodes, weights):
    report = count_macs(self.model(nodes, **weights), dimensions={'n': 5})
    self.assertEqual(report.total, 30 * 4 * 8)
    # Arithmetic on shapes is free.
    report = count_macs(
      self.model(nodes, **weights), dimensions={'n': 5}, convention='flops'
    )
    self.assertEqual(list(report.by_layer), ['product'])

  def test_positions_of_a_mask(self):
    nodes = [
      helper.make_node('NonZero', ['mask'], ['positions']),
      helper.make_node('Squeeze', ['positions', 'axis'], ['index']),
      helper.make_node('Gather', ['x', 'index'], ['rows']),
      helper.make_node('MatMul', ['rows', 'w'], ['y']),
    ]
    mask = tensor('mask', [True, False, True, True])
    weights = [mask, scalar('axis', [0]), ones('w', 4, 8)]
    self.assertEqual(
      count_macs(model_of(nodes, {'x': (4, 4)}, weights)).total, 3 * 32
    )

  def branches(self):
    def branch(name, axes):
      nodes = [helper.make_node('Squeeze', ['x', axes], [name])]
      return graph_of(nodes, [], [value(name)])

    nodes = [
      helper.make_node('Shape', ['x'], ['all']),
      helper.make_node('Gather', ['all', 'zero'], ['n']),
      helper.make_node('Equal', ['n', 'one'], ['is_one']),
      helper.make_node(
        'If',
        ['is_one'],
        ['z'],
        then_branch=branch('then', 'both'),
        else_branch=branch('else', 'last'),
      ),
      helper.make_node('MatMul', ['z', 'w'], ['y'], 'product'),
    ]
    weights = [
      scalar('zero', 0),
      scalar('one', 1),
      scalar('both', [0, 3]),
      scalar('last', [3]),
      ones('w', 4, 8),
    ]
    return model_of(nodes, {'x': ('n', 3, 4, 1)}, weights)

  @parameterized.parameters((1, 3), (5, 15))
  def test_branches_that_shapes_choose(self, batch, rows):
    report = count_macs(self.branches(), dimensions={'n': batch})
    self.assertEqual(report.total, rows * 32)

  def test_dimensions_by_name_that_the_model_notes(self):
    nodes = [
      helper.make_node('Own', ['x'], ['z'], 'own', domain='com.example'),
      helper.make_node('MatMul', ['z', 'w'], ['y'], 'product'),
    ]
    model = model_of(
      nodes,
      {'x': ('n', 9)},
      [ones('w', 4, 8)],
      domains=['com.example'],
      noted=[value('z', ('n', 4))],
    )
    with pytest.warns(report_lib.UncountedWarning, match='Own in own'):
      report = count_macs(model, dimensions={'n': 5})
    self.assertEqual(report.total, 5 * 32)

  def test_early_versions(self):
    nodes = [
      helper.make_node('Relu', ['x'], ['r'], consumed_inputs=[0]),
      helper.make_node('Add', ['r', 'b'], ['s'], broadcast=1, axis=1),
      helper.make_node('MatMul', ['s', 'w'], ['y']),
    ]
    weights = [ones('b', 3), ones('w', 4, 8)]
    model = model_of(nodes, {'x': (2, 3, 4)}, weights, opset=1)
    self.assertEqual(count_macs(model, convention='flops').total, 24 * 18)


class ExportedTest(parameterized.TestCase):
  """Networks by PyTorch's tracing exporter, which computes many shapes."""

  def setUp(self):
    super().setUp()
    self.torch = pytest.importorskip('torch', reason='PyTorch is not installed')

  def check(self, module, shape, macs=None, opset=17):
    from dynconv_jax.macs.torch import count_macs as count_torch_macs

    expected = count_torch_macs(module, shape).total
    if macs is not None:
      self.assertEqual(expected, macs)
    sizes = {name: shape[axis] for axis, name in _DYNAMIC.items()}
    for dynamic in (None, _DYNAMIC):
      model = exported(module, self.torch.zeros(shape), opset, dynamic)
      report = count_macs(model, dimensions=sizes if dynamic else None)
      self.assertEqual(report.total, expected)
      self.assertEmpty(report.uncounted)

  @parameterized.parameters(11, 17)
  def test_halves_of_channels(self, opset):
    torch = self.torch

    class Halves(torch.nn.Module):
      def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 1, bias=False)

      def forward(self, x):
        left, right = x.chunk(2, 1)
        return self.conv(torch.cat([right, left], 1))

    self.check(Halves(), (1, 8, 4, 2), 512, opset)

  def test_padding_to_a_multiple(self):
    torch = self.torch

    class Padded(torch.nn.Module):
      def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 8, 3, bias=False)

      def forward(self, x):
        height, width = x.shape[2:]
        pads = (0, (7 - width % 7) % 7, 0, (7 - height % 7) % 7)
        return self.conv(torch.nn.functional.pad(x, pads))

    self.check(Padded(), (1, 4, 5, 6), 7200)

  def test_shuffled_channels(self):
    torch = self.torch

    class Shuffled(torch.nn.Module):
      def __init__(self):
        super().__init__()
        self.one = torch.nn.Conv2d(4, 4, 1)
        self.depthwise = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)

      def forward(self, x):
        for _ in range(2):
          left, right = x.chunk(2, dim=1)
          right = self.depthwise(self.one(right))
          x = torch.cat((left, right), dim=1)
          n, c, h, w = x.shape
          x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return x.mean([2, 3])

    self.check(Shuffled(), (2, 8, 5, 6), 2 * 2 * 30 * (16 + 36))

  def test_shifted_windows(self):
    torch = self.torch

    class Windows(torch.nn.Module):
      def __init__(self, size=4, features=8, heads=2):
        super().__init__()
        self.size, self.heads = size, heads
        self.embed = torch.nn.Conv2d(3, features, 2, stride=2)
        self.qkv = torch.nn.Linear(features, 3 * features)
        self.out = torch.nn.Linear(features, features)

      def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        n, height, width, c = x.shape
        k = self.size
        pads = (0, 0, 0, (k - width % k) % k, 0, (k - height % k) % k)
        x = torch.nn.functional.pad(x, pads)
        _, rows, columns, _ = x.shape
        x = torch.roll(x, shifts=(-2, -2), dims=(1, 2))
        # Windows that the shift brought together must not attend to each other.
        mask = x.new_zeros((rows, columns))
        mask[-2:, :] = 1
        mask = mask.view(rows // k, k, columns // k, k).transpose(1, 2)
        mask = mask.reshape(-1, k * k)
        mask = (mask.unsqueeze(1) != mask.unsqueeze(2)) * -100.0
        windows = (rows // k) * (columns // k)
        x = x.view(n, rows // k, k, columns // k, k, c).permute(
          0, 1, 3, 2, 4, 5
        )
        x = x.reshape(n * windows, k * k, c)
        qkv = self.qkv(x).reshape(n * windows, k * k, 3, self.heads, -1)
        q, k_, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k_.transpose(-2, -1)
        scores = scores.view(n, windows, self.heads, k * k, k * k)
        scores = (scores + mask.unsqueeze(1).unsqueeze(0)).softmax(-1)
        scores = scores.view(-1, self.heads, k * k, k * k)
        x = self.out(
          (scores @ v).transpose(1, 2).reshape(n * windows, k * k, c)
        )
        x = x.view(n, rows // k, columns // k, k, k, c).permute(
          0, 1, 3, 2, 4, 5
        )
        x = torch.roll(x.reshape(n, rows, columns, c), (2, 2), (1, 2))
        return x[:, :height, :width, :].contiguous()

    # 10 x 12 pixels are 5 x 6 positions, padded to 8 x 8: 64 in 4 windows.
    tokens = 2 * 64 * 4 * 8 * 8 + 2 * 2 * 64 * 16 * 8
    self.check(Windows(), (2, 3, 10, 12), 2 * 30 * 8 * 12 + tokens)

  def test_standardized_weights_and_padding_as_needed(self):
    torch = self.torch
    F = torch.nn.functional

    class Standardized(torch.nn.Conv2d):
      def forward(self, x):
        for axis in (3, 2):
          size = x.shape[axis]
          step, taps = self.stride[0], self.kernel_size[0]
          missing = max((size - 1) // step * step + taps - size, 0)
          pads = [0, 0] * (3 - axis) + [missing // 2, missing - missing // 2]
          x = F.pad(x, pads)
        weight = F.batch_norm(
          self.weight.reshape(1, self.out_channels, -1),
          None,
          None,
          weight=self.gain,
          training=True,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride)

      def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = torch.nn.Parameter(torch.ones(self.out_channels))

    net = torch.nn.Sequential(
      Standardized(3, 4, 3, stride=2), torch.nn.GELU(), Standardized(4, 6, 3)
    )
    self.check(net, (2, 3, 9, 8), 2 * 20 * (4 * 27 + 6 * 36))

  def test_convolution_then_attention(self):
    torch = self.torch
    F = torch.nn.functional

    class ConvThenAttention(torch.nn.Module):
      def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.qkv = torch.nn.Conv2d(8, 24, 1)
        self.head = torch.nn.Linear(8, 5)
        self.register_buffer('table', torch.zeros(1, 2, 7, 7))

      def forward(self, x):
        x = F.gelu(self.stem(x))
        n, c, h, w = x.shape
        x = F.interpolate(x, size=(h // 2, w // 2), mode='bilinear')
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 2, 12, h * w).chunk(3, dim=2)
        bias = F.interpolate(self.table, size=(h * w, h * w), mode='bilinear')
        scores = (q.transpose(-1, -2) @ k + bias).softmax(dim=-1)
        x = (v @ scores.transpose(-1, -2)).reshape(n, -1, h, w)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(x)

    # 12 x 8 pixels: a stem of 6 x 4, 3 x 2 tokens, two heads of four.
    macs = 2 * (24 * 8 * 27 + 6 * 24 * 8 + 2 * 2 * 36 * 4 + 40)
    self.check(ConvThenAttention(), (2, 3, 12, 8), macs)


class BackendTest(absltest.TestCase):
  """ONNX's own tests of its operators: models, inputs and outputs."""

  @pytest.mark.slow
  def test_shapes_are_those_of_the_outputs(self):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      from onnx.backend.test.case.node import collect_testcases

      cases = collect_testcases(None)
    wrong, compared = [], 0
    for case in cases:
      graph, (inputs, outputs) = case.model.graph, case.data_sets[0]
      for info, array in zip(graph.input, inputs, strict=False):
        if info.type.HasField('tensor_type') and isinstance(array, np.ndarray):
          kind = info.type.tensor_type
          kind.shape.CopyFrom(value('', array.shape).type.tensor_type.shape)
      # Remove the declared shapes, so that they are inferred.
      del graph.value_info[:]
      for info in graph.output:
        info.type.tensor_type.ClearField('shape')
      probes = []
      for info, array in zip(graph.output, outputs, strict=True):
        if isinstance(array, np.ndarray) and array.dtype == np.float32:
          probes.append((f'probe {info.name}', array.shape))
          graph.node.append(
            helper.make_node('Neg', [info.name], [probes[-1][0]], probes[-1][0])
          )
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', report_lib.UncountedWarning)
        report = count_macs(case.model, convention='flops')
      layers = report.by_layer
      for name, shape in probes:
        if name in layers:
          compared += 1
          if layers[name].output_shape != shape:
            wrong.append((case.name, layers[name].output_shape, shape))
    self.assertEmpty(wrong)
    self.assertGreater(compared, 500)


class FalseAlarmTest(parameterized.TestCase):
  def model(self):
    nodes = [
      helper.make_node('NonZero', ['x'], ['n']),
      helper.make_node('Cast', ['n'], ['m'], to=TensorProto.FLOAT),
      helper.make_node('Neg', ['m'], ['y'], 'minus'),
      helper.make_node('NonMaxSuppression', ['boxes', 'scores'], ['chosen']),
    ]
    inputs = {'x': (2, 3), 'boxes': (1, 9, 4), 'scores': (1, 2, 9)}
    return model_of(nodes, inputs, outputs=('y', 'chosen'))

  @parameterized.parameters('conv', 'conv+linear', 'ptflops')
  def test_what_costs_nothing_is_not_missed(self, convention):
    # A warning would be an error.
    self.assertEmpty(count_macs(self.model(), convention=convention).uncounted)

  def test_what_costs_is_missed(self):
    with pytest.warns(report_lib.UncountedWarning):
      report = count_macs(self.model(), convention='flops')
    self.assertEqual(
      [entry.operation for entry in report.uncounted],
      ['Neg', 'NonMaxSuppression'],
    )

  def product(self):
    nodes = [
      helper.make_node('NonZero', ['x'], ['n']),
      helper.make_node('Cast', ['n'], ['m'], to=TensorProto.FLOAT),
      helper.make_node('MatMul', ['w', 'm'], ['y'], 'product'),
    ]
    return model_of(nodes, {'x': (2, 3)}, [ones('w', 4, 2)])

  def test_products_are_missed_where_they_cost(self):
    with pytest.warns(
      report_lib.UncountedWarning,
      match=r"MatMul in product .* \['m', 'y'\] depend on tensor values \(Non",
    ):
      count_macs(self.product())
    self.assertEmpty(count_macs(self.product(), convention='conv').uncounted)

  def test_no_operator_of_onnx_is_unknown(self):
    from dynconv_jax.macs import conventions, onnx_ops

    unknown = [
      schema.name
      for schema in onnx.defs.get_all_schemas()
      if schema.domain in ('', 'ai.onnx.ml')
      and schema.name not in ('If', 'Loop', 'Scan', 'SequenceMap')
      and onnx_ops.may_cost(
        '::'.join(filter(None, (schema.domain, schema.name))),
        conventions.get_convention('conv'),
      )
    ]
    self.assertCountEqual(
      [name for name in unknown if 'Conv' not in name], [], unknown
    )

  def test_one_of_a_kind(self):
    self.assertEmpty(count_macs(one('Relu', {'x': (2, 3)})).uncounted)


if __name__ == '__main__':
  absltest.main()
