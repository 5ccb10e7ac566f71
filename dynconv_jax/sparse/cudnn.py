"""Dense convolutions in the form that XLA executes the fastest on a GPU.

XLA hands a convolution, its bias, the shortcut and the ReLU to cuDNN in one
call, if all of them are in the dtype of the features, and copies each kernel at
each call unless its features come first. Matrix products, the form that is the
best on a CPU, leave bias, shortcut and ReLU to passes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dynconv_jax.sparse.fold import FoldedBlock, FoldedNetwork, Layer

# cuDNN's kernels for tensor cores read channels by eights.
_CHANNELS = 8


def lay_out(
  network: FoldedNetwork, dense: Sequence[bool] | None = None
) -> FoldedNetwork:
  """Returns a network whose dense layers are as cuDNN reads them.

  Args:
    network: the folded network.
    dense: whether each block is executed everywhere; None: all are.
  """
  dense = dense or [True] * len(network.blocks)
  return network.replace(
    stem=_lay_out(_space_to_depth(network.stem)),
    blocks=tuple(
      _lay_out_block(block) if all_of_it else block
      for block, all_of_it in zip(network.blocks, dense, strict=True)
    ),
  )


def convolve(x: jax.Array, layer: Layer) -> jax.Array:
  """Returns [N, h, w, features] in the dtype of x, before any activation.

  Args:
    x: float[N, H, W, in_features].
    layer: the convolution.
  """
  x = rearrange(x, layer)
  k = layer.size
  kernel = 'OHWI' if layer.features_first else 'HWIO'
  y = lax.conv_general_dilated(
    x,
    layer.kernel,
    (layer.strides, layer.strides),
    ((k // 2, (k - 1) // 2),) * 2,
    dimension_numbers=('NHWC', kernel, 'NHWC'),
  )
  return y + layer.bias.astype(x.dtype)


def rearrange(x: jax.Array, layer: Layer) -> jax.Array:
  """Returns the map that a layer reads, its squares of positions as channels.

  Args:
    x: float[N, H, W, in_features].
    layer: of `lay_out`.
  """
  if layer.block == 1:
    return x
  n, height, width, depth = x.shape
  h, w = (-(-size // layer.block) for size in (height, width))
  ends = ((0, h * layer.block - height), (0, w * layer.block - width))
  x = jnp.pad(x, ((0, 0), *ends, (0, 0)))
  x = x.reshape(n, h, layer.block, w, layer.block, depth)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
  return jnp.pad(x, ((0, 0),) * 3 + ((0, layer.shape[2] - x.shape[-1]),))


def _lay_out_block(block: FoldedBlock) -> FoldedBlock:
  return jax.tree.map(
    _lay_out, block, is_leaf=lambda layer: isinstance(layer, Layer)
  )


def _lay_out(layer: Layer) -> Layer:
  return layer.replace(
    kernel=jnp.transpose(layer.kernel, (3, 0, 1, 2)),
    bias=layer.bias.astype(layer.kernel.dtype),
    features_first=True,
  )


def _space_to_depth(layer: Layer) -> Layer:
  """Returns a 7x7 of stride 2 as a 4x4 of stride 1 on squares of 2x2 positions.

  Tap k of the 7, which reads position 2 i + k - 3, is tap a of square b where
  2 a + b = k + 1. Other layers are returned as they are.
  """
  if (layer.size, layer.strides) != (7, 2):
    return layer
  _, _, depth, features = layer.kernel.shape
  kernel = jnp.pad(layer.kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
  kernel = kernel.reshape(4, 2, 4, 2, depth, features)
  kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, -1, features)
  padding = -kernel.shape[2] % _CHANNELS
  return layer.replace(
    kernel=jnp.pad(kernel, ((0, 0), (0, 0), (0, padding), (0, 0))),
    strides=1,
    block=2,
  )
