"""Layers with PyTorch's padding, batch norm, and initialization."""

from dynconv_jax.layers.convolution import conv as conv
from dynconv_jax.layers.cpu import conv_general_dilated as conv_general_dilated
from dynconv_jax.layers.cpu import max_pool as max_pool
from dynconv_jax.layers.dropout import Dropout as Dropout
from dynconv_jax.layers.norm import ACTIVATIONS as ACTIVATIONS
from dynconv_jax.layers.norm import BatchNorm as BatchNorm
from dynconv_jax.layers.pooling import MaxPool as MaxPool

__all__ = [
  'ACTIVATIONS',
  'BatchNorm',
  'Dropout',
  'MaxPool',
  'conv',
  'conv_general_dilated',
  'max_pool',
]
