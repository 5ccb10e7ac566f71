"""Descriptions of networks compiled by XLA."""

from __future__ import annotations

import re
from typing import Any

# Operations without a launch.
_FREE = ('parameter', 'constant', 'get-tuple-element', 'bitcast', 'tuple')


def describe(text: str, log: str) -> dict[str, Any]:
  """Returns the launches and copies of a compiled module.

  Args:
    text: the module after all passes.
    log: XLA's log, with one line per command buffer.
  """
  recorded = re.findall(r'command buffer thunk with .* thunks: (.*)', log)
  names = {name.strip() for line in recorded for name in line.split(',')}
  entry = text[text.index('\nENTRY ') :]
  operations = re.findall(
    r'^ +(?:ROOT )?%(\S+) = (\(.*?\) |\S+ )([\w-]+)\(', entry, re.MULTILINE
  )
  return {
    'command_buffers': len(recorded),
    'recorded': len(names),
    'outside': [
      name
      for name, _, op in operations
      if op not in _FREE and name not in names
    ],
    # Except copies of empty arrays.
    'copies': [
      shape.strip()
      for _, shape, op in operations
      if op == 'copy' and not re.search(r'[\[,]0[],]', shape)
    ],
    'kernels': entry.count('custom_call_target="triton_kernel_call'),
  }
