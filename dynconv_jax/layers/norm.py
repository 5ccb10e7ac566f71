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
# Their numbers in kernels/batch_norm.h.
_NUMBERS = {None: 0, 'relu': 1, 'relu6': 2}


class BatchNorm(nnx.BatchNorm):
  """Batch normalization in PyTorch's convention, and an activation.

  Running statistics hold the unbiased variance. The statistics and the
  normalization are float32 whatever the compute dtype, which the result has.

  Args:
    num_features: channels.
    activation: a key of ACTIVATIONS, applied to the result.
    scale_init: initializer of the scale.
    epsilon: is added to the variance.
    momentum: share of the running statistics that a step keeps, 1 less
      PyTorch's.
    rngs: stream `params`.
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
    """Returns x, float[N, H, W, C], normalized by channel and activated."""
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
      self.mean[...] = self._moved(self.mean[...], mean)
      self.var[...] = self._moved(self.var[...], unbiased)
    return y.astype(x.dtype)

  def _moved(self, old: jax.Array, new: jax.Array) -> jax.Array:
    new = lax.stop_gradient(new)
    return self.momentum * old + (1 - self.momentum) * new


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x, scale, bias, epsilon, activation):
  """Returns what is normalized and activated, and the batch's statistics.

  Statistics have no gradient of their own.

  Args:
    x: float32[..., C].
    scale: float32[C].
    bias: float32[C].
    epsilon: is added to the variance.
    activation: a key of ACTIVATIONS.

  Returns:
    y: float32[..., C].
    mean, var: float32[C]; the variance is the biased one.
  """
  plain = functools.partial(_plain, epsilon=epsilon, activation=activation)

  def fast(x, scale, bias):
    return kernels.call(
      'batch_norm',
      [x.shape, scale.shape, scale.shape],
      x,
      scale,
      bias,
      **_attributes(epsilon, activation),
    )

  fast = fast if activation in _NUMBERS else plain
  return kernels.choose(fast, plain, x, scale, bias)


def _forward(x, scale, bias, epsilon, activation):
  y, mean, var = _batch_norm(x, scale, bias, epsilon, activation)
  return (y, mean, var), (x, scale, bias, mean, var)


def _backward(epsilon, activation, residuals, grads):
  def plain(x, scale, bias, mean, var, grad):
    del mean, var
    normalized = lambda *args: _plain(*args, epsilon, activation)[0]
    return list(jax.vjp(normalized, x, scale, bias)[1](grad))

  def fast(x, scale, bias, mean, var, grad):
    return kernels.call(
      'batch_norm_gradient',
      [x.shape, scale.shape, scale.shape],
      *(x, scale, bias, mean, var, grad),
      **_attributes(epsilon, activation),
    )

  fast = fast if activation in _NUMBERS else plain
  return tuple(kernels.choose(fast, plain, *residuals, grads[0]))


_batch_norm.defvjp(_forward, _backward)


def _plain(x, scale, bias, epsilon, activation):
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axis=axes)
  var = jnp.mean(jnp.square(x - mean), axis=axes)
  y = _normalize(x, scale, bias, mean, var, epsilon, activation)
  return [y, mean, var]


def _normalize(x, scale, bias, mean, var, epsilon, activation):
  y = (x - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
  return ACTIVATIONS[activation](y)


def _attributes(epsilon, activation):
  number = np.int64(_NUMBERS[activation])
  return {'epsilon': np.float32(epsilon), 'activation': number}
