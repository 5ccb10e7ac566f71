"""Convolutions, padded and initialized as in PyTorch."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers.cpu import conv_general_dilated


def conv(
  in_features: int,
  out_features: int,
  kernel_size: int,
  *,
  strides: int = 1,
  groups: int = 1,
  padding: str = 'symmetric',
  dtype: jnp.dtype = jnp.float32,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """Returns a convolution without bias.

  Args:
    in_features: channels of the input.
    out_features: channels of the output.
    kernel_size: side of the kernel.
    strides: stride along both axes.
    groups: number of channel groups.
    padding: 'symmetric', kernel_size // 2 on each side, as PyTorch pads; or
      'same', TensorFlow's.
    dtype: compute dtype.
    rngs: stream `params`.
  """
  low = kernel_size // 2
  return nnx.Conv(
    in_features,
    out_features,
    (kernel_size, kernel_size),
    strides=strides,
    padding='SAME' if padding == 'same' else ((low, low), (low, low)),
    feature_group_count=groups,
    use_bias=False,
    dtype=dtype,
    # He et al., ICCV 2015; torchvision's ResNets use mode fan_out. Of a group's
    # outputs, as in TensorFlow and timm: depthwise ones would vanish otherwise.
    kernel_init=nnx.initializers.variance_scaling(
      2.0 * groups, 'fan_out', 'normal'
    ),
    conv_general_dilated=conv_general_dilated,
    rngs=rngs,
  )
