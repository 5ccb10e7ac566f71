"""Convolutions with PyTorch's padding and initialization."""

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
    padding: 'symmetric' for kernel_size // 2 on each side, as in PyTorch; or
      'same', as in TensorFlow.
    dtype: compute dtype.
    rngs: random streams; uses `params`.
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
    # He et al., ICCV 2015, with mode fan_out as in torchvision's ResNets. As in
    # TensorFlow and timm, fan_out counts the outputs of one group; otherwise,
    # depthwise outputs would vanish.
    kernel_init=nnx.initializers.variance_scaling(
      2.0 * groups, 'fan_out', 'normal'
    ),
    conv_general_dilated=conv_general_dilated,
    rngs=rngs,
  )
