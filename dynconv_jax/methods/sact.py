"""SACT: adaptive computation time within each stage, per position."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import BatchNorm, conv_general_dilated
from dynconv_jax.masks import ExecutionMask, check_scores
from dynconv_jax.methods.gate import Decision, Gate, GateSite, MakeGate
from dynconv_jax.methods.method import Method
from dynconv_jax.options import NOT_NEGATIVE, option

# A position halts when at most this much of its remainder is left (section
# 3.1).
_EPSILON = 0.01
# Initial logit: low, so that positions do not halt early at first (authors'
# code).
_OPENING = -3.0
# Initialization of TF-slim's convolutions (authors' code).
_kernel_init = nnx.initializers.variance_scaling(
  2.0, 'fan_in', 'truncated_normal'
)


class _Halting(NamedTuple):
  """The state of a stage after some of its units.

  Attributes:
    active: bool[N, h, w], positions that have not halted; [N, 1, 1] in ACT.
    remainder: float32 in the same shape, 1 minus the sum of the scores before
      halting.
    output: float32[N, h, w, C], weighted sum of the states so far.
  """

  active: jax.Array
  remainder: jax.Array
  output: jax.Array


class HaltingUnit(Gate):
  """A gate that executes a residual unit at positions that have not halted.

  Figurnov et al., CVPR 2017, sections 3.1 and 3.2, and the authors' code. A
  stage is one computation of at most L units, its blocks. Each unit except the
  last is followed by a halting score, computed from the state. A position halts
  once its scores add up to 1 - 0.01. The stage's output is the weighted sum of
  the states: each state is weighted by its score, except the state at which a
  position halts, which is weighted by the remainder. The first unit runs
  everywhere and has no gate. The gate of unit l reads and scores the state
  after unit l - 1.

  Nothing is sampled: training and evaluation differ only in batch statistics.
  The mask has no gradient. The scores get theirs from the weighted output and
  the ponder cost. Sums are float32 regardless of the compute dtype, because in
  bfloat16 the weights of a long stage would not add up to 1.

  Args:
    in_features: channels of the block's input.
    spatial: whether each position halts separately (SACT) or the whole image
      halts at once (ACT).
    rngs: random streams; uses `params`.
  """

  spans_stage = True

  def __init__(
    self,
    in_features: int,
    *,
    spatial: bool,
    rngs: nnx.Rngs,
  ):
    super().__init__()
    self.per_image = not spatial
    opening = nnx.initializers.constant(_OPENING)
    self.local_norm = self.local_conv = nnx.data(None)
    if spatial:
      self.local_norm = BatchNorm(in_features, rngs=rngs)
      self.local_conv = nnx.Conv(
        in_features,
        1,
        (3, 3),
        padding=((1, 1), (1, 1)),
        dtype=jnp.float32,
        kernel_init=_kernel_init,
        bias_init=opening,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
      )
    self.global_norm = BatchNorm(in_features, rngs=rngs)
    self.global_fc = nnx.Linear(
      in_features,
      1,
      use_bias=not spatial,  # In SACT, the convolution has the bias.
      dtype=jnp.float32,
      kernel_init=_kernel_init,
      bias_init=opening,
      rngs=rngs,
    )

  def score(self, x: jax.Array) -> jax.Array:
    """Returns halting scores in [0, 1], float32[N, h, w]; [N, 1, 1] in ACT.

    Args:
      x: float[N, h, w, C], the state to score.
    """
    x = x.astype(jnp.float32)
    average = jnp.mean(x, axis=(1, 2), keepdims=True)
    logits = self.global_fc(self.global_norm(average))
    if self.local_conv is not None:
      logits += self.local_conv(self.local_norm(x))
    return jax.nn.sigmoid(logits[..., 0])

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    del rngs, temperature, gumbel_noise
    score = self.score(x)
    if carry is None:
      carry = _Halting(
        active=jnp.ones(score.shape, bool),
        remainder=jnp.ones_like(score),
        output=jnp.zeros(x.shape, jnp.float32),
      )
    left = carry.remainder - score
    active = carry.active & (left > _EPSILON)
    weight = jnp.where(active, score, carry.active * carry.remainder)
    carry = _Halting(
      active=active,
      remainder=jnp.where(active, left, carry.remainder),
      output=carry.output + weight[..., None] * x,
    )
    return Decision(active.astype(jnp.float32), score), carry

  def end_stage(self, x, carry):
    # Positions that are still active halt at the last unit.
    weight = carry.active * carry.remainder
    return (carry.output + weight[..., None] * x).astype(x.dtype), None


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of SACT and ACT."""

  ponder_weight: float = option(
    0.01,
    'Weight of the ponder cost of SACT and ACT. The paper uses 0.005 on '
    'ImageNet.',
    allowed=NOT_NEGATIVE,
  )


def halting_gates(
  name: str, spatial: bool, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns a function that makes a block's halting unit.

  Args:
    name: name of the method, for messages.
    spatial: whether each position halts separately.
    sites: all sites of the network.
    rngs: random streams; uses `params`.

  Raises:
    ValueError: no stage has two blocks or more.
  """
  if not any(site.stage_index > 0 for site in sites):
    raise ValueError(
      f'{name} needs a stage of two blocks or more, because the first block of '
      'a stage always runs; the network has one block per stage'
    )
  return lambda site: (
    HaltingUnit(site.in_features, spatial=spatial, rngs=rngs)
    if site.stage_index > 0
    else None
  )


def ponder_cost(masks: Sequence[ExecutionMask]) -> jax.Array:
  """Returns the unweighted ponder cost of SACT and ACT.

  A position costs N + R in each stage: the number N of units until it halts,
  plus the remainder R that weights its last state (Figurnov et al., CVPR 2017,
  section 3.1). The cost is averaged over positions and images and summed over
  stages. Only R has a gradient. A stage of one block has no gate and adds
  nothing. The authors weight the cost by 0.005 on ImageNet and 0.01 on CIFAR.

  Args:
    masks: one mask per gated block, with halting scores.

  Returns:
    float32 scalar.

  Raises:
    ValueError: there are no masks, or a mask has no score.
  """
  check_scores(masks, 'the ponder cost needs masks with halting scores')
  stages: dict[int, jax.Array] = {}
  for mask in masks:
    # N is 1 plus the number of masks that are set. R is 1 minus the scores
    # under those masks.
    cost = stages.get(mask.stage, 2.0) + mask.hard * (1 - mask.score)
    stages[mask.stage] = cost
  return sum(jnp.mean(cost) for cost in stages.values())


def halting_loss(options, masks, cross_entropy, progress):
  """Returns (weight, ponder cost); see `Method.loss`."""
  del cross_entropy, progress
  return options.ponder_weight, ponder_cost(masks)


METHOD = Method(
  'sact',
  Options,
  lambda options, sites, rngs: halting_gates('sact', True, sites, rngs),
  halting_loss,
  knob='ponder_weight',
  label='SACT',
  color='purple',
  marker='D',
)
