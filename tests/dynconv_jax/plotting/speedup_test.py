"""Tests of the figure of speedup against density."""

import numpy as np
import pytest

from dynconv_jax.plotting import speedup


def _runs(batch_size, ratios):
  return [
    {
      'batch_size': batch_size,
      'density': density,
      'sparse_over_fastest_dense': ratio,
      'mac_ideal': 0.1 + 0.9 * density,
    }
    for density, ratio in ratios.items()
  ]


def test_curves_ideal_and_break_even(tmp_path):
  runs = _runs(8, {1.0: 1.25, 0.1: 0.4, 0.5: 0.8}) + _runs(1, {0.5: 0.5})
  figure = speedup.plot_speedup(runs, tmp_path / 'a.png', title='ResNet')
  assert (tmp_path / 'a.png').exists() and (tmp_path / 'a.svg').exists()
  (ax,) = figure.axes
  lines = {line.get_label(): line for line in ax.get_lines()}
  # 1 / 0.8 = 1.25 at 0.5 and 1 / 1.25 = 0.8 at 1: it crosses 1 at 7/9.
  curve = lines['batch 8, break-even at 0.78']
  np.testing.assert_allclose(curve.get_xdata(), [0.1, 0.5, 1.0])
  np.testing.assert_allclose(curve.get_ydata(), [2.5, 1.25, 0.8])
  np.testing.assert_allclose(lines['batch 1'].get_ydata(), [2.0])
  ideal = lines['MAC-proportional ideal']
  np.testing.assert_allclose(ideal.get_xdata(), [0.1, 0.5, 1.0])
  np.testing.assert_allclose(ideal.get_ydata(), [1 / 0.19, 1 / 0.55, 1.0])
  assert ax.get_title(loc='left') == 'ResNet'


def test_masks_of_positions_and_of_patches(tmp_path):
  runs = [
    {**run, 'mask_granularity': patches}
    for patches, ratio in (('1', 0.5), ('4,2', 0.4))
    for run in _runs(1, {0.3: ratio})
  ]
  runs[1]['mac_ideal'] = 0.2
  figure = speedup.plot_speedup(runs, tmp_path / 'a.png')
  lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
  np.testing.assert_allclose(lines['batch 1'].get_ydata(), [2])
  np.testing.assert_allclose(lines['batch 1, patches 4,2'].get_ydata(), [2.5])
  # The ideal is for positions.
  ideal = lines['MAC-proportional ideal']
  np.testing.assert_allclose(ideal.get_ydata(), [1 / 0.37])


@pytest.mark.parametrize(
  'speedups, expected',
  [
    ([2.0, 1.5, 1.1], None),
    ([0.9, 0.8, 0.7], None),
    ([2.0, 1.0, 0.5], 0.5),
    ([3.0, 2.0, 0.0], 0.75),
    # The last of two crossings, because one number cannot describe both.
    ([0.5, 1.5, 0.5], 0.75),
  ],
)
def test_break_even(speedups, expected):
  result = speedup.break_even(np.array([0.1, 0.5, 1.0]), np.array(speedups))
  assert result == (expected if expected is None else pytest.approx(expected))


def test_without_runs(tmp_path):
  with pytest.raises(ValueError, match='there are no runs to plot'):
    speedup.plot_speedup([], tmp_path / 'a.png')
