"""Tests of the PyTorch front end's operations."""

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from dynconv_jax.macs.torch import count_macs  # noqa: E402


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


def sum_of_ones(module, shape):
  """Returns the sum of the output for ones, i.e. the number of products."""
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
  ('stride_1', nn.ConvTranspose2d, dict(kernel_size=4), (1, 4, 1, 1)),
  (
    'stride_1_and_2',
    nn.ConvTranspose2d,
    dict(kernel_size=3, stride=(1, 2), dilation=(2, 1)),
    (2, 4, 5, 6),
  ),
  (
    'transposed_three_dimensions',
    nn.ConvTranspose3d,
    dict(kernel_size=2, stride=2),
    (1, 4, 3, 2, 3),
  ),
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
    taps = module.weight[0].numel()  # for one input channel
    inputs = torch.zeros(*shape).numel()
    self.assertEqual(count_macs(module, shape).total, inputs * taps)

  @parameterized.parameters(True, False)
  def test_the_first_layer_of_a_generator(self, padding):
    module = nn.ConvTranspose2d(100, 512, 4, 1, 0, bias=False)
    report = count_macs(module, (1, 100, 1, 1), padding=padding)
    self.assertEqual(report.total, 16 * 100 * 512)

  def test_time_first(self):
    class Convolution(nn.Module):
      def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3, 8))
        self.bias = nn.Parameter(torch.zeros(8))

      def forward(self, x):
        return torch.conv_tbc(x, self.weight, self.bias, 1)

    report = count_macs(Convolution(), (4, 2, 3))
    self.assertEqual(report.total, 576)
    report = count_macs(Convolution(), (4, 2, 3), padding=False)
    with torch.no_grad():
      module = nn.Conv1d(3, 8, 3, padding=1, bias=False)
      self.assertEqual(report.total, sum_of_ones(module, (2, 3, 4)))

  def test_deformable(self):
    # torchvision's operation, according to its schema.
    library = torch.library.Library('torchvision', 'FRAGMENT')
    self.addCleanup(library._destroy)
    library.define(
      'deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask,'
      ' Tensor bias, int stride_h, int stride_w, int pad_h, int pad_w,'
      ' int dilation_h, int dilation_w, int groups, int offset_groups,'
      ' bool use_mask) -> Tensor'
    )
    library.impl(
      'deform_conv2d',
      lambda x, w, *_: x.new_empty(x.shape[0], w.shape[0], *x.shape[2:]),
      'CompositeExplicitAutograd',
    )
    deform = torch.ops.torchvision.deform_conv2d
    report = count_macs(
      Functional(lambda *x: deform(*x, 1, 1, 1, 1, 1, 1, 2, 1, True)),
      (2, 4, 5, 6),
      (8, 2, 3, 3),
      (2, 18, 5, 6),
      (2, 9, 5, 6),
      (8,),
      convention='conv',
    )
    self.assertEqual(report.total, 2 * 8 * 30 * (9 * 2 + 1))

  @pytest.mark.filterwarnings('ignore:Using padding=.same. with even')
  def test_same_padding_of_an_even_kernel(self):
    module = nn.Conv2d(4, 6, 4, padding='same', bias=False)
    shape = (1, 4, 7, 5)
    report = count_macs(module, shape, padding=False)
    self.assertEqual(report.total, sum_of_ones(module, shape))

  def test_bias_is_one_an_output(self):
    module = nn.Conv2d(4, 6, 3)
    self.assertEqual(
      count_macs(module, (2, 4, 5, 5), convention='conv').total,
      2 * 6 * 9 * (4 * 9 + 1),
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
    ('linear_vector', F.linear, [(4, 3), (3,)], 4 * 3),
    ('linear_long_vector', F.linear, [(2, 4, 16), (16,)], 2 * 4 * 16),
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
      'affine_grid',
      lambda a: F.affine_grid(a, [2, 3, 5, 6], align_corners=False),
      [(2, 2, 3)],
      2 * 5 * 6 * 2 * 3,
    ),
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

  @parameterized.named_parameters(
    ('matmul', torch.matmul, [(4, 8), (8, 4)], 4 * 128),
    ('bmm', torch.bmm, [(2, 4, 8), (2, 8, 4)], 4 * 2 * 128),
    ('conv', F.conv1d, [(1, 2, 5), (3, 2, 3)], 4 * 3 * 2 * 9),
    (
      'transposed',
      lambda a, b: F.conv_transpose1d(a, b, stride=2),
      [(1, 2, 5), (2, 3, 3)],
      4 * 5 * 2 * 9,
    ),
    (
      'einsum',
      lambda a, b: torch.einsum('ij,kj->ik', a, b),
      [(4, 8), (4, 8)],
      4 * 128,
    ),
  )
  def test_complex_products_are_real_operations(self, function, shapes, macs):
    inputs = [torch.zeros(shape, dtype=torch.complex64) for shape in shapes]
    module = Functional(function)
    self.assertEqual(count_macs(module, *inputs).total, macs)
    self.assertEqual(
      count_macs(module, *inputs, convention='flops').total, 2 * macs
    )

  @parameterized.parameters(
    (lambda x: x * x, 6),
    (lambda x: x + x, 2),
    (lambda x: x.abs(), 4),
    (lambda x: torch.view_as_real(x), 0),
  )
  def test_complex_elements(self, function, steps):
    report = count_macs(
      Functional(function),
      torch.zeros(3, 5, dtype=torch.complex64),
      convention='flops',
    )
    self.assertEqual(report.total, 15 * steps)

  def test_a_fourier_transform_is_its_butterflies(self):
    # log2(n) stages of n / 2, each a complex product and two sums.
    module = Functional(torch.fft.fft)
    x = torch.zeros(8, dtype=torch.complex64)
    self.assertEqual(
      count_macs(module, x, convention='flops').total, 3 * 4 * (6 + 2 * 2)
    )

  @parameterized.parameters(2.0, 1.0)
  def test_distances(self, p):
    module = Functional(lambda a, b: torch.cdist(a, b, p=p))
    pairs, size = 2 * 4 * 5, 3
    report = count_macs(module, (2, 4, size), (2, 5, size))
    self.assertEqual(report.total, pairs * size if p == 2 else 0)
    self.assertEmpty(report.uncounted)

  @pytest.mark.filterwarnings('ignore:Sparse CSR tensor support')
  def test_sparse_products(self):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(6, 7, generator=generator)
    a, b = a * (a > 0.6), torch.rand(7, 5, generator=generator)
    c = b * (b > 0.5)
    mask = (torch.rand(6, 5, generator=generator) > 0.5).float()
    of_pairs = int(((a != 0).double() @ (c != 0).double()).sum())
    stored = int((a != 0).sum())
    self.assertGreater(of_pairs, 0)
    for layout in ('to_sparse_coo', 'to_sparse_csr'):
      sparse = getattr(a, layout)()
      for function, inputs, macs in (
        (torch.sparse.mm, (sparse, b), stored * 5),
        (torch.matmul, (sparse, b), stored * 5),
        (torch.mv, (sparse, b[:, 0]), stored),
        (torch.matmul, (b.T, sparse.mT), stored * 5),
        (torch.sparse.mm, (sparse, getattr(c, layout)()), of_pairs),
      ):
        report = count_macs(Functional(function), *inputs)
        self.assertEqual(report.total, macs)
        self.assertEmpty(report.uncounted)
    report = count_macs(
      Functional(torch.sparse.sampled_addmm), mask.to_sparse_csr(), a, b
    )
    self.assertEqual(report.total, int(mask.sum()) * 7)

  def test_linear_bias_whatever_the_layout(self):
    module = nn.Linear(4, 3)
    transposed = torch.zeros(4, 5, 2).permute(
      2, 1, 0
    )  # [2, 5, 4], not contiguous
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

  @parameterized.parameters(
    ((1, 1, 7, 16), (4, 3, 9, 16), (4, 3, 9, 16), 4 * 3 * 7 * 9 * 32),
    ((4, 3, 7, 16), (1, 1, 9, 16), (1, 3, 9, 8), 4 * 3 * 7 * 9 * 24),
    ((7, 16), (3, 9, 16), (9, 16), 3 * 7 * 9 * 32),
  )
  def test_attention_of_a_broadcast_batch(self, q, k, v, macs):
    module = Functional(F.scaled_dot_product_attention)
    report = count_macs(module, q, k, v)
    self.assertEqual(report.total, macs)
    with torch.no_grad():
      attended = module(*map(torch.zeros, (q, k, v)))
    # The two products, by their parts.
    scores = attended[..., 0].numel() * k[-2]
    self.assertEqual(report.total, scores * (q[-1] + v[-1]))

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
  """Element-wise work, computed by hand for an input of [2, 4, 6, 6]."""

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
    ('sort', Functional(lambda x: x.sort(-1).values), 288 * 3),
    ('fft', Functional(lambda x: torch.fft.fft(x[..., :4]).real), 960),
    ('cumulative', Functional(lambda x: x.cumsum(1)), 288 - 72),
    ('indices', Functional(lambda x: x.argsort().long() * 2 + 1), 288 * 3),
    ('views', Functional(lambda x: x.flatten(1).T[:3].clone()), 0),
    ('dropout', nn.Dropout(), 0),
    ('choice', Functional(lambda x: torch.where(x > 0, x, -1.0)), 288),
    (
      'cross',
      Functional(lambda x: torch.cross(x[:, 1:], x[:, 1:], 1)),
      3 * 216,
    ),
  )
  def test_elementwise(self, module, flops):
    report = count_macs(module, (2, 4, 6, 6), convention='flops')
    self.assertEqual(report.total, flops)
    self.assertEmpty(report.uncounted)


if __name__ == '__main__':
  absltest.main()
