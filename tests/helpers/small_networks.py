"""Small networks with random weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.training import workdir
from dynconv_jax.training.config import Config


def config(**changes) -> Config:
  """Returns a configuration of a small ResNet, with changes."""
  changes = {'model': 'cifar_resnet8', 'width_multiplier': 0.25, **changes}
  return Config().replace(**changes)


def network(num_classes: int, seed: int = 0, **changes) -> nnx.Module:
  """Returns a network with random weights."""
  model = workdir.build_model(config(**changes), num_classes, abstract=True)
  return filled(model, np.random.default_rng(seed).normal)


def filled(abstract: nnx.Module, draw: Callable[..., np.ndarray]) -> nnx.Module:
  """Returns a network with drawn variables, without compiling anything."""
  graphdef, state = nnx.split(abstract)
  return nnx.merge(
    graphdef,
    jax.tree.map(
      lambda a: jnp.asarray(draw(size=a.shape), a.dtype), nnx.as_pure(state)
    ),
  )


def weights(model: nnx.Module) -> dict[str, np.ndarray]:
  """Returns all variables of a network by path."""
  return {
    '.'.join(map(str, path)): np.asarray(variable[...])
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }
