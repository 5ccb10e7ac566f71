"""Tests of the training step on a toy network, against sums by hand."""

import json
import os
import subprocess
import sys

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.data import decode
from dynconv_jax.data.augment import Augmentation
from dynconv_jax.data.batches import TrainBatches
from dynconv_jax.layers import Dropout
from dynconv_jax.masks import ExecutionMask, MaskedLayer
from dynconv_jax.methods.gumbel import binary_gumbel
from dynconv_jax.training import schedules
from dynconv_jax.training import state as state_lib
from dynconv_jax.training.config import Config

_STEPS = 4  # one epoch


class Toy(nnx.Module):
  """Logits x W, and a mask whose density is the share of positive pixels.

  `seen` counts the calls, like batch statistics.
  """

  def __init__(self, kernel, gated=True):
    self.kernel = nnx.Param(jnp.asarray(kernel, jnp.float32))
    self.seen = nnx.BatchStat(jnp.zeros(()))
    self.gated = gated

  def __call__(
    self, images, *, rngs=None, temperature=1.0, gumbel_noise=True, masks=None
  ):
    del rngs, temperature, gumbel_noise
    self.seen[...] = self.seen[...] + 1
    x = images[:, 0, 0, :]
    hard = images[..., 0] > 0 if masks is None else masks['layer1.0']
    hard = hard.astype(jnp.float32)
    layers = (MaskedLayer('layer1.0.conv1', 5, level=0),)
    masks = [ExecutionMask((hard,), 'layer1.0', layers)]
    return x @ self.kernel[...], masks if self.gated else []


def _config(**changes):
  changes = {
    'optimizer': 'sgd',
    'momentum': 0.0,
    'weight_decay': 0.0,
    'learning_rate': 0.1,
    'schedule': 'step',
    'milestones': (),
    'epochs': 2,
    'sparsity_weight': 0.0,
    **changes,
  }
  return Config().replace(**changes)


def _batch(seed=0, n=6):
  rng = np.random.default_rng(seed)
  return {
    'image': jnp.asarray(rng.normal(size=(n, 2, 2, 3)), jnp.float32),
    'label': jnp.asarray(np.eye(4)[rng.integers(0, 4, n)], jnp.float32),
  }


def _start(config, kernel=None, teacher=None, gated=True, masks=None):
  if kernel is None:
    kernel = np.random.default_rng(9).normal(size=(3, 4))
  model = Toy(kernel, gated)
  tx = schedules.optimizer(
    config.optimization,
    schedules.learning_rate(config.optimization, _STEPS),
  )
  step = state_lib.make_train_step(
    state_lib.split(model)[0], tx, config, _STEPS, teacher, masks=masks
  )
  return state_lib.create_state(model, tx, config), step


def _kernel(state):
  return np.asarray(state.params['kernel'], np.float64)


def _softmax(logits):
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def _numpy_step(kernel, batch, lr=0.1):
  """Returns (kernel, loss, gradient norm) of a gradient descent step."""
  x = np.asarray(batch['image'], np.float64)[:, 0, 0, :]
  y = np.asarray(batch['label'], np.float64)
  p = _softmax(x @ kernel)
  gradient = x.T @ (p - y) / len(x)
  loss = -np.mean(np.sum(y * np.log(p), -1))
  return kernel - lr * gradient, loss, np.linalg.norm(gradient)


def test_a_step_descends_the_gradient_and_sums_the_metrics():
  state, step = _start(_config())
  kernel, sums = _kernel(state), {'loss': 0, 'gradient_norm': 0, 'correct': 0}
  for i in range(_STEPS):
    batch = _batch(i)
    x = np.asarray(batch['image'])[:, 0, 0, :]
    hits = (x @ kernel).argmax(-1) == np.asarray(batch['label']).argmax(-1)
    kernel, loss, norm = _numpy_step(kernel, batch)
    sums['loss'] += loss
    sums['gradient_norm'] += norm
    sums['correct'] += hits.mean()
    state = step(state, batch)
    np.testing.assert_allclose(_kernel(state), kernel, rtol=1e-5)
    for name, total in sums.items():
      np.testing.assert_allclose(state.sums[name], total, rtol=1e-5)
  assert state.step == _STEPS
  assert state.model_state['seen'] == _STEPS
  assert state.first_bad.tolist() == [-1, -1]
  # The first step of the next epoch resets the sums.
  _, loss, _ = _numpy_step(kernel, _batch(7))
  state = step(state, _batch(7))
  np.testing.assert_allclose(state.sums['loss'], loss, rtol=1e-5)


def test_binary_cross_entropy_of_soft_labels():
  batch = _batch()
  # Labels as after mixup and label smoothing.
  mixed = 0.7 * batch['label'] + 0.3 * jnp.roll(batch['label'], 1, 0)
  batch['label'] = 0.9 * mixed + 0.1 / 4
  state, step = _start(_config(loss='bce'))
  kernel = _kernel(state)
  x = np.asarray(batch['image'], np.float64)[:, 0, 0, :]
  y = np.asarray(batch['label'], np.float64)
  p = 1 / (1 + np.exp(-x @ kernel))
  loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
  gradient = x.T @ (p - y) / y.size
  state = step(state, batch)
  np.testing.assert_allclose(state.sums['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(state.sums['cross_entropy'], loss, rtol=1e-5)
  np.testing.assert_allclose(_kernel(state), kernel - 0.1 * gradient, rtol=1e-5)


def test_sparsity_enters_the_loss_with_its_weight():
  config = _config(sparsity_weight=10.0, budget=0.25)
  state, step = _start(config)
  batch = _batch()
  density = np.mean(np.asarray(batch['image'])[..., 0] > 0)
  _, cross_entropy, _ = _numpy_step(_kernel(state), batch)
  state = step(state, batch)
  # At the start, a block's bounds are the budget itself, so both terms are
  # equal.
  sparsity = 2 * (density - 0.25) ** 2
  np.testing.assert_allclose(state.sums['gating'], sparsity, rtol=1e-5)
  np.testing.assert_allclose(
    state.sums['executed_fraction'], density, rtol=1e-6
  )
  np.testing.assert_allclose(
    state.sums['loss'], cross_entropy + 10 * sparsity, rtol=1e-5
  )


def test_given_masks_replace_those_of_the_gates():
  batch = _batch() | {'object_mask': jnp.ones((6, 2, 2), bool)}
  config = _config(sparsity_weight=10.0, budget=0.25)
  state, step = _start(
    config, masks=lambda batch: {'layer1.0': batch['object_mask']}
  )
  state = step(state, batch)
  np.testing.assert_allclose(state.sums['executed_fraction'], 1)
  np.testing.assert_allclose(state.sums['gating'], 2 * 0.75**2, rtol=1e-6)


def test_distillation_enters_the_loss_and_leaves_the_teacher():
  teacher = Toy(np.random.default_rng(3).normal(size=(3, 4)), gated=False)
  before = np.array(teacher.kernel[...])
  config = _config(
    method='dense',
    distill_from='x',
    distill_weight=0.3,
    distill_temperature=2.0,
  )
  state, step = _start(config, teacher=teacher, gated=False)
  kernel, batch = _kernel(state), _batch()
  x = np.asarray(batch['image'], np.float64)[:, 0, 0, :]
  p = _softmax(x @ before.astype(np.float64) / 2)
  q = _softmax(x @ kernel / 2)
  divergence = 4 * np.mean(np.sum(p * np.log(p / q), -1))
  _, cross_entropy, _ = _numpy_step(kernel, batch)
  # Its gradient: the difference of softened probabilities, times the
  # temperature.
  y = np.asarray(batch['label'], np.float64)
  gradient = (
    x.T @ (0.7 * (_softmax(x @ kernel) - y) + 0.3 * 2 * (q - p)) / len(x)
  )
  state = step(state, batch)
  np.testing.assert_allclose(state.sums['distillation'], divergence, rtol=1e-4)
  np.testing.assert_allclose(
    state.sums['loss'], 0.7 * cross_entropy + 0.3 * divergence, rtol=1e-5
  )
  np.testing.assert_allclose(_kernel(state), kernel - 0.1 * gradient, rtol=1e-5)
  step(state, _batch(1))
  np.testing.assert_array_equal(teacher.kernel[...], before)
  assert teacher.seen[...] == 0


def test_the_average_follows_quickly_at_first_then_by_its_decay():
  state, step = _start(_config(ema_decay=0.15))
  average = kernel = _kernel(state)
  seen = 0.0
  for i in range(3):
    kernel, _, _ = _numpy_step(kernel, _batch(i))
    decay = min(0.15, (1 + i) / (10 + i))  # 0.1, then 0.15
    average = decay * average + (1 - decay) * kernel
    seen = decay * seen + (1 - decay) * (i + 1)
    state = step(state, _batch(i))
  params, model_state = state.evaluated()
  np.testing.assert_allclose(params['kernel'], average, rtol=1e-5)
  np.testing.assert_allclose(model_state['seen'], seen, rtol=1e-5)
  assert np.abs(_kernel(state) - average).max() > 1e-4


def test_without_an_average_the_weights_are_evaluated():
  state, _ = _start(_config())
  assert state.ema is None
  chex.assert_trees_all_equal(
    state.evaluated(), (state.params, state.model_state)
  )


@pytest.mark.parametrize('bad_step', [0, 2])
def test_a_batch_that_is_not_finite_is_named_once(bad_step):
  state, step = _start(_config())
  for i in range(4):
    batch = _batch(i)
    if i == bad_step:
      batch['image'] = batch['image'].at[1].set(jnp.nan)
    state = step(state, batch)
  assert state.first_bad.tolist() == [
    bad_step,
    state_lib.CHECKED.index('cross_entropy'),
  ]


def test_weights_that_overflow_are_named_in_the_step_that_made_them():
  config = _config(learning_rate=1e30, epochs=1)
  state, step = _start(config)
  kernel = _kernel(state).astype(np.float32)
  for i in range(4):
    # Steps with finite gradients, computed by hand in float32.
    batch = _batch(i)
    batch['image'] *= 10.0**10
    x = np.asarray(batch['image'])[:, 0, 0, :]
    with np.errstate(all='ignore'):
      p = _softmax((x @ kernel).astype(np.float64))
      y = np.asarray(batch['label'], np.float64)
      gradient = (x.T.astype(np.float64) @ (p - y) / len(x)).astype(np.float32)
      kernel = kernel - np.float32(1e30) * gradient
    state = step(state, batch)
    if not np.isfinite(kernel).all():
      break
  assert np.isfinite(gradient).all()
  assert state.first_bad.tolist() == [
    i,
    state_lib.CHECKED.index('an updated weight'),
  ]
  assert not np.isfinite(_kernel(state)).all()


def test_the_state_is_fresh_arrays():
  model = Toy(np.ones((3, 4)))
  config = _config(ema_decay=0.5)
  tx = schedules.optimizer(
    config.optimization,
    schedules.learning_rate(config.optimization, _STEPS),
  )
  state = state_lib.create_state(model, tx, config)
  step = state_lib.make_train_step(
    state_lib.split(model)[0], tx, config, _STEPS
  )
  step(state, _batch())
  # The step donates its state; the model's own weights remain usable.
  np.testing.assert_array_equal(model.kernel[...], np.ones((3, 4)))


class Drawing(nnx.Module):
  """A classifier that keeps what five drops and five gates drew per image."""

  def __init__(self, n):
    self.kernel = nnx.Param(jnp.zeros((3, 2)))
    self.drawn = nnx.BatchStat(jnp.zeros((10, n)))
    self.drop = Dropout(0.5, broadcast_dims=(1, 2, 3), deterministic=False)

  def __call__(self, images, *, rngs, **unused):
    ones = jnp.ones((len(images), 1, 1, 1))
    drawn = [self.drop(ones, rngs=rngs)[:, 0, 0, 0] > 0 for _ in range(5)]
    zeros = jnp.zeros(len(images))
    drawn += [binary_gumbel(zeros, rngs['gumbel']()) for _ in range(5)]
    self.drawn[...] = jnp.stack(drawn)
    return images[:, 0, 0, :] @ self.kernel[...], []


class Halves:
  """Images with a white left half."""

  class_names = ('a', 'b')

  def __len__(self):
    return 128

  def __getitem__(self, index):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255
    name = f'{index}.png'
    return {'image': decode.to_png(image), 'label': index % 2, 'name': name}


def test_drops_and_gates_do_not_depend_on_the_augmentation():
  config = _config(method='dense', seed=3)
  batches = TrainBatches(
    Halves(),
    image_size=8,
    batch_size=128,
    augmentation=Augmentation(crop='none'),
    seed=3,
  )
  model = Drawing(128)
  tx = schedules.optimizer(
    config.optimization,
    schedules.learning_rate(config.optimization, _STEPS),
  )
  step = state_lib.make_train_step(
    state_lib.split(model)[0], tx, config, _STEPS
  )
  state = state_lib.create_state(model, tx, config)
  same = []
  for _ in range(8):
    batch = next(batches)
    flipped = np.asarray(batch['image'][:, 0, 0, 0] < 0)
    state = step(state, batch)
    same.append(np.asarray(state.model_state['drawn'] > 0) == flipped)
  batches.close()
  # Five standard deviations of a fair coin, thrown 1024 times.
  share = np.concatenate(same, axis=1).mean(1)
  np.testing.assert_allclose(share, 0.5, atol=5 * 0.5 / 32)


@pytest.mark.parametrize('parts', [2, 3])
def test_accumulated_gradients_are_those_of_the_batch(parts):
  whole, step = _start(_config(method='dense'), gated=False)
  config = _config(method='dense', grad_accum_steps=parts)
  split, step_by_part = _start(config, gated=False)
  for i in range(_STEPS):
    whole, split = step(whole, _batch(i)), step_by_part(split, _batch(i))
    np.testing.assert_allclose(_kernel(split), _kernel(whole), rtol=1e-5)
    chex.assert_trees_all_close(split.sums, whole.sums, rtol=1e-5)
  assert whole.model_state['seen'] == _STEPS
  # Batch statistics are computed for each part.
  assert split.model_state['seen'] == _STEPS * parts


_SHARDED = """
import json
import chex, jax, numpy as np, optax
from dynconv_jax import distributed
from dynconv_jax.training import schedules, workdir
from dynconv_jax.training import state as state_lib
from dynconv_jax.training.config import Config
config = Config().replace(
  method='dense', ema_decay=0.9, batch_size=8, optimizer='adamw'
)
rng = np.random.default_rng(0)
batch = {
  'image': rng.normal(size=(8, 16, 16, 3)).astype(np.float32),
  'label': np.eye(6, dtype=np.float32)[rng.integers(0, 6, 8)],
}
results = {}
for fsdp in (1, 4):
  model = workdir.build_model(config, 6)
  tx = schedules.optimizer(
    config.optimization, schedules.learning_rate(config.optimization, 3)
  )
  mesh = distributed.make_mesh(fsdp)
  assert mesh.shape == {'data': 4 // fsdp, 'fsdp': fsdp}
  state = state_lib.create_state(model, tx, config)
  shardings = distributed.weight_shardings(state, mesh)
  state = distributed.spread(state, shardings)
  step = state_lib.make_train_step(
    state_lib.split(model)[0], tx, config, 3, None,
    shardings if fsdp > 1 else None,
  )
  placed = distributed.place(batch, distributed.batch_sharding(mesh))
  for _ in range(3):
    state = step(state, placed)
  for a, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
    assert a.sharding.is_equivalent_to(sharding, a.ndim)
  state = state.replace(key=jax.random.key_data(state.key))
  here = jax.tree.map(lambda a: a.addressable_shards[0].data.nbytes, state)
  results[fsdp] = {
    'bytes': sum(jax.tree.leaves(here)),
    'loss': float(state.sums['loss']),
    'norm': float(state.sums['gradient_norm']),
  }
print(json.dumps(results))
"""


@pytest.mark.slow
def test_sharded_weights_take_less_memory_and_train_alike():
  done = subprocess.run(
    [sys.executable, '-c', _SHARDED],
    env={
      **os.environ,
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_NUM_CPU_DEVICES': '4',
      'JAX_PLATFORMS': 'cpu',
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  one, four = json.loads(done.stdout).values()
  # Everything except small arrays and batch statistics is sharded.
  assert four['bytes'] < 0.32 * one['bytes']
  np.testing.assert_allclose(four['loss'], one['loss'], rtol=1e-4)
  np.testing.assert_allclose(four['norm'], one['norm'], rtol=1e-3)
