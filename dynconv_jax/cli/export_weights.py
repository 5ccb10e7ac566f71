r"""Exports a network's weights for PyTorch, as a safetensors file.

dynconv export weights --workdir=workdir/spots_dynconv \
  --output=workdir/spots_dynconv.safetensors

Weights have the names used by torchvision or by the method's public
checkpoints. The file's header describes the network, so
`predict --pretrained=FILE` needs no other flags.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.training.published import save_published
from dynconv_jax.training.workdir import load_run

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Workdir of the run.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Output file, ending in .safetensors.', required=True
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use.'
)


def main(argv: Sequence[str]) -> None:
  """Loads the network and writes the file."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  output = pathlib.Path(_OUTPUT.value).expanduser()
  run = load_run(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
  save_published(output, run, _WORKDIR.value)
  print(f'wrote {output}, step {run.step}')


if __name__ == '__main__':
  program.run(main)
