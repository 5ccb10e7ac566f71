"""Tests of the page's data about a network, against the network itself."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from dynconv_jax.data import decode
from dynconv_jax.data.augment import normalize
from dynconv_jax.demo.networks import (
  MAX_PIXELS,
  check_size,
  find_examples,
  load_networks,
)
from dynconv_jax.macs import count_macs
from dynconv_jax.training.workdir import load_run


def _expected(run, photograph):
  """Returns probabilities, masks and MACs of the model's own forward pass."""
  seen = decode.preprocess_image(photograph, 24, 256 / 224)[None]
  logits, masks = run.model(normalize(seen, 'imagenet'))
  images = jax.ShapeDtypeStruct((1, 24, 24, 3), np.float32)
  report = count_macs(run.model, images, convention='conv')
  return jax.nn.softmax(logits[0]), masks, report


def test_a_prediction_is_that_of_the_model(networks, runs, photograph):
  result = networks[0].predict(photograph)
  probabilities, masks, report = _expected(load_run(runs['low']), photograph)
  np.testing.assert_allclose(result['probabilities'], probabilities, rtol=1e-4)
  assert result['macs'] == report.executed(masks)[0]
  blocks = networks[0].description['blocks']
  assert [block['name'] for block in blocks] == [mask.name for mask in masks]
  density = []
  for block, text, mask in zip(blocks, result['masks'], masks, strict=True):
    found = np.array(list(text), np.float32).reshape(block['size'])
    np.testing.assert_array_equal(found, mask.hard[0])
    density.append(found.mean())
  assert 0.1 < np.mean(density) < 0.9
  assert result['sparse_ms'] > 0 and result['dense_ms'] > 0


def test_a_dense_network_computes_everything(networks, runs, photograph):
  network = networks[2]
  result = network.predict(photograph)
  probabilities, _, report = _expected(load_run(runs['dense']), photograph)
  np.testing.assert_allclose(result['probabilities'], probabilities, rtol=1e-4)
  assert result['macs'] == network.dense_macs == report.total
  assert result['masks'] == network.description['blocks'] == []
  assert 'sparse_ms' not in result and not network.description['gated']


def test_the_dense_network_of_a_gated_one_has_no_gates(networks):
  """The third network has the same architecture: it is the reference."""
  assert networks[0].dense_macs == networks[2].dense_macs
  assert networks[0].always_macs < networks[0].dense_macs


def test_descriptions(networks):
  low, high, dense = (network.description for network in networks)
  assert [low['name'], high['name'], dense['name']] == ['low', 'high', 'dense']
  assert (low['knob'], low['knob_value']) == ('budget', 0.25)
  assert (high['knob'], high['knob_value']) == ('budget', 0.75)
  assert (dense['knob'], dense['knob_value']) == ('', None)
  assert (low['image_size'], low['short_side']) == (24, 27)
  assert low['class_names'] == ['disc', 'ring', 'club_sandwich']
  assert (low['model'], low['method']) == ('cifar_resnet8', 'DynConv')


def test_workdirs(runs, tmp_path):
  low = str(runs['low'])
  with pytest.raises(ValueError, match='one or more different workdirs'):
    load_networks([low, low])
  with pytest.raises(ValueError, match='different workdirs; got none'):
    load_networks([])
  with pytest.raises(FileNotFoundError, match='is not the workdir of a run'):
    load_networks([str(tmp_path)])
  # Folders with the same name are distinguished.
  other = tmp_path / 'other' / 'low'
  other.parent.mkdir()
  other.symlink_to(runs['low'])
  parent = runs['low'].parent.name
  names = [network.name for network in load_networks([low, str(other)])]
  assert names == [f'{parent}/low', 'other/low']


def test_huge_pictures(png):
  check_size(png(8000, 8000), 'photograph')
  check_size(b'no picture', 'photograph')  # Checked elsewhere.
  # Pillow warns about the second and rejects the third.
  for width, height in ((8000, 8001), (10000, 10000), (20000, 10000)):
    assert width * height > MAX_PIXELS
    with pytest.raises(decode.CorruptImageError, match='at most 64 megapixels'):
      check_size(png(width, height), 'photograph')


def test_examples_are_test_images_of_all_classes(runs):
  examples = find_examples('8', str(runs['low']))
  names = [name for name, _ in examples]
  # Labels cycle through six classes.
  assert names == [*names[:6], *names[:2]] and len(set(names)) == 6
  image = Image.open(io.BytesIO(examples[0][1]))
  assert image.size == (24, 24)


def test_examples_of_a_folder(photograph_file, tmp_path, runs):
  found = find_examples(str(photograph_file.parent), str(runs['low']))
  assert found == [('photograph', photograph_file.read_bytes())]
  with pytest.raises(FileNotFoundError, match='a number or a folder of images'):
    find_examples(str(tmp_path), str(runs['low']))
  assert find_examples('0', 'no such run') == []
