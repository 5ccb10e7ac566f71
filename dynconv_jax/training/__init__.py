"""Training and evaluation."""

from dynconv_jax import extras

# Enough to load a trained network. Modules that train require more.
extras.require('train', 'optax', 'orbax')

# Importing the package imports none of its modules.
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
