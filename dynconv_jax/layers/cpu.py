"""Convolution and pooling in forms that XLA's CPU backend runs fast."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dynconv_jax.layers.depthwise import depthwise


def conv_general_dilated(x, kernel, strides, padding, **kwargs):
  """Convolves like `lax.conv_general_dilated`, but fast on a CPU.

  XLA's CPU backend is slow for four kinds of convolutions, which this function
  computes differently on a CPU:
  - 1x1: as a matrix product, whose gradients are several times faster.
  - Depthwise: see `depthwise`.
  - Output smaller than the kernel: with im2col and one matrix product.
  - One output feature, as in mask units: one product computes all taps.
  Other platforms and MAC counters use the plain convolution.

  Args:
    x: float[N, H, W, C].
    kernel: float[k, k, C, features].
    strides: one integer per spatial dimension.
    padding: ((low, high), (low, high)), or 'SAME' or 'VALID'.
    **kwargs: other arguments of `lax.conv_general_dilated`.

  Returns:
    float[N, h, w, features].
  """
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      x.shape[1:3], kernel.shape[:2], strides, padding
    )
  padding = tuple(map(tuple, padding))
  plain = functools.partial(
    lax.conv_general_dilated, window_strides=strides, padding=padding, **kwargs
  )
  groups = kwargs.get('feature_group_count', 1)
  dilations = (
    kwargs.get(f'{side}_dilation') or (1,) for side in ('lhs', 'rhs')
  )
  if any(step != 1 for dilation in dilations for step in dilation):
    return plain(x, kernel)
  k, also_k, depth, features = kernel.shape
  if (
    depth == 1
    and groups == features > 1
    and k == also_k
    and (strides[0] == strides[1])
  ):
    return depthwise(x, kernel, strides[0], padding)
  size = [
    (extent + low + high - k) // stride + 1
    for extent, k, stride, (low, high) in zip(
      x.shape[1:3], kernel.shape[:2], strides, padding, strict=True
    )
  ]
  if groups > 1:
    return plain(x, kernel)
  if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
    fast = _im2col
  elif kernel.shape[-1] == 1:
    fast = _taps
  elif any(n < k for n, k in zip(size, kernel.shape[:2], strict=True)):
    fast = _im2col
  else:
    return plain(x, kernel)
  matmul = functools.partial(
    jnp.matmul, preferred_element_type=kwargs.get('preferred_element_type')
  )
  return lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(
      fast, strides=strides, padding=padding, size=size, matmul=matmul
    ),
    default=plain,
  )


def _im2col(x, kernel, strides, padding, size, matmul):
  if any(map(any, padding)):
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  (sh, sw), (h, w) = strides, size
  columns = [
    x[:, i : i + (h - 1) * sh + 1 : sh, j : j + (w - 1) * sw + 1 : sw]
    for i in range(kernel.shape[0])
    for j in range(kernel.shape[1])
  ]
  kernel = kernel.reshape(-1, kernel.shape[-1])
  return matmul(jnp.concatenate(columns, axis=-1), kernel)


def _taps(x, kernel, strides, padding, size, matmul):
  taps = matmul(x, kernel[..., 0].reshape(-1, kernel.shape[2]).T)
  taps = jnp.pad(taps, ((0, 0), *padding, (0, 0)))
  (sh, sw), (h, w) = strides, size
  return sum(
    taps[:, i : i + (h - 1) * sh + 1 : sh, j : j + (w - 1) * sw + 1 : sw, tap]
    for tap, (i, j) in enumerate(np.ndindex(*kernel.shape[:2]))
  )[..., None]


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
  """Returns the 3x3 max pooling of float[N, H, W, C], stride 2, padding 1.

  As in PyTorch, the gradient flows to the first maximum of a window. The custom
  gradient avoids XLA's `select_and_scatter`, which is slow on a CPU.
  """
  return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _max_pool_forward(x):
  n, h, w, c = x.shape
  padding = ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0))
  padded = jnp.pad(x, padding, constant_values=-jnp.inf)
  # The nine positions of every window, in reading order.
  windows = [
    padded[:, i : i + h + h % 2 - 1 : 2, j : j + w + w % 2 - 1 : 2]
    for i in range(3)
    for j in range(3)
  ]
  largest, first = windows[0], jnp.zeros(windows[0].shape, jnp.int8)
  for k, window in enumerate(windows[1:], start=1):
    first = jnp.where(window > largest, jnp.int8(k), first)
    largest = jnp.maximum(largest, window)
  return largest, (first, x.shape)


def _max_pool_backward(residuals, grad):
  first, (n, h, w, c) = residuals

  def sent(i, j):
    return jnp.where(first == 3 * i + j, grad, 0)

  def previous(t, axis):
    """Shifts gradients so that each window gets those of the next one."""
    rest = lax.slice_in_dim(t, 1, t.shape[axis], axis=axis)
    return jnp.concatenate(
      [rest, jnp.zeros_like(lax.slice_in_dim(t, 0, 1, axis=axis))], axis
    )

  def interleave(even, odd, axis):
    shape = list(even.shape)
    shape[axis] *= 2
    return jnp.stack([even, odd], axis + 1).reshape(shape)

  # Row 2a is the middle row of window a. Row 2a + 1 is the last row of window a
  # and the first row of window a + 1. The same holds for columns.
  rows = [
    interleave(sent(1, j), sent(2, j) + previous(sent(0, j), 1), 1)
    for j in range(3)
  ]
  full = interleave(rows[1], rows[2] + previous(rows[0], 2), 2)
  return (full[:, :h, :w],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
