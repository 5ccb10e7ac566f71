"""Depthwise convolutions that are fast on a CPU.

XLA's CPU backend runs grouped convolutions and their gradients in naive loops.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax import lax

from dynconv_jax.layers import training_kernels as kernels

# Number of partial sums, which are added in order for any number of threads.
_PARTS = 16

Padding = tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(
  x: jax.Array, kernel: jax.Array, strides: int, padding: Padding
) -> jax.Array:
  """Returns a depthwise convolution, float[N, h, w, C].

  Supports only first-order reverse-mode differentiation.

  Args:
    x: float[N, H, W, C].
    kernel: float[k, k, 1, C].
    strides: stride along both axes.
    padding: ((low, high), (low, high)).
  """
  plain = functools.partial(_plain, strides=strides, padding=padding)

  def fast(x, kernel):
    (out,) = kernels.call(
      'depthwise',
      [jax.eval_shape(plain, x, kernel).shape],
      x,
      kernel[:, :, 0],
      rule='nhwc,ijc->npqc',
      **_attributes(strides, padding),
    )
    return out

  return kernels.choose(fast, plain, x, kernel)


def _forward(x, kernel, strides, padding):
  return depthwise(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, grad):
  def plain(x, kernel, grad):
    convolve = functools.partial(_plain, strides=strides, padding=padding)
    return jax.vjp(convolve, x, kernel)[1](grad)

  def fast(x, kernel, grad):
    kernel = kernel[:, :, 0]
    attributes = _attributes(strides, padding)
    (of_x,) = kernels.call(
      'depthwise_input_gradient',
      [x.shape],
      grad,
      kernel,
      rule='nhwc,ijc->npqc',
      **attributes,
    )
    of_kernel, _ = kernels.call(
      'depthwise_kernel_gradient',
      [kernel.shape, (_PARTS, *kernel.shape)],
      x,
      grad,
      rule='nhwc,npqc->ijc,kijc',
      combine=lax.psum,
      **attributes,
    )
    return of_x, of_kernel[:, :, None]

  return kernels.choose(fast, plain, *residuals, grad)


depthwise.defvjp(_forward, _backward)


def _plain(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x,
    kernel,
    (strides, strides),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1],
  )


def _attributes(strides, padding):
  (top, _), (left, _) = padding
  values = {'strides': strides, 'top': top, 'left': left}
  return {name: np.int64(value) for name, value in values.items()}
