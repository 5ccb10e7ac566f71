"""Tests of the work of quantized networks."""

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

from torch import nn  # noqa: E402
from torch.ao import quantization  # noqa: E402

from dynconv_jax.macs.torch import count_macs  # noqa: E402

# PyTorch is moving quantization to a separate library.
pytestmark = pytest.mark.filterwarnings('ignore')


def static(module, *shape):
  """Returns the module, quantized for inputs of a shape."""
  module = nn.Sequential(
    quantization.QuantStub(), module, quantization.DeQuantStub()
  ).eval()
  engine = torch.backends.quantized.engine
  module.qconfig = quantization.get_default_qconfig(engine)
  module = quantization.prepare(module)
  module(torch.randn(*shape))
  return quantization.convert(module)


class QuantizedTest(parameterized.TestCase):
  @parameterized.parameters(
    (nn.Linear(16, 16), {nn.Linear}, (1, 16), 256),
    (nn.Linear(16, 8, bias=False), {nn.Linear}, (2, 3, 16), 6 * 128),
    (nn.LSTM(8, 16), {nn.LSTM}, (5, 2, 8), 10 * 64 * (8 + 16)),
    (
      nn.LSTM(8, 16, 2, bidirectional=True),
      {nn.LSTM},
      (5, 2, 8),
      2 * 10 * 64 * (8 + 16 + 32 + 16),
    ),
    (nn.GRU(8, 16), {nn.GRU}, (5, 2, 8), 10 * 48 * (8 + 16)),
    (nn.LSTMCell(8, 16), {nn.LSTMCell}, (2, 8), 2 * 64 * (8 + 16)),
    (nn.GRUCell(8, 16), {nn.GRUCell}, (2, 8), 2 * 48 * (8 + 16)),
  )
  def test_dynamic(self, module, kinds, shape, macs):
    quantized = quantization.quantize_dynamic(nn.Sequential(module), kinds)
    self.assertIsNot(type(quantized[0]), type(module))
    for convention in ('conv+linear', 'flops'):
      report = count_macs(quantized, shape, convention=convention)
      self.assertEmpty(report.uncounted)
      float_report = count_macs(module, shape, convention=convention)
      if convention == 'conv+linear':
        self.assertEqual(report.total, macs)
        self.assertEqual(report.total, float_report.total)

  @parameterized.parameters(
    (nn.Conv2d(3, 4, 3), (1, 3, 8, 8)),
    (nn.Conv2d(4, 8, 3, 2, 1, 2, groups=2), (2, 4, 9, 7)),
    (nn.Conv1d(3, 4, 3, 2, 1), (1, 3, 8)),
    (nn.Conv3d(3, 4, 2), (1, 3, 4, 5, 6)),
    (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), (1, 3, 5, 6)),
    (nn.Linear(6, 5), (2, 6)),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (1, 3, 8, 8)),
  )
  def test_static(self, module, shape):
    if isinstance(module, nn.ConvTranspose2d):
      # Its weights have a single scale.
      self.enter_context(pytest.MonkeyPatch.context()).setattr(
        quantization,
        'get_default_qconfig',
        lambda engine: quantization.default_qconfig,
      )
    for convention in ('conv', 'conv+linear'):
      for padding in (True, False):
        options = {'convention': convention, 'padding': padding}
        report = count_macs(static(module, *shape), shape, **options)
        expected = count_macs(module, shape, **options)
        self.assertEqual(report.total, expected.total)
        self.assertEmpty(report.uncounted)

  def test_by_hand(self):
    report = count_macs(static(nn.Conv2d(3, 4, 3), 1, 3, 8, 8), (1, 3, 8, 8))
    self.assertEqual(report.total, 3888)
    self.assertEqual(list(report.by_layer), ['1'])
    self.assertLen(report.notes, 1)


if __name__ == '__main__':
  absltest.main()
