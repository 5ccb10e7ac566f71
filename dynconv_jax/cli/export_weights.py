r"""Writes a network's weights for PyTorch, as a safetensors file.

dynconv export weights --workdir=workdir/spots_dynconv \
  --output=workdir/spots_dynconv.safetensors

The names are torchvision's, or those of the public checkpoints of the method;
the file's header says what network it is.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax import interop
from dynconv_jax.cli import program
from dynconv_jax.training.workdir import load_run

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The file, which ends in .safetensors.', required=True
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Which weights.'
)


def main(argv: Sequence[str]) -> None:
  """Reads the weights and writes the file."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  run = load_run(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
  output = pathlib.Path(_OUTPUT.value).expanduser()
  metadata = {
    'model': run.network.model.model,
    'method': run.network.method.method,
    'width_multiplier': str(run.network.model.width_multiplier),
    'step': str(run.step),
    'class_names': json.dumps(run.class_names),
  }
  interop.write_safetensors(
    output, interop.to_torch_state_dict(run.model), metadata
  )
  print(f'wrote {output}, step {run.step}')


if __name__ == '__main__':
  program.run(main)
