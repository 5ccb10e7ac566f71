"""Convolutions and gated blocks with batch norm folded in."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import BatchNorm, conv_general_dilated
from dynconv_jax.models.gated import GatedBlock


@flax.struct.dataclass
class FoldedConv:
  """A convolution with a bias and an activation.

  Attributes:
    kernel: float[k, k, in_features / groups, features], in the compute dtype.
    bias: float32[features].
    conv: description of the convolution.
  """

  kernel: jax.Array
  bias: jax.Array
  conv: Conv = flax.struct.field(pytree_node=False)

  @property
  def matrix(self) -> jax.Array:
    """The kernel as float[k * k * in_features / groups, features]."""
    return self.kernel.reshape(-1, self.kernel.shape[-1])


@flax.struct.dataclass
class FoldedBlock:
  """`activation(shortcut(x) + mask * branch(x))` as plain convolutions.

  Attributes:
    convs: convolutions of the branch, in order of execution.
    projection: convolution of the shortcut, or None.
    branch: description of the branch.
  """

  convs: tuple[FoldedConv, ...]
  projection: FoldedConv | None
  branch: Branch = flax.struct.field(pytree_node=False)


def fold_conv(conv: nnx.Conv, norm: BatchNorm, what: Conv, dtype) -> FoldedConv:
  """Returns a convolution with its batch norm folded in.

  Computes in float64 and rounds once.

  Args:
    conv: a convolution without bias.
    norm: the batch norm after it; its running statistics are used.
    what: description of both.
    dtype: dtype of the folded kernel.
  """
  scale, bias, mean, var = (
    np.asarray(v[...], np.float64)
    for v in (norm.scale, norm.bias, norm.mean, norm.var)
  )
  scale = scale / np.sqrt(var + norm.epsilon)
  kernel = np.asarray(conv.kernel[...], np.float64) * scale
  return FoldedConv(
    jnp.asarray(kernel, dtype),
    jnp.asarray(bias - mean * scale, jnp.float32),
    what,
  )


def fold_block(block: GatedBlock, dtype=None) -> FoldedBlock:
  """Returns a gated block with batch norm folded into its convolutions.

  Args:
    block: the block, in evaluation.
    dtype: dtype of the folded kernels; None for the block's compute dtype.
  """
  dtype = dtype or block.dtype
  projection = None
  if block.downsample is not None:
    projection = fold_conv(*block.downsample, block.branch.projection, dtype)
  return FoldedBlock(
    tuple(
      fold_conv(getattr(block, c.name), getattr(block, c.norm), c, dtype)
      for c in block.branch.convs
    ),
    projection,
    block.branch,
  )


def describe_conv(conv: Any, norm: Any) -> Conv | None:
  """Returns the description of a convolution and its batch norm.

  Returns None if a `Conv` cannot describe them.

  Args:
    conv: any convolution; other modules have no description.
    norm: the batch norm after it.
  """
  if type(conv) is not nnx.Conv or type(norm) is not BatchNorm:
    return None
  k, strides = conv.kernel_size, conv.strides
  strides = (strides,) * 2 if isinstance(strides, int) else tuple(strides)
  low = k[0] // 2
  paddings = {
    'symmetric': ((low, low), (low, low)),
    'same': 'SAME',
  }
  padding = [name for name, pads in paddings.items() if pads == conv.padding]
  if (
    conv.bias is not None
    or conv.mask is not None
    or conv.conv_general_dilated
    not in (conv_general_dilated, jax.lax.conv_general_dilated)
    or len(k) != 2
    or k[0] != k[1]
    or not k[0] % 2
    or strides[0] != strides[1]
    or not padding
    or any(
      d not in (1, (1, 1), None)
      for d in (conv.input_dilation, conv.kernel_dilation)
    )
  ):
    return None
  return Conv(
    name='conv',
    norm='norm',
    in_features=conv.in_features,
    features=conv.out_features,
    kernel_size=k[0],
    strides=strides[0],
    groups=conv.feature_group_count,
    activation=norm.activation,
    padding=padding[0],
  )


def check_evaluation(model: nnx.Module) -> None:
  """Raises ValueError unless a model is in evaluation mode.

  Args:
    model: the model whose batch norms will be folded.
  """
  for _, node in nnx.iter_modules(model):
    training = isinstance(node, nnx.BatchNorm) and not node.use_running_average
    if training or getattr(node, 'deterministic', True) is False:
      raise ValueError(
        'folding batch norm needs the evaluation view of the model: '
        'nnx.view(model, deterministic=True, use_running_average=True)'
      )
