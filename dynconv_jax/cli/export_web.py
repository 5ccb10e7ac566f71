"""Writes a static page that runs networks in the browser, without a server.

python -m experiments.export_web --workdir=workdir/spots_dynconv --output=site
python -m http.server --directory=site

The page is that of experiments.demo. It loads onnxruntime-web from a CDN, or
from the folder itself with --runtime.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.demo import export_web, load_networks
from dynconv_jax.demo.networks import find_examples
from dynconv_jax.demo.web import RUNTIME_VERSION, check_output, read_runtime

try:
  import dynconv_jax.sparse.onnx  # noqa: F401  It needs onnx.
except ImportError as error:
  sys.exit(f'error: {error}')

_WORKDIR = flags.DEFINE_list(
  'workdir', None, 'Folder of the run; several, with commas.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The folder; a new one, or one to write again.', required=True
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Which weights.'
)
_EXAMPLES = flags.DEFINE_string(
  'examples',
  '0',
  'Images to offer, which are published with the page: a number of the first '
  "run's test images, or a folder.",
)
_RUNTIME = flags.DEFINE_string(
  'runtime',
  None,
  f'Folder dist of the npm package onnxruntime-web@{RUNTIME_VERSION}, to be '
  'copied; by default the page loads it from jsdelivr.net.',
)


def main(argv: Sequence[str]) -> None:
  """Reads the networks and writes the folder."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
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
