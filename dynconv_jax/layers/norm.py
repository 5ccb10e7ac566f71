"""Batch normalization and activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

ACTIVATIONS = {
  None: lambda x: x,
  'relu': nnx.relu,
  'relu6': nnx.relu6,
  'silu': nnx.silu,
  'gelu': nnx.gelu,
}


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
    y = x.astype(jnp.float32)
    if use_running_average:
      mean, var = self.mean[...], self.var[...]
    else:
      mean = jnp.mean(y, axis=(0, 1, 2))
      var = jnp.mean(jnp.square(y - mean), axis=(0, 1, 2))
      count = x.size // x.shape[-1]
      unbiased = var * (count / max(count - 1, 1))
      self.mean[...] = self._moved(self.mean[...], mean)
      self.var[...] = self._moved(self.var[...], unbiased)
    scale = self.scale[...] * lax.rsqrt(var + self.epsilon)
    y = ((y - mean) * scale + self.bias[...]).astype(x.dtype)
    return ACTIVATIONS[self.activation](y)

  def _moved(self, old: jax.Array, new: jax.Array) -> jax.Array:
    new = lax.stop_gradient(new)
    return self.momentum * old + (1 - self.momentum) * new
