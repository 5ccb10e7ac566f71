"""Tests of evaluation against counts and sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from dynconv_jax.masks import ExecutionMask, MaskedLayer
from dynconv_jax.training import evaluation

_LAYERS = (
  MaskedLayer('layer1.0.conv1', 7, level=1),
  MaskedLayer('layer1.0.conv2', 3, level=0),
)
# 13 examples: one in three classes, decided by the network below.
_LABELS = np.arange(13) % 3


def _logits(images):
  """Returns logits for class 0 for even examples and class 2 for odd ones."""
  odd = images[:, 0, 0, 0] % 2
  return jnp.stack([1 - odd, jnp.zeros_like(odd) - 1, odd], -1)


def _mask(hard, name='layer1.0', layers=_LAYERS):
  """Returns a mask with full dilation, for the purpose of the test."""
  hard = jnp.asarray(hard, jnp.float32)
  return ExecutionMask((hard, jnp.ones_like(hard)), name, layers)


def _hard(images):
  """Returns float32[N, 4, 4]: the first min(i, 16) positions of example i."""
  count = images[:, :1, :1, 0].reshape(-1, 1)
  return (jnp.arange(16)[None] < count).astype(jnp.float32).reshape(-1, 4, 4)


def _batches(batch_size, with_objects=False):
  """Yields 13 examples, whose images contain their index, padded with -7."""
  for start in range(0, 13, batch_size):
    numbers = np.full(batch_size, -7)
    number = np.arange(start, min(start + batch_size, 13))
    numbers[: len(number)] = number
    batch = {
      'image': jnp.asarray(
        np.broadcast_to(numbers[:, None, None, None], (batch_size, 8, 8, 3)),
        jnp.float32,
      ),
      # Padding has the predicted label: it would count as correct.
      'label': jnp.asarray(
        np.where(numbers < 0, 2, _LABELS[numbers]), jnp.int32
      ),
      'weight': jnp.asarray(numbers >= 0, jnp.float32),
    }
    if with_objects:
      objects = np.zeros((batch_size, 8, 8), bool)
      objects[:, :4, :4] = True  # rows 0, 1 and columns 0, 1 of a 4x4 mask
      batch['object_mask'] = jnp.asarray(objects)
    yield batch


class EvaluateTest(parameterized.TestCase):
  @parameterized.parameters(1, 5, 13, 20)
  def test_every_example_counts_once(self, batch_size):
    result = evaluation.evaluate(
      lambda images: (_logits(images), [_mask(_hard(images))]),
      _batches(batch_size),
    )
    said = np.where(np.arange(13) % 2, 2, 0)
    np.testing.assert_array_equal(result.index, np.arange(13))
    np.testing.assert_array_equal(result.label, _LABELS)
    np.testing.assert_array_equal(result.prediction, said)
    np.testing.assert_array_equal(result.correct, said == _LABELS)
    # By the definition of cross-entropy, in float64.
    for i in range(13):
      odd = i % 2
      logits = np.array([1 - odd, -1, odd], np.float64)
      expected = np.log(np.exp(logits).sum()) - logits[_LABELS[i]]
      np.testing.assert_allclose(result.cross_entropy[i], expected, rtol=1e-6)
    # Seven MACs at each of 16 positions, three at the active ones.
    np.testing.assert_array_equal(
      result.executed_macs, [7 * 16 + 3 * i for i in range(13)]
    )
    self.assertEqual(result.dense_macs, 160)
    np.testing.assert_array_equal(
      result.densities[:, 0], [i / 16 for i in range(13)]
    )
    summary = result.summary()
    self.assertEqual(summary['num_examples'], 13)
    self.assertAlmostEqual(summary['accuracy'], np.mean(said == _LABELS))
    self.assertAlmostEqual(summary['executed_fraction'], (112 + 18) / 160)
    self.assertAlmostEqual(summary['block_density']['layer1.0'], 6 / 16)
    self.assertEqual(
      list(summary),
      [
        'accuracy',
        'accuracy_low',
        'accuracy_high',
        'loss',
        'num_examples',
        'executed_fraction',
        'block_density',
        'block_stage',
      ],
    )

  def test_executed_fraction_weighs_blocks_by_their_macs(self):
    heavy = (MaskedLayer('layer2.0.conv1', 1000, level=0),)

    def predict(images):
      ones = jnp.ones((len(images), 2, 2))
      return _logits(images), [
        _mask(_hard(images)),
        _mask(ones, 'layer2.0', heavy),
      ]

    result = evaluation.evaluate(predict, _batches(5))
    executed = dense = 0
    for i in range(13):
      for position in range(16):
        executed += 7 + 3 * (position < i)
        dense += 10
      executed += 4 * 1000
      dense += 4 * 1000
    summary = result.summary()
    self.assertAlmostEqual(summary['executed_fraction'], executed / dense)
    self.assertEqual(list(summary['block_density']), ['layer1.0', 'layer2.0'])

  def test_object_recall_and_background_density(self):
    def predict(images):
      hard = np.zeros((len(images), 4, 4))
      hard[:, 0, :3] = 1  # two of four object positions, one of twelve others
      return _logits(images), [_mask(hard), _mask(np.ones_like(hard), 'b')]

    result = evaluation.evaluate(predict, _batches(5, with_objects=True))
    self.assertEqual(result.object_recall.shape, (13, 2))
    np.testing.assert_allclose(result.object_recall[:, 0], 0.5)
    np.testing.assert_allclose(result.background_density[:, 0], 1 / 12)
    np.testing.assert_allclose(result.object_recall[:, 1], 1)
    np.testing.assert_allclose(result.background_density[:, 1], 1)
    summary = result.summary()
    self.assertAlmostEqual(summary['object_recall'], 0.75)
    self.assertAlmostEqual(summary['background_density'], (1 / 12 + 1) / 2)

  def test_blocks_that_never_run_have_no_object_recall(self):
    def predict(images):
      hard = np.zeros((len(images), 4, 4))
      hard[:, 0, :3] = 1
      return _logits(images), [_mask(hard), _mask(np.zeros_like(hard), 'b')]

    result = evaluation.evaluate(predict, _batches(5, with_objects=True))
    recall, background = result.localization
    np.testing.assert_allclose(recall, np.full(13, 0.5))
    np.testing.assert_allclose(background, np.full(13, 1 / 12))
    self.assertAlmostEqual(result.summary()['object_recall'], 0.5)

    def closed(images):
      return _logits(images), [_mask(np.zeros((len(images), 4, 4)))]

    result = evaluation.evaluate(closed, _batches(5, with_objects=True))
    self.assertNotIn('object_recall', result.summary())
    self.assertNotIn('background_density', result.summary())

  def test_an_object_that_was_cropped_away_does_not_count(self):
    def batches():
      for batch in _batches(5, with_objects=True):
        seen = batch['image'][:, 0, 0, 0] < 6
        batch['object_mask'] &= seen[:, None, None]
        yield batch

    def predict(images):
      return _logits(images), [_mask(jnp.ones((len(images), 4, 4)))]

    result = evaluation.evaluate(predict, batches())
    self.assertEqual(result.summary()['object_recall'], 1.0)
    self.assertEqual(np.isnan(result.object_recall[:, 0]).sum(), 7)
    np.testing.assert_array_equal(
      result.object_share, np.where(np.arange(13) < 6, 16 / 64, 0)
    )

  def test_an_object_that_fills_the_image_has_no_background(self):
    def batches(large):
      for batch in _batches(5, with_objects=True):
        whole = batch['image'][:, 0, 0, 0] < large
        batch['object_mask'] |= whole[:, None, None]
        yield batch

    def predict(images):
      return _logits(images), [_mask(jnp.ones((len(images), 4, 4)))]

    result = evaluation.evaluate(predict, batches(large=6))
    self.assertEqual(result.summary()['background_density'], 1.0)
    self.assertEqual(np.isnan(result.background_density[:, 0]).sum(), 6)
    summary = evaluation.evaluate(predict, batches(large=13)).summary()
    self.assertEqual(summary['object_recall'], 1.0)
    self.assertNotIn('background_density', summary)

  def test_examples_left_out_leave_gaps_in_the_index(self):
    def batches():
      for batch in _batches(5):
        odd = batch['image'][:, 0, 0, 0] % 2 > 0
        yield batch | {'weight': batch['weight'] * odd}

    result = evaluation.evaluate(
      lambda images: (_logits(images), []), batches()
    )
    np.testing.assert_array_equal(result.index, np.arange(1, 13, 2))

  def test_a_dense_network_has_no_fraction(self):
    result = evaluation.evaluate(
      lambda images: (_logits(images), []), _batches(5, with_objects=True)
    )
    for name in ('executed_fraction', 'block_density', 'object_recall'):
      self.assertNotIn(name, result.summary())

  def test_macs_of_each_image(self):
    class Report:
      total = 2_000_000_000

      def executed(self, masks):
        return 1e9 + 1e6 * np.sum([m.hard.sum((1, 2)) for m in masks], axis=0)

    def gated(images):
      return _logits(images), [_mask(_hard(images))]

    summary = evaluation.evaluate(gated, _batches(5), Report()).summary()
    self.assertAlmostEqual(summary['gmacs_mean'], 1.006)
    self.assertAlmostEqual(summary['gmacs_p50'], 1.006)
    self.assertAlmostEqual(summary['gmacs_p95'], 1 + 0.001 * 0.95 * 12)
    summary = evaluation.evaluate(
      lambda images: (_logits(images), []), _batches(5), Report()
    ).summary()
    self.assertEqual(summary['gmacs_mean'], 2.0)
    self.assertEqual(summary['gmacs_p95'], 2.0)

  def test_a_loss_that_is_not_finite_is_an_error(self):
    def predict(images):
      # The losses of examples 0 and 1 are NaN and infinite; padding is NaN.
      scale = jnp.where(images[:, 0, 0, 0] > 1, 1.0, jnp.nan)
      scale = jnp.where(images[:, 0, 0, 0] == 1, jnp.inf, scale)
      return _logits(images) * scale[:, None], []

    with self.assertRaisesRegex(
      FloatingPointError, '^the loss of 2 of 13 examples is not finite'
    ):
      evaluation.evaluate(predict, _batches(5))
    rest = list(_batches(5))[1:]
    assert len(evaluation.evaluate(predict, rest).correct) == 8

  def test_no_example_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'no examples to evaluate'):
      evaluation.evaluate(lambda images: (_logits(images), []), [])
    batch = next(_batches(5))
    batch['weight'] = jnp.zeros(5)
    with self.assertRaisesRegex(ValueError, 'no examples to evaluate'):
      evaluation.evaluate(lambda images: (_logits(images), []), [batch])


@pytest.mark.parametrize(
  ('successes', 'n', 'low', 'high'),
  [
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (20, 20, 1 - 0.1611, 1.0),
  ],
)
def test_wilson_interval(successes, n, low, high):
  got = evaluation.wilson_interval(successes, n)
  np.testing.assert_allclose(got, (low, high), atol=5e-5)


def test_predict_passes_a_key_on():
  class Sampling(nnx.Module):
    def __call__(self, images, rngs=None):
      return images if rngs is None else jax.random.normal(rngs.gumbel(), (2,))

  predict = evaluation.make_predict(nnx.graphdef(Sampling()))
  images = jnp.arange(2.0)
  np.testing.assert_array_equal(predict({}, {}, images), images)
  first, again, other = (
    predict({}, {}, images, jax.random.key(seed)) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)


def test_predict_is_the_evaluation_view():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  predict = evaluation.make_predict(graphdef)
  images = jnp.arange(6.0).reshape(2, 3)
  np.testing.assert_allclose(
    predict(nnx.as_pure(params), nnx.as_pure(rest), images),
    images @ model.kernel[...] + model.bias[...],
    rtol=1e-6,
  )
