"""Tests of initial weights and gates."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks
from absl.testing import absltest
from flax import nnx

from dynconv_jax.training import initialization, workdir


@pytest.fixture
def dense():
  return small_networks.network(6, method='dense', seed=1)


def test_starts_from_a_dense_network(dense):
  model = small_networks.network(6, method='dynconv')
  before = small_networks.weights(model)
  with absltest.TestCase().assertLogs(level='INFO') as logs:
    fresh = initialization.initialize_from(model, dense)
  after, theirs = small_networks.weights(model), small_networks.weights(dense)
  assert len(fresh) == 12  # kernel and bias, twice, in each of three blocks
  assert all('masker' in name for name in fresh)
  assert fresh == [name for name in before if name not in theirs]
  for name in after:
    expected = before if name in fresh else theirs
    np.testing.assert_array_equal(after[name], expected[name], name)
  assert f'newly initialized: {", ".join(fresh)}' in logs.output[0]
  # A copy: the source may be trained further, or its arrays donated.
  model.fc.bias[...] = model.fc.bias[...] + 1
  np.testing.assert_array_equal(dense.fc.bias[...], theirs['fc.bias'])


def test_another_number_of_classes_starts_the_head_afresh(dense):
  model = small_networks.network(10, method='dense')
  before = small_networks.weights(model)
  assert initialization.initialize_from(model, dense) == [
    'fc.bias',
    'fc.kernel',
  ]
  after = small_networks.weights(model)
  np.testing.assert_array_equal(after['fc.kernel'], before['fc.kernel'])
  np.testing.assert_array_equal(
    after['conv1.kernel'], small_networks.weights(dense)['conv1.kernel']
  )


def test_mask_units_can_be_left_behind(dense):
  gated = small_networks.network(6, method='dynconv')
  assert initialization.initialize_from(dense, gated) == []


@pytest.mark.parametrize('deeper', ['model', 'source'])
def test_another_depth_is_an_error_that_lists_all(dense, deeper):
  other = small_networks.network(6, method='dense', model='cifar_resnet14')
  pair = (other, dense) if deeper == 'model' else (dense, other)
  before = small_networks.weights(pair[0])
  with pytest.raises(ValueError, match='another architecture') as error:
    initialization.initialize_from(*pair)
  names = set(small_networks.weights(other)) - set(
    small_networks.weights(dense)
  )
  assert len(names) == 3 * 2 * 5  # blocks, layers, kernel and batch norm
  for name in names:
    assert f'{name}: ' in str(error.value)
  assert ('from none' if deeper == 'model' else 'none from') in str(error.value)
  assert str(error.value).count(': ') == 1 + len(names)
  after = small_networks.weights(pair[0])
  for name in before:
    np.testing.assert_array_equal(after[name], before[name])


def test_another_width_is_an_error_with_both_shapes(dense):
  wide = small_networks.network(6, method='dense', width_multiplier=0.5)
  with pytest.raises(
    ValueError, match=r'conv1\.kernel: \(3, 3, 3, 8\) from \(3, 3, 3, 4\)'
  ):
    initialization.initialize_from(wide, dense)


def _open(model, bias, **changes):
  initialization.open_gates(
    model, small_networks.config(mask_bias=bias, **changes).method
  )


def test_masks_open_at_the_bias():
  model = small_networks.network(6, method='dynconv')
  kernel = np.asarray(model.layer1[0].masker.maskconv.conv.kernel[...])
  _open(model, 2.5)
  for block in model.blocks:
    unit = block.masker.maskconv
    np.testing.assert_array_equal(unit.conv.bias[...], [2.5])
    assert not np.any(unit.fc.kernel[...]) and not np.any(unit.fc.bias[...])
  unit = model.layer1[0].masker.maskconv
  np.testing.assert_array_equal(unit.conv.kernel[...], kernel)
  # A map of zeros then has this logit everywhere.
  x = jnp.zeros((1, 4, 4, 4))
  np.testing.assert_array_equal(unit(x), np.full((1, 4, 4), 2.5))


def _open_shares(model):
  images = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
  view = nnx.view(model, deterministic=True, use_running_average=True)
  return [float(mask.density().mean()) for mask in view(images)[1]]


@pytest.mark.parametrize('gate', ['ff1', 'ff2', 'recurrent'])
def test_gates_of_skipnet_open_and_sharpen(gate):
  config = {'method': 'skipnet', 'skip_gate': gate, 'skip_temperature': 0.5}
  model = workdir.build_model(small_networks.config(**config), 6)
  _open(model, -1.0, **config)
  assert _open_shares(model) == [0.0, 0.0]
  _open(model, 1.5, **config)
  assert _open_shares(model) == [1.0, 1.0]
  initialization.start_gates(model, small_networks.config(**config).method)
  layer = model.layer2[0].masker.last_layer
  assert layer.bias[...].tolist()[-1] == 3.0


@pytest.mark.parametrize('gate', ['ff1', 'ff2', 'recurrent'])
def test_the_second_stage_starts_from_the_first(gate, dense):
  first = small_networks.network(6, method='skipnet', skip_gate=gate)
  fresh = initialization.initialize_from(first, dense)
  assert fresh == [
    name for name in small_networks.weights(first) if 'masker' in name
  ]
  second = small_networks.network(
    6, method='skipnet', skip_gate=gate, skip_training='reinforce', seed=5
  )
  assert second.layer2[0].masker.training == 'reinforce'
  assert initialization.initialize_from(second, first) == []
  chex.assert_trees_all_equal(
    small_networks.weights(second), small_networks.weights(first)
  )


def test_a_dense_network_has_no_masks_to_open(dense):
  before = small_networks.weights(dense)
  _open(dense, 2.5)
  for name, value in small_networks.weights(dense).items():
    np.testing.assert_array_equal(value, before[name])
