"""Tests of what the benchmarks time: networks, their masks, forced gates."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import networks
from benchmarks.forced import force_gates
from dynconv_jax import create_model
from dynconv_jax.macs import count_macs
from dynconv_jax.models.gated import gated_blocks

_SHAPE = (2, 16, 16, 3)


def _network(method, name='cifar_resnet14'):
  model = create_model(name, method=method, num_classes=5, rngs=nnx.Rngs(0))
  return nnx.view(model, deterministic=True, use_running_average=True)


@pytest.mark.parametrize('checkpoint', ('best', 'latest'))
def test_the_weights_are_those_asked_for(checkpoint):
  settings = {'workdir': 'some', 'checkpoint': checkpoint}
  with (
    mock.patch.object(
      networks.workdir, 'load_run', side_effect=OSError
    ) as load,
    pytest.raises(OSError),
  ):
    networks.Networks(settings)
  load.assert_called_once_with('some', best=checkpoint == 'best')


@pytest.mark.parametrize(
  'method, share',
  [
    ('dynconv', 0.4),
    ('sact', 0.4),
    # One of two images.
    ('convnet_aig', 0.5),
    ('skipnet', 0.5),
    ('act', 0.5),
  ],
)
def test_forced_gates_give_what_masks_do_and_are_paid_for(method, share):
  model = _network(method)
  masks = networks.masks_of(model, _SHAPE, 0.4)
  gates = {b.name: b.masker is not None for b in gated_blocks(model)}
  assert list(masks) == list(gates)
  for name, mask in masks.items():
    expected_share = share if gates[name] else 1
    assert np.mean(mask) == pytest.approx(expected_share, abs=0.03), name
  given = {name: mask for name, mask in masks.items() if gates[name]}
  images = jax.random.normal(jax.random.key(1), _SHAPE)

  def run(network, **kwargs):
    compiled = jax.jit(lambda x: network(x, **kwargs)).lower(images).compile()
    products = len(re.findall(r' (?:dot|convolution)\(', compiled.as_text()))
    return *compiled(images), products, compiled.cost_analysis()['flops']

  expected, obeyed, fewer, cheaper = run(model, masks=given)
  logits, decided, products, cost = run(force_gates(model, masks))
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  for ours, theirs in zip(decided, obeyed, strict=True):
    assert ours.name == theirs.name
    np.testing.assert_array_equal(ours.hard, theirs.hard)
  image = jax.ShapeDtypeStruct((1, *_SHAPE[1:]), jnp.float32)
  macs, dense = (
    count_macs(network, image, convention='conv+linear').total
    for network in (model, _network('dense'))
  )
  assert macs > dense
  # Each gate's products are present, with two operations per product. XLA also
  # counts additions, so ACT's gates, with 112 MACs, are not visible.
  assert products - fewer >= len(given)
  if macs - dense > 1000:
    assert cost - cheaper > 0.9 * 2 * _SHAPE[0] * (macs - dense)


def test_a_gated_network_has_the_weights_of_the_dense_one():
  settings = {
    'workdir': None,
    'model': 'mobilenet_v2',
    'method': 'dynconv',
    'num_classes': 5,
    'image_size': 64,
    'compute_dtype': 'float32',
    'options': {'gated_blocks': 'all'},
  }
  own = networks.Networks(settings)
  dense, gated = own.model('dense'), own.model('dynconv')
  assert all(block.masker is not None for block in gated_blocks(gated))
  weights = {
    path: value
    for path, value in nnx.to_flat_state(nnx.state(gated, nnx.Param))
    if 'masker' not in path
  }
  expected = dict(nnx.to_flat_state(nnx.state(dense, nnx.Param)))
  assert weights.keys() == expected.keys()
  for path, value in weights.items():
    np.testing.assert_array_equal(value[...], expected[path][...])
  # The batch norms to fold have nontrivial statistics.
  assert np.ptp(dense.bn1.mean[...]) > 0.1
