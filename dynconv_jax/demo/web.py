"""The demo page as a static folder, which runs networks in the browser."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

from dynconv_jax.demo.networks import DemoNetwork
from dynconv_jax.demo.server import Example, describe, page_files
from dynconv_jax.files import write_atomic

RUNTIME_VERSION = '1.30.0'
RUNTIME_URL = (
  f'https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/'
)
# The files of this version that the page loads, with their SHA-256.
RUNTIME_FILES = {
  'ort.wasm.bundle.min.mjs': (
    '11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90'
  ),
  'ort-wasm-simd-threaded.wasm': (
    '3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2'
  ),
}


def export_web(
  networks: Sequence[DemoNetwork],
  output: str | os.PathLike,
  examples: Sequence[Example] = (),
  runtime: str | os.PathLike | None = None,
) -> dict[str, int]:
  """Writes the page with each network as sparse and dense ONNX models.

  Any web server can serve the folder. onnxruntime-web runs the networks in the
  browser, and images are not uploaded.

  Args:
    networks: the networks on the page.
    output: output folder: new, empty, or an earlier export.
    examples: name and content of each example image.
    runtime: folder `dist` of the npm package onnxruntime-web, version
      RUNTIME_VERSION, to copy files from. None: the page loads them from
      RUNTIME_URL.

  Returns:
    The size of each file in bytes, by its path in the folder.

  Raises:
    ImportError: onnx is not installed.
    ValueError: the folder contains other files, the runtime has another
      version, or a network cannot be exported (see `export_onnx`).
    FileNotFoundError: a file of the runtime is missing.
  """
  from dynconv_jax.sparse.onnx import export_onnx  # Requires onnx.

  output = pathlib.Path(output).expanduser()
  check_output(output)
  files = page_files()
  if runtime is not None:
    files |= read_runtime(runtime)
  descriptions = []
  for i, network in enumerate(networks):
    size = (network.run.image_size,) * 2
    forms = {
      'dense': export_onnx(network.ungated, size, form='dense', batch_size=1)
    }
    if network.gated:
      forms['sparse'] = export_onnx(
        network.run.model, size, batch_size=1, masks=True
      )
    paths = {form: f'networks/{i}-{form}.onnx' for form in forms}
    contents = {
      paths[form]: model.SerializeToString() for form, model in forms.items()
    }
    files |= contents
    sizes = {form: len(contents[path]) for form, path in paths.items()}
    descriptions.append({**network.description, 'paths': paths, 'bytes': sizes})
  description, pictures = describe(
    descriptions,
    examples,
    backend='web',
    runtime=RUNTIME_URL if runtime is None else './runtime/',
  )
  files |= pictures
  # Makes GitHub Pages serve all files unchanged.
  files['.nojekyll'] = b''
  # Written last, so that its presence means that the export is complete.
  files['networks.json'] = json.dumps(description).encode()
  for path, content in files.items():
    write_atomic(output / path, content)
  for path in output.glob('networks/*.onnx'):
    if f'networks/{path.name}' not in files:  # Of an earlier export.
      path.unlink()
  return {path: len(content) for path, content in files.items()}


def check_output(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder contains anything but an earlier export."""
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'output must be a folder; got {folder}')
  if (
    folder.is_dir()
    and any(folder.iterdir())
    and not (folder / 'networks.json').is_file()
  ):
    raise ValueError(
      f'output must be an empty folder or an earlier export; {folder} contains '
      'other files'
    )


def read_runtime(folder: str | os.PathLike) -> dict[str, bytes]:
  """Returns the files of onnxruntime-web by their path in the page's folder.

  Args:
    folder: folder `dist` of the npm package.

  Raises:
    FileNotFoundError: one of RUNTIME_FILES is missing.
    ValueError: a file has another version.
  """
  folder, files = pathlib.Path(folder).expanduser(), {}
  for name, digest in RUNTIME_FILES.items():
    path = folder / name
    if not path.is_file():
      raise FileNotFoundError(
        f'{path} is missing: runtime must be the folder dist of the npm package'
        f' onnxruntime-web@{RUNTIME_VERSION}'
      )
    files[f'runtime/{name}'] = content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
      raise ValueError(f'{path} is not from onnxruntime-web@{RUNTIME_VERSION}')
  return files
