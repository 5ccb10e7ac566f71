"""Tests of the package's front door."""

import subprocess
import sys

from absl.testing import absltest

import dynconv_jax
from dynconv_jax.models import create


class InitTest(absltest.TestCase):
  def test_create_model(self):
    self.assertIs(dynconv_jax.create_model, create.create_model)
    self.assertEqual(dynconv_jax.__all__, ['create_model'])

  def test_unknown_name(self):
    with self.assertRaisesRegex(
      AttributeError, "module 'dynconv_jax' has no attribute 'create_modle'"
    ):
      _ = dynconv_jax.create_modle

  def test_import_is_light(self):
    program = (
      'import sys, dynconv_jax; '
      'print([m for m in ("jax", "flax", "torch") if m in sys.modules])'
    )
    done = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, text=True
    )
    self.assertEqual(done.stdout, '[]\n', done.stderr)


if __name__ == '__main__':
  absltest.main()
