"""Common behavior of all programs: errors, logging, and setup."""

from __future__ import annotations

import ctypes
import logging as stdlib_logging
import os
import pathlib
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from absl import app, flags, logging

import dynconv_jax
from dynconv_jax import extras
from dynconv_jax.cli import command, flag_help

# Log records from this folder are shown at all levels.
_PACKAGE = f'{pathlib.Path(dynconv_jax.__path__[0]).resolve()}{os.sep}'

_RAISED_HERE = ('orbax', 'asyncio')


def is_wanted(record: stdlib_logging.LogRecord) -> bool:
  """Returns whether to show a log record.

  Shows all records of this package and warnings of most other packages, and
  everything at --verbosity=1 and above.

  Args:
    record: a record of any logger.
  """
  if logging.get_verbosity() > logging.INFO:
    return True
  # orbax warns about intended use, such as saves without metrics or read-only
  # managers. Its threads and tasks log pages about errors that are also raised.
  if any(f'{os.sep}{n}{os.sep}' in record.pathname for n in _RAISED_HERE):
    return False
  return record.levelno >= stdlib_logging.WARNING or os.path.realpath(
    record.pathname
  ).startswith(_PACKAGE)


def user_errors() -> tuple[type[Exception], ...]:
  """Returns the error types that are reported by message only.

  Any other error is a bug and is shown with its traceback.
  """
  errors = (FloatingPointError, OSError, ValueError, extras.MissingError)
  # Programs without checkpoints do not import this module.
  checkpoints = sys.modules.get('dynconv_jax.training.checkpoints')
  return (*errors, checkpoints.CheckpointError) if checkpoints else errors


def parse(argv: Sequence[str], doc: str) -> list[str]:
  """Parses flags and returns the remaining arguments.

  A wrong flag ends the program with a one-line error and status 2. --help
  prints all flags and exits.

  Args:
    argv: the command line.
    doc: docstring of the program's module.
  """
  if any(argument in command.HELP for argument in argv[1:]):
    print(flag_help.text(doc), end='')
    sys.exit(0)
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    name = f'--{error.flagname}'
    command.fail(f'unknown flag {name}', name, [f'--{n}' for n in flags.FLAGS])
  except flags.Error as error:
    required = re.sub(
      r'flag --(\w+)=None: .* other than None\.',
      r'--\1 is required',
      str(error),
    )
    command.fail(required, '', ())


def check_given(name: str) -> None:
  """Raises ValueError if a flag of a program is set to an empty value.

  Args:
    name: name of the program's module in absl.
  """
  empty = [
    f'--{flag.name}'
    for flag in flags.FLAGS.get_key_flags_for_module(name)
    if flag.default is None and flag.value in ('', [''])
  ]
  if empty:
    raise ValueError(f'missing values: {", ".join(sorted(empty))}')


def require_checkout(what: str) -> None:
  """Makes benchmarks/ of the checkout importable.

  Args:
    what: name of the feature that needs it, for the error message.

  Raises:
    extras.MissingError: there is no benchmarks/ next to the package.
  """
  root = pathlib.Path(dynconv_jax.__path__[0]).parent
  if not (root / 'benchmarks/cases.py').exists():
    raise extras.MissingError(
      f'{what} needs a checkout of dynconv_jax: benchmarks/ is not installed'
    )
  # An editable install only makes the package itself importable.
  if str(root) not in sys.path:
    sys.path.append(str(root))


def share_cpu(devices: int, batch_size: int) -> None:
  """Splits the CPU into several JAX devices. Must be called before JAX is used.

  XLA runs many operations on one core. On two cores, two devices with half a
  batch each are therefore faster than one device with the whole batch. Has no
  effect if XLA_FLAGS sets the number of devices or if JAX is already in use.

  Args:
    devices: number of devices. 0: 2, or 1 if there is one core or the batch
      size is odd.
    batch_size: number of images in a batch over all devices.
  """
  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  if not devices:
    cores = (
      len(os.sched_getaffinity(0))
      if hasattr(os, 'sched_getaffinity')
      else os.cpu_count()
    )
    devices = 2 if cores > 1 and batch_size % 2 == 0 else 1
  import jax  # Imported here because counting a PyTorch model needs no JAX.

  try:
    jax.config.update('jax_num_cpu_devices', devices)
  except (
    RuntimeError
  ):  # JAX is already in use, for example when tests call programs.
    logging.info('JAX keeps its %d devices', jax.local_device_count())


def keep_memory() -> None:
  """Makes glibc keep freed memory. Has no effect with other C libraries.

  XLA allocates temporaries again in each call. By default, large ones are
  mapped by the system, which zeroes every page. A single arena that is never
  trimmed reuses the same pages.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  # M_TRIM_THRESHOLD, M_MMAP_MAX, and M_ARENA_MAX of malloc.h.
  for parameter, value in ((-1, 2**31 - 1), (-4, 0), (-8, 1)):
    mallopt(parameter, value)


def show_unraisable(unraisable) -> None:
  """Reports unraisable errors except a redundant one of TensorStore.

  If an array of a checkpoint cannot be written, that error is raised, and the
  event loop of TensorStore's other writes is already closed.

  Args:
    unraisable: argument of `sys.unraisablehook`.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a program. User errors end it with a one-line message and status 1."""
  module = sys.modules[main.__module__]
  # absl's name of the main module.
  name = sys.argv[0] if module.__name__ == '__main__' else module.__name__

  def guarded(argv: Sequence[str]) -> None:
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(is_wanted)
    try:
      check_given(name)
      main(argv)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      sys.exit(128 + signal.SIGINT)
    except (*user_errors(), RuntimeError) as error:
      # pathlib raises a plain RuntimeError if it cannot expand '~'.
      homeless = 'home directory' in str(error)
      # Show the traceback at --verbosity=1 and above.
      if logging.get_verbosity() > logging.INFO or not (
        homeless or isinstance(error, user_errors())
      ):
        raise
      advice = ' Set HOME or use paths without ~' if homeless else ''
      print(f'error: {error}{advice}', file=sys.stderr)
      sys.exit(1)

  sys.unraisablehook = show_unraisable
  # If an array of a checkpoint cannot be written, other writes never start.
  warnings.filterwarnings(
    'ignore', 'coroutine .*async_serialize', RuntimeWarning
  )
  # File names may not be valid text.
  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors='backslashreplace')
  app.run(guarded, flags_parser=lambda argv: parse(argv, module.__doc__ or ''))
