"""ConvNet-AIG: one decision an image and block, and target rates."""

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

# Channels between the two layers, and the opening logits of 'skip' and
# 'execute', which leave about 85 % of the blocks open (authors' code).
_HIDDEN = 16
_OPENING = (0.1, 2.0)


class LayerGate(Gate):
  """Decides per image whether a block's branch is executed.

  Veit and Belongie, ECCV 2018, section 3.2 and the authors' code: global
  average, two 1x1 convolutions, Gumbel-softmax over (skip, execute). With two
  outcomes that is the binary Gumbel-softmax of the logits' difference.

  In training the gate samples. In evaluation it takes the likelier outcome;
  with ``nnx.view(model, deterministic=False, use_running_average=True)`` it
  samples there too, as the authors' code does: then the execution rates of
  training and evaluation agree, and an image's logits vary from call to call.

  Args:
    in_features: channels of the block's input.
    rngs: stream `params`.
  """

  per_image = True
  # The authors' checkpoints: gates lie in their blocks.
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
    "ConvNet-AIG's target rate of each block: uniform, or the paper's list "
    'for resnet50 or resnet101, with the budget as t.',
  )
  target_rate_weight: float = option(
    2.0, "Weight of ConvNet-AIG's target-rate loss.", allowed=NOT_NEGATIVE
  )


def target_rates(
  name: str | Sequence[float], rate: float, num_blocks: int | None
) -> tuple[float, ...]:
  """Returns the target execution rate of each block, in network order.

  Args:
    name: 'uniform', every block at `rate`; or 'resnet50', 'resnet101', the
      lists of the paper (Veit and Belongie, ECCV 2018, section 4.2 and the
      authors' code), where `rate` is t. Or the rates themselves.
    rate: t, in [0, 1].
    num_blocks: of the network; None: as many as in the list.

  Raises:
    ValueError: there is no such list, or it is of another network.
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
      f'target_rates must be one a block, {num_blocks}; got {len(rates)}'
      + (f', those of {name}' if isinstance(name, str) else '')
    )
  return tuple(map(float, rates))


def make_gates(
  options: Options, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns what makes the gate of a block; one whose rate is 1 has none."""
  options.check_phases()
  rates = target_rates(options.target_rates, options.budget, len(sites))
  if all(rate == 1 for rate in rates):
    raise ValueError(
      'convnet_aig needs a target rate below 1, because a block whose target '
      'is 1 has no gate; got 1 for every block'
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
