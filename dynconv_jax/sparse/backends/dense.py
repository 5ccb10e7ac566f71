"""Dense backend: runs folded blocks everywhere and applies their masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import ACTIVATIONS, conv_general_dilated
from dynconv_jax.sparse.backend import Backend
from dynconv_jax.sparse.backends import cudnn
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv


class DenseBackend(Backend):
  """XLA's dense form, the baseline and fallback of sparse execution."""

  name = 'dense'
  calibrated = False

  def supports(self, branch, dtype, platform):
    return True

  def compiler_options(self, platform):
    return cudnn.COMPILER_OPTIONS if platform == 'gpu' else {}

  def pack(self, block):
    if jax.default_backend() == 'gpu':
      return cudnn.lay_out(block)
    return block

  def run(self, packed, x, mask):
    return run_dense(packed, x, None if mask is None else mask.hard)

  def convolution(self, conv):
    return DenseConv(conv)


class DenseConv(nnx.Module):
  """A folded convolution with its activation.

  Args:
    conv: the folded convolution.
  """

  def __init__(self, conv: FoldedConv):
    if jax.default_backend() == 'gpu':
      conv = cudnn.lay_out_conv(conv)
    self.layout = conv.replace(kernel=None, bias=None)
    self.kernel, self.bias = nnx.Param(conv.kernel), nnx.Param(conv.bias)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, features] for float[N, H, W, in_features]."""
    conv = self.layout.replace(kernel=self.kernel[...], bias=self.bias[...])
    x = x.astype(self.kernel.dtype)
    return activate(convolve(x, conv), conv).astype(x.dtype)


def activate(y: jax.Array, conv: FoldedConv) -> jax.Array:
  """Applies the activation of a convolution."""
  return ACTIVATIONS[conv.conv.activation](y)


def matmul(rows: jax.Array, matrix: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns `rows @ matrix + bias` in the dtype of the bias, [..., F].

  Products of bfloat16 are summed in float32.

  Args:
    rows: float[..., C].
    matrix: float[C, F].
    bias: float32[F].
  """
  return jnp.matmul(rows, matrix, preferred_element_type=bias.dtype) + bias


def convolve(x: jax.Array, layer: FoldedConv) -> jax.Array:
  """Returns a convolution before its activation, float32[N, h, w, features].

  The result of a layer in cuDNN's layout has the dtype of x.

  Args:
    x: float[N, H, W, in_features].
    layer: the convolution. Pointwise convolutions that are not in cuDNN's
      layout are computed as matrix products.
  """
  conv = layer.conv
  if isinstance(layer, cudnn.CudnnConv):
    return cudnn.convolve(x, layer)
  s = conv.strides
  if conv.kernel_size == 1 and conv.groups == 1:
    return matmul(x[:, ::s, ::s], layer.matrix, layer.bias)
  y = conv_general_dilated(
    x,
    layer.kernel,
    (s, s),
    tuple(conv.pads(n) for n in x.shape[1:3]),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=conv.groups,
    preferred_element_type=jnp.float32,
  )
  return y + layer.bias


def shortcut(block: FoldedBlock, x: jax.Array) -> jax.Array | float:
  """Returns a block's shortcut, float[N, h, w, features], or 0 for none."""
  if block.branch.shortcut == 'none':
    return 0.0
  if block.projection is None:
    return x
  return convolve(x, block.projection).astype(x.dtype)


def run_dense(
  block: FoldedBlock, x: jax.Array, hard: jax.Array | None = None
) -> jax.Array:
  """Returns a block's output, with the branch computed everywhere.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features].
    hard: float32[N, h, w] of {0, 1}, where to use the branch's output; None for
      everywhere.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  y = x
  for conv in block.convs[:-1]:
    y = activate(convolve(y, conv), conv).astype(x.dtype)
  y = activate(convolve(y, block.convs[-1]), block.convs[-1])
  if hard is not None:
    y = jnp.where(hard[..., None] != 0, y, 0)
  y = shortcut(block, x) + y
  return ACTIVATIONS[block.branch.activation](y).astype(x.dtype)
