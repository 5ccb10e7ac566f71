"""DynConv's gates: mask units and the masks derived from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import BatchNorm, conv_general_dilated
from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.methods.gumbel import binary_gumbel

# PyTorch's default initialization, U(-1/sqrt(fan_in), 1/sqrt(fan_in)). About
# half of the positions are executed initially.
_torch_uniform = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def _uniform_bias(fan_in: int):
  bound = fan_in**-0.5

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Squeeze(nnx.Module):
  """Mask logits: a convolution plus a linear map of the global average.

  Verelst and Tuytelaars, CVPR 2020, section 3.2 and the authors' code.

  Args:
    in_features: channels of the input.
    strides: stride of the convolution.
    kernel_size: kernel size of the convolution, odd.
    pool: side of the patches over which the input is averaged first; 1 for no
      averaging.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self,
    in_features: int,
    *,
    strides: int,
    kernel_size: int,
    pool: int = 1,
    rngs: nnx.Rngs,
  ):
    padding = kernel_size // 2
    self.pool = pool
    self.conv = nnx.Conv(
      in_features,
      1,
      (kernel_size, kernel_size),
      strides=strides,
      padding=((padding, padding), (padding, padding)),
      dtype=jnp.float32,
      kernel_init=_torch_uniform,
      bias_init=_uniform_bias(in_features * kernel_size**2),
      conv_general_dilated=conv_general_dilated,
      rngs=rngs,
    )
    self.fc = nnx.Linear(
      in_features,
      1,
      dtype=jnp.float32,
      kernel_init=_torch_uniform,
      bias_init=_uniform_bias(in_features),
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32[N, h, w] logits for a float[N, H, W, C] input."""
    x = average_pool(x, self.pool)
    squeezed = self.fc(jnp.mean(x, axis=(1, 2)))
    return (self.conv(x) + squeezed[:, None, None, :])[..., 0]


class MaskUnit(Gate):
  """A gate that executes or skips a block's branch at each position.

  The mask is sampled in training and is `logits >= 0` in evaluation. With a
  granularity above 1, each decision covers a patch of positions and is computed
  from the average-pooled input (Han et al., LASNet, NeurIPS 2022, section 3.2).
  Coarser masks run faster on a large GPU.

  Args:
    in_features: channels of the block's input.
    strides: stride of the block. The mask has the block's output resolution.
    kernel_size: 3, or 1 for the variant in the authors' pose network.
    granularity: side of a patch, in positions of the block's output.
    norm: whether to normalize the input per channel. The features of pretrained
      networks differ in scale by orders of magnitude; normalization makes the
      noise and the initial bias equally effective in every block.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self,
    in_features: int,
    *,
    strides: int,
    kernel_size: int = 3,
    granularity: int = 1,
    norm: bool = False,
    rngs: nnx.Rngs,
  ):
    super().__init__()
    self.norm = BatchNorm(in_features, rngs=rngs) if norm else None
    self.strides = strides
    self.granularity = granularity
    self.maskconv = Squeeze(
      in_features,
      # Pooling includes the block's stride.
      strides=strides if granularity == 1 else 1,
      kernel_size=kernel_size,
      pool=1 if granularity == 1 else granularity * strides,
      rngs=rngs,
    )

  def open(self, logit: float) -> None:
    """Sets the logit to which the convolution adds; its kernel is kept.

    Far above 0, the block runs nearly everywhere.

    Args:
      logit: the logit without the convolution's products.
    """
    unit = self.maskconv
    unit.fc.kernel[...] = jnp.zeros_like(unit.fc.kernel[...])
    unit.fc.bias[...] = jnp.zeros_like(unit.fc.bias[...])
    unit.conv.bias[...] = jnp.full_like(unit.conv.bias[...], logit)

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    logits = self.maskconv(x if self.norm is None else self.norm(x))
    if self.deterministic:
      hard = (logits >= 0).astype(jnp.float32)
    else:
      key = None if gumbel_noise is False else self.key(rngs)
      hard = binary_gumbel(logits, key, temperature, gumbel_noise)
    if self.granularity > 1:
      hard = jnp.repeat(hard, self.granularity, axis=1)
      hard = jnp.repeat(hard, self.granularity, axis=2)
      h, w = (-(-n // self.strides) for n in x.shape[1:3])
      hard = hard[:, :h, :w]
    return Decision(hard), carry


class Ran(NamedTuple):
  """Where a stage has run: the carry of the gates below.

  Attributes:
    mask: float32[N, h, w] of {0, 1}.
    inherited: whether no mask unit of the stage has decided yet.
  """

  mask: jax.Array
  inherited: bool


class RecordedMaskUnit(MaskUnit):
  """A mask unit that records where its stage has run, for `InheritedMask`.

  Its carry is a `Ran`. The arguments are those of `MaskUnit`.
  """

  def record(self, hard, carry):
    if carry is not None and not carry.inherited:
      hard = union((carry.mask, hard))
    return Ran(hard, inherited=False)

  def __call__(self, x, carry=None, **kwargs):
    decision, carry = super().__call__(x, carry, **kwargs)
    return decision, self.record(decision.hard, carry)


class InheritedMask(Gate):
  """A gate that runs its block where the blocks before it ran.

  In a block without an identity shortcut, which starts a stage and loses its
  input where it is skipped, the mask is the union of the previous stage's
  masks. In a block with one, it is the union of the masks of its stage so far.
  In a strided block, an output position runs if one of the strides x strides
  input positions at its place ran. A stage without mask units passes its own
  inherited mask on. An earlier gate must be a `RecordedMaskUnit`.

  Args:
    strides: stride of the block.
    identity: whether the block's shortcut is the identity.
  """

  def __init__(self, strides: int, identity: bool = False):
    super().__init__()
    self.strides = strides
    self.identity = identity

  def record(self, hard, carry):
    return Ran(hard, inherited=carry.inherited or not self.identity)

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    s = self.strides
    _, h, w = carry.mask.shape
    ran = jnp.pad(carry.mask, ((0, 0), (0, -h % s), (0, -w % s)))
    ran = union([ran[:, i::s, j::s] for i in range(s) for j in range(s)])
    return Decision(ran), self.record(ran, carry)


def union(masks: Sequence[jax.Array]) -> jax.Array:
  """Returns the union of masks of {0, 1} as 1 - prod(1 - m).

  Its gradient is 0 where several masks are 1, because then no mask alone
  changes the union.

  Args:
    masks: float32[N, h, w] each.
  """
  return 1 - functools.reduce(jnp.multiply, [1 - mask for mask in masks])


def average_pool(x: jax.Array, size: int) -> jax.Array:
  """Returns float32 means of size x size patches; edge patches are cropped."""
  if size == 1:
    return x.astype(jnp.float32)

  def summed(v):
    return jax.lax.reduce_window(
      v.astype(jnp.float32),
      0.0,
      jax.lax.add,
      (1, size, size, 1),
      (1, size, size, 1),
      [
        (0, -n % size if axis in (1, 2) else 0)
        for axis, n in enumerate(v.shape)
      ],
    )

  return summed(x) / summed(jnp.ones((1, *x.shape[1:3], 1)))
