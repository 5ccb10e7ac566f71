"""Exact multiply-accumulate counts of networks, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynconv_jax.macs.conventions import CONVENTIONS, Convention
from dynconv_jax.macs.formulas import Work
from dynconv_jax.macs.registry import register
from dynconv_jax.macs.report import (
  Distribution,
  LayerMacs,
  Report,
  Uncounted,
  UncountedWarning,
  distribution,
)

if TYPE_CHECKING:
  from dynconv_jax.macs.jaxpr import count_macs as count_macs

__all__ = [
  'CONVENTIONS',
  'Convention',
  'Distribution',
  'LayerMacs',
  'Report',
  'Uncounted',
  'UncountedWarning',
  'Work',
  'count_macs',
  'distribution',
  'register',
]


def __getattr__(name):
  # Imported lazily: counting PyTorch or ONNX models does not need JAX.
  if name == 'count_macs':
    from dynconv_jax.macs.jaxpr import count_macs

    return count_macs
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
