"""Objects named on the command line as package.module:NAME."""

from __future__ import annotations

import importlib
from typing import Any


def load(reference: str, kind: type, option: str) -> Any:
  """Imports a module and returns the object named package.module:NAME.

  Args:
    reference: the name.
    kind: required type of the object.
    option: option that specified the name, for errors.

  Raises:
    ValueError: the name is malformed, the module is missing or cannot be
      imported, it lacks the object, or the object has another type.
  """
  module_name, _, name = reference.partition(':')
  given = f'{option}={reference}'
  if not all(p.isidentifier() for p in (*module_name.split('.'), name)):
    raise ValueError(f'{given}: write package.module:NAME')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # A user's module may raise anything.
    missing = isinstance(error, ModuleNotFoundError) and (
      f'{module_name}.'.startswith(f'{error.name}.')
    )
    reason = (
      f'there is no module {error.name} in the current folder or PYTHONPATH'
      if missing
      else f'importing {module_name} fails: {type(error).__name__}: {error}'
    )
    raise ValueError(f'{given}: {reason}') from error
  choices = [k for k, v in vars(module).items() if isinstance(v, kind)]
  choice = f'of type {kind.__name__} it has {", ".join(choices) or "none"}'
  if not hasattr(module, name):
    raise ValueError(f'{given}: {module_name} has no {name}; {choice}')
  value = getattr(module, name)
  if not isinstance(value, kind):
    raise ValueError(
      f'{given} must be of type {kind.__name__}; got {type(value).__name__}; '
      f'{choice}'
    )
  return value
