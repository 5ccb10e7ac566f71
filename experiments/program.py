"""What every program here shares: one clear line for a user's error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, logging

from dynconv_jax.data.decode import CorruptImageError
from dynconv_jax.training.checkpoints import CheckpointError

# Errors whose message says what to do; anything else is a bug and its
# traceback is wanted.
USER_ERRORS = (
  CheckpointError,
  CorruptImageError,
  FloatingPointError,
  OSError,
  ValueError,
)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a program; an error of the user's ends it with status 1 and a line."""

  def guarded(argv: Sequence[str]) -> None:
    # At -v=1 and above the traceback is shown too.
    logging.use_absl_handler()
    try:
      main(argv)
    except USER_ERRORS as error:
      if logging.get_verbosity() > logging.INFO:
        raise
      print(f'error: {error}', file=sys.stderr)
      sys.exit(1)

  app.run(guarded)
