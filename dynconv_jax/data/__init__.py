"""Data sets: sources, decoding, augmentation and batches."""

from dynconv_jax import extras

# What reads one image. Modules that read data sets ask for more.
extras.require('train', 'dm_pix', 'PIL')

# Its modules; importing the package imports none of them.
__all__ = [
  'augment',
  'batches',
  'decode',
  'prepare',
  'scenes',
  'source',
  'sources',
  'splits',
]
