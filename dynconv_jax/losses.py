"""What computing costs in training, and the classification losses."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from dynconv_jax.masks import ExecutionMask

# Share of the training after which the per-block bounds are fully open
# (authors' code, `SparsityCriterion`).
_ANNEALED = 0.33


def budget_bounds(
  budget: float | jax.Array, progress: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the (lower, upper) bound of a block's executed fraction.

  Both are the budget at the start and open to [0, 1] by a third of the
  training (Verelst and Tuytelaars, CVPR 2020, section 3.4).

  Args:
    budget: target executed fraction, in [0, 1].
    progress: share of the training that is done, in [0, 1].
  """
  q = jnp.cos(jnp.pi / 2 * jnp.minimum(1.0, progress / _ANNEALED)) ** 2
  return q * budget, 1.0 - q * (1.0 - budget)


def executed_fractions(
  masks: Sequence[ExecutionMask],
) -> tuple[jax.Array, jax.Array]:
  """Returns executed over dense MACs of the masked layers, over the batch.

  Args:
    masks: one a gated block.

  Returns:
    network: float32 scalar, of all masked layers together.
    blocks: float32[blocks].
  """
  executed = jnp.stack([jnp.mean(mask.executed_macs()) for mask in masks])
  dense = jnp.array([mask.dense_macs() for mask in masks], jnp.float32)
  return jnp.sum(executed) / jnp.sum(dense), executed / dense


def sparsity_loss(
  masks: Sequence[ExecutionMask],
  *,
  budget: float | jax.Array,
  progress: float | jax.Array,
) -> jax.Array:
  """Returns DynConv's loss on the executed fraction, unweighted.

  The network's executed fraction is drawn to the budget, each block's into
  bounds that open as training goes on (Verelst and Tuytelaars, CVPR 2020,
  section 3.4; the authors weigh it by 10, by 0.01 for pose).

  Args:
    masks: one a gated block, with straight-through gradients.
    budget: target executed fraction of the masked layers' MACs, in [0, 1].
    progress: share of the training that is done, in [0, 1].

  Returns:
    float32 scalar.

  Raises:
    ValueError: there are no masks, or a constant budget is outside [0, 1].
  """
  if not masks:
    raise ValueError(
      'the sparsity loss needs at least one execution mask; got none: '
      'a dense network has no budget'
    )
  if not isinstance(budget, jax.Array) and not 0 <= budget <= 1:
    raise ValueError(f'budget must be in [0, 1]; got {budget}')
  network, blocks = executed_fractions(masks)
  lower, upper = budget_bounds(budget, progress)
  outside = jax.nn.relu(blocks - upper) ** 2 + jax.nn.relu(lower - blocks) ** 2
  return (network - budget) ** 2 + jnp.mean(outside)


def target_rate_loss(
  masks: Sequence[ExecutionMask], target_rates: Sequence[float]
) -> jax.Array:
  """Returns ConvNet-AIG's loss on the execution rates, unweighted.

  Mean over the gated blocks of (target - batch mean of the gate)^2 (Veit and
  Belongie, ECCV 2018, section 3.3; the authors weigh it by 2 on CIFAR and by 1
  on ImageNet).

  Args:
    masks: one a gated block, with straight-through gradients.
    target_rates: one a gated block, in [0, 1].

  Returns:
    float32 scalar.

  Raises:
    ValueError: there is not one target a mask, or no mask.
  """
  if not masks or len(masks) != len(target_rates):
    raise ValueError(
      'target_rates must be one a gated block, and at least one; got '
      f'{len(target_rates)} for {len(masks)} masks'
    )
  rates = jnp.stack([jnp.mean(mask.density()) for mask in masks])
  return jnp.mean((jnp.array(target_rates, jnp.float32) - rates) ** 2)


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
  _check_scores(masks, 'the ponder cost needs masks with halting scores')
  stages: dict[int, jax.Array] = {}
  for mask in masks:
    # N is 1 and a unit more for each mask that is set; R is 1 less the scores
    # read there, of the units that did not halt.
    cost = stages.get(mask.stage, 2.0) + mask.hard * (1 - mask.score)
    stages[mask.stage] = cost
  return sum(jnp.mean(cost) for cost in stages.values())


def skip_penalty(masks: Sequence[ExecutionMask]) -> jax.Array:
  """Returns SkipNet's price of computing in supervised training, unweighted.

  Mean over the gated blocks of the batch mean of the gate. The authors' first
  stage has no such term; their reward for skipping, which it takes the place
  of, is that of the second (Wang et al., ECCV 2018, section 3.3).

  Args:
    masks: one a gated block, with straight-through gradients.

  Returns:
    float32 scalar in [0, 1].

  Raises:
    ValueError: there are no masks.
  """
  if not masks:
    raise ValueError('the skip penalty needs at least one mask; got none')
  return jnp.mean(jnp.stack([jnp.mean(mask.density()) for mask in masks]))


def skip_rewards(
  actions: jax.Array,
  cross_entropy: jax.Array,
  skip_weight: float | jax.Array,
) -> jax.Array:
  """Returns what each of SkipNet's gates has to gain, float32[blocks, N].

  R_i = -cross_entropy + the sum over j >= i of (1 - a_j) skip_weight / blocks:
  of what is skipped, a gate is credited with its own block and those after it
  (Wang et al., ECCV 2018, section 3.3 and the authors' code).

  Args:
    actions: float32[blocks, N] of {0, 1}, 1 where a block was executed.
    cross_entropy: float32[N], of each image.
    skip_weight: the paper's alpha, the reward for skipping every gated block.
  """
  rewards = (1 - actions) * (skip_weight / len(actions))
  return jax.lax.cumsum(rewards, axis=0, reverse=True) - cross_entropy


def reinforce_loss(
  masks: Sequence[ExecutionMask],
  cross_entropy: jax.Array,
  skip_weight: float | jax.Array,
) -> jax.Array:
  """Returns a loss whose gradient is REINFORCE's, unweighted.

  The sum over gates of the batch mean of -log p(a_i) R_i, with the rewards of
  `skip_rewards` taken as constants: in expectation over the sampled actions its
  gradient is that of the negative expected reward (Williams, 1992; Wang et al.,
  ECCV 2018, section 3.3; the authors weigh it by 0.01). Its value means little.

  Args:
    masks: one a gated block, sampled per image from their `score`.
    cross_entropy: float32[N], of each image under these masks.
    skip_weight: the paper's alpha.

  Returns:
    float32 scalar.

  Raises:
    ValueError: there are no masks, or some have no score.
  """
  _check_scores(
    masks,
    'REINFORCE needs masks with the probabilities they were sampled from',
  )
  # Constant over positions.
  actions = jnp.stack([mask.hard[:, 0, 0] for mask in masks])
  scores = jnp.stack([mask.score[:, 0, 0] for mask in masks])
  rewards = skip_rewards(actions, cross_entropy, skip_weight)
  # What was sampled has a probability above 0.
  log_p = jnp.log(jnp.where(actions == 1, scores, 1 - scores))
  losses = -log_p * jax.lax.stop_gradient(rewards)
  return jnp.sum(jnp.mean(losses, axis=1))


def _check_scores(masks: Sequence[ExecutionMask], need: str) -> None:
  without = [mask.name for mask in masks if mask.score is None]
  if without or not masks:
    raise ValueError(f'{need}; got {without or "none"}')


def distillation_loss(
  logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
  """Returns the divergence of the student from its teacher, a mean.

  Hinton, Vinyals and Dean, 2015, section 2: KL(teacher || student) of the
  softened probabilities, times the squared temperature.

  Args:
    logits: float32[N, classes] of the student.
    teacher_logits: float32[N, classes]; no gradient flows to them.
    temperature: softens both, > 0.
  """
  targets = jax.nn.log_softmax(
    jax.lax.stop_gradient(teacher_logits) / temperature
  )
  divergence = optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(logits / temperature), targets
  )
  return temperature**2 * jnp.mean(divergence)
