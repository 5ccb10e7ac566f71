"""Restores logging after a test."""

import contextlib
import logging as stdlib_logging

from absl import logging


@contextlib.contextmanager
def kept():
  """Restores levels, handlers and filters on exit.

  Which logger has the level depends on the handlers that exist when absl's
  --verbosity is set or reset.
  """
  root, handler = stdlib_logging.getLogger(), logging.get_absl_handler()
  verbosity = logging.get_verbosity()
  loggers = [root, logging.get_absl_logger()]
  levels = [logger.level for logger in loggers]
  handlers, filters = list(root.handlers), list(handler.filters)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)
    root.handlers[:], handler.filters[:] = handlers, filters
