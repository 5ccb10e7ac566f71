"""Gates that are computed, but whose decisions are replaced."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.models.gated import gated_blocks


class ForcedGate(Gate):
  """A gate that is computed but returns a given decision.

  Args:
    gate: the gate to compute, because it is part of the cost.
    mask: float32[N, h, w] of {0, 1}, the decision to return.
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
    # No decision is negative. Without this dependence, XLA would remove the
    # gate.
    hard = jnp.where(decision.hard < 0, decision.hard, self.mask[...])
    return Decision(hard, decision.score), (its, decision.hard)

  def end_stage(self, x, carry):
    its, decided = carry
    output, its = self.gate.end_stage(x, its)
    # Return the output of the last block, but compute the gate's output too.
    return jnp.where(jnp.sum(decided) < 0, output, x), (its, decided)


def force_gates(
  model: nnx.Module, masks: Mapping[str, np.ndarray]
) -> nnx.Module:
  """Returns a copy of a network whose gates return given decisions.

  Args:
    model: the network, in evaluation.
    masks: float32[N, h, w] of {0, 1}, by block name. Gates of other blocks make
      their own decisions; masks of blocks without a gate are ignored.
  """
  model = nnx.clone(model)
  for block in gated_blocks(model):
    if block.masker is not None and block.name in masks:
      block.masker = ForcedGate(block.masker, masks[block.name])
  return model
