"""Parses absl flags once: grain's workers and the programs need them."""

import sys

from absl import flags


def pytest_configure(config):
  del config
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])
