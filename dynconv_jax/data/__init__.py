"""Data sets: sources, decoding, augmentation and batches."""

from dynconv_jax import extras

extras.require(
  'train',
  'array_record',
  'dm_pix',
  'grain',
  'PIL',
  'requests',
  'tensorflow_datasets',
)
