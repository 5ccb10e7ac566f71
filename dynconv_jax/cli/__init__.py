"""Programs: absl flags to calls of the library."""

import sys


def _excepthook(kind, error, traceback):
  """Ctrl-C while a program imports what it needs is no error."""
  if not issubclass(kind, KeyboardInterrupt):
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _excepthook
