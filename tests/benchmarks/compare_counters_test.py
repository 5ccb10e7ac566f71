"""Checks the explanations of docs/macs_comparison.md for differing counts."""

import pytest
from absl.testing import absltest

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
pytest.importorskip('ptflops', reason='ptflops 0.7.5 is not installed')

from benchmarks import compare_counters  # noqa: E402

FLOP_COUNTER = 'torch.utils.flop_counter / 2'


class CompareTest(absltest.TestCase):
  def test_resnet(self):
    counts = compare_counters.compare(
      compare_counters.resnet50(), (1, 3, 64, 64)
    )
    biases = 1000
    # Outputs of all normalized convolutions: the stem, then by stage.
    stem, sides = 64 * 32**2, (16, 8, 4, 2)
    normalized, rectified = stem, stem
    for stage, (side, blocks) in enumerate(
      zip(sides, (3, 4, 6, 3), strict=True)
    ):
      planes, before = 64 * 2**stage, side if stage == 0 else 2 * side
      block = 2 * planes * side**2 + 4 * planes * side**2
      wider = planes * (before**2 - side**2)  # conv1 of the strided block.
      normalized += blocks * block + wider + 4 * planes * side**2
      rectified += blocks * block + wider
    pooled = 64 * 32**2 + 2048 * 2**2
    self.assertEqual(
      counts['ptflops (pytorch)'],
      counts['conv+linear'] + biases + 2 * (normalized + rectified + pooled),
    )
    self.assertEqual(counts['ptflops'], counts['ptflops (pytorch)'])
    self.assertEqual(counts['ptflops (aten)'], counts['conv+linear'] + biases)
    self.assertEqual(counts[FLOP_COUNTER], counts['conv+linear'])
    self.assertEqual(counts['conv'], counts['conv+linear'] - 2048 * 1000)

  def test_depthwise(self):
    counts = compare_counters.compare(
      compare_counters.depthwise(), (1, 3, 64, 64)
    )
    features, side = 32, 32
    macs = 27 * features * side**2
    for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
      side //= stride
      outputs = features * (2 if stride == 2 or i == 0 else 1)
      macs += (9 * features + features * outputs) * side**2
      features = outputs
    self.assertEqual(counts['conv'], macs)
    self.assertEqual(counts['conv+linear'], macs + 1024 * 1000)
    self.assertEqual(counts[FLOP_COUNTER], counts['conv+linear'])
    self.assertEqual(counts['ptflops'], counts['ptflops (pytorch)'])

  def test_transformer(self):
    length, size, depth = 49, 64, 2
    counts = compare_counters.compare(
      compare_counters.Transformer(size, 4, depth), (1, length, size)
    )
    projections = depth * 4 * length * size**2
    attention = depth * 2 * length**2 * size
    perceptrons = depth * 2 * length * size * 4 * size
    biases = depth * length * (3 + 1 + 4 + 1) * size
    macs = projections + attention + perceptrons
    self.assertEqual(counts['conv'], 0)
    self.assertEqual(counts['conv+linear'], macs)
    self.assertEqual(counts['ptflops'], counts['ptflops (pytorch)'])
    self.assertEqual(counts['ptflops (aten)'], macs + biases - attention)
    self.assertEqual(counts[FLOP_COUNTER], perceptrons)

  def test_recurrent(self):
    steps, features, hidden, outputs = 9, 8, 16, 10
    counts = compare_counters.compare(
      compare_counters.Recurrent(features, hidden, outputs),
      (1, steps, features),
    )
    first = 4 * hidden * (features + hidden)
    second = 4 * hidden * (hidden + hidden)
    head = steps * hidden * outputs
    self.assertEqual(counts['conv+linear'], steps * (first + second) + head)
    self.assertEqual(counts['ptflops'], counts['ptflops (pytorch)'])
    self.assertEqual(counts['ptflops (aten)'], head + steps * outputs)
    self.assertEqual(counts[FLOP_COUNTER], head)


if __name__ == '__main__':
  absltest.main()
