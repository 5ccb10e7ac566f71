"""Training and evaluation."""

from dynconv_jax import extras

# What loads a trained network. Modules that train ask for more.
extras.require('train', 'optax', 'orbax')

# Its modules; importing the package imports none of them.
__all__ = [
  'checkpoints',
  'config',
  'evaluation',
  'inputs',
  'loop',
  'published',
  'schedules',
  'state',
  'workdir',
]
