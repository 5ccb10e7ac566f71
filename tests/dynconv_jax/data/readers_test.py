"""Tests of the host side of batches: order and reading ahead."""

import numpy as np
from absl.testing import absltest, parameterized

from dynconv_jax.data import readers


class EpochOrderTest(parameterized.TestCase):
  @parameterized.parameters(0, 3)
  def test_candidates_walk_one_permutation_an_epoch(self, seed):
    order = readers.EpochOrder(num_examples=10, batch_size=3, seed=seed)
    self.assertEqual(order.steps_per_epoch, 3)
    epochs = []
    for epoch in range(4):
      first, second, third = (
        order.candidates(3 * epoch + i).tolist() for i in range(3)
      )
      self.assertCountEqual(first, range(10))
      self.assertEqual(second, first[3:] + first[:3])
      self.assertEqual(third, first[6:] + first[:6])
      epochs.append(tuple(first))
    self.assertLen(set(epochs), 4)

  def test_first_place_is_uniform(self):
    order = readers.EpochOrder(num_examples=5, batch_size=5, seed=0)
    first = [order.candidates(step)[0] for step in range(1000)]
    counts = np.bincount(first, minlength=5)
    # Chi-squared with 4 degrees of freedom exceeds 23.5 once in 10,000 seeds.
    self.assertLess(np.sum((counts - 200) ** 2 / 200), 23.5)

  def test_seed_and_step_decide_the_crops(self):
    def draw(seed, step):
      return readers.EpochOrder(9, 3, seed).rng(step).random(4).tolist()

    self.assertEqual(draw(1, 2), draw(1, 2))
    self.assertNotEqual(draw(1, 2), draw(1, 3))
    self.assertNotEqual(draw(1, 2), draw(2, 2))


class ReadAheadTest(absltest.TestCase):
  def test_all_steps_from_one_on(self):
    batches = readers.train_batches(lambda step: -step, 10**6)
    iterator = readers.read_ahead(batches, num_workers=0)
    self.assertEqual(
      [next(iterator) for _ in range(3)], [-1_000_000, -1_000_001, -1_000_002]
    )
    iterator.close()


if __name__ == '__main__':
  absltest.main()
