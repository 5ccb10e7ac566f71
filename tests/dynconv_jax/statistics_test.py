"""Tests of statistics against binomial sums, normal theory, and simulation."""

import math

import numpy as np
import pytest

from dynconv_jax.statistics import mcnemar, mean_interval, paired_bootstrap

_Z = 1.959964


def _correct(only_a, only_b, both=5, neither=3):
  counts = [only_a, only_b, both, neither]
  a = np.repeat([True, False, True, False], counts)
  b = np.repeat([False, True, True, False], counts)
  return a, b


@pytest.mark.parametrize(
  'only_a, only_b', [(0, 0), (1, 0), (3, 3), (0, 8), (14, 5), (61, 90)]
)
def test_mcnemar_is_the_sum_of_both_tails(only_a, only_b):
  found = mcnemar(*_correct(only_a, only_b))
  n = only_a + only_b
  far = abs(only_a - n / 2)
  tails = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= far)
  assert (found.only_a, found.only_b) == (only_a, only_b)
  assert found.p == pytest.approx(tails / 2**n, rel=1e-9)


def test_one_seed_is_the_normal_interval_of_a_paired_difference():
  rng = np.random.default_rng(0)
  base = rng.random(1500)
  a, b = base[None] < 0.8, np.roll(base, 300)[None] < 0.77
  d = a[0].astype(float) - b[0]
  half = _Z * d.std(ddof=1) / np.sqrt(len(d))
  found = paired_bootstrap(a, b)
  assert found.value == pytest.approx(d.mean(), abs=1e-12)
  assert found.low == pytest.approx(d.mean() - half, abs=0.04 * half)
  assert found.high == pytest.approx(d.mean() + half, abs=0.04 * half)
  # The normal test of the same difference.
  p = math.erfc(abs(d.mean()) / (half / _Z) / math.sqrt(2))
  assert found.p == pytest.approx(p, abs=0.015)
  mean = mean_interval(a)
  assert mean.value == pytest.approx(a.mean(), abs=1e-12)
  half = _Z * np.sqrt(a.mean() * (1 - a.mean()) / a.size)
  assert mean.high - mean.low == pytest.approx(2 * half, rel=0.04)


@pytest.mark.parametrize('deviation', [0.0, 0.03])
def test_width_is_that_of_the_variances_of_seeds_and_examples(deviation):
  rng = np.random.default_rng(1)
  seeds, n = 12, 900
  examples, noise = rng.normal(0, 0.3, n), rng.normal(0, 1, (seeds, n))
  values = examples + deviation * rng.normal(size=(seeds, 1)) + noise
  # Mean squares of a two-way layout, by loops over its cells.
  grand, by_seed, by_example = values.mean(), values.mean(1), values.mean(0)
  rest = sum(
    (values[s, i] - by_seed[s] - by_example[i] + grand) ** 2
    for s in range(seeds)
    for i in range(n)
  ) / ((seeds - 1) * (n - 1))
  of_seeds = max(0, by_seed.var(ddof=1) - rest / n)
  variance = of_seeds / seeds + by_example.var(ddof=1) / n
  found = mean_interval(values)
  width = 2 * _Z * np.sqrt(variance)
  assert found.high - found.low == pytest.approx(width, rel=0.05)


def _simulate(rng, seeds, shift, seed_deviation):
  """Returns the correctness of two settings whose difference is `shift`."""
  examples = rng.normal(0, 0.1, 300)
  return [
    rng.random((seeds, 300))
    < 0.6 + s + examples + rng.normal(0, seed_deviation, (seeds, 1))
    for s in (shift, 0)
  ]


def test_coverage_and_false_alarms():
  rng = np.random.default_rng(2)
  trials, shift, deviation = 300, 0.04, 0.03
  covered = blind = alarms = 0
  for trial in range(trials):
    options = {'resamples': 400, 'seed': trial}
    a, b = _simulate(rng, 4, shift, deviation)
    found = paired_bootstrap(a, b, **options)
    covered += found.low <= shift <= found.high
    # The mean over seeds as one network: ignores the variance of seeds.
    means = a.mean(0, keepdims=True), b.mean(0, keepdims=True)
    found = paired_bootstrap(*means, **options)
    blind += found.low <= shift <= found.high
    alarms += paired_bootstrap(*_simulate(rng, 4, 0, 0), **options).p < 0.05
  # Three binomial deviations, 0.038, around 0.95 and 0.05; and 0.03 below, for
  # the normal quantile with four seeds.
  assert 0.88 <= covered / trials <= 0.988
  assert blind / trials < 0.82
  assert 0.012 <= alarms / trials <= 0.088


def test_what_seeds_share_cancels_in_pairs():
  rng = np.random.default_rng(3)
  shared = 0.2 * rng.normal(size=(6, 1))
  a, b = rng.normal(0, 0.1, (2, 6, 200)) + shared
  pairs = paired_bootstrap(a, b, paired_seeds=True)
  apart = paired_bootstrap(a, b)
  assert pairs.value == apart.value
  assert apart.high - apart.low > 5 * (pairs.high - pairs.low)
  back = paired_bootstrap(b, a, paired_seeds=True)
  assert (back.value, back.low, back.high) == pytest.approx(
    (-pairs.value, -pairs.high, -pairs.low), rel=1e-9
  )


def test_the_same_and_the_opposite():
  a = np.arange(40).reshape(2, 20) % 3 == 0
  same = paired_bootstrap(a, a, paired_seeds=True)
  assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
  ones = np.ones((2, 20))
  opposite = paired_bootstrap(ones, 0 * ones[:1], resamples=999)
  assert (opposite.value, opposite.low, opposite.high) == (1, 1, 1)
  assert opposite.p == 2 / 1000
  again = [paired_bootstrap(a, ~a, seed=s, resamples=50) for s in (5, 5, 6)]
  assert again[0] == again[1] != again[2]


@pytest.mark.parametrize(
  'function, arguments, options, message',
  [
    (mcnemar, ([True], [True, False]), {}, r'got bool\[1\] and bool\[2\]'),
    (mcnemar, ([1, 0], [True, False]), {}, r'got int64\[2\] and bool\[2\]'),
    (mean_interval, ([1, 0],), {}, r'values must be .*; got shape \[2\]'),
    (mean_interval, ([[1]],), {}, r'got shape \[1, 1\]'),
    (mean_interval, ([[1, 0]],), {'resamples': 0}, 'at least 1; got 0'),
    (mean_interval, ([[1, np.nan]],), {}, 'values must be finite'),
    (paired_bootstrap, ([[1, 0]], [[1, 0, 1]]), {}, r'\[1, 2\] and \[1, 3\]'),
    (
      paired_bootstrap,
      ([[1, 0]], [[1, 0], [0, 1]]),
      {'paired_seeds': True},
      'equal in number; got 1 and 2',
    ),
  ],
)
def test_bad_arguments(function, arguments, options, message):
  with pytest.raises(ValueError, match=message):
    function(*arguments, **options)
