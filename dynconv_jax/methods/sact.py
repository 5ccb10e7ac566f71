"""SACT: adaptive computation time in a stage, for each position."""

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

# A position halts where less than this is left of its score (section 3.1).
_EPSILON = 0.01
# Opening logit, so that nothing halts early at first (authors' code).
_OPENING = -3.0
# That of TF-slim's convolutions (authors' code).
_kernel_init = nnx.initializers.variance_scaling(
  2.0, 'fan_in', 'truncated_normal'
)


class _Halting(NamedTuple):
  """What the units of a stage have done so far.

  Attributes:
    active: bool[N, h, w], where none has halted; of ACT [N, 1, 1].
    remainder: float32 of that shape, 1 less the scores up to halting.
    output: float32[N, h, w, C], the states so far, weighted.
  """

  active: jax.Array
  remainder: jax.Array
  output: jax.Array


class HaltingUnit(Gate):
  """Executes a residual unit where none of the stage has halted before.

  Figurnov et al., CVPR 2017, sections 3.1 and 3.2, and the authors' code. A
  stage is one computation of at most L units, its blocks. After each but the
  last, a halting score is read from the state; a position halts once its
  scores add up to 1 - 0.01. The stage's output is the sum of the states, each
  weighted by its score, the one at which a position halts by what is then left
  of 1. The first unit is executed everywhere and has no gate; the gate of unit
  l reads the state after unit l - 1 and scores that one.

  Nothing is sampled: training and evaluation differ in batch statistics only.
  The mask has no gradient; the scores get theirs from the weighted output and
  the ponder cost. Sums are float32 whatever the compute dtype: in bfloat16 the
  weights of a long stage would not add up to 1.

  Args:
    in_features: channels of the block's input.
    spatial: whether positions halt one by one (SACT), or whole images (ACT).
    rngs: stream `params`.
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
      use_bias=not spatial,  # Of SACT the convolution has it.
      dtype=jnp.float32,
      kernel_init=_kernel_init,
      bias_init=opening,
      rngs=rngs,
    )

  def score(self, x: jax.Array) -> jax.Array:
    """Returns the halting score, float32[N, h, w] in [0, 1], of ACT [N, 1, 1].

    Args:
      x: float[N, h, w, C], the state that is scored.
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
    # The last unit halts whatever is still active.
    weight = carry.active * carry.remainder
    return (carry.output + weight[..., None] * x).astype(x.dtype), None


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of SACT and ACT."""

  ponder_weight: float = option(
    0.01,
    'Weight of the ponder cost of SACT and ACT; on ImageNet the paper has '
    '0.005.',
    allowed=NOT_NEGATIVE,
  )


def halting_gates(
  name: str, spatial: bool, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns what makes the halting unit of a block.

  Args:
    name: of the method.
    spatial: whether positions halt one by one.
    sites: of the network.
    rngs: stream `params`.

  Raises:
    ValueError: no stage has two blocks.
  """
  if not any(site.stage_index > 0 for site in sites):
    raise ValueError(
      f'{name} needs a stage of two blocks or more, because the first of a '
      'stage is always executed; the network has one a stage'
    )
  return lambda site: (
    HaltingUnit(site.in_features, spatial=spatial, rngs=rngs)
    if site.stage_index > 0
    else None
  )


def ponder_cost(masks: Sequence[ExecutionMask]) -> jax.Array:
  """Returns what SACT and ACT pay for computing, unweighted.

  A position pays N + R in a stage: N units until it halts, and the remainder R
  that weighs its last state (Figurnov et al., CVPR 2017, section 3.1). The mean
  over positions and images is summed over the stages; the authors weigh it by
  0.005 on ImageNet and by 0.01 on CIFAR. Only R has a gradient. A stage of one
  block has no gate and adds nothing.

  Args:
    masks: one a gated block, with halting scores.

  Returns:
    float32 scalar.

  Raises:
    ValueError: there are no masks, or some have no score.
  """
  check_scores(masks, 'the ponder cost needs masks with halting scores')
  stages: dict[int, jax.Array] = {}
  for mask in masks:
    # N is 1 and a unit more for each mask that is set; R is 1 less the scores
    # read there, of the units that did not halt.
    cost = stages.get(mask.stage, 2.0) + mask.hard * (1 - mask.score)
    stages[mask.stage] = cost
  return sum(jnp.mean(cost) for cost in stages.values())


def halting_loss(options, masks, cross_entropy, progress):
  """Returns weight and ponder cost; see `Method.loss`."""
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
