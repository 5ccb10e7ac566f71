"""Training and evaluation."""

from dynconv_jax import extras

# What loads a trained network. Modules that train ask for more.
extras.require('train', 'optax', 'orbax')
