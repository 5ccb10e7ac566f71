"""Data sets: sources, decoding, augmentation, and batches."""

from dynconv_jax import extras

# Packages needed to read one image. Modules that read data sets require more.
extras.require('train', 'dm_pix', 'PIL')

# Modules of this package, which importing the package does not import.
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
