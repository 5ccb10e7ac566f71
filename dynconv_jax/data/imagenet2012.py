"""ImageNet of ILSVRC 2012 (Russakovsky et al., IJCV 2015), from its archives.

Splits, labels, and order equal those of TFDS's `imagenet2012`, whose builder
needs TensorFlow. Images are stored as published, including the few in CMYK or
PNG.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import tarfile

import tensorflow_datasets as tfds

from dynconv_jax.data import folders, imagenet
from dynconv_jax.data.prepare import prepare
from dynconv_jax.data.source import Common, Dataset, DataSource, option

_OPTION = 'imagenet2012_dir'
_ARCHIVES = {
  'train': 'ILSVRC2012_img_train.tar',
  'validation': 'ILSVRC2012_img_val.tar',
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the source."""

  imagenet2012_dir: str = option(
    '',
    f"Folder of ImageNet's archives {' and '.join(_ARCHIVES.values())}. Needed "
    'only until ImageNet is prepared in data_dir.',
    operational=True,
  )


def open_imagenet2012(options: Options, common: Common) -> Dataset:
  """Returns ImageNet; prepares it from the published archives if needed.

  Raises:
    FileNotFoundError: ImageNet is not prepared, and archives are missing.
    ValueError: an archive is truncated or has the wrong classes or images.
  """

  def examples(dl_manager):
    del dl_manager  # Downloads from image-net.org need an account.
    paths = {}
    for split, name in _ARCHIVES.items():
      paths[split] = pathlib.Path(options.imagenet2012_dir).expanduser() / name
      if not options.imagenet2012_dir or not paths[split].is_file():
        raise FileNotFoundError(
          f'imagenet2012 is not prepared in {common.data_dir}, and {_OPTION}='
          f'{options.imagenet2012_dir!r} has no {name}. Download it from '
          'https://image-net.org, which needs an account'
        )
    return {
      'train': _train_examples(paths['train']),
      'validation': _validation_examples(paths['validation']),
    }

  return prepare(
    SOURCE.name,
    '5.1.0',
    examples,
    imagenet.class_names(),
    common.data_dir,
    aliases={'test': 'validation'},
  )


SOURCE = DataSource('imagenet2012', Options, open_imagenet2012)


def _read(name: str) -> list[str]:
  """Returns the lines of a file that TFDS includes."""
  path = tfds.core.tfds_path(f'datasets/imagenet2012/{name}')
  return path.read_text().split()


def _train_examples(path: pathlib.Path):
  """Yields the images of an archive that contains one archive per class."""
  labels = {name: label for label, name in enumerate(_read('labels.txt'))}
  seen = set()
  for archive, content in _members(path):
    name = archive.removesuffix('.tar')
    if name not in labels:
      raise ValueError(
        f'{path} contains {archive}, which is not an ImageNet class'
      )
    seen.add(name)
    for image, data in _members(path, content):
      yield {'image': data, 'label': labels[name], 'name': image}
  if absent := sorted(set(labels) - seen):
    raise ValueError(f'{path} lacks the classes {folders.some(absent)}')


def _validation_examples(path: pathlib.Path):
  """Yields the images of an archive, with labels by the number in the name."""
  numbers = {name: label for label, name in enumerate(_read('labels.txt'))}
  labels = [numbers[name] for name in _read('validation_labels.txt')]
  count = 0
  for name, data in _members(path):
    count += 1
    try:  # ILSVRC2012_val_00000001.JPEG is the first.
      number = int(pathlib.Path(name).stem.rpartition('_')[2])
      label = labels[number - 1 if number > 0 else len(labels)]
    except (IndexError, ValueError):
      raise ValueError(
        f'{path} contains {name}, which is not an ImageNet validation image'
      ) from None
    yield {'image': data, 'label': label, 'name': name}
  if count != len(labels):
    raise ValueError(f'{path} contains {count} of {len(labels)} images')


def _members(path: pathlib.Path, content: bytes | None = None):
  """Yields (name, content) of the files of an archive.

  Args:
    path: the archive.
    content: content of an inner archive to read instead, or None.
  """
  file = path.open('rb') if content is None else io.BytesIO(content)
  try:
    with file, tarfile.open(fileobj=file) as tar:
      for member in filter(tarfile.TarInfo.isfile, tar):
        name = pathlib.PurePath(member.name).name
        yield name, tar.extractfile(member).read()
  except tarfile.TarError as error:
    raise ValueError(f'{path} is damaged: {error}') from error
