"""What is installed with an extra of this package, and what is not."""

from __future__ import annotations

import importlib.util


class MissingError(ImportError):
  """A module is not installed; the message names the extra that has it."""


def require(extra: str, *modules: str) -> None:
  """Checks that modules are installed, without importing them.

  Args:
    extra: of this package, that installs them.
    *modules: names of top-level modules.

  Raises:
    MissingError: naming all that are missing, and the extra.
  """
  missing = [name for name in modules if importlib.util.find_spec(name) is None]
  if missing:
    raise MissingError(
      f'{", ".join(missing)} not installed: pip install'
      f" 'dynconv-jax[{extra}]' installs what this needs"
    )
