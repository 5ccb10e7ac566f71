"""Tests of the PyTorch front end of the MAC counter."""

import importlib
import pathlib
import subprocess
import sys
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import compare_counters  # noqa: E402
from dynconv_jax import macs  # noqa: E402
from dynconv_jax.macs import formulas, torch_ops  # noqa: E402
from dynconv_jax.macs import report as report_lib  # noqa: E402
from dynconv_jax.macs.torch import AsIs, count_macs  # noqa: E402


class Functional(nn.Module):
  """Calls a function, with its own weight."""

  def __init__(self, function, *shape):
    super().__init__()
    self.function = function
    self.weight = nn.Parameter(torch.zeros(*shape)) if shape else None

  def forward(self, *args):
    if self.weight is None:
      return self.function(*args)
    return self.function(*args, self.weight)


class PublishedTest(parameterized.TestCase):
  """Totals of plain ResNets, as published and in ptflops 0.7.5."""

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
    with torch.device('meta'):
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


class StructureTest(parameterized.TestCase):
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
    for n, total in ((2, 0), (3, 3 * 16)):
      report = count_macs(module, (n, 4), convention='conv+linear')
      self.assertEqual(report.total, total)

  @parameterized.parameters(
    ('max', ['large.0', 'large.1']),
    ('min', ['small']),
    ('true', ['small']),
    ('false', ['large.0', 'large.1']),
  )
  def test_the_branch_of_cond_that_counts(self, branch, layers):
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
      # From the compiler that torch.cond calls.
      warnings.simplefilter('ignore', DeprecationWarning)
      report = count_macs(
        Cond(), (2, 4), convention='conv+linear', branch=branch
      )
    self.assertEqual(list(report.by_layer), layers)
    self.assertEqual(report.total, 2 * 16 if len(layers) == 1 else 2 * 2 * 64)

  def test_compiled_modules(self):
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    report = count_macs(
      torch.compile(module, backend='eager'), (2, 4), convention='flops'
    )
    self.assertEqual(list(report.by_layer), ['0', '1'])
    self.assertEqual(report.total, 2 * 3 * (2 * 4 + 1 + 1))

  @pytest.mark.filterwarnings('ignore:LSTM with projections')
  def test_long_sequences_have_the_shapes_of_pytorch(self):
    for layer in (
      nn.GRU(5, 3, 2, bidirectional=True),
      nn.LSTM(5, 4, 2, proj_size=3, batch_first=True),
    ):
      module = nn.Sequential(layer, Functional(lambda out: out[0]))
      after = Functional(lambda x: x.reshape(-1).sin())
      module.append(after)
      report = count_macs(module, (7, 2, 5), convention='flops')
      with torch.no_grad():
        (size,) = module(torch.zeros(7, 2, 5)).shape
      self.assertEqual(report.by_layer['2'].macs, size)

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

  def test_a_tuple_of_ints_may_stay_one(self):
    class Pair(NamedTuple):
      rows: int
      columns: int

    module = Functional(
      lambda x, size, pair: F.adaptive_avg_pool2d(x, size) @ x[0, :, : pair[0]]
    )
    pooled = count_macs(module, (1, 4, 8, 8), AsIs((4, 4)), Pair(4, 8))
    self.assertEqual(pooled.total, 4 * 4 * 4 * 8)
    with self.assertRaises(ValueError):
      count_macs(module, (1, 4, 8, 8), (4, 4), Pair(4, 8))

  def test_what_a_module_adds_to_is_left_as_it_was(self):
    class Adding(nn.Module):
      def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen, self.ready = [], False

      def forward(self, x, cache):
        if not self.ready:
          self.linear.register_forward_hook(lambda _, __, y: y + 1)
          self.ready = True
        self.seen.append(x)
        cache['x'] = x
        return self.linear(x)

    class Cache(dict):
      """Not a pytree."""

    module, cache = Adding(), Cache()
    count_macs(module, (2, 4), cache)
    self.assertEmpty(module.seen)
    self.assertEmpty(module.linear._forward_hooks)
    self.assertFalse(module.ready)
    self.assertEmpty(cache)


class Unknown(nn.Module):
  """Calls an operation of another library, in itself and in a module."""

  def __init__(self, operation):
    super().__init__()
    self.inner = Functional(lambda x: operation(operation(x)))
    self.linear = nn.Linear(4, 4)
    self.operation = operation

  def forward(self, x):
    return self.linear(self.inner(x)) + self.operation(x)


class UncountedTest(parameterized.TestCase):
  def test_an_unknown_operation_warns_once_and_is_noted(self):
    with pytest.warns(report_lib.UncountedWarning) as caught:
      report = count_macs(Unknown(torch.linalg.matrix_exp), (4, 4))
    self.assertEqual(
      [str(warning.message) for warning in caught],
      [
        'aten.linalg_matrix_exp.default in inner is not counted: its work is'
        ' not known; see dynconv_jax.macs.register'
      ],
    )
    self.assertEqual(
      [tuple(entry) for entry in report.uncounted],
      [
        ('aten.linalg_matrix_exp.default', 'inner'),
        ('aten.linalg_matrix_exp.default', 'Unknown'),
      ],
    )
    self.assertEqual(report.total, 4 * 16)

  @parameterized.parameters(
    # A matrix product or a convolution may count; element-wise work only counts
    # in `flops`.
    (torch.linalg.matrix_exp, ('conv+linear', 'ptflops', 'flops')),
    (lambda x: torch.renorm(x, 2, 0, 1.0), ('flops',)),
    (lambda x: torch.special.airy_ai(x), ()),
    (torch.histc, ()),
  )
  def test_warns_only_of_what_the_convention_prices(self, operation, warning):
    for convention in ('conv', 'conv+linear', 'ptflops', 'flops'):
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        report = count_macs(
          Functional(operation), (4, 4), convention=convention
        )
      self.assertEqual(bool(report.uncounted), convention in warning)
      self.assertEqual(bool(caught), convention in warning)

  def test_profiler_records_are_no_operations(self):
    def recorded(x):
      with torch.profiler.record_function('mine'):
        return x + x

    report = count_macs(Functional(recorded), (2, 4), convention='flops')
    self.assertEqual(report.total, 8)
    self.assertEmpty(report.uncounted)


class RegisterTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(torch_ops._REGISTERED, clear=True))
    library = torch.library.Library('counted', 'FRAGMENT')
    self.addCleanup(library._destroy)
    library.define('gram(Tensor x, *, int times=1) -> Tensor')
    kernel = lambda x, times=1: (x @ x.mT) * times  # noqa: E731
    library.impl('gram', kernel, 'CompositeExplicitAutograd')
    self.module = Functional(lambda x: torch.ops.counted.gram(x, times=3))

  def test_a_formula_of_a_user(self):
    with pytest.warns(report_lib.UncountedWarning, match='counted.gram'):
      count_macs(self.module, (5, 4))

    @macs.register('counted::gram', 'torch')
    def gram(operation):
      self.assertEqual(operation.outputs[0].shape, (5, 5))
      rows, inner = operation.inputs[0].shape
      return formulas.matmul(rows, inner, rows) * operation.params['times']

    report = count_macs(self.module, (5, 4))
    self.assertEqual(report.total, 3 * 5 * 5 * 4)
    self.assertEmpty(report.uncounted)

  def test_takes_precedence_over_ours_and_over_the_parts(self):
    for name in ('aten::mm', 'aten::matmul'):
      macs.register(name, 'torch')(lambda _: formulas.matmul(1, 1, 7))
      report = count_macs(Functional(torch.matmul), (2, 3), (3, 4))
      self.assertEqual(report.total, 7)

  def test_bad_names_and_formulas(self):
    with self.assertRaisesRegex(ValueError, "'namespace::operation'; got 'mm'"):
      macs.register('mm', 'torch')
    macs.register('aten::mm', 'torch')(lambda _: 7)
    with self.assertRaisesRegex(TypeError, 'must return a macs.Work; got int'):
      count_macs(Functional(torch.mm), (2, 3), (3, 4))


class ImportTest(absltest.TestCase):
  def test_counting_imports_no_jax(self):
    program = (
      'import sys, torch;'
      'from dynconv_jax.macs.torch import count_macs;'
      'assert count_macs(torch.nn.Linear(3, 4), (2, 3)).total == 24;'
      'print([name for name in ("jax", "flax") if name in sys.modules])'
    )
    done = subprocess.run(
      [sys.executable, '-c', program],
      capture_output=True,
      text=True,
      check=True,
      cwd=pathlib.Path(__file__).parents[3],
    )
    self.assertEqual(done.stdout.strip(), '[]')


class ErrorTest(parameterized.TestCase):
  def test_not_a_module(self):
    with self.assertRaisesRegex(TypeError, 'must be a torch.nn.Module; got'):
      count_macs(lambda x: x, (2, 4))

  def test_unknown_branch(self):
    with self.assertRaisesRegex(ValueError, "'true' or 'false'; got 'first'"):
      count_macs(nn.ReLU(), (2, 4), branch='first')

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
      ValueError,
      'Functional depends on the values of its tensors in its forward .*, so'
      ' shapes are not enough: pass weights and inputs with data, and run=True',
    ):
      count_macs(module, (2, 4), run=False)

  def test_running_without_data(self):
    with torch.device('meta'):
      module = nn.Linear(4, 4)
    with self.assertRaisesRegex(ValueError, "are on the device 'meta'"):
      count_macs(module, (2, 4), run=True)

  @parameterized.parameters((-1,), (True,), (1.5,), ({'a': 2.0},))
  def test_trip_counts_that_are_no_counts(self, trips):
    with self.assertRaisesRegex(ValueError, 'must be integers >= 0; got'):
      count_macs(nn.ReLU(), (2, 4), trip_counts=trips)

  def test_gradients_in_the_convention_of_ptflops(self):
    with self.assertRaisesRegex(ValueError, 'does not support the backward'):
      count_macs(nn.ReLU(), (2, 4), convention='ptflops', backward=True)

  def test_parameters_without_a_shape(self):
    module = nn.LazyLinear(4)
    with self.assertRaisesRegex(ValueError, 'parameters without a shape'):
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
