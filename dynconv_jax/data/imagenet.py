"""ImageNet's class names, in the order of published weights."""

from __future__ import annotations

import functools
import pathlib

_FILE = pathlib.Path(__file__).with_name('imagenet_classes.txt')


@functools.cache
def class_names() -> tuple[str, ...]:
  """Returns ImageNet's 1000 class names, from WordNet, in label order."""
  lines = _FILE.read_text('utf-8').splitlines()
  return tuple(line for line in lines if not line.startswith('#'))
