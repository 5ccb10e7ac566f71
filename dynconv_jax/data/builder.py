"""The TensorFlow Datasets builder of prepared data sets."""

from __future__ import annotations

import hashlib
import os
import pathlib

import tensorflow_datasets as tfds
from absl import logging

from dynconv_jax.data import folders


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Stores examples, and warns about images that two splits share."""

  def __init__(self, examples, features, **kwargs):
    self._examples, self._features = examples, features
    self._first: dict[bytes, tuple[str, str]] = {}
    self._shared: list[str] = []
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(self._features)
    )

  def _split_generators(self, dl_manager):
    return {
      split: self._generate_examples(split, examples)
      for split, examples in self._examples(dl_manager).items()
    }

  def _generate_examples(self, split, examples):
    for example in examples:
      example = dict(example)
      name, image = example.pop('name'), example['image']
      if isinstance(image, os.PathLike):
        image = pathlib.Path(image).read_bytes()
      self._note(split, name, image)
      yield name, example | {'id': name, 'image': image}

  def _note(self, split: str, name: str, image: bytes) -> None:
    digest = hashlib.blake2b(image, digest_size=16).digest()
    first, twin = self._first.setdefault(digest, (split, name))
    if first != split and image:
      self._shared.append(f'{name} of {split} is {twin} of {first}')

  def download_and_prepare(self, **kwargs):
    super().download_and_prepare(**kwargs)
    if self._shared:
      logging.warning(
        '%s: two splits contain the same images: %s',
        self.name,
        folders.some(self._shared),
      )
