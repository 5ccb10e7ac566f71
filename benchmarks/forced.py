"""Gates that are paid for, but not obeyed."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.models.gated import gated_blocks


class ForcedGate(Gate):
  """Computes what a gate decides, and decides as it was told.

  Args:
    gate: is computed all the same: it is a part of the cost.
    mask: float32[N, h, w] of {0, 1}, the decision.
  """

  def __init__(self, gate: Gate, mask: np.ndarray):
    super().__init__()
    self.deterministic = True
    self.per_image, self.interpolates = gate.per_image, gate.interpolates
    self.spans_stage = gate.spans_stage
    self.gate = gate
    self.mask = nnx.Variable(jnp.asarray(mask, jnp.float32))

  def __call__(self, x, carry=None, **kwargs):
    its, _ = carry or (None, None)
    decision, its = self.gate(x, its, **kwargs)
    # No decision is negative. Without the dependence XLA would leave the gate
    # out.
    hard = jnp.where(decision.hard < 0, decision.hard, self.mask[...])
    return Decision(hard, decision.score), (its, decision.hard)

  def end_stage(self, x, carry):
    its, decided = carry
    output, its = self.gate.end_stage(x, its)
    # A stage's output is its last block's; the gates' is computed as well.
    return jnp.where(jnp.sum(decided) < 0, output, x), (its, decided)


def force_gates(
  model: nnx.Module, masks: Mapping[str, np.ndarray]
) -> nnx.Module:
  """Returns a copy of a network whose gates decide as they are told.

  Args:
    model: in evaluation.
    masks: float32[N, h, w] of {0, 1} by the blocks' names. The gates of other
      blocks decide by themselves; blocks without a gate have no use for one.
  """
  model = nnx.clone(model)
  for block in gated_blocks(model):
    if block.masker is not None and block.name in masks:
      block.masker = ForcedGate(block.masker, masks[block.name])
  return model
