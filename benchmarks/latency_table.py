"""Updates tables of dynconv_jax.cli.benchmark's times in a README.

  python -m benchmarks.latency_table results/lite0_latency/README.md

Replaces the text between a line `<!-- table: FILE -->`, where FILE is the path
of a benchmark.json relative to the README, and a line `<!-- end -->`.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from dynconv_jax.files import write_atomic

_PLACE = re.compile(
  r'(<!-- table: (\S+) -->\n).*?(^<!-- end -->$)', re.DOTALL | re.MULTILINE
)


def latency_table(summary: Mapping[str, Any]) -> str:
  """Returns a table by batch size and density, with processor and versions.

  Args:
    summary: the JSON content that dynconv_jax.cli.benchmark writes.
  """
  runs = summary.get('runs', [summary])
  own = {'sparse_ms': 'sparse', 'native_dense_ms': 'our dense'}
  own['dense_ms'] = 'XLA'
  own = {key: name for key, name in own.items() if key in runs[0]}
  heads = ['batch', 'density', 'executed MACs', *own.values()]
  heads += [*runs[0]['runtimes'], 'fastest dense']
  heads += ['sparse / fastest', 'sparse / (fastest * MACs)']
  rows = [heads, ['---:'] * len(heads)]
  for run in runs:
    times = [*(run[key] for key in own), *run['runtimes'].values()]
    rows.append(
      [
        str(run['batch_size']),
        f'{run["density"]:.2f}',
        f'{run["mac_ideal"]:.3f}',
        *(f'{time:.2f}' for time in times),
        run['fastest_dense'].replace('jax', 'XLA'),
        f'{run["sparse_over_fastest_dense"]:.2f}',
        f'{run["sparse_over_proportional"]:.2f}',
      ]
    )
  table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
  versions = ', '.join(f'{k} {v}' for k, v in summary['versions'].items())
  return f'{table}\n\nMilliseconds. {summary["cpu"]}; {versions}.\n'


def fill(readme: pathlib.Path) -> str:
  """Returns the content of a README with updated tables.

  Args:
    readme: path of the README. Tables whose file is missing are unchanged.
  """

  def replace(match):
    file = readme.parent / match[2]
    if not file.exists():
      return match[0]
    return match[1] + latency_table(json.loads(file.read_text())) + match[3]

  return _PLACE.sub(replace, readme.read_text())


if __name__ == '__main__':
  for name in sys.argv[1:]:
    write_atomic(name, fill(pathlib.Path(name)))
