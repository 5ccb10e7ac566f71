"""Tests of higher-order operators, exported graphs and gradients."""

import warnings

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch.nn.functional as F  # noqa: E402
from torch import _higher_order_ops as control  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402

from benchmarks import torch_networks  # noqa: E402
from dynconv_jax.macs import report as report_lib  # noqa: E402
from dynconv_jax.macs.torch import count_macs  # noqa: E402

pytestmark = [
  # From the compiler that higher-order operators call.
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
]


class Functional(nn.Module):
  """Calls a function."""

  def __init__(self, function):
    super().__init__()
    self.function = function

  def forward(self, *args):
    return self.function(*args)


def square(a):
  return a @ a


def looped(x):
  """Squares a matrix three times."""
  start = torch.zeros((), dtype=torch.int64)
  return control.while_loop(
    lambda i, y: i < 3, lambda i, y: (i + 1, y @ y), (start, x)
  )[1]


class HigherOrderTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('map', lambda x: control.map(square, x), 3 * 512),
    (
      'scan',
      lambda x: control.scan(lambda c, a: (c @ a, c + a), x[0], x)[1],
      3 * 512,
    ),
    (
      'scan_backwards',
      lambda x: control.scan(
        lambda c, a: (c @ a, c + a), x[0], x, reverse=True
      )[1],
      3 * 512,
    ),
    (
      # Two pairs, then the pairs: log2(4) steps of a tree, and one within.
      'associative_scan',
      lambda x: control.associative_scan(
        torch.matmul, x[:2], 0, combine_mode='generic'
      ),
      512,
    ),
    (
      'nested',
      lambda x: control.map(
        lambda a: control.map(lambda b: b @ a, a.expand(2, 8, 8)), x
      ),
      3 * 2 * 512,
    ),
    (
      'checkpoint',
      lambda x: torch.utils.checkpoint.checkpoint(
        square, x, use_reentrant=False
      ),
      3 * 512,
    ),
  )
  def test_a_body_counts_as_often_as_it_runs(self, function, macs):
    for run in (False, True):
      report = count_macs(Functional(function), (3, 8, 8), run=run)
      self.assertEqual(report.total, macs)
      self.assertEmpty(report.uncounted)

  @parameterized.parameters(
    (lambda q, k, v: flex_attention(q, k, v),),
    (lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s * 2 + i),),
    (torch.compile(flex_attention, fullgraph=True),),
  )
  def test_flex_attention(self, attention):
    shapes = (2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)
    report = count_macs(Functional(attention), *shapes)
    self.assertEqual(report.total, 2 * 3 * 7 * 9 * (16 + 16))

  @parameterized.parameters(
    ({'trip_counts': 4}, 4 * 512),
    ({'trip_counts': 0}, 0),
    ({'trip_counts': {'1': 2}}, 2 * 512),
    # A run on data counts what it executed.
    ({'run': True, 'trip_counts': 4}, 3 * 512),
  )
  def test_while_loops(self, options, macs):
    module = nn.Sequential(nn.ReLU(), Functional(looped))
    report = count_macs(module, (8, 8), **options)
    self.assertEqual(report.total, macs)
    self.assertEmpty(report.uncounted)

  def test_the_condition_of_a_loop_runs_once_more(self):
    module = Functional(
      lambda x: control.while_loop(
        lambda x: (x @ x).sum() < 3, lambda x: (x + x,), (x,)
      )
    )
    report = count_macs(module, (8, 8), trip_counts=4)
    self.assertEqual(report.total, 5 * 512)

  def test_a_loop_without_a_trip_count(self):
    module = nn.Sequential(Functional(looped))
    with self.assertWarnsRegex(
      report_lib.UncountedWarning,
      'while_loop in 0 is not counted: its number of iterations is not known;'
      ' pass trip_counts, or data and run=True',
    ):
      report = count_macs(module, (8, 8))
    self.assertEqual(report.total, 0)
    with self.assertRaisesRegex(
      ValueError, r"got \['a'\], and the loops are in \['0'\]"
    ):
      count_macs(module, (8, 8), trip_counts={'a': 3})
    # The convention counts none of it.
    self.assertEmpty(count_macs(module, (8, 8), convention='conv').uncounted)

  @parameterized.parameters((1.0, 512), (-1.0, 2 * 512))
  def test_a_run_takes_one_branch(self, value, macs):
    module = Functional(
      lambda x: torch.cond(
        x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, (x,)
      )
    )
    x = torch.full((8, 8), value)
    self.assertEqual(count_macs(module, x, run=True).total, macs)

  def test_what_is_not_seen_is_noted(self):
    class Opaque(torch._ops.HigherOrderOperator):
      def __init__(self):
        super().__init__('opaque')

      def __call__(self, x):
        return super().__call__(x)

    opaque = Opaque()
    opaque.fallthrough(torch._C.DispatchKey.AutogradCPU)
    opaque.py_impl(torch._subclasses.FakeTensorMode)(lambda mode, x: x)
    with self.assertWarnsRegex(
      report_lib.UncountedWarning, 'opaque in Functional is not counted: the'
    ):
      count_macs(Functional(opaque), (8, 8))


class Network(nn.Module):
  def __init__(self):
    super().__init__()
    self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    self.head = nn.Linear(144, 5)

  def forward(self, x, *, scale=1.0):
    return {'y': self.head(self.body(x).flatten(1)) * scale}


class ExportTest(parameterized.TestCase):
  @parameterized.parameters('conv+linear', 'flops')
  def test_equals_the_module(self, convention):
    module = Network().eval()
    program = torch.export.export(
      module, (torch.zeros(2, 3, 8, 8),), {'scale': 2.0}
    )
    expected = count_macs(
      module, (2, 3, 8, 8), kwargs={'scale': 2.0}, convention=convention
    )
    for exported in (program, program.module()):
      report = count_macs(
        exported, (2, 3, 8, 8), kwargs={'scale': 2.0}, convention=convention
      )
      # Work outside any module has a different name.
      self.assertEqual(
        list(report.by_layer.values())[:3], list(expected.by_layer.values())[:3]
      )
      self.assertEqual(report.total, expected.total)
      self.assertEqual(report.parameters, expected.parameters)

  @parameterized.parameters(
    ((), ('a', 'b', 'c')),
    ((), ('c', 'b', 'a')),
    (('a',), ('c', 'b')),
    (('a', 'b', 'c'), ()),
  )
  def test_arguments_in_any_order(self, first, names):
    class Three(nn.Module):
      def __init__(self):
        super().__init__()
        self.p, self.q = nn.Linear(4, 6), nn.Linear(4, 3)

      def forward(self, x, a=None, b=None, c=None):
        return x + self.p(a).sum() + self.q(b).sum() + (c['u'] @ c['v']).sum()

    x, a, b = torch.zeros(1), torch.zeros(5, 4), torch.zeros(2, 4)
    c = {'u': torch.zeros(7, 4), 'v': torch.zeros(4, 9)}
    given = {'a': a, 'b': b, 'c': dict(reversed(c.items()))}
    layers, product = 5 * 4 * 6 + 2 * 4 * 3, 7 * 4 * 9
    rows = {0: torch.export.Dim.DYNAMIC}
    shapes = {'x': None, 'a': rows, 'b': rows, 'c': {'u': None, 'v': None}}
    for program in (
      torch.export.export(
        Three(), (x,), {'a': a, 'b': b, 'c': c}, dynamic_shapes=shapes
      ),
      torch.export.export(Three(), (x, a, b, c), dynamic_shapes=shapes),
      torch.fx.symbolic_trace(Three()),
    ):
      for backward in (False, True):
        report = count_macs(
          program,
          x,
          *(given[name] for name in first),
          kwargs={name: given[name] for name in names},
          backward=backward,
        )
        # Only the weights of the layers have a gradient.
        self.assertEqual(report.total, (1 + backward) * layers + product)

  def test_other_shapes_than_it_was_exported_for(self):
    program = torch.export.export(Network(), (torch.zeros(2, 3, 8, 8),))
    with self.assertRaisesRegex(ValueError, 'GraphModule does not run on'):
      count_macs(program, (1, 3, 8, 8))


class GradientTest(parameterized.TestCase):
  def test_resnet152(self):
    with torch.device('meta'):
      module = torch_networks.create('resnet152', 1000)
    report = count_macs(module, (1, 3, 224, 224), backward=True)
    # As JAX counts it: three times everything, except the gradient of the
    # images.
    self.assertEqual(report.total, 34_422_865_920)
    forward = count_macs(module, (1, 3, 224, 224))
    stem = forward.by_layer['conv1'].macs
    self.assertEqual(report.total, 3 * forward.total - stem)

  @parameterized.named_parameters(
    ('linear', nn.Linear(8, 3), (2, 8)),
    ('conv', nn.Conv2d(8, 4, 3, 2, 1, groups=2), (2, 8, 5, 6)),
    ('unpadded', nn.Conv2d(8, 4, 3), (2, 8, 5, 6)),
    ('transposed', nn.ConvTranspose2d(8, 4, 3, 2, 1), (2, 8, 5, 6)),
    ('transposed_by_1', nn.ConvTranspose2d(8, 4, 3), (2, 8, 5, 6)),
    ('lstm', nn.LSTM(8, 4, 2), (5, 2, 8)),
    ('bidirectional', nn.LSTM(8, 4, bidirectional=True), (5, 2, 8)),
    ('attention', nn.TransformerEncoderLayer(8, 2, 16), (5, 2, 8)),
    (
      'mixed',
      nn.Sequential(
        nn.Conv2d(8, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(24),
        nn.Linear(24, 5),
        nn.LogSoftmax(-1),
      ),
      (2, 8, 4, 6),
    ),
  )
  def test_a_product_has_two_gradients(self, module, shape):
    x = torch.zeros(*shape, requires_grad=True)
    forward = count_macs(module, x)
    for run in (False, True):
      report = count_macs(module, x, backward=True, run=run)
      self.assertEqual(
        {name: layer.macs for name, layer in report.by_layer.items()},
        {name: 3 * layer.macs for name, layer in forward.by_layer.items()},
      )
      for name, layer in report.by_layer.items():
        self.assertEqual(layer.positions, forward.by_layer[name].positions)
        self.assertEqual(layer.activations, forward.by_layer[name].activations)

  @parameterized.parameters((nn.GRU, 3), (nn.RNN, 1))
  def test_loops_have_no_gradient_of_the_first_state(self, layer, gates):
    module, x = layer(8, 4), torch.zeros(5, 2, 8, requires_grad=True)
    first = gates * 2 * 4 * 4
    self.assertEqual(
      count_macs(module, x, backward=True).total,
      3 * count_macs(module, x).total - first,
    )

  def test_bilinear(self):
    n, i, j, k = 2 * 7, 4, 5, 3
    module = nn.Bilinear(i, j, k)
    x, y = (torch.zeros(2, 7, s, requires_grad=True) for s in (i, j))
    forward = n * i * j * k + n * j * k
    by_weight = n * i * k + n * i * j * k
    by_x, by_y = n * i * j * k + n * i * j, n * i * j * k + n * j * k
    self.assertEqual(count_macs(module, x, y).total, forward)
    for run in (False, True):
      report = count_macs(module, x, y, backward=True, run=run)
      self.assertEqual(report.total, forward + by_weight + by_x + by_y)
      self.assertEmpty(report.uncounted)
    report = count_macs(module, x.detach(), y.detach(), backward=True)
    self.assertEqual(report.total, forward + by_weight)
    self.assertEqual(report.activations, count_macs(module, x, y).activations)

  @parameterized.parameters(False, True)
  def test_distances(self, run):
    x, y, z = (
      torch.rand(*shape, requires_grad=True)
      for shape in ((2, 4, 3), (2, 5, 3), (4, 3))
    )
    report = count_macs(Functional(torch.cdist), x, y, backward=True, run=run)
    self.assertEqual(report.total, 3 * 2 * 4 * 5 * 3)
    # 6 pairs of 4 rows; each is part of the gradients of two rows.
    report = count_macs(Functional(F.pdist), z, backward=True, run=run)
    self.assertEqual(report.total, 3 * 6 * 3)

  def test_fused_attention(self):
    q = torch.zeros(2, 3, 7, 16, requires_grad=True)
    k = torch.zeros(2, 3, 9, 16, requires_grad=True)
    v = torch.zeros(2, 3, 9, 8, requires_grad=True)
    module = Functional(F.scaled_dot_product_attention)
    self.assertEqual(
      count_macs(module, q, k, v, backward=True).total,
      3 * 2 * 3 * 7 * 9 * (16 + 8),
    )

  @parameterized.named_parameters(
    ('map', lambda x: control.map(square, x), 3 * 512),
    (
      'scan',
      lambda x: control.scan(lambda c, a: (c @ a, c + a), x[0], x)[0],
      3 * 512,
    ),
    (
      'cond',
      lambda x: torch.cond(x.sum() > 0, square, lambda a: a @ a @ a, (x[0],)),
      2 * 512,
    ),
    (
      'nested',
      lambda x: control.map(
        lambda a: torch.cond(a.sum() > 0, square, square, (a,)), x
      ),
      3 * 512,
    ),
  )
  def test_operators_on_functions(self, function, macs):
    module, x = Functional(function), torch.zeros(3, 8, 8, requires_grad=True)
    self.assertEqual(count_macs(module, x).total, macs)
    report = count_macs(module, x, backward=True)
    self.assertEqual(report.total, 3 * macs)
    self.assertEmpty(report.uncounted)

  def test_only_what_requires_a_gradient(self):
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    module[0].requires_grad_(False)
    report = count_macs(module, (2, 4), backward=True)
    self.assertEqual(report.by_layer['0'].macs, 2 * 24)
    self.assertEqual(report.by_layer['2'].macs, 2 * 2 * 18)
    module.requires_grad_(False)
    with self.assertRaisesRegex(ValueError, 'no output depends on a'):
      count_macs(module, (2, 4), backward=True)

  def test_gradients_are_named_by_what_they_are_of(self):
    class Attention(nn.Module):
      def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

      def forward(self, x):
        q, k, v = self.project(x).chunk(3, -1)
        return self.out(input=(q @ k.mT).softmax(-1) @ v)

    module = nn.Sequential(Attention(), Attention())
    x = torch.zeros(2, 5, 8, requires_grad=True)
    forward = count_macs(module, x)
    self.assertLen(forward.by_layer, 6)
    report = count_macs(module, x, backward=True)
    for name, layer in forward.by_layer.items():
      self.assertEqual(report.by_layer[name].macs, 3 * layer.macs)

  def test_a_forward_pass_that_computes_gradients(self):
    class Force(nn.Module):
      def __init__(self):
        super().__init__()
        self.energy, self.out = nn.Linear(8, 1), nn.Linear(8, 4)

      def forward(self, x):
        energy = self.energy(x).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.out(x), force @ force.mT

    x = torch.zeros(2, 8, requires_grad=True)
    report = count_macs(Force(), x, backward=True)
    # The energy and the force. The force is a product of ones and the weight;
    # its gradient by the weight belongs to the module that computed it.
    self.assertEqual(report.by_layer['energy'].macs, 2 * 2 * 8)
    self.assertEqual(report.by_layer['out'].macs, 3 * 2 * 8 * 4)
    self.assertEqual(report.by_layer['Force'].macs, 3 * 2 * 8 * 2 + 2 * 8)

  def test_checkpoints_are_computed_twice(self):
    class Checkpointed(nn.Module):
      def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

      def forward(self, x):
        return torch.utils.checkpoint.checkpoint(
          self.inner, x, use_reentrant=False
        )

    x = torch.zeros(2, 8, requires_grad=True)
    report = count_macs(Checkpointed(), x, backward=True)
    self.assertEqual(report.by_layer['inner.0'].macs, 4 * 2 * 64)
    # No gradient needs the output of the last layer.
    self.assertEqual(report.by_layer['inner.2'].macs, 3 * 2 * 64)

  def test_training_mode_is_kept_and_nothing_is_left(self):
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.ones(2, 4, requires_grad=True)
    flops = [
      count_macs(module.train(mode), x, convention='flops', backward=True).total
      for mode in (True, False)
    ]
    # Statistics of the input: 3 per element and 2 per feature.
    self.assertEqual(flops[0] - flops[1], 3 * 8 + 2 * 4)
    count_macs(module, x, backward=True, run=True)
    self.assertIsNone(module[0].weight.grad)
    self.assertIsNone(x.grad)
    self.assertEqual(module[1].num_batches_tracked, 0)

  def test_flops_of_a_linear_layer(self):
    # Two gradients of the product, and the sum for the bias gradient.
    x = torch.zeros(2, 4, requires_grad=True)
    report = count_macs(nn.Linear(4, 3), x, convention='flops', backward=True)
    self.assertEqual(report.total, 3 * 2 * 24 + 2 * 3 + (2 * 3 - 3))

  def test_no_warning_of_a_gradient_that_has_no_price(self):
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      module = Functional(
        lambda x: torch.renorm(F.interpolate(x, scale_factor=2), 2, 0, 1.0)
      )
      x = torch.zeros(1, 2, 4, 4, requires_grad=True)
      count_macs(module, x, backward=True)


if __name__ == '__main__':
  absltest.main()
