"""Checks of user input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_choice(what: str, given: str, allowed: Iterable[str]) -> None:
  """Raises ValueError with the allowed choices unless a choice is allowed.

  Args:
    what: the kind of choice, such as 'model'.
    given: the choice.
    allowed: all allowed choices.
  """
  allowed = list(allowed)
  if given in allowed:
    return
  matches = difflib.get_close_matches(str(given), allowed, n=1)
  hint = f' (did you mean {matches[0]!r}?)' if matches else ''
  raise ValueError(
    f'unknown {what} {given!r}{hint}; allowed: {", ".join(allowed)}'
  )
