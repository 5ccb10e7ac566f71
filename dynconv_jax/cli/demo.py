"""Serves a page that shows where networks compute in a photograph.

python -m experiments.demo --workdir=workdir/spots_dynconv
python -m experiments.demo --workdir=workdir/budget0.25,workdir/budget0.5

The page shows the class, the GMACs, the time of dense and of sparse execution,
and the masks of every block. Several networks can be compared; where they
differ in their budget, a slider chooses among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.demo import Server, load_networks
from dynconv_jax.demo.networks import find_examples

_WORKDIR = flags.DEFINE_list(
  'workdir', None, 'Folder of the run; several, with commas.', required=True
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Which weights.'
)
_PORT = flags.DEFINE_integer(
  'port', 8000, 'Of the page; 0: any free one.', 0, 65535
)
_HOST = flags.DEFINE_string(
  'host', '127.0.0.1', 'Address to listen at; 0.0.0.0: for other machines too.'
)
_EXAMPLES = flags.DEFINE_string(
  'examples',
  '8',
  "Images to offer: a number of the first run's test images, or a folder.",
)


def main(argv: Sequence[str]) -> None:
  """Serves until it is interrupted."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  with Server(_PORT.value, _HOST.value) as server:
    networks = load_networks(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
    examples = find_examples(_EXAMPLES.value, _WORKDIR.value[0])
    print(f'serving {server.url} (Ctrl-C ends it)', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      server.start(networks, examples)


if __name__ == '__main__':
  program.run(main)
