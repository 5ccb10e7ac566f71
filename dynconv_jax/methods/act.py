"""ACT: adaptive computation time within each stage, per image."""

from __future__ import annotations

from dynconv_jax.methods.method import Method
from dynconv_jax.methods.sact import Options, halting_gates, halting_loss

METHOD = Method(
  'act',
  Options,
  lambda options, sites, rngs: halting_gates('act', False, sites, rngs),
  halting_loss,
  knob='ponder_weight',
  label='ACT',
  color='orange',
  marker='P',
)
