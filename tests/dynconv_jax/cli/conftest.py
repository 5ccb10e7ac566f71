"""Fixtures that call programs in this process, and two small trained runs."""

import contextlib
import importlib.util
import io
import pathlib
import sys
from unittest import mock

import absl_logging
import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from dynconv_jax.cli import flag_help
from dynconv_jax.cli import program as shared
from dynconv_jax.training import loop
from dynconv_jax.training.config import Config


class Programs:
  """Calls the programs, each with its own flags.

  Several programs define a flag of the same name, which absl does not allow in
  one process. A program's flags are therefore only known while it is loaded or
  called.
  """

  def __init__(self):
    self._loaded = {}
    # The --help output of each program, by name.
    self.help = {}
    # Used from now on: no program changes the devices of the other tests.
    jax.devices()
    # They define flags when they are imported. A program that imported them
    # first would take these flags away when it ends.
    for name in 'grain.python', 'array_record.python.array_record_data_source':
      importlib.import_module(name)

  def __call__(self, name: str, *arguments, stdout=None) -> str:
    """Returns what a program prints to stdout; raises its errors.

    Args:
      name: such as 'evaluate' or 'benchmarks.gpu_floor'.
      *arguments: of its command line.
      stdout: is printed to, for a program that ends by an error.
    """
    stdout = stdout or io.StringIO()
    with _no_program_flags():
      if name not in self._loaded:
        self._load(name)
      module, own = self._loaded[name]
      with contextlib.ExitStack() as stack:
        stack.enter_context(absl_logging.kept())
        stack.enter_context(flagsaver.flagsaver())
        # A process with many tests has to release memory.
        stack.enter_context(mock.patch.object(shared, 'keep_memory'))
        for flag in own:
          flags.FLAGS[flag.name] = flag
          stack.callback(delattr, flags.FLAGS, flag.name)
          stack.callback(flag.unparse)
        rest = flags.FLAGS([name, *map(str, arguments)])
        stack.enter_context(contextlib.redirect_stdout(stdout))
        module.main(rest)
    return stdout.getvalue()

  def load(self, name: str) -> None:
    """Loads a program without calling it."""
    with _no_program_flags():
      if name not in self._loaded:
        self._load(name)

  def _load(self, name: str) -> None:
    """Stores a copy of a program's module and flags and removes them."""
    known = set(flags.FLAGS)
    full = name if name.startswith('benchmarks.') else f'dynconv_jax.cli.{name}'
    spec = importlib.util.find_spec(full)
    module = importlib.util.module_from_spec(spec)
    # absl asks which module defines a flag.
    with pytest.MonkeyPatch.context() as patch:
      patch.setitem(sys.modules, full, module)
      spec.loader.exec_module(module)
    self.help[name] = flag_help.text(module.__doc__)
    own = [flags.FLAGS[flag] for flag in set(flags.FLAGS) - known]
    for flag in own:
      delattr(flags.FLAGS, flag.name)
    self._loaded[name] = module, own


@contextlib.contextmanager
def _no_program_flags():
  """Removes flags of programs that a test has imported directly."""
  taken = [
    (module, flag)
    for module, defined in flags.FLAGS.flags_by_module_dict().items()
    if module.startswith(('dynconv_jax.cli.', 'benchmarks.'))
    for flag in defined
  ]
  for _, flag in taken:
    delattr(flags.FLAGS, flag.name)
  try:
    yield
  finally:
    for module, flag in taken:
      flags.FLAGS[flag.name] = flag
      flags.FLAGS.register_flag_by_module(module, flag)


@pytest.fixture(scope='session')
def program():
  """program('evaluate', '--workdir=...') returns the program's output."""
  return Programs()


def _train(folder: pathlib.Path, method: str) -> pathlib.Path:
  config = Config.make(
    dataset='spots',
    spots_size=24,
    spots_train=64,
    spots_test=20,
    data_dir=str(folder.parent / 'data'),
    image_size=24,
    crop='none',
    model='cifar_resnet8',
    width_multiplier=0.25,
    method=method,
    batch_size=16,
    # Divides none of the splits: 58, 6 and 20 images.
    eval_batch_size=8,
    epochs=1,
  )
  loop.train(config, folder)
  return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """The folder of the runs; tests must copy it before writing."""
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='session')
def dynconv_run(trained):
  """Workdir of a DynConv network, trained for three steps on spots."""
  return _train(trained / 'dynconv', 'dynconv')


@pytest.fixture(scope='session')
def dense_run(trained):
  """Workdir of a dense network, trained for three steps on spots."""
  return _train(trained / 'dense', 'dense')
