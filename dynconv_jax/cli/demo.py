"""Serves a web page that shows where networks compute in an image.

dynconv demo --workdir=workdir/spots_dynconv
dynconv demo --workdir=workdir/budget0.25,workdir/budget0.5

The page shows the class, the GMACs, the latency of dense and sparse execution,
and the masks of every block. Several networks can be compared. If they differ
in budget, a slider selects one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.demo import Server, load_networks
from dynconv_jax.demo.networks import find_examples

_WORKDIR = flags.DEFINE_list(
  'workdir',
  None,
  'Workdir of a run, or several separated by commas.',
  required=True,
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use.'
)
_PORT = flags.DEFINE_integer(
  'port', 8000, 'Port of the page; 0: any free port.', 0, 65535
)
_HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'Address to listen on; 0.0.0.0 allows access from other machines.',
)
_EXAMPLES = flags.DEFINE_string(
  'examples',
  '8',
  "Example images: a folder, or a number of the first run's test images.",
)


def main(argv: Sequence[str]) -> None:
  """Serves the page until interrupted."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  with Server(_PORT.value, _HOST.value) as server:
    networks = load_networks(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
    examples = find_examples(_EXAMPLES.value, _WORKDIR.value[0])
    print(f'serving {server.url} (press Ctrl-C to stop)', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      server.start(networks, examples)


if __name__ == '__main__':
  program.run(main)
