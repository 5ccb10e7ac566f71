"""Names of ImageNet's classes, in the order of published weights."""

from __future__ import annotations

import functools
import pathlib

_FILE = pathlib.Path(__file__).with_name('imagenet_classes.txt')


@functools.cache
def class_names() -> tuple[str, ...]:
  """Returns the 1000 names of ImageNet's classes, by their number.

  They are WordNet's; the file says where they are from.
  """
  lines = _FILE.read_text('utf-8').splitlines()
  return tuple(line for line in lines if not line.startswith('#'))
