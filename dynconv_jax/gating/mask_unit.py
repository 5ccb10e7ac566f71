"""DynConv's mask unit: one decision an image and position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.gating.gumbel import binary_gumbel

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


class MaskUnit(nnx.Module):
  """Decides per image and position whether a block's branch is executed.

  Args:
    in_features: channels of the block's input.
    strides: stride of the block: the mask has the block's output resolution.
    kernel_size: 3, or 1 for the variant of the authors' pose network.
    conv_general_dilated: the convolution function.
    rngs: stream `params`.
  """

  def __init__(
    self,
    in_features: int,
    *,
    strides: int,
    kernel_size: int = 3,
    conv_general_dilated=jax.lax.conv_general_dilated,
    rngs: nnx.Rngs,
  ):
    self.maskconv = Squeeze(
      in_features,
      strides=strides,
      kernel_size=kernel_size,
      conv_general_dilated=conv_general_dilated,
      rngs=rngs,
    )
    self.deterministic = False

  def __call__(
    self,
    x: jax.Array,
    *,
    rngs: nnx.Rngs | None = None,
    temperature: float | jax.Array = 1.0,
    gumbel_noise: bool | jax.Array = True,
  ) -> jax.Array:
    """Returns the hard mask, float32[N, h, w] of {0, 1}.

    Args:
      x: float[N, H, W, C], the block's input.
      rngs: stream `gumbel`; needed unless deterministic or without noise.
      temperature: of the Gumbel-softmax, > 0.
      gumbel_noise: whether noise is added in training.

    Raises:
      ValueError: noise is wanted and there is no `gumbel` stream.
    """
    logits = self.maskconv(x)
    if self.deterministic:
      return (logits >= 0).astype(jnp.float32)
    key = None
    if gumbel_noise is not False:
      if rngs is None or not ('gumbel' in rngs or 'default' in rngs):
        given = None if rngs is None else [name for name, _ in rngs.items()]
        raise ValueError(
          'a mask unit in training needs rngs=nnx.Rngs(gumbel=key); got '
          f'{given}. For evaluation use nnx.view(model, deterministic=True, '
          'use_running_average=True)'
        )
      # By name: where there is only `default`, which stands in for any stream,
      # `rngs.gumbel` is a method that draws a sample.
      key = rngs['gumbel']()
    return binary_gumbel(logits, key, temperature, gumbel_noise)

  def set_view(self, deterministic: bool | None = None):
    """Class method used by ``nnx.view``.

    Args:
      deterministic: if True, the mask is logits >= 0, without noise.
    """
    if deterministic is not None:
      self.deterministic = deterministic
