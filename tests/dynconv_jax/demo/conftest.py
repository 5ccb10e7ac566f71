"""Fixtures for the page's tests: networks of three budgets, a photograph."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dynconv_jax.demo import load_networks
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.training import workdir
from dynconv_jax.training.config import Config

CLASSES = ('disc', 'ring', 'club_sandwich')


def _make_run(folder, seed, **options):
  """Writes a workdir with random weights, whose gates decide by position."""
  config = Config.make(
    dataset='spots',
    data_dir=str(folder.parent / 'data'),
    spots_size=24,
    spots_train=30,
    spots_test=12,
    image_size=24,
    crop='resized',
    model='cifar_resnet8',
    width_multiplier=0.25,
    **options,
  )
  model = workdir.build_model(config, len(CLASSES), seed=seed)
  rng = np.random.default_rng(seed)
  for block in gated_blocks(model):
    if block.masker is not None:
      kernel = block.masker.maskconv.conv.kernel
      kernel[...] = jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)
  workdir.write_network(folder, config, model, CLASSES, 'a test')
  return folder


@pytest.fixture(scope='session')
def runs(tmp_path_factory):
  """Workdirs by name."""
  folder = tmp_path_factory.mktemp('runs')
  return {
    'low': _make_run(folder / 'low', 0, method='dynconv', budget=0.25),
    'high': _make_run(folder / 'high', 1, method='dynconv', budget=0.75),
    'dense': _make_run(folder / 'dense', 2, method='dense'),
  }


@pytest.fixture(scope='session')
def networks(runs):
  """The networks of `runs`, in the same order."""
  return load_networks([str(folder) for folder in runs.values()])


def _photograph(shape):
  rng = np.random.default_rng(0)
  noise = rng.uniform(0, 255, (*(n // 8 for n in shape), 3))
  image = jax.image.resize(noise, (*shape, 3), 'cubic').clip(0, 255)
  return np.asarray(image).astype(np.uint8)


@pytest.fixture(scope='session')
def photograph():
  """uint8[72, 104, 3]."""
  return _photograph((72, 104))


@pytest.fixture(scope='session')
def photograph_file(photograph, tmp_path_factory):
  """The path of the photograph, a PNG."""
  path = tmp_path_factory.mktemp('photographs') / 'photograph.png'
  Image.fromarray(photograph).save(path)
  return path


@pytest.fixture(scope='session')
def png():
  """Returns a PNG of one color with the given size."""

  def make(width, height):
    buffer = io.BytesIO()
    Image.new('1', (width, height)).save(buffer, 'png')
    return buffer.getvalue()

  return make
