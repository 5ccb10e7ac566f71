"""Tests of the PyTorch front end of the MAC counter."""

import importlib
import sys
import warnings
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from dynconv_jax.macs import report as report_lib  # noqa: E402
from dynconv_jax.macs.torch import count_macs  # noqa: E402
from experiments import compare_counters  # noqa: E402


class Functional(nn.Module):
  """Calls a function, with a weight of its own."""

  def __init__(self, function, *shape):
    super().__init__()
    self.function = function
    self.weight = nn.Parameter(torch.zeros(*shape)) if shape else None

  def forward(self, *args):
    if self.weight is None:
      return self.function(*args)
    return self.function(*args, self.weight)


def sum_of_ones(module, shape):
  """Returns the output's sum for ones: one for each product of two of them."""
  with torch.no_grad():
    for weight in module.parameters():
      weight.fill_(1)
    return round(module(torch.ones(*shape)).double().sum().item())


CONVOLUTIONS = (
  ('plain', nn.Conv2d, dict(kernel_size=3), (2, 4, 7, 9)),
  ('padded', nn.Conv2d, dict(kernel_size=5, padding=2), (2, 4, 3, 9)),
  (
    'rectangle',
    nn.Conv2d,
    dict(kernel_size=(1, 4), padding=(0, 3)),
    (1, 4, 5, 6),
  ),
  (
    'strided',
    nn.Conv2d,
    dict(kernel_size=3, stride=2, padding=1),
    (2, 4, 8, 9),
  ),
  (
    'dilated',
    nn.Conv2d,
    dict(kernel_size=3, dilation=3, padding=3),
    (1, 4, 8, 9),
  ),
  (
    'grouped',
    nn.Conv2d,
    dict(kernel_size=3, groups=2, padding=1),
    (2, 4, 5, 6),
  ),
  ('one_dimension', nn.Conv1d, dict(kernel_size=4, padding=2), (2, 4, 9)),
  (
    'three_dimensions',
    nn.Conv3d,
    dict(kernel_size=2, padding=1),
    (1, 4, 3, 4, 5),
  ),
  (
    'same',
    nn.Conv2d,
    dict(kernel_size=3, padding='same', dilation=2),
    (1, 4, 7, 5),
  ),
  ('unbatched', nn.Conv2d, dict(kernel_size=3, padding=1), (4, 7, 5)),
)

TRANSPOSED = (
  (
    'stride_2',
    nn.ConvTranspose2d,
    dict(kernel_size=3, stride=2, padding=1, output_padding=1),
    (2, 4, 5, 6),
  ),
  (
    'stride_3_kernel_2',
    nn.ConvTranspose2d,
    dict(kernel_size=2, stride=3),
    (1, 4, 5, 6),
  ),
  (
    'transposed_groups',
    nn.ConvTranspose2d,
    dict(kernel_size=4, stride=2, padding=1, groups=2),
    (2, 4, 5, 6),
  ),
  (
    'transposed_dilated',
    nn.ConvTranspose1d,
    dict(kernel_size=3, stride=2, dilation=2),
    (2, 4, 5),
  ),
  (
    'transposed_three_dimensions',
    nn.ConvTranspose3d,
    dict(kernel_size=2, stride=2),
    (1, 4, 3, 2, 3),
  ),
)


class PublishedTest(parameterized.TestCase):
  """Totals of plain ResNets, as FACTS.md and ptflops 0.7.5 have them."""

  @parameterized.parameters(
    ('resnet50', (224, 224), 'conv', 4_087_136_256),
    ('resnet50', (175, 200), 'conv', 3_018_278_912),
    ('resnet50', (256, 300), 'conv', 6_378_766_336),
    ('resnet50', (250, 450), 'conv', 9_601_661_376),
    ('resnet101', (224, 224), 'conv', 7_799_357_440),
    ('resnet50', (224, 224), 'conv+linear', 4_089_184_256),
    ('resnet50', (224, 224), 'ptflops', 4_132_436_968),
  )
  def test_resnet(self, name, size, convention, total):
    with torch.device('meta'):
      module = getattr(compare_counters, name)()
    report = count_macs(module, (1, 3, *size), convention=convention)
    self.assertEqual(report.total, total)
    self.assertEqual(
      sum(layer.macs for layer in report.by_layer.values()), total
    )
    self.assertEmpty(report.uncounted)

  def test_names_parameters_and_shapes(self):
    module = compare_counters.resnet18()
    report = count_macs(module, (2, 3, 64, 64), convention='ptflops')
    self.assertEqual(
      report.parameters, sum(weight.numel() for weight in module.parameters())
    )
    layer = report.by_layer['layer2.0.downsample.0']
    self.assertEqual(layer.output_shape, (2, 128, 8, 8))
    self.assertEqual(layer.parameters, 64 * 128)
    self.assertEqual(layer.positions, 2 * 8 * 8)
    self.assertEqual(layer.macs, 2 * 8 * 8 * 64 * 128)
    self.assertContainsSubset(
      {'conv1', 'layer1.0.bn1', 'layer4.1.relu', 'maxpool', 'fc'},
      report.by_layer,
    )


class ConvolutionTest(parameterized.TestCase):
  @parameterized.named_parameters(*CONVOLUTIONS, *TRANSPOSED)
  def test_inside_macs_are_the_products_of_ones(self, kind, options, shape):
    module = kind(4, 6, bias=False, **options)
    report = count_macs(module, shape, padding=False)
    self.assertEqual(report.total, sum_of_ones(module, shape))

  @parameterized.named_parameters(*CONVOLUTIONS)
  def test_padding_counts_as_an_input_of_ones(self, kind, options, shape):
    module = kind(4, 6, bias=False, **options)
    with torch.no_grad():
      outputs = module(torch.ones(*shape)).numel()
    taps = module.weight[0].numel()
    self.assertEqual(count_macs(module, shape).total, outputs * taps)

  @parameterized.named_parameters(*TRANSPOSED)
  def test_a_transposed_one_takes_each_input_to_each_tap(
    self, kind, options, shape
  ):
    module = kind(4, 6, bias=False, **options)
    taps = module.weight[0].numel()  # Of one input channel.
    inputs = torch.zeros(*shape).numel()
    self.assertEqual(count_macs(module, shape).total, inputs * taps)

  @pytest.mark.filterwarnings('ignore:Using padding=.same. with even')
  def test_same_padding_of_an_even_kernel(self):
    module = nn.Conv2d(4, 6, 4, padding='same', bias=False)
    shape = (1, 4, 7, 5)
    report = count_macs(module, shape, padding=False)
    self.assertEqual(report.total, sum_of_ones(module, shape))

  def test_bias_is_one_an_output(self):
    module = nn.Conv2d(4, 6, 3)
    self.assertEqual(
      count_macs(module, (2, 4, 5, 5)).total, 2 * 6 * 9 * (4 * 9 + 1)
    )
    self.assertEqual(
      count_macs(module, (2, 4, 5, 5), convention='conv+linear').total,
      2 * 6 * 9 * 4 * 9,
    )

  def test_circular_padding_is_input(self):
    module = nn.Conv2d(4, 6, 3, padding=1, padding_mode='circular', bias=False)
    report = count_macs(module, (1, 4, 5, 5), padding=False)
    self.assertEqual(report.total, 25 * 9 * 4 * 6)


class MatmulTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('linear', F.linear, [(2, 5, 4), (3, 4)], 2 * 5 * 4 * 3),
    ('operator', lambda a, b: a @ b, [(2, 5, 4), (4, 3)], 2 * 5 * 4 * 3),
    ('batched', torch.bmm, [(2, 5, 4), (2, 4, 3)], 2 * 5 * 4 * 3),
    ('vector', torch.mv, [(5, 4), (4,)], 20),
    ('dot', torch.dot, [(4,), (4,)], 4),
    (
      'einsum',
      lambda a, b: torch.einsum('bij,bkj->ik', a, b),
      [(2, 5, 4), (2, 3, 4)],
      2 * 5 * 4 * 3,
    ),
    ('tensordot', lambda a, b: torch.tensordot(a, b, 1), [(2, 4), (4, 3)], 24),
    ('addbmm', torch.addbmm, [(5, 3), (2, 5, 4), (2, 4, 3)], 2 * 5 * 4 * 3),
    ('bilinear', F.bilinear, [(7, 4), (7, 5), (3, 4, 5)], 7 * 3 * 5 * (4 + 1)),
    ('vmap', torch.vmap(lambda a: a @ a.T), [(2, 5, 4)], 2 * 5 * 5 * 4),
    (
      'multi_dot',
      lambda *a: torch.linalg.multi_dot(a),
      [(2, 9), (9, 3), (3, 4)],
      2 * 9 * 3 + 2 * 3 * 4,
    ),
  )
  def test_functions_count(self, function, shapes, macs):
    report = count_macs(Functional(function), *shapes, convention='conv+linear')
    self.assertEqual(report.total, macs)

  def test_linear_bias_whatever_the_layout(self):
    module = nn.Linear(4, 3)
    transposed = torch.zeros(4, 5, 2).permute(
      2, 1, 0
    )  # [2, 5, 4], not contiguous.
    for inputs in ((2, 5, 4), transposed):
      report = count_macs(module, inputs, convention='ptflops')
      self.assertEqual(report.total, 2 * 5 * 3 * (4 + 1))

  @parameterized.product(need_weights=(True, False), batch_first=(True, False))
  def test_multi_head_attention(self, need_weights, batch_first):
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    n, queries, keys, size = 3, 5, 7, 8
    shapes = [(n, queries, size), (n, keys, size), (n, keys, size)]
    if not batch_first:
      shapes = [(length, batch, size) for batch, length, size in shapes]
    report = count_macs(
      module,
      *shapes,
      kwargs={'need_weights': need_weights},
      convention='conv+linear',
    )
    projections = 2 * n * (queries + keys) * size * size
    scores_and_values = 2 * n * queries * keys * size
    self.assertEqual(report.total, projections + scores_and_values)
    self.assertEqual(
      report.parameters, sum(weight.numel() for weight in module.parameters())
    )

  def test_grouped_query_attention(self):
    module = Functional(
      lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
      )
    )
    shapes = [(2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)]
    report = count_macs(module, *shapes, convention='conv+linear')
    self.assertEqual(report.total, 2 * 6 * 5 * 7 * (8 + 4))

  def test_encoder_layer_is_not_hidden_by_its_fused_kernel(self):
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = count_macs(module, (3, 5, 8), convention='conv+linear')
    self.assertEqual(report.total, 3 * 5 * (4 * 8 * 8 + 2 * 5 * 8 + 2 * 8 * 16))


class RecurrentTest(parameterized.TestCase):
  @parameterized.parameters(
    (nn.RNN, nn.RNNCell, 1), (nn.GRU, nn.GRUCell, 3), (nn.LSTM, nn.LSTMCell, 4)
  )
  def test_layers_and_cells(self, layer, cell, gates):
    steps, n, inputs, hidden = 6, 2, 5, 3
    step = gates * n * hidden * (inputs + hidden)
    macs = count_macs(
      layer(inputs, hidden), (steps, n, inputs), convention='conv+linear'
    )
    self.assertEqual(macs.total, steps * step)
    macs = count_macs(
      cell(inputs, hidden), (n, inputs), convention='conv+linear'
    )
    self.assertEqual(macs.total, step)

  def test_bidirectional_layers(self):
    module = nn.LSTM(5, 3, num_layers=2, bidirectional=True, batch_first=True)
    report = count_macs(module, (2, 6, 5), convention='conv+linear')
    first, second = 4 * 3 * (5 + 3), 4 * 3 * (6 + 3)
    self.assertEqual(report.total, 2 * 6 * 2 * (first + second))
    biases = 2 * 6 * 2 * 2 * (2 * 4 * 3)
    steps = 2 * 6 * 2 * 2 * 3 * 13
    self.assertEqual(
      count_macs(module, (2, 6, 5), convention='flops').total,
      2 * report.total + biases + steps,
    )

  def test_projection(self):
    module = nn.LSTM(5, 4, proj_size=3)
    report = count_macs(module, (6, 2, 5), convention='conv+linear')
    self.assertEqual(report.total, 6 * 2 * (16 * (5 + 3) + 4 * 3))

  def test_a_loop_over_a_cell_counts_each_step(self):
    class Loop(nn.Module):
      def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(5, 3)

      def forward(self, x):
        state = None
        for step in x:
          state = self.cell(step, state)
        return state

    for convention in ('conv+linear', 'ptflops', 'flops'):
      loop = count_macs(Loop(), (7, 2, 5), convention=convention)
      layer = count_macs(nn.GRU(5, 3), (7, 2, 5), convention=convention)
      self.assertEqual(loop.total, layer.total)
    self.assertEqual(
      loop.parameters, sum(w.numel() for w in nn.GRUCell(5, 3).parameters())
    )


class FlopsTest(parameterized.TestCase):
  """Element-wise work, by hand for an input of [2, 4, 6, 6]."""

  @parameterized.named_parameters(
    ('relu', nn.ReLU(), 288),
    ('add', Functional(lambda x: x + x), 288),
    ('mean', Functional(lambda x: x.mean((2, 3))), 288),
    ('sum', Functional(lambda x: x.sum((2, 3))), 288 - 8),
    ('max_pool', nn.MaxPool2d(3, 3), 2 * 4 * 4 * 8),
    ('mean_pool', nn.AvgPool2d(2), 2 * 4 * 9 * 4),
    ('adaptive_pool', nn.AdaptiveAvgPool2d(1), 2 * 4 * 36),
    ('batch_norm', nn.BatchNorm2d(4), 3 * (288 + 4)),
    ('layer_norm', nn.LayerNorm(6), 3 * (288 + 48) + 3 * 288 + 2 * 48),
    ('softmax', nn.Softmax(-1), 5 * 288 - 2 * 48),
    ('views', Functional(lambda x: x.flatten(1).T[:3].clone()), 0),
    ('dropout', nn.Dropout(), 0),
    ('choice', Functional(lambda x: torch.where(x > 0, x, -1.0)), 0),
  )
  def test_elementwise(self, module, flops):
    report = count_macs(module, (2, 4, 6, 6), convention='flops')
    self.assertEqual(report.total, flops)
    self.assertEmpty(report.uncounted)


PTFLOPS_MODULES = (
  *(
    (type(module).__name__ + str(i), module, (4, 8, 8))
    for i, module in enumerate(
      (
        nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, dilation=2),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.PReLU(),
        nn.ELU(),
        nn.LeakyReLU(),
        nn.ReLU6(),
        nn.GELU(),
        nn.SiLU(),
        nn.Hardtanh(),
        nn.Sigmoid(),
        nn.Softmax(1),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(8),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveMaxPool2d(3),
        nn.Upsample(scale_factor=2),
        nn.Linear(8, 3),
        nn.Linear(8, 3, bias=False),
      )
    )
  ),
  ('LSTM', nn.LSTM(5, 3, 2, bidirectional=True, batch_first=True), (7, 5)),
  ('GRU', nn.GRU(5, 3, batch_first=True), (7, 5)),
  ('RNN', nn.RNN(5, 3, bias=False, batch_first=True), (7, 5)),
  ('LSTMCell', nn.LSTMCell(5, 3), (5,)),
  ('GRUCell', nn.GRUCell(5, 3), (5,)),
  ('Transformer', compare_counters.Transformer(16, 2, 2), (6, 16)),
  ('MobileNet', compare_counters.depthwise(), (3, 64, 64)),
  ('ResNet', compare_counters.resnet18(), (3, 65, 96)),
)


class PtflopsTest(parameterized.TestCase):
  @parameterized.named_parameters(*PTFLOPS_MODULES)
  def test_equals_ptflops(self, module, shape):
    pytest.importorskip('ptflops', reason='ptflops 0.7.5 is not installed')
    self.assertEqual(
      count_macs(module, (1, *shape), convention='ptflops').total,
      compare_counters.ptflops_macs(module, (1, *shape), 'pytorch'),
    )


class StructureTest(absltest.TestCase):
  def test_shared_modules_and_weights(self):
    class Shared(nn.Module):
      def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight

      def forward(self, x):
        return self.tied(self.first(self.first(x)))

    report = count_macs(Shared(), (2, 4), convention='conv+linear')
    macs = {name: layer.macs for name, layer in report.by_layer.items()}
    self.assertEqual(macs, {'first': 2 * 2 * 16, 'tied': 2 * 16})
    self.assertEqual(report.parameters, 16)

  def test_python_control_flow_runs_as_written(self):
    module = Functional(
      lambda x, w: F.linear(x, w) if x.shape[0] > 2 else x, 4, 4
    )
    for n, macs in ((2, 0), (3, 3 * 16)):
      report = count_macs(module, (n, 4), convention='conv+linear')
      self.assertEqual(report.total, macs)

  def test_the_dearer_branch_of_cond_counts(self):
    class Cond(nn.Module):
      def __init__(self):
        super().__init__()
        self.small = nn.Linear(4, 4)
        self.large = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4))

      def forward(self, x):
        return torch.cond(
          x.sum() > 0,
          lambda x: self.small(x),
          lambda x: self.large(x),
          (x,),
        )

    with warnings.catch_warnings():
      # Of the compiler that torch.cond calls.
      warnings.simplefilter('ignore', DeprecationWarning)
      report = count_macs(Cond(), (2, 4), convention='conv+linear')
    self.assertEqual(list(report.by_layer), ['large.0', 'large.1'])
    self.assertEqual(report.total, 2 * 2 * 64)

  def test_nothing_is_allocated(self):
    module = nn.Conv2d(3, 2, 1, bias=False)
    report = count_macs(module, (64, 3, 10**6, 10**6))
    self.assertEqual(report.total, 64 * 6 * 10**12)

  def test_the_module_is_left_as_it_was(self):
    class Caching(nn.Module):
      def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = None
        self.register_buffer('calls', torch.zeros(()))

      def forward(self, x):
        self.last = self.norm(x)
        self.calls += 1
        self.calls = self.calls * 2
        self.other = x
        return self.last

    module = Caching().train()
    module.norm.eval()
    count_macs(module, (2, 4))
    self.assertTrue(module.training)
    self.assertFalse(module.norm.training)
    self.assertIsNone(module.last)
    self.assertFalse(hasattr(module, 'other'))
    self.assertEqual(module.calls.item(), 0)
    self.assertTrue(torch.backends.mha.get_fastpath_enabled())
    self.assertEqual(module(torch.ones(2, 4)).shape, (2, 4))

  def test_inputs_may_be_nests_tensors_or_shapes(self):
    class Nested(nn.Module):
      def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.linear = nn.Linear(4, 3, dtype=torch.float16)

      def forward(self, batch, scale, *, extra):
        tokens = self.embedding(batch['tokens']).half() + extra
        return self.linear(tokens) * scale

    report = count_macs(
      Nested().half(),
      {'tokens': torch.zeros(2, 5, dtype=torch.long)},
      0.5,
      kwargs={'extra': (2, 5, 4)},
      convention='conv+linear',
    )
    self.assertEqual(report.total, 2 * 5 * 4 * 3)


class UncountedTest(absltest.TestCase):
  def test_an_unknown_operation_warns_once_and_is_noted(self):
    class Spectral(nn.Module):
      def __init__(self):
        super().__init__()
        self.inner = Functional(lambda x: torch.fft.fft(torch.fft.fft(x)).real)
        self.linear = nn.Linear(4, 4)

      def forward(self, x):
        return self.linear(self.inner(x)) + torch.fft.fft(x).real

    with pytest.warns(report_lib.UncountedWarning) as caught:
      report = count_macs(Spectral(), (2, 4), convention='conv+linear')
    text = [str(warning.message) for warning in caught]
    self.assertLen(text, 2)  # fft of real and of complex numbers.
    self.assertIn('aten._fft_r2c.default in inner', text[0])
    self.assertEqual(
      [tuple(entry) for entry in report.uncounted],
      [
        ('aten._fft_r2c.default', 'inner'),
        ('aten._fft_c2c.default', 'inner'),
        ('aten._fft_r2c.default', ''),
      ],
    )
    self.assertEqual(report.total, 2 * 16)


class ErrorTest(absltest.TestCase):
  def test_not_a_module(self):
    with self.assertRaisesRegex(TypeError, 'must be a torch.nn.Module; got'):
      count_macs(lambda x: x, (2, 4))

  def test_unknown_convention(self):
    with self.assertRaisesRegex(ValueError, "one of .*'conv'.*; got 'macs'"):
      count_macs(nn.ReLU(), (2, 4), convention='macs')

  def test_inputs_that_do_not_fit(self):
    with self.assertRaisesRegex(
      ValueError,
      r'Sequential does not run on inputs of shapes \[\(2, 5\)\]: '
      'RuntimeError in 0: .*',
    ):
      count_macs(nn.Sequential(nn.Linear(4, 4)), (2, 5))

  def test_missing_inputs(self):
    with self.assertRaisesRegex(
      ValueError, r'Linear does not run on inputs of shapes \[\]: TypeError'
    ):
      count_macs(nn.Linear(4, 4))

  def test_control_flow_on_values(self):
    module = Functional(lambda x: x if x.sum() > 0 else -x)
    with self.assertRaisesRegex(
      ValueError, 'Functional looks at the values of its tensors in its forward'
    ):
      count_macs(module, (2, 4))

  def test_parameters_without_a_shape(self):
    module = nn.LazyLinear(4)
    with self.assertRaisesRegex(ValueError, 'parameters that have no shape'):
      count_macs(module, (2, 4))

  def test_without_pytorch(self):
    with (
      mock.patch.dict(sys.modules, {'torch': None}),
      self.assertRaisesRegex(
        ImportError, r"pip install 'dynconv-jax\[torch\]'"
      ),
    ):
      sys.modules.pop('dynconv_jax.macs.torch')
      importlib.import_module('dynconv_jax.macs.torch')


if __name__ == '__main__':
  absltest.main()
