"""Checks of user input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_choice(what: str, given: str, allowed: Iterable[str]) -> None:
  """Raises ValueError unless a choice is allowed; the message lists choices.

  Args:
    what: the kind of choice, such as 'model'.
    given: the choice.
    allowed: all choices.
  """
  allowed = list(allowed)
  if given in allowed:
    return
  near = difflib.get_close_matches(str(given), allowed, n=1)
  hint = f' (did you mean {near[0]!r}?)' if near else ''
  raise ValueError(
    f'unknown {what} {given!r}{hint}; allowed: {", ".join(allowed)}'
  )
