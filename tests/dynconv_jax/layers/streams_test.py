"""Tests of random streams that are traced in linear time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from dynconv_jax import create_model
from dynconv_jax.layers import streams


def _draw(rngs):
  return [jax.random.key_data(rngs[name]()) for name in ('a', 'b', 'a', 'c')]


def test_keys_and_counts_are_those_of_flax():
  plain, given = nnx.Rngs(1, a=2), nnx.Rngs(1, a=2)
  np.testing.assert_array_equal(_draw(plain), _draw(streams.linear(given)))
  # The next keys are new, whichever object they are drawn from.
  np.testing.assert_array_equal(_draw(plain), _draw(given))
  np.testing.assert_array_equal(
    _draw(plain.fork()), _draw(streams.linear(given).fork())
  )


def test_the_streams_of_an_outer_trace_are_refused():
  rngs = streams.linear(nnx.Rngs(0))
  with pytest.raises(errors.TraceContextError):
    jax.eval_shape(lambda: jax.random.normal(rngs(), ()))


def test_tracing_a_network_asks_no_tracer_for_its_sharding(monkeypatch):
  asked = []

  def sharding(tracer):
    asked.append(tracer)
    raise AttributeError

  def trace(rngs):
    model = create_model(
      'cifar_resnet8', method='dynconv', num_classes=3, drop_path=0.5, rngs=rngs
    )
    images = jnp.zeros((2, 8, 8, 3))
    return model(images, rngs=nnx.Rngs(gumbel=0, dropout=1))

  monkeypatch.setattr(jax.core.Tracer, 'sharding', property(sharding))
  jax.eval_shape(lambda: nnx.Rngs(0)())
  assert asked  # Otherwise, `streams` is no longer needed.
  asked.clear()
  jax.eval_shape(lambda: trace(nnx.Rngs(0)))
  assert not asked


def test_none():
  assert streams.linear(None) is None
