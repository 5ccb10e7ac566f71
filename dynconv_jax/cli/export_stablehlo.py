r"""Exports a trained network to StableHLO, with dense execution.

dynconv export stablehlo --workdir=workdir/spots_dynconv \
  --output=workdir/spots_dynconv.stablehlo [--platforms=cpu,cuda]

To run it elsewhere, with only jax and flatbuffers installed:

  network = jax.export.deserialize(bytearray(open(FILE, "rb").read()))
  logits, density = network.call(images)

`images` is float32[N, H, W, 3] with any N, normalized by the mean and standard
deviation that this program prints. `density` is the fraction of active
positions for each image and block. A network without gates returns (logits,).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax import extras
from dynconv_jax.cli import program
from dynconv_jax.data.augment import NORMALIZATIONS
from dynconv_jax.files import write_atomic
from dynconv_jax.sparse.stablehlo import PLATFORMS, export_stablehlo
from dynconv_jax.training.workdir import load_run

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Workdir of the run.', required=True
)
_OUTPUT = flags.DEFINE_string('output', None, 'Output file.', required=True)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use.'
)
_PLATFORMS = flags.DEFINE_list(
  'platforms', 'cpu,cuda', f'Target platforms, of {", ".join(PLATFORMS)}.'
)


def main(argv: Sequence[str]) -> None:
  """Loads the network and writes the file."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  extras.require('stablehlo', 'flatbuffers')
  output = pathlib.Path(_OUTPUT.value).expanduser()
  run = load_run(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
  exported = export_stablehlo(
    run.model, (run.image_size,) * 2, platforms=_PLATFORMS.value
  )
  write_atomic(output, bytes(exported.serialize()))
  mean, std = NORMALIZATIONS[run.normalization]
  normalization = json.dumps({'mean': mean, 'std': std})
  print(f'wrote {output}, step {run.step}, normalization {normalization}')


if __name__ == '__main__':
  program.run(main)
