"""Tests of the package's top-level interface."""

import importlib
import pathlib
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

  def test_every_package_says_what_is_public(self):
    folder = pathlib.Path(dynconv_jax.__file__).parent
    for path in folder.glob('*/__init__.py'):
      name, found = f'dynconv_jax.{path.parent.name}', {}
      if name == 'dynconv_jax.cli':  # programs
        continue
      public = importlib.import_module(name).__all__
      # Raises for missing names.
      exec(f'from {name} import *', found)
      self.assertEqual(found.keys() - {'__builtins__'}, set(public), name)


if __name__ == '__main__':
  absltest.main()
