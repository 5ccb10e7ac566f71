"""A tiny run shared by the tests of training."""

import gc

import pytest

from dynconv_jax.training import loop
from dynconv_jax.training.config import Config


@pytest.fixture(scope='module')
def collected():
  """Collects garbage, whose warnings would otherwise appear in another file."""
  yield
  gc.collect()


@pytest.fixture(scope='session')
def config(tmp_path_factory):
  """Two epochs of seven steps, with six validation examples."""
  return Config.make(
    dataset='spots',
    data_dir=str(tmp_path_factory.mktemp('data')),
    spots_size=24,
    spots_train=64,
    spots_test=8,
    image_size=16,
    cache='device',
    width_multiplier=0.25,
    ema_decay=0.9,
    batch_size=8,
    epochs=2,
    eval_batch_size=4,
    log_every_steps=1,
  )


@pytest.fixture(scope='session')
def finished(config, tmp_path_factory):
  """The workdir of an uninterrupted run. Copy it before changing it."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  loop.train(config, workdir)
  return workdir
