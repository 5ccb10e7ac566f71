"""What XLA makes of a network, read off what it compiles."""

from __future__ import annotations

import re
from typing import Any

# What takes no launch.
_FREE = ('parameter', 'constant', 'get-tuple-element', 'bitcast', 'tuple')


def describe(text: str, log: str) -> dict[str, Any]:
  """Returns what a compiled module launches.

  Args:
    text: the module after all passes.
    log: of XLA, in which each command buffer is a line.
  """
  recorded = re.findall(r'command buffer thunk with .* thunks: (.*)', log)
  names = {name.strip() for line in recorded for name in line.split(',')}
  entry = text[text.index('\nENTRY ') :]
  found = re.findall(
    r'^ +(?:ROOT )?%(\S+) = (\(.*?\) |\S+ )([\w-]+)\(', entry, re.MULTILINE
  )
  return {
    'command_buffers': len(recorded),
    'recorded': len(names),
    'outside': [
      name for name, _, op in found if op not in _FREE and name not in names
    ],
    # Not those of nothing.
    'copies': [
      shape.strip()
      for _, shape, op in found
      if op == 'copy' and '[0]' not in shape
    ],
    'kernels': entry.count('custom_call_target="triton_kernel_call'),
  }
