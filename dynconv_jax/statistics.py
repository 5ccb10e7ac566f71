"""Paired tests of whether one network is better than another.

The tests compare two sets of networks on the same examples, so only examples on
which they differ matter. Intervals account for the sampling of examples and,
given several seeds, of seeds. With a single seed, the interval applies only to
that network.
"""

from __future__ import annotations

import dataclasses

import numpy as np

RESAMPLES = 10_000
# Resamples per batch: 1,000 x 1,500 examples take 12 MB.
_BATCH = 1_000


@dataclasses.dataclass(frozen=True)
class McNemar:
  """McNemar's exact test of two networks on the same examples.

  Attributes:
    only_a: examples that only the first got right.
    only_b: examples that only the second got right.
    p: two-sided p-value.
  """

  only_a: int
  only_b: int
  p: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean, or a difference of means, with its 95 % interval.

  Attributes:
    value: mean over all seeds and examples, in the unit of the values.
    low: 2.5 % quantile of the resampled means.
    high: 97.5 % quantile.
    p: two-sided p-value of the hypothesis that the mean is 0; at least
      2 / (resamples + 1).
  """

  value: float
  low: float
  high: float
  p: float


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
  """Returns an exact test of whether two networks are right equally often.

  Only examples on which exactly one network is right matter. If the networks
  are equally good, each of these is a fair coin (McNemar, Psychometrika 1947).

  Args:
    correct_a: bool[n], correctness of the first network.
    correct_b: bool[n], correctness of the second network on the same examples.

  Raises:
    ValueError: the arrays are not bool[n] with the same n.
  """
  a, b = np.asarray(correct_a), np.asarray(correct_b)
  if (
    a.ndim != 1 or a.shape != b.shape or {a.dtype, b.dtype} != {np.dtype(bool)}
  ):
    raise ValueError(
      'correct_a and correct_b must be bool[n] of the same examples; got '
      f'{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}'
    )
  only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
  n = only_a + only_b
  from scipy import stats  # Imported here because it takes a second.

  return McNemar(
    only_a, only_b, stats.binomtest(only_a, n).pvalue if n else 1.0
  )


def mean_interval(
  values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
  """Returns the mean over seeds and examples with its bootstrap interval.

  Args:
    values: float or bool[seeds, n], such as correctness.
    resamples: number of bootstrap draws.
    seed: seed of the resampling.

  Raises:
    ValueError: see `paired_bootstrap`.
  """
  values = _checked('values', values)
  return _bootstrap(values.mean(0), [values], resamples, seed)


def paired_bootstrap(
  a: np.ndarray,
  b: np.ndarray,
  *,
  paired_seeds: bool = False,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Estimate:
  """Returns mean(a) - mean(b) with its bootstrap interval and p value.

  Examples are resampled jointly for all networks. Seeds are resampled through
  their effects, the deviations of seeds' means from the overall mean. Effects
  are scaled to the unbiased variance estimate of the two-way layout, as in
  Carpenter, Goldstein, and Rasbash, JRSS C 2003. Drawing seeds and examples
  independently would count their interaction three times (Owen, Annals of
  Applied Statistics 2007).

  Two or three seeds yield only a rough estimate of the seeds' variance.

  Args:
    a: float or bool[seeds, n], such as correctness.
    b: float or bool[seeds of b, n], for the same examples in the same order.
    paired_seeds: whether row i of both arrays comes from the same seed. If so,
      the effects of seeds are those on the difference.
    resamples: number of bootstrap draws.
    seed: seed of the resampling.

  Raises:
    ValueError: the shapes do not match, values are not finite, there are fewer
      than two examples, or resamples is not positive.
  """
  a, b = _checked('a', a), _checked('b', b)
  if a.shape[1] != b.shape[1]:
    raise ValueError(
      'a and b must have the same number of examples; got '
      f'{list(a.shape)} and {list(b.shape)}'
    )
  if paired_seeds and len(a) != len(b):
    raise ValueError(
      f'paired seeds must be equal in number; got {len(a)} and {len(b)}'
    )
  layouts = [a - b] if paired_seeds else [a, b]
  return _bootstrap(a.mean(0) - b.mean(0), layouts, resamples, seed)


def _bootstrap(per_example, layouts, resamples: int, seed: int) -> Estimate:
  """Returns the estimate of the mean over examples.

  Args:
    per_example: float[n], means over seeds, or differences of means.
    layouts: one or two arrays float[seeds, n], whose seeds are drawn
      independently.
    resamples: number of draws.
    seed: seed of the draws.
  """
  if resamples < 1:
    raise ValueError(f'resamples must be at least 1; got {resamples}')
  rng, n = np.random.default_rng(seed), len(per_example)
  means = np.concatenate(
    [
      per_example[rng.integers(n, size=(batch, n))].mean(1)
      for batch in np.diff([*range(0, resamples, _BATCH), resamples])
    ]
  )
  for sign, layout in zip((1, -1), layouts, strict=False):
    effects = _seed_effects(layout)
    draws = rng.integers(len(effects), size=(resamples, len(effects)))
    means += sign * effects[draws].mean(1)
  low, high = np.percentile(means, (2.5, 97.5))
  # Counting the value itself as a draw keeps p above 0 (Davison and Hinkley,
  # 1997).
  tail = 1 + min(np.sum(means <= 0), np.sum(means >= 0))
  p = min(1.0, 2 * tail / (resamples + 1))
  return Estimate(float(per_example.mean()), float(low), float(high), float(p))


def _seed_effects(layout: np.ndarray) -> np.ndarray:
  """Returns effects of seeds, float[seeds], with mean 0.

  Their variance is the estimated variance of seeds. In a two-way layout without
  repeats, the mean square between seeds estimates the variance of the
  interaction plus n times that of the seeds. The interaction is subtracted.
  """
  seeds, n = layout.shape
  effects = layout.mean(1) - layout.mean()
  if seeds == 1:
    return effects
  between = n * np.sum(effects**2) / (seeds - 1)
  rest = layout - layout.mean(0) - effects[:, None]
  interaction = np.sum(rest**2) / ((seeds - 1) * (n - 1))
  if between <= interaction:
    return np.zeros(seeds)
  # The factor seeds / (seeds - 1) corrects for resampling, which shrinks the
  # variance.
  return effects * np.sqrt((1 - interaction / between) * seeds / (seeds - 1))


def _checked(name: str, values: np.ndarray) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 2 or len(values) < 1 or values.shape[1] < 2:
    raise ValueError(
      f'{name} must be [seeds, examples], at least one seed and two examples; '
      f'got shape {list(values.shape)}'
    )
  if not np.isfinite(values).all():
    raise ValueError(f'{name} must be finite')
  return values
