"""What networks cost in multiply-accumulates, exactly and layer by layer."""

from dynconv_jax.macs.conventions import CONVENTIONS, Convention
from dynconv_jax.macs.jaxpr import count_macs
from dynconv_jax.macs.report import (
  Distribution,
  LayerMacs,
  Report,
  Uncounted,
  UncountedWarning,
  distribution,
)

__all__ = [
  'CONVENTIONS',
  'Convention',
  'Distribution',
  'LayerMacs',
  'Report',
  'Uncounted',
  'UncountedWarning',
  'count_macs',
  'distribution',
]
