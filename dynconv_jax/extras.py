"""Checks that optional dependencies are installed."""

from __future__ import annotations

import importlib.util


class MissingError(ImportError):
  """A module is not installed; the message names the extra that installs it."""


def require(extra: str, *modules: str) -> None:
  """Checks that modules are installed, without importing them.

  Args:
    extra: the extra of this package that installs them.
    *modules: names of top-level modules.

  Raises:
    MissingError: modules are missing; the message names them and the extra.
  """
  missing = [name for name in modules if importlib.util.find_spec(name) is None]
  if missing:
    raise MissingError(
      f'{", ".join(missing)} not installed: run'
      f" pip install 'dynconv-jax[{extra}]'"
    )
