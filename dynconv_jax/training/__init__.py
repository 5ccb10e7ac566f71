"""Training and evaluation."""

from dynconv_jax import extras

extras.require('train', 'grain', 'optax', 'orbax', 'tensorboardX', 'tqdm')
