"""What every program here shares: one clear line for a user's error."""

from __future__ import annotations

import ctypes
import logging as stdlib_logging
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

import dynconv_jax
from dynconv_jax import extras
from dynconv_jax.cli import command, flag_help

# Ours; through other libraries' progress nobody would find it.
_PACKAGE = f'{pathlib.Path(dynconv_jax.__path__[0]).resolve()}{os.sep}'

_RAISED_HERE = ('orbax', 'asyncio')


def is_wanted(record: stdlib_logging.LogRecord) -> bool:
  """Returns whether a record is shown: our own, and warnings of most others.

  At --verbosity=1 and above everything is.

  Args:
    record: of any logger.
  """
  if logging.get_verbosity() > logging.INFO:
    return True
  # orbax warns of what is meant, such as saves without metrics or reading only,
  # and its threads and tasks log pages on errors that are raised here as well.
  if any(f'{os.sep}{n}{os.sep}' in record.pathname for n in _RAISED_HERE):
    return False
  return record.levelno >= stdlib_logging.WARNING or os.path.realpath(
    record.pathname
  ).startswith(_PACKAGE)


def user_errors() -> tuple[type[Exception], ...]:
  """Returns the errors whose message says what to do.

  Anything else is a bug and its traceback is wanted.
  """
  errors = (FloatingPointError, OSError, ValueError, extras.MissingError)
  # A program that has no checkpoints does not import what they need.
  checkpoints = sys.modules.get('dynconv_jax.training.checkpoints')
  return (*errors, checkpoints.CheckpointError) if checkpoints else errors


def parse(argv: Sequence[str], doc: str) -> list[str]:
  """Returns what is left of a command line after its flags.

  A flag that is wrong ends the program with one line and status 2; one that
  asks for help, with all flags.

  Args:
    argv: of the program.
    doc: of its module.
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
  """Raises ValueError for a flag of a program that is given without a value.

  Args:
    name: of the program's module, as absl has it.
  """
  empty = [
    f'--{flag.name}'
    for flag in flags.FLAGS.get_key_flags_for_module(name)
    if flag.default is None and flag.value in ('', [''])
  ]
  if empty:
    raise ValueError(f'a value is missing: {", ".join(sorted(empty))}')


def require_checkout(what: str) -> None:
  """Checks that benchmarks/ lies beside the package, and makes it importable.

  Args:
    what: needs it.

  Raises:
    extras.MissingError: the package is installed without it.
  """
  root = pathlib.Path(dynconv_jax.__path__[0]).parent
  if not (root / 'benchmarks/cases.py').exists():
    raise extras.MissingError(
      f'{what} needs a checkout of dynconv_jax: what it times with is not '
      'installed'
    )
  # An editable install finds the package alone.
  if str(root) not in sys.path:
    sys.path.append(str(root))


def share_cpu(devices: int, batch_size: int) -> None:
  """Shares the CPU out to JAX devices; to be called before JAX is used.

  XLA runs many of a step's operations on one core, so two devices with half a
  batch each are quicker on two cores than one with all of it. Devices that
  XLA_FLAGS asks for stay, and those of a process that has used JAX before.

  Args:
    devices: their number; 0: one a core, but at most 2, or 1 where the batch
      cannot be halved.
    batch_size: images that they share.
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
  import jax  # Here: to count a PyTorch model takes no JAX.

  try:
    jax.config.update('jax_num_cpu_devices', devices)
  except (
    RuntimeError
  ):  # JAX is in use already, as where a test calls a program.
    logging.info('JAX keeps its %d devices', jax.local_device_count())


def keep_memory() -> None:
  """Lets the C library keep freed memory, where it is glibc.

  XLA allocates the temporaries of each call anew. Large ones come from the
  system, which clears every page again. One arena, without separate mappings,
  which is not trimmed, hands the same pages out.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  # M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of malloc.h.
  for parameter, value in ((-1, 2**31 - 1), (-4, 0), (-8, 1)):
    mallopt(parameter, value)


def show_unraisable(unraisable) -> None:
  """Shows an error that nobody catches, but for one that is raised as well.

  Where an array of a checkpoint cannot be written, TensorStore's threads find
  that nobody waits for the others.

  Args:
    unraisable: as `sys.unraisablehook` has it.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a program; an error of the user's ends it with status 1 and a line."""
  module = sys.modules[main.__module__]
  # absl knows the main module by this name.
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
      # pathlib has no error of its own for a '~' that leads nowhere.
      homeless = 'home directory' in str(error)
      # At --verbosity=1 and above the traceback is shown too.
      if logging.get_verbosity() > logging.INFO or not (
        homeless or isinstance(error, user_errors())
      ):
        raise
      advice = ' Set HOME, or give paths without ~' if homeless else ''
      print(f'error: {error}{advice}', file=sys.stderr)
      sys.exit(1)

  sys.unraisablehook = show_unraisable
  # Names of files may be no text.
  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors='backslashreplace')
  app.run(guarded, flags_parser=lambda argv: parse(argv, module.__doc__ or ''))
