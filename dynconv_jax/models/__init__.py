"""Networks and their gated blocks."""

from dynconv_jax.models.blocks import BasicBlock, Bottleneck, InvertedResidual
from dynconv_jax.models.create import create_model
from dynconv_jax.models.gated import GatedBlock, Gating, gated_blocks

__all__ = [
  'BasicBlock',
  'Bottleneck',
  'GatedBlock',
  'Gating',
  'InvertedResidual',
  'create_model',
  'gated_blocks',
]
