"""Tests of training SkipNet: loss, gradients, traces, whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynconv_jax.methods import skipnet
from dynconv_jax.methods.skipnet import SKIP_GATES, SKIP_TRAININGS
from dynconv_jax.training import loop, schedules, workdir
from dynconv_jax.training import state as state_lib
from dynconv_jax.training.config import Config


def _config(**changes):
  changes = {'method': 'skipnet', 'width_multiplier': 0.25, **changes}
  return Config().replace(**changes)


def _loss(config, *args):
  return config.method.record.loss(config.method.options, *args)


def _batch(seed, n=8):
  rng = np.random.default_rng(seed)
  return {
    'image': jnp.asarray(rng.normal(size=(n, 8, 8, 3)), jnp.float32),
    'label': jnp.asarray(np.eye(3)[rng.integers(0, 3, n)], jnp.float32),
  }


def _losses(config):
  """Returns params and a function of them: cross-entropy, gating loss."""
  graphdef, params, rest = state_lib.split(workdir.build_model(config, 3))
  batch = _batch(0)

  def losses(params):
    model = nnx.merge(graphdef, params, rest)
    logits, masks = model(batch['image'], rngs=nnx.Rngs(gumbel=1))
    cross_entropy = optax.softmax_cross_entropy(logits, batch['label'])
    _, gating = _loss(config, masks, cross_entropy, 0.5)
    return jnp.mean(cross_entropy), gating

  return params, losses


def _gates(tree):
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if 'masker' in jax.tree_util.keystr(path)
  }


@pytest.mark.parametrize('gate', SKIP_GATES)
def test_supervised_gradients_reach_every_gate_parameter(gate):
  params, losses = _losses(_config(skip_gate=gate))
  for i in range(2):
    grads = _gates(jax.jit(jax.grad(lambda p, i=i: losses(p)[i]))(params))
    assert len(grads) == {'ff1': 16, 'ff2': 10, 'recurrent': 9}[gate]
    for name, grad in grads.items():
      assert np.any(grad), (i, name)


@pytest.mark.parametrize('gate', SKIP_GATES)
def test_reinforce_alone_moves_the_gates_of_the_second_stage(gate):
  params, losses = _losses(_config(skip_gate=gate, skip_training='reinforce'))
  direct, reinforced = (
    _gates(jax.jit(jax.grad(lambda p, i=i: losses(p)[i]))(params))
    for i in range(2)
  )
  for name, grad in direct.items():
    assert not np.any(grad), name
    assert np.any(reinforced[name]), name


def test_the_loss_of_each_stage_by_hand():
  actions = np.array([[1.0, 0.0], [0.0, 0.0]])  # blocks by images
  scores = np.array([[0.75, 0.5], [0.125, 0.25]])

  class Masks:
    """The fields of an execution mask that the losses read."""

    def __init__(self, i):
      self.hard = jnp.asarray(actions[i])[:, None, None]
      self.score = jnp.asarray(scores[i])[:, None, None]
      self.name = f'layer{i + 1}.0'

    def density(self):
      return self.hard[:, 0, 0]

  masks = [Masks(0), Masks(1)]
  cross_entropy = jnp.array([1.0, 3.0])
  config = _config(skip_weight=0.4, budget_warmup=0.5, reinforce_weight=0.02)
  for progress, alpha in ((0.0, 0.0), (0.25, 0.2), (0.5, 0.4), (1.0, 0.4)):
    weight, loss = _loss(config, masks, cross_entropy, progress)
    np.testing.assert_allclose([weight, loss], [alpha, 0.25], rtol=1e-6)
    second = config.replace(skip_training='reinforce')
    weight, loss = _loss(second, masks, cross_entropy, progress)
    # A skipped block earns alpha / 2.
    rewards = [[alpha / 2 - 1, alpha - 3], [alpha / 2 - 1, alpha / 2 - 3]]
    log_p = np.log([[0.75, 0.5], [0.875, 0.75]])
    assert weight == 0.02
    np.testing.assert_allclose(loss, -np.sum(log_p * rewards) / 2, rtol=1e-5)


@pytest.mark.parametrize('training', SKIP_TRAININGS)
def test_steps_train_the_gates_in_one_trace(training, monkeypatch):
  config = _config(skip_training=training, budget_warmup=0.5, epochs=2)
  model = workdir.build_model(config, 3)
  tx = schedules.optimizer(
    config.optimization, schedules.learning_rate(config.optimization, 2)
  )
  state = state_lib.create_state(model, tx, config)
  traces = []
  record = config.method.record
  counted = dataclasses.replace(
    record,
    loss=lambda *arguments: traces.append(1) or record.loss(*arguments),
  )
  monkeypatch.setattr(skipnet, 'METHOD', counted)
  step = state_lib.make_train_step(
    state_lib.split(model)[0], tx, config, steps_per_epoch=2
  )
  before = jax.tree.map(jnp.copy, _gates(state.params))
  for i in range(4):
    state = step(state, _batch(i))
  assert len(traces) == 1
  assert state.first_bad.tolist() == [-1, -1]
  assert 0 < state.sums['executed_fraction'] <= 2
  after = _gates(state.params)
  for name, value in before.items():
    assert np.any(after[name] != value), name


@pytest.mark.slow
def test_both_stages_on_spots(tmp_path):
  config = _config(
    data_dir=str(tmp_path / 'data'),
    model='cifar_resnet14',
    width_multiplier=0.5,
    cache='device',
    crop='none',
    mask_bias=2.0,
    budget_warmup=1.0,
    skip_weight=0.8,
    epochs=12,
    learning_rate=0.1,
    weight_decay=5e-4,
    warmup_epochs=1.0,
  )
  first = loop.train(config, tmp_path / 'first')['validation']
  # Chance is 0.17.
  assert first['accuracy'] > 0.8
  assert 0.5 < first['executed_fraction'] < 0.9
  second = loop.train(
    config.replace(
      init_from=str(tmp_path / 'first'),
      skip_training='reinforce',
      skip_temperature=0.05,
      budget_warmup=0.0,
      epochs=2,
      learning_rate=1e-4,
      warmup_epochs=0.0,
    ),
    tmp_path / 'second',
  )['validation']
  # It continues from the first stage's best checkpoint; newly opened gates
  # would execute everything.
  assert second['accuracy'] > 0.8
  assert 0.5 < second['executed_fraction'] < 0.9
