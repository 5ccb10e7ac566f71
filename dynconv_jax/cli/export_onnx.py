r"""Exports a trained network to ONNX, with sparse execution.

dynconv export onnx --workdir=workdir/spots_dynconv \
  --output=workdir/spots_dynconv.onnx [--form=dense]

Supports all methods. The model's input 'images' is float32[N, H, W, 3] with any
N, normalized by the mean and standard deviation in the model's metadata, which
also contains the class names. The outputs are 'logits' and, for gated networks,
'density', the fraction of active positions for each image and block.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax import extras
from dynconv_jax.cli import program
from dynconv_jax.data.augment import NORMALIZATIONS
from dynconv_jax.files import replacing
from dynconv_jax.training.workdir import load_run

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Workdir of the run.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Output file, ending in .onnx.', required=True
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use.'
)
_FORM = flags.DEFINE_enum(
  'form',
  'sparse',
  ['sparse', 'dense'],
  'Execution of gated blocks. sparse: active positions only; dense: '
  'everywhere, then masked.',
)


def main(argv: Sequence[str]) -> None:
  """Loads the network and writes the file."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  extras.require('onnx', 'onnx')
  import onnx

  from dynconv_jax.sparse.onnx import export_onnx

  output = pathlib.Path(_OUTPUT.value).expanduser()
  if output.suffix != '.onnx':
    raise ValueError(f'output must end in .onnx; got {output}')
  run = load_run(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
  network = run.network
  mean, std = NORMALIZATIONS[run.normalization]
  model = export_onnx(
    run.model, (run.image_size, run.image_size), form=_FORM.value
  )
  metadata = {
    'model': network.model.model,
    'method': network.method.method,
    'width_multiplier': str(network.model.width_multiplier),
    'step': str(run.step),
    'class_names': json.dumps(run.class_names),
    'mean': json.dumps(mean),
    'std': json.dumps(std),
  }
  onnx.helper.set_model_props(model, metadata)
  with replacing(output) as partial:
    onnx.save(model, partial)
  print(f'wrote {output}, step {run.step}')


if __name__ == '__main__':
  program.run(main)
