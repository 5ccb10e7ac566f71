"""DynConv's mask unit: one decision an image and position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.methods.gumbel import binary_gumbel

# PyTorch's default initialisation, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): about
# half of the positions open at the start.
_torch_uniform = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def _uniform_bias(fan_in: int):
  bound = fan_in**-0.5

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Squeeze(nnx.Module):
  """Mask logits: a convolution plus a linear map of the global average.

  Verelst and Tuytelaars, CVPR 2020, section 3.2 and the authors' code.
  """

  def __init__(
    self,
    in_features: int,
    *,
    strides: int,
    kernel_size: int,
    conv_general_dilated,
    rngs: nnx.Rngs,
  ):
    padding = kernel_size // 2
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
    """Returns float32[N, h, w]: logits of a float[N, H, W, C] input."""
    x = x.astype(jnp.float32)
    squeezed = self.fc(jnp.mean(x, axis=(1, 2)))
    return (self.conv(x) + squeezed[:, None, None, :])[..., 0]


class MaskUnit(Gate):
  """Decides per image and position whether a block's branch is executed.

  In training the mask is sampled; in evaluation it is logits >= 0. With a
  granularity above 1 one decision holds for a patch of positions, which is
  read off the average-pooled map (Han et al., LASNet, NeurIPS 2022, section
  3.2): coarser masks are cheaper to execute on a large GPU.

  Args:
    in_features: channels of the block's input.
    strides: stride of the block: the mask has the block's output resolution.
    kernel_size: 3, or 1 for the variant of the authors' pose network.
    granularity: side of a patch, in positions of the block's output.
    conv_general_dilated: the convolution function.
    rngs: stream `params`.
  """

  def __init__(
    self,
    in_features: int,
    *,
    strides: int,
    kernel_size: int = 3,
    granularity: int = 1,
    conv_general_dilated=jax.lax.conv_general_dilated,
    rngs: nnx.Rngs,
  ):
    super().__init__()
    self.strides = strides
    self.granularity = granularity
    self.maskconv = Squeeze(
      in_features,
      # Pooling does the stride of the block too.
      strides=strides if granularity == 1 else 1,
      kernel_size=kernel_size,
      conv_general_dilated=conv_general_dilated,
      rngs=rngs,
    )

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    pooled = x
    if self.granularity > 1:
      pooled = _average_pool(x, self.granularity * self.strides)
    logits = self.maskconv(pooled)
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


def _average_pool(x: jax.Array, size: int) -> jax.Array:
  """Returns float32 means of size x size patches; those at the edge are cut."""

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
