"""SkipNet: one decision per image and block, trained in two stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.masks import ExecutionMask, check_scores
from dynconv_jax.methods.budget import Opening, Warmup
from dynconv_jax.methods.gate import (
  Decision,
  Gate,
  GateSite,
  MakeGate,
  conv1x1,
)
from dynconv_jax.methods.gumbel import straight_through
from dynconv_jax.methods.method import Method
from dynconv_jax.options import NOT_NEGATIVE, POSITIVE, option

SKIP_GATES = ('ff1', 'ff2', 'recurrent')
SKIP_TRAININGS = ('supervised', 'reinforce')

# Size of the recurrent gate's input and state (authors' code).
_HIDDEN = 10


class SkipGate(Gate):
  """A per-image gate; subclasses compute its logit.

  Wang et al., ECCV 2018, section 3 and the authors' code. A gate reads the
  output of one block and decides about the next, `x = m block(x) + (1 - m) x`.
  If the shapes differ, the kept x is projected. A block is executed if its
  probability exceeds 1/2. Only reinforcement training samples decisions,
  regardless of `gumbel_noise`; no gradient flows through the samples.

  Args:
    training: 'supervised', straight-through; or 'reinforce', sampled.
  """

  per_image = True
  interpolates = True

  def __init__(self, training: str):
    super().__init__()
    self.training = training

  @property
  def last_layer(self) -> nnx.Conv | nnx.Linear | None:
    """The layer that computes the logits; None if it is in another gate."""
    raise NotImplementedError

  def open(self, logit: float) -> None:
    """Sets the logit of all images; above 0, the block is executed."""
    if layer := self.last_layer:
      layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
      # If the layer has two outputs, the logit is their difference.
      bias = jnp.zeros_like(layer.bias[...])
      layer.bias[...] = bias.at[-1].set(logit)

  def sharpen(self, temperature: float) -> None:
    """Divides the weights of the last layer, and thus the logits, in place."""
    if layer := self.last_layer:
      for variable in (layer.kernel, layer.bias):
        variable[...] = variable[...] / temperature

  def logits(self, x: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """Returns float32[N] logits, above 0 to execute, and the carry.

    Args:
      x: float32[N, H, W, C], the output of the previous block.
      carry: the carry of the previous gate; None for the first.
    """
    raise NotImplementedError

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    logits, carry = self.logits(x.astype(jnp.float32), carry)
    score = nnx.sigmoid(logits)[:, None, None]
    if self.training == 'reinforce' and not self.deterministic:
      sample = jax.random.bernoulli(self.key(rngs), score)
      return Decision(sample.astype(jnp.float32), score), carry
    hard = (score > 0.5).astype(jnp.float32)
    return Decision(straight_through(hard, score), score), carry


class FeedForwardGate(SkipGate):
  """Convolutions with batch norm, the global average, and a linear map.

  Wang et al., ECCV 2018, figure 3 and the authors' code. FF-I has a 2x2 max
  pooling, a 3x3 convolution, and a strided 3x3 convolution; FF-II has only the
  strided convolution. Both keep the number of channels. The softmax over (skip,
  execute) is computed as the sigmoid of the difference. Relative to a basic
  block without projection, the gate costs 16 % of the block's MACs for FF-I and
  12.5 % for FF-II; a recurrent gate costs less than 1 %.

  Args:
    in_features: channels of the block's input.
    pooled: whether the gate is FF-I instead of FF-II.
    training: see `SkipGate`.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self, in_features: int, *, pooled: bool, training: str, rngs: nnx.Rngs
  ):
    super().__init__(training)
    self.pooled = pooled

    def conv3x3(strides):
      return conv(
        in_features,
        in_features,
        3,
        strides=strides,
        dtype=jnp.float32,
        rngs=rngs,
      )

    self.conv1 = conv3x3(1 if pooled else 2)
    self.bn1 = BatchNorm(in_features, rngs=rngs)
    self.conv2 = nnx.data(conv3x3(2) if pooled else None)
    self.bn2 = nnx.data(BatchNorm(in_features, rngs=rngs) if pooled else None)
    self.linear = conv1x1(in_features, 2, rngs=rngs)

  @property
  def last_layer(self):
    return self.linear

  def logits(self, x, carry):
    if self.pooled:
      x = _halve(x)
    x = nnx.relu(self.bn1(self.conv1(x)))
    if self.pooled:
      x = nnx.relu(self.bn2(self.conv2(x)))
    x = self.linear(jnp.mean(x, axis=(1, 2), keepdims=True))[:, 0, 0]
    return x[:, 1] - x[:, 0], carry


class Control(nnx.Module):
  """An LSTM over the sequence of gates, and a linear map of its output.

  Args:
    rngs: random streams; uses `params`.
  """

  def __init__(self, *, rngs: nnx.Rngs):
    init = nnx.initializers.glorot_normal()  # As in the authors' code.
    self.rnn = nnx.OptimizedLSTMCell(
      _HIDDEN,
      _HIDDEN,
      kernel_init=init,
      recurrent_kernel_init=init,
      dtype=jnp.float32,
      rngs=rngs,
    )
    self.proj = nnx.Linear(
      _HIDDEN, 1, kernel_init=init, dtype=jnp.float32, rngs=rngs
    )

  def __call__(
    self, x: jax.Array, state: tuple[jax.Array, jax.Array] | None
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns float32[N] logits, and the new state.

    Args:
      x: float32[N, 10].
      state: cell and output, float32[N, 10] each; None for zeros.
    """
    if state is None:
      state = (jnp.zeros_like(x), jnp.zeros_like(x))
    state, y = self.rnn(state, x)
    return self.proj(y)[:, 0], state


class RecurrentGate(SkipGate):
  """The global average, a 1x1 convolution, and an LSTM shared by all gates.

  Wang et al., ECCV 2018, figure 3 and the authors' code. The network's first
  gate owns the LSTM and passes it on in the carry, with its state. A module
  referenced by several gates would be copied or rejected when the state is
  split in tree mode.

  Args:
    in_features: channels of the block's input.
    first: whether this is the network's first gate.
    training: see `SkipGate`.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self, in_features: int, *, first: bool, training: str, rngs: nnx.Rngs
  ):
    super().__init__(training)
    self.embed = conv1x1(in_features, _HIDDEN, rngs=rngs)
    self.control = nnx.data(Control(rngs=rngs) if first else None)

  @property
  def last_layer(self):
    return self.control and self.control.proj

  def logits(self, x, carry):
    control, state = carry or (self.control, None)
    if control is None:
      raise ValueError(
        'a recurrent gate needs the carry of the previous gate; got None for a '
        'gate that is not the first'
      )
    x = self.embed(jnp.mean(x, axis=(1, 2), keepdims=True))[:, 0, 0]
    logits, state = control(x, state)
    return logits, (control, state)

  def record(self, hard, carry):
    # The LSTM makes no step for this block.
    return carry or (self.control, None)


def _halve(x: jax.Array) -> jax.Array:
  """Returns the 2x2 max pooling at stride 2; an extent of 1 stays.

  Reshapes, because the gradient of XLA's reduce_window is slow on CPUs.
  """
  n, h, w, c = x.shape
  rows, columns = min(2, h), min(2, w)
  x = x[:, : h // rows * rows, : w // columns * columns]
  return jnp.max(
    x.reshape(n, h // rows, rows, w // columns, columns, c), axis=(2, 4)
  )


@dataclasses.dataclass(frozen=True)
class Options(Warmup, Opening):
  """SkipNet's options."""

  skip_gate: str = option(
    'recurrent',
    f"Type of SkipNet's gates: {', '.join(SKIP_GATES)}.",
    allowed=SKIP_GATES,
  )
  skip_training: str = option(
    'supervised',
    "SkipNet's training stage: supervised, or reinforce, which starts from a "
    'trained network.',
    allowed=SKIP_TRAININGS,
  )
  skip_temperature: float = option(
    1.0,
    "Divides the logits of SkipNet's gates once, before training. Below 1, as "
    "in the authors' second stage (0.05), samples are nearly deterministic.",
    allowed=POSITIVE,
  )
  skip_weight: float = option(
    0.1,
    "SkipNet's alpha: the cost of executing, or the reward for skipping, all "
    'gated blocks.',
    allowed=NOT_NEGATIVE,
  )
  reinforce_weight: float = option(
    0.01,
    "Weight of SkipNet's REINFORCE loss in the second stage.",
    allowed=NOT_NEGATIVE,
  )

  def alpha(self, progress: float | jax.Array) -> float | jax.Array:
    """Returns the skip weight at the given training progress."""
    return self.skip_weight * self.warm(progress)


def make_gates(
  options: Options, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns a function that makes a block's gate; the first block has none."""
  if len(sites) < 2:
    raise ValueError(
      'skipnet needs two gated blocks or more, because the first always runs; '
      f'this network has {len(sites)}'
    )
  order = {site.name: i for i, site in enumerate(sites)}

  def make(site: GateSite) -> SkipGate | None:
    number = order[site.name]
    if number == 0:
      return None
    training = options.skip_training
    if options.skip_gate == 'recurrent':
      return RecurrentGate(
        site.in_features, first=number == 1, training=training, rngs=rngs
      )
    pooled = options.skip_gate == 'ff1'
    return FeedForwardGate(
      site.in_features, pooled=pooled, training=training, rngs=rngs
    )

  return make


def skip_penalty(masks: Sequence[ExecutionMask]) -> jax.Array:
  """Returns the unweighted penalty of SkipNet's supervised training.

  The mean over gated blocks of the batch mean of the gate. The authors' first
  stage has no such term. Here it replaces the reward for skipping, which they
  use only in the second stage (Wang et al., ECCV 2018, section 3.3).

  Args:
    masks: one mask per gated block, with straight-through gradients.

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
  """Returns the rewards of SkipNet's gates, float32[blocks, N].

  R_i = -cross_entropy + the sum over j >= i of (1 - a_j) skip_weight / blocks.
  A gate is credited for skipping its own block and for all later skipped blocks
  (Wang et al., ECCV 2018, section 3.3 and the authors' code).

  Args:
    actions: float32[blocks, N] of {0, 1}, 1 if a block was executed.
    cross_entropy: float32[N], one value per image.
    skip_weight: the paper's alpha, the reward for skipping all gated blocks.
  """
  rewards = (1 - actions) * (skip_weight / len(actions))
  return jax.lax.cumsum(rewards, axis=0, reverse=True) - cross_entropy


def reinforce_loss(
  masks: Sequence[ExecutionMask],
  cross_entropy: jax.Array,
  skip_weight: float | jax.Array,
) -> jax.Array:
  """Returns an unweighted loss whose gradient is that of REINFORCE.

  The sum over gates of the batch mean of -log p(a_i) R_i, with the rewards of
  `skip_rewards` as constants. In expectation over the sampled actions, its
  gradient is that of the negative expected reward (Williams, 1992; Wang et al.,
  ECCV 2018, section 3.3). The authors weight it by 0.01. The value itself is
  not meaningful.

  Args:
    masks: one mask per gated block, sampled per image from its `score`.
    cross_entropy: float32[N], one value per image under these masks.
    skip_weight: the paper's alpha.

  Returns:
    float32 scalar.

  Raises:
    ValueError: there are no masks, or a mask has no score.
  """
  check_scores(
    masks,
    'REINFORCE needs masks with the probabilities they were sampled from',
  )
  # Constant over positions.
  actions = jnp.stack([mask.hard[:, 0, 0] for mask in masks])
  scores = jnp.stack([mask.score[:, 0, 0] for mask in masks])
  rewards = skip_rewards(actions, cross_entropy, skip_weight)
  # The probability of a sampled action is above 0.
  log_p = jnp.log(jnp.where(actions == 1, scores, 1 - scores))
  losses = -log_p * jax.lax.stop_gradient(rewards)
  return jnp.sum(jnp.mean(losses, axis=1))


def _loss(options, masks, cross_entropy, progress):
  alpha = options.alpha(progress)
  if options.skip_training == 'supervised':
    return alpha, skip_penalty(masks)
  return options.reinforce_weight, reinforce_loss(masks, cross_entropy, alpha)


def _open(options: Options, gate: SkipGate) -> None:
  if options.mask_bias is not None:
    gate.open(options.mask_bias)


METHOD = Method(
  'skipnet',
  Options,
  make_gates,
  _loss,
  open_gate=_open,
  start_gate=lambda options, gate: gate.sharpen(options.skip_temperature),
  needs_trained=lambda options: (
    'skip_training=reinforce' if options.skip_training == 'reinforce' else ''
  ),
  knob='skip_weight',
  label='SkipNet',
  color='green',
  marker='v',
)
