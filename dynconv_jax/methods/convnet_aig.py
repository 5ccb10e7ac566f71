"""ConvNet-AIG's gate: one decision an image and block."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.methods.gate import Decision, Gate, conv1x1
from dynconv_jax.methods.gumbel import binary_gumbel

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
    norm: makes the batch norm, given the channels and `rngs`.
    rngs: stream `params`.
  """

  per_image = True

  def __init__(self, in_features: int, *, norm, rngs: nnx.Rngs):
    super().__init__()
    self.fc1 = conv1x1(in_features, _HIDDEN, rngs=rngs)
    self.fc1bn = norm(_HIDDEN, rngs=rngs)
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


def target_rates(name: str, rate: float, num_blocks: int) -> tuple[float, ...]:
  """Returns the target execution rate of each block, in network order.

  Args:
    name: 'uniform', every block at `rate`; or 'resnet50', 'resnet101', the
      lists of the paper (Veit and Belongie, ECCV 2018, section 4.2 and the
      authors' code), where `rate` is t.
    rate: t, in [0, 1].
    num_blocks: of the network.

  Raises:
    ValueError: there is no such list, or it is of another network.
  """
  t = rate
  rates = {
    'uniform': (t,) * num_blocks,
    'resnet50': (1, 1, 0.8, 1, t, t, t, 1, t, t, t, t, t, 1, 0.7, 1),
    'resnet101': (1,) * 8 + (t,) * 25,
  }
  if name not in rates:
    raise ValueError(f'target_rates must be {", ".join(rates)}; got {name!r}')
  if len(rates[name]) != num_blocks:
    raise ValueError(
      f'target_rates {name} are those of {len(rates[name])} blocks; the '
      f'network has {num_blocks}'
    )
  return tuple(map(float, rates[name]))
