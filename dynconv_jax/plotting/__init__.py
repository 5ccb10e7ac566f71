"""Figures: learning curves, block density, ponder maps, accuracy, speed."""

# ruff: noqa: E402  Missing packages are reported before the imports below.

from dynconv_jax import extras

extras.require('train', 'matplotlib', 'PIL')

from dynconv_jax.plotting.curves import plot_block_density, plot_learning_curves
from dynconv_jax.plotting.gains import plot_gains
from dynconv_jax.plotting.ponder import (
  overlay_ponder_map,
  plot_ponder_grid,
  ponder_cost_map,
  save_overlay,
)
from dynconv_jax.plotting.results import read_results
from dynconv_jax.plotting.speedup import plot_speedup
from dynconv_jax.plotting.tradeoff import (
  plot_accuracy_against_macs,
  plot_results,
)

__all__ = [
  'overlay_ponder_map',
  'plot_accuracy_against_macs',
  'plot_block_density',
  'plot_gains',
  'plot_learning_curves',
  'plot_ponder_grid',
  'plot_results',
  'plot_speedup',
  'ponder_cost_map',
  'read_results',
  'save_overlay',
]
