"""Tests that the examples run, at small sizes."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax import create_model
from dynconv_jax.macs import count_macs
from dynconv_jax.sparse import sparsify
from dynconv_jax.training import loop, workdir
from dynconv_jax.training.config import Config
from examples import top_k_gate, unet, vit


def test_a_unet_segments_and_runs_sparsely():
  model = unet.UNet(8, rngs=nnx.Rngs(0))
  images, objects = unet.load('train', 32)
  unet.train(model, images, objects, steps=3, budget=0.3)
  result = unet.evaluate(model, images[:4], objects[:4])
  assert 0 <= result['iou'] <= 1
  assert 0 < result['executed_mmacs'] <= result['dense_mmacs']
  assert result['sparse_difference'] < 1e-5
  assert len(result['block_density']) == 5
  json.dumps(result)


def test_a_vision_transformer_drops_tokens():
  model = vit.ViT(6, features=32, depth=2, rngs=nnx.Rngs(0))
  images, labels = vit.load('train', 32)
  vit.train(model, images, labels, steps=3, budget=0.5)
  result = vit.evaluate(model, images[:4], labels[:4])
  assert 0 < result['executed_mmacs'] < result['dense_mmacs']
  # The report agrees with the masks' own MACs.
  view = nnx.view(model, deterministic=True)
  half = jnp.asarray(np.arange(64) % 2 == 0)[None]
  given = [half] * 2
  _, masks = view(images[:1], masks=given)
  report = count_macs(view, images[:1], convention='conv+linear')
  closed = sum(m.dense_macs() - float(m.executed_macs()[0]) for m in masks)
  assert report.executed(masks)[0] == pytest.approx(report.total - closed)
  with pytest.raises(ValueError, match='no gated block'):
    sparsify(view)  # an error, not a guess


@pytest.mark.parametrize(
  'name,method',
  [
    ('examples.backbone:patch_net', 'dynconv'),
    ('examples.backbone:patch_net', 'sact'),
    ('cifar_resnet8', 'examples.top_k_gate:METHOD'),
    ('examples.backbone:patch_net', 'examples.top_k_gate:METHOD'),
  ],
)
def test_own_gates_and_backbones_run_sparsely(name, method):
  model = create_model(name, method=method, num_classes=3, rngs=nnx.Rngs(0))
  view = nnx.view(model, deterministic=True, use_running_average=True)
  images = np.random.default_rng(0).normal(size=(2, 20, 24, 3)).astype('f4')
  expected, masks = jax.jit(lambda x: view(x))(images)
  sparse = sparsify(view)
  got, _ = jax.jit(lambda x: sparse(x))(images)
  scale = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
  report = count_macs(view, images[:1], convention='conv')
  assert (report.executed(masks) <= report.total).all()
  if 'top_k' in method:
    for mask in masks:
      share = np.asarray(mask.density())
      positions = mask.hard[0].size
      np.testing.assert_allclose(share, round(0.3 * positions) / positions)


def test_top_k_of_equal_scores_are_k_positions():
  gate = top_k_gate.TopKGate(2, strides=1, keep=0.3, rngs=nnx.Rngs(0))
  decision, _ = gate(jnp.zeros((2, 4, 5, 2)))
  np.testing.assert_array_equal(decision.hard.sum((1, 2)), [6, 6])


def test_both_are_trained_by_the_trainer(tmp_path):
  config = Config.make(
    model='examples.backbone:patch_net',
    method='examples.top_k_gate:METHOD',
    keep=0.5,
    depth=1,
    spots_train=32,
    spots_test=16,
    batch_size=16,
    epochs=1,
    data_dir=str(tmp_path / 'data'),
  )
  loop.train(config, tmp_path / 'run')
  run = workdir.load_run(tmp_path / 'run')
  assert run.network.method.options.keep == 0.5
  assert type(run.model).__name__ == 'PatchNet'


@pytest.mark.parametrize('name', ['unet', 'vit', 'top_k_gate', 'backbone'])
def test_a_docstring_says_how_to_run_it(name):
  doc = importlib.import_module(f'examples.{name}').__doc__
  assert 'python -m ' in doc
