"""Tests of counting PyTorch modules by a run on data."""

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from dynconv_jax.macs.torch import count_macs  # noqa: E402


class Detector(nn.Module):
  """A map of scores, and a head for the positions above a threshold."""

  def __init__(self):
    super().__init__()
    self.backbone = nn.Conv2d(3, 8, 3, padding=1)
    self.scores = nn.Conv2d(8, 1, 1)
    self.head = nn.Linear(8, 5)

  def forward(self, images):
    features = self.backbone(images)
    chosen = self.scores(features)[:, 0] > 0
    return self.head(features.permute(0, 2, 3, 1)[chosen])


class Packed(nn.Module):
  """Sequences of several lengths."""

  def __init__(self, **options):
    super().__init__()
    self.lstm = nn.LSTM(8, 16, **options)

  def forward(self, x):
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
    return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]


class Counting(nn.Module):
  """Modifies itself during the forward pass."""

  def __init__(self):
    super().__init__()
    self.linear = nn.Linear(4, 4)
    self.register_buffer('calls', torch.zeros(()))
    self.plain = torch.zeros(2)

  def forward(self, x):
    self.calls += 1
    self.plain += 1
    with torch.no_grad():
      self.linear.weight.mul_(2)
    if x.sum() > 1e9:
      return x
    return self.linear(x.mul_(2))


class RunTest(parameterized.TestCase):
  def test_a_part_that_depends_on_the_data(self):
    images = torch.randn(2, 3, 6, 7)
    module = Detector().eval()
    with torch.no_grad():
      chosen = int((module.scores(module.backbone(images)) > 0).sum())
    self.assertGreater(chosen, 0)
    report = count_macs(module, images)
    macs = {name: layer.macs for name, layer in report.by_layer.items()}
    self.assertEqual(
      macs,
      {
        'backbone': 2 * 42 * 27 * 8,
        'scores': 2 * 42 * 8,
        'head': chosen * 8 * 5,
      },
    )
    (note,) = report.notes
    self.assertIn('a run on the data given', note)
    self.assertIn(note, str(report))

  def test_shapes_stand_for_the_same_data_each_time(self):
    reports = [count_macs(Detector().eval(), (1, 3, 9, 9)) for _ in range(2)]
    for report in reports:
      self.assertIn('a run on random data', report.notes[0])
    torch.manual_seed(0)
    module, state = Detector(), torch.random.get_rng_state()
    reports = [count_macs(module, (1, 3, 9, 9)) for _ in range(2)]
    self.assertEqual(reports[0], reports[1])
    self.assertTrue(torch.equal(state, torch.random.get_rng_state()))

  def test_does_not_run_where_shapes_are_enough(self):
    self.assertEmpty(count_macs(nn.Linear(3, 4), torch.zeros(2, 3)).notes)
    report = count_macs(nn.Linear(3, 4), torch.zeros(2, 3), run=True)
    self.assertEqual(report.total, 24)
    self.assertLen(report.notes, 1)

  @parameterized.parameters(
    (lambda x: x[x > 0] @ x[x > 0], 5),
    (lambda x: x[: int(x.sum())] @ x[: int(x.sum())], 5),
    (lambda x: F.linear(x[None], torch.eye(8)) if x.any() else x, 64),
    (lambda x: torch.as_tensor(x.numpy()) @ x, 8),
    (lambda x: torch.ones(len(x.nonzero())) @ torch.ones(len(x.tolist())), 8),
  )
  def test_ways_to_look_at_values(self, function, macs):
    class Module(nn.Module):
      def forward(self, x):
        return function(x)

    x = torch.ones(8)
    if macs == 5:
      x[5:] = 0
    report = count_macs(Module(), x)
    self.assertEqual(report.total, macs)
    self.assertLen(report.notes, 1)

  @parameterized.parameters(
    ({}, 8 * 64 * (8 + 16)),
    ({'bidirectional': True}, 2 * 8 * 64 * (8 + 16)),
    ({'num_layers': 2}, 8 * 64 * (8 + 16 + 16 + 16)),
  )
  def test_packed_sequences(self, options, macs):
    report = count_macs(Packed(**options), (5, 2, 8))
    self.assertEqual(report.total, macs)
    self.assertEqual(list(report.by_layer), ['lstm'])

  def test_the_module_and_its_inputs_are_left_as_they_were(self):
    module, x = Counting().train(), torch.ones(2, 4)
    weight = module.linear.weight.detach().clone()
    report = count_macs(module, x)
    self.assertEqual(report.total, 2 * 16)
    self.assertEqual(report.parameters, 20)
    self.assertTrue(torch.equal(module.linear.weight, weight))
    self.assertEqual(module.calls, 0)
    self.assertEqual(module.plain.sum(), 0)
    self.assertEqual(x.sum(), 8)
    self.assertTrue(module.training)
    self.assertTrue(module.linear.weight.requires_grad)
    self.assertFalse(module.linear.weight.is_inference())

  def test_errors_of_the_run_are_told(self):
    class Fails(nn.Module):
      def forward(self, x):
        return F.linear(x[x > 0], torch.zeros(3, 5))

    with self.assertRaisesRegex(
      ValueError,
      r'Fails does not run on inputs of shapes \[\(4,\)\]: RuntimeError in'
      ' its forward: ',
    ):
      count_macs(Fails(), torch.ones(4))

  def test_drawn_values_keep_what_depends_on_shapes(self):
    class Gated(nn.Module):
      """Half of its work depends on input values, none on its products."""

      def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.conv = nn.Conv1d(8, 4, 3)

      def forward(self, x):
        x = x[:, : int(x[0, :, 0].sum())]
        return self.conv(self.block(x).mT).softmax(1) @ torch.ones(9, 3)

    x = torch.ones(2, 13, 8)
    x[:, 11:] = 0
    module = Gated().eval()
    drawn, run = (count_macs(module, x, run=r) for r in ('drawn', True))
    self.assertEqual(drawn.by_layer, run.by_layer)
    self.assertIn('random outputs of products', drawn.notes[0])

  def test_drawn_values_are_not_computed(self):
    seen = []

    class Watched(nn.Module):
      def forward(self, x):
        y = F.conv2d(x, torch.zeros(5, 3, 3, 3))
        seen.append(y)
        return y[y > 0]

    count_macs(Watched(), (2, 3, 300, 301), run='drawn')
    (y,) = seen
    self.assertEqual(y.shape, (2, 5, 298, 299))
    self.assertAlmostEqual(float(y.mean()), 0, delta=0.02)
    self.assertAlmostEqual(float(y.std()), 1, delta=0.02)
    # No two maps are equal.
    self.assertLen(y.flatten(2).sum(-1).unique(), 10)

  def test_unknown_ways_to_run(self):
    with self.assertRaisesRegex(ValueError, "run must be .*; got 'fast'"):
      count_macs(nn.Linear(3, 4), (2, 3), run='fast')

  @parameterized.parameters(None, True)
  def test_grouped_products_of_float32(self, run):
    class Grouped(nn.Module):
      def forward(self, x, weight, ends):
        return F.grouped_mm(x, weight, offs=ends)

    report = count_macs(
      Grouped(),
      torch.ones(16, 32),
      torch.ones(2, 32, 8),
      torch.tensor([8, 16], dtype=torch.int32),
      run=run,
    )
    self.assertEqual(report.total, 16 * 32 * 8)


if __name__ == '__main__':
  absltest.main()
