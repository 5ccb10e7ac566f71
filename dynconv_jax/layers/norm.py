"""Batch normalization and activations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dynconv_jax.layers import training_kernels as kernels

ACTIVATIONS = {
  None: lambda x: x,
  'relu': nnx.relu,
  'relu6': nnx.relu6,
  'silu': nnx.silu,
  'gelu': nnx.gelu,
}
# Numbers of activations in kernels/batch_norm.h.
_NUMBERS = {None: 0, 'relu': 1, 'relu6': 2}


class BatchNorm(nnx.BatchNorm):
  """Batch normalization with PyTorch's conventions, followed by an activation.

  The running variance is unbiased. Statistics and normalization use float32;
  the result has the input's dtype.

  Args:
    num_features: number of channels.
    activation: a key of ACTIVATIONS, applied to the result.
    scale_init: initializer of the scale.
    epsilon: added to the variance.
    momentum: decay of the running statistics, which is 1 minus PyTorch's
      momentum.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self,
    num_features: int,
    *,
    activation: str | None = None,
    scale_init=nnx.initializers.ones_init(),  # noqa: B008 (a pure function)
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      num_features,
      use_running_average=False,
      momentum=momentum,
      epsilon=epsilon,
      scale_init=scale_init,
      rngs=rngs,
    )
    self.activation = activation

  def __call__(self, x: jax.Array, use_running_average=None) -> jax.Array:
    """Returns x, float[N, H, W, C], normalized per channel and activated."""
    if use_running_average is None:
      use_running_average = self.use_running_average
    y, scale, bias = x.astype(jnp.float32), self.scale[...], self.bias[...]
    if use_running_average:
      mean, var = self.mean[...], self.var[...]
      y = _normalize(y, scale, bias, mean, var, self.epsilon, self.activation)
    else:
      y, mean, var = _batch_norm(y, scale, bias, self.epsilon, self.activation)
      count = x.size // x.shape[-1]
      unbiased = var * (count / max(count - 1, 1))
      # Not `mean[...] = ...`: see `streams.linear`.
      self.mean.set_value(self._moved(self.mean[...], mean))
      self.var.set_value(self._moved(self.var[...], unbiased))
    return y.astype(x.dtype)

  def _moved(self, old: jax.Array, new: jax.Array) -> jax.Array:
    new = lax.stop_gradient(new)
    return self.momentum * old + (1 - self.momentum) * new


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x, scale, bias, epsilon, activation):
  """Returns the normalized and activated input, and the batch statistics.

  No gradient flows through the returned statistics.

  Args:
    x: float32[N, ..., C].
    scale: float32[C].
    bias: float32[C].
    epsilon: added to the variance.
    activation: a key of ACTIVATIONS.

  Returns:
    y: float32[N, ..., C].
    mean, var: float32[C]; the variance is biased.
  """

  def fast(x):
    return kernels.call(
      'moments',
      [(x.shape[-1],)] * 2,
      _rows(x),
      rule='nrc->c,c',
      combine=_pooled,
    )

  mean, var = kernels.choose(fast, _moments, x)
  return _normalize(x, scale, bias, mean, var, epsilon, activation), mean, var


def _forward(x, scale, bias, epsilon, activation):
  y, mean, var = _batch_norm(x, scale, bias, epsilon, activation)
  return (y, mean, var), (x, scale, bias, mean, var)


def _backward(epsilon, activation, residuals, grads):
  def plain(x, scale, bias, mean, var, grad):
    del mean, var

    def normalized(x, scale, bias):
      mean, var = _moments(x)
      return _normalize(x, scale, bias, mean, var, epsilon, activation)

    return jax.vjp(normalized, x, scale, bias)[1](grad)

  def fast(x, scale, bias, mean, var, grad):
    inverse = lax.rsqrt(var + epsilon)
    slope = scale * inverse
    total, product = kernels.call(
      'batch_norm_sums',
      [scale.shape] * 2,
      *(_rows(x), _rows(grad), mean, slope, bias),
      rule='nrc,nrc,c,c,c->c,c',
      combine=lax.psum,
      activation=np.int64(_NUMBERS[activation]),
    )
    activate = functools.partial(_affine, activation=activation)
    _, pullback = jax.vjp(lambda d: activate(d, slope, bias), x - mean)
    count = x.size // x.shape[-1]
    # The pullback includes the slope.
    of_x = pullback(grad)[0] - slope / count * (
      total + (x - mean) * (inverse**2 * product)
    )
    return of_x, product * inverse, total

  fast = fast if activation in _NUMBERS else plain
  return kernels.choose(fast, plain, *residuals, grads[0])


_batch_norm.defvjp(_forward, _backward)


def _moments(x):
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axis=axes)
  return [mean, jnp.mean(jnp.square(x - mean), axis=axes)]


def _pooled(moments, axis):
  """Returns the mean and variance of a batch from those of equal parts."""
  mean, var = moments
  whole = lax.pmean(mean, axis)
  return [whole, lax.pmean(var + jnp.square(mean - whole), axis)]


def _normalize(x, scale, bias, mean, var, epsilon, activation):
  return _affine(x - mean, scale * lax.rsqrt(var + epsilon), bias, activation)


def _affine(d, slope, bias, activation):
  return ACTIVATIONS[activation](d * slope + bias)


def _rows(x):
  return x.reshape(len(x), -1, x.shape[-1])
