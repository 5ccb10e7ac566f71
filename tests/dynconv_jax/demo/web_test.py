"""Tests of the static page's networks, run by ONNX Runtime, against JAX."""

import json

import numpy as np
import pytest

from dynconv_jax.data import decode
from dynconv_jax.data.augment import normalize
from dynconv_jax.demo import web

onnxruntime = pytest.importorskip(
  'onnxruntime', reason='pip install dynconv_jax[onnx]'
)
pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')


@pytest.fixture(scope='module')
def site(networks, photograph_file, tmp_path_factory):
  folder = tmp_path_factory.mktemp('site')
  # An earlier export left these.
  (folder / 'networks').mkdir()
  for name in ('networks.json', 'networks/7-dense.onnx'):
    (folder / name).touch()
  examples = [('disc', photograph_file.read_bytes())]
  sizes = web.export_web([networks[0], networks[2]], folder, examples)
  return folder, sizes


def test_the_folder_has_all_files(site):
  folder, sizes = site
  files = [path for path in folder.rglob('*') if path.is_file()]
  assert sizes == {
    str(path.relative_to(folder)): path.stat().st_size for path in files
  }
  description = json.loads((folder / 'networks.json').read_text())
  assert description['backend'] == 'web'
  assert description['runtime'].endswith(f'web@{web.RUNTIME_VERSION}/dist/')
  gated, dense = description['networks']
  assert set(gated['paths']) == {'sparse', 'dense'}
  assert set(dense['paths']) == {'dense'}
  wanted = [*gated['paths'].values(), *dense['paths'].values()]
  wanted += [example['path'] for example in description['examples']]
  assert set(wanted) < set(sizes)
  assert gated['bytes'] == {f: sizes[p] for f, p in gated['paths'].items()}


def test_networks_compute_the_same(site, networks, photograph):
  folder, _ = site
  description, *_ = json.loads((folder / 'networks.json').read_text())[
    'networks'
  ]
  seen = decode.preprocess_image(photograph, 24, 256 / 224)[None]
  images = np.asarray(normalize(seen, 'imagenet'))
  found = {}
  for form, path in description['paths'].items():
    session = onnxruntime.InferenceSession(folder / path)
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {'images': images})
    found[form] = dict(zip(names, values, strict=True))
  expected = networks[0].predict(photograph)
  logits = found['sparse']['logits'][0]
  probabilities = np.exp(logits) / np.exp(logits).sum()
  np.testing.assert_allclose(
    probabilities, expected['probabilities'], rtol=1e-4
  )
  macs = description['always_macs'] + found['sparse']['executed_macs'][0]
  np.testing.assert_allclose(macs, expected['macs'], rtol=1e-6)
  for block, text in zip(description['blocks'], expected['masks'], strict=True):
    mask = found['sparse'][block['output']][0]
    assert list(mask.shape) == block['size']
    assert ''.join(str(int(value)) for value in mask.ravel()) == text
  # Without gates, every block runs everywhere.
  ones = [np.ones((1, *block['size'])) for block in description['blocks']]
  full, _ = networks[0].run.model(images, masks=ones)
  assert set(found['dense']) == {'logits'}
  np.testing.assert_allclose(
    found['dense']['logits'], full, rtol=0, atol=1e-5 * np.abs(full).max()
  )
  assert np.abs(full - logits).max() > 1e-3


def test_a_folder_is_written_again_but_no_other(site, networks, tmp_path):
  folder, sizes = site
  web.check_output(folder)
  web.check_output(tmp_path)
  web.check_output(tmp_path / 'new')
  (tmp_path / 'thesis.tex').touch()
  with pytest.raises(ValueError, match='empty folder .* contains other files'):
    web.export_web(networks, tmp_path)
  with pytest.raises(ValueError, match='output must be a folder; got'):
    web.export_web(networks, tmp_path / 'thesis.tex')


def test_a_runtime_of_another_version(tmp_path):
  first, second = web.RUNTIME_FILES
  with pytest.raises(FileNotFoundError, match=f'{first} is missing: .*dist'):
    web.read_runtime(tmp_path)
  (tmp_path / first).write_text('older')
  with pytest.raises(ValueError, match=f'{first} is not from onnxruntime-web@'):
    web.read_runtime(tmp_path)
