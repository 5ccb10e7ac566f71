"""Writes a static web page that runs networks in the browser.

dynconv export web --workdir=workdir/spots_dynconv --output=site
python -m http.server --directory=site

The page looks like that of `dynconv demo`. It loads onnxruntime-web from a CDN
or, with --runtime, from its own folder.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax import extras
from dynconv_jax.cli import program
from dynconv_jax.demo import export_web, load_networks
from dynconv_jax.demo.networks import find_examples
from dynconv_jax.demo.web import RUNTIME_VERSION, check_output, read_runtime

_WORKDIR = flags.DEFINE_list(
  'workdir',
  None,
  'Workdir of a run, or several separated by commas.',
  required=True,
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'Output folder: a new one, or an earlier export to overwrite.',
  required=True,
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use.'
)
_EXAMPLES = flags.DEFINE_string(
  'examples',
  '0',
  "Example images: a folder, or a number of the first run's test images. They "
  'are published with the page.',
)
_RUNTIME = flags.DEFINE_string(
  'runtime',
  None,
  f'Folder dist of the npm package onnxruntime-web@{RUNTIME_VERSION} to copy. '
  'By default, the page loads it from jsdelivr.net.',
)


def main(argv: Sequence[str]) -> None:
  """Loads the networks and writes the folder."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  extras.require('onnx', 'onnx')
  check_output(pathlib.Path(_OUTPUT.value).expanduser())
  if _RUNTIME.value is not None:
    read_runtime(_RUNTIME.value)
  networks = load_networks(_WORKDIR.value, best=_CHECKPOINT.value == 'best')
  examples = find_examples(_EXAMPLES.value, _WORKDIR.value[0])
  sizes = export_web(networks, _OUTPUT.value, examples, _RUNTIME.value)
  print(
    f'wrote {_OUTPUT.value}: {len(sizes)} files, '
    f'{sum(sizes.values()) / 1e6:.1f} MB'
  )


if __name__ == '__main__':
  program.run(main)
