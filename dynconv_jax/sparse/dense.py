"""Folded residual blocks over all positions, and over whole images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dynconv_jax.layers import conv_general_dilated
from dynconv_jax.sparse import cudnn
from dynconv_jax.sparse.chunks import for_chunks
from dynconv_jax.sparse.fold import FoldedBlock, Layer
from dynconv_jax.sparse.positions import find_positions, take


def matmul(rows: jax.Array, matrix: jax.Array, bias: jax.Array) -> jax.Array:
  """Returns float32[..., F] or what the bias is: `rows @ matrix + bias`.

  Products of bfloat16 are summed in float32.

  Args:
    rows: float[..., C].
    matrix: float[C, F].
    bias: float32[F].
  """
  return jnp.matmul(rows, matrix, preferred_element_type=bias.dtype) + bias


def convolve(x: jax.Array, layer: Layer, im2col: bool = False) -> jax.Array:
  """Returns float32[N, h, w, features], before any activation.

  On a GPU it is in the dtype of x: see `cudnn.py`.

  Args:
    x: float[N, H, W, in_features].
    layer: 1x1 ones are matrix products on a CPU.
    im2col: whether larger kernels are gathered windows and a matrix product
      rather than XLA's convolution: on a CPU, what is faster on small maps.
  """
  if jax.default_backend() == 'gpu':
    return cudnn.convolve(x, layer)
  k, s = layer.size, layer.strides
  if k == 1:
    return matmul(x[:, ::s, ::s], layer.matrix, layer.bias)
  pad = k // 2
  if not im2col:
    y = conv_general_dilated(
      x,
      layer.kernel,
      (s, s),
      ((pad, pad), (pad, pad)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      preferred_element_type=jnp.float32,
    )
    return y + layer.bias
  _, h, w = layer.output_shape(x.shape)
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  columns = [
    x[:, i : i + (h - 1) * s + 1 : s, j : j + (w - 1) * s + 1 : s]
    for i in range(k)
    for j in range(k)
  ]
  return matmul(jnp.concatenate(columns, -1), layer.matrix, layer.bias)


def shortcut(block: FoldedBlock, x: jax.Array) -> jax.Array:
  """Returns the identity or its projection, float[N, h, w, features]."""
  if block.projection is None:
    return x
  return convolve(x, block.projection).astype(x.dtype)


def branch(block: FoldedBlock, x: jax.Array, im2col: bool) -> jax.Array:
  """Returns what `convolve` does: the branch at all positions."""
  y = jax.nn.relu(convolve(x, block.first, im2col)).astype(x.dtype)
  y = convolve(y, block.second, im2col)
  if block.third is not None:
    y = convolve(jax.nn.relu(y).astype(x.dtype), block.third)
  return y


def run_dense(
  block: FoldedBlock,
  x: jax.Array,
  hard: jax.Array | None = None,
  *,
  im2col: bool = False,
) -> jax.Array:
  """Returns a block's output, the branch computed at all positions.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features].
    hard: float32[N, h, w] of {0, 1}, where the branch counts; None: everywhere.
    im2col: see `convolve`.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  y = branch(block, x, im2col)
  if hard is not None:
    y = jnp.where(hard[..., None] != 0, y, 0)
  return jax.nn.relu(shortcut(block, x) + y).astype(x.dtype)


def run_images(
  block: FoldedBlock,
  x: jax.Array,
  active: jax.Array,
  *,
  images: int,
  im2col: bool = False,
) -> jax.Array:
  """Returns a block's output, the branch computed for whole active images.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features], rectified.
    active: float32[N] of {0, 1}, the images whose branch counts.
    images: how many are computed at a time, in [1, N].
    im2col: see `convolve`.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  num_images = x.shape[0]
  found = find_positions(active, images)

  def body(start, size, out):
    index = lax.dynamic_slice(found.indices, (start,), (size,))
    inside = jnp.minimum(index, num_images - 1)
    y = branch(block, take(x, inside), im2col)
    y = jax.nn.relu(take(out, inside) + y).astype(out.dtype)
    return out.at[index].set(y, mode='drop')

  out = for_chunks(found.count, (images,), body, shortcut(block, x))
  return out if block.projection is None else jax.nn.relu(out)
