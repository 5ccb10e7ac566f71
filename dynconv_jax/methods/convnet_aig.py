"""ConvNet-AIG: one decision per image and block, with target rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import BatchNorm
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.methods.budget import Budget
from dynconv_jax.methods.gate import (
  Decision,
  Gate,
  GateSite,
  MakeGate,
  conv1x1,
)
from dynconv_jax.methods.gumbel import Gumbel, binary_gumbel
from dynconv_jax.methods.method import Method
from dynconv_jax.options import NOT_NEGATIVE, option

# Hidden channels, and the initial logits of 'skip' and 'execute', which execute
# about 85 % of the blocks (authors' code).
_HIDDEN = 16
_OPENING = (0.1, 2.0)


class LayerGate(Gate):
  """A gate that executes or skips a block's branch for each image.

  Veit and Belongie, ECCV 2018, section 3.2 and the authors' code: a global
  average, two 1x1 convolutions, and a Gumbel-softmax over (skip, execute). With
  two outcomes, this equals the binary Gumbel-softmax of the logits' difference.

  The gate samples in training and takes the likelier outcome in evaluation.
  With ``nnx.view(model, deterministic=False, use_running_average=True)`` it
  also samples in evaluation, as the authors' code does. Execution rates then
  match those of training, but an image's logits vary between calls.

  Args:
    in_features: channels of the block's input.
    rngs: random streams; uses `params`.
  """

  per_image = True
  # In the authors' checkpoints, gates are part of their blocks.
  checkpoint_modules = {
    'downsample': 'shortcut',
    'fc': 'linear',
    'masker': None,
  }

  def __init__(self, in_features: int, *, rngs: nnx.Rngs):
    super().__init__()
    self.fc1 = conv1x1(in_features, _HIDDEN, rngs=rngs)
    self.fc1bn = BatchNorm(_HIDDEN, rngs=rngs)
    self.fc2 = conv1x1(
      _HIDDEN,
      2,
      kernel_init=nnx.initializers.normal(0.001),
      bias_init=lambda key, shape, dtype: jnp.array(_OPENING, dtype),
      rngs=rngs,
    )

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    average = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
    logits = self.fc2(nnx.relu(self.fc1bn(self.fc1(average))))
    logits = logits[..., 1] - logits[..., 0]
    if self.deterministic:
      return Decision((logits >= 0).astype(jnp.float32)), carry
    key = None if gumbel_noise is False else self.key(rngs)
    hard = binary_gumbel(logits, key, temperature, gumbel_noise)
    return Decision(hard), carry


@dataclasses.dataclass(frozen=True)
class Options(Budget, Gumbel):
  """ConvNet-AIG's options."""

  target_rates: str = option(
    'uniform',
    "ConvNet-AIG's target rate of each block: uniform, or the paper's list for "
    'resnet50 or resnet101, with the budget as t.',
  )
  target_rate_weight: float = option(
    2.0, "Weight of ConvNet-AIG's target-rate loss.", allowed=NOT_NEGATIVE
  )


def target_rates(
  name: str | Sequence[float], rate: float, num_blocks: int | None
) -> tuple[float, ...]:
  """Returns the target execution rate of each block, in network order.

  Args:
    name: 'uniform' for `rate` in every block; 'resnet50' or 'resnet101' for the
      paper's lists (Veit and Belongie, ECCV 2018, section 4.2 and the authors'
      code), with `rate` as t; or the rates themselves.
    rate: t, in [0, 1].
    num_blocks: number of blocks in the network, or None to skip the check of
      the list's length.

  Raises:
    ValueError: the name is unknown, or the number of rates is not `num_blocks`.
  """
  t = rate
  known = {
    'uniform': (t,) * (num_blocks or 0),
    'resnet50': (1, 1, 0.8, 1, t, t, t, 1, t, t, t, t, t, 1, 0.7, 1),
    'resnet101': (1,) * 8 + (t,) * 25,
  }
  if isinstance(name, str) and name not in known:
    raise ValueError(f'target_rates must be {", ".join(known)}; got {name!r}')
  rates = known[name] if isinstance(name, str) else tuple(name)
  if num_blocks is not None and len(rates) != num_blocks:
    raise ValueError(
      f'target_rates must have one rate per block ({num_blocks}); got '
      f'{len(rates)}' + (f' from {name}' if isinstance(name, str) else '')
    )
  return tuple(map(float, rates))


def make_gates(
  options: Options, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns a function that makes a block's gate, or None if its rate is 1."""
  options.check_phases()
  rates = target_rates(options.target_rates, options.budget, len(sites))
  if all(rate == 1 for rate in rates):
    raise ValueError(
      'convnet_aig needs at least one target rate below 1, because a block '
      'with target rate 1 has no gate; got 1 for every block'
    )
  order = {site.name: i for i, site in enumerate(sites)}
  return lambda site: (
    None
    if rates[order[site.name]] == 1
    else LayerGate(site.in_features, rngs=rngs)
  )


def target_rate_loss(
  masks: Sequence[ExecutionMask], target_rates: Sequence[float]
) -> jax.Array:
  """Returns ConvNet-AIG's unweighted loss on execution rates.

  The mean over gated blocks of (target - batch mean of the gate)^2 (Veit and
  Belongie, ECCV 2018, section 3.3). The authors weight it by 2 on CIFAR and by
  1 on ImageNet.

  Args:
    masks: one mask per gated block, with straight-through gradients.
    target_rates: one rate per gated block, in [0, 1].

  Returns:
    float32 scalar.

  Raises:
    ValueError: there are no masks, or the numbers of targets and masks differ.
  """
  if not masks or len(masks) != len(target_rates):
    raise ValueError(
      'target_rates must have one rate per gated block, and at least one; got '
      f'{len(target_rates)} for {len(masks)} masks'
    )
  rates = jnp.stack([jnp.mean(mask.density()) for mask in masks])
  return jnp.mean((jnp.array(target_rates, jnp.float32) - rates) ** 2)


def _loss(options, masks, cross_entropy, progress):
  del cross_entropy, progress
  uniform = options.target_rates == 'uniform'
  rates = target_rates(
    options.target_rates, options.budget, len(masks) if uniform else None
  )
  return options.target_rate_weight, target_rate_loss(
    masks, [rate for rate in rates if rate != 1]
  )


METHOD = Method(
  'convnet_aig',
  Options,
  make_gates,
  _loss,
  lambda options, progress: options.budget,
  anneal=Options.anneal,
  samples=True,
  knob='budget',
  label='ConvNet-AIG',
  color='blue',
  marker='^',
)
