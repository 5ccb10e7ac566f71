"""Tests of every architecture against a PyTorch twin with equal weights."""

import numpy as np
import pytest
from flax import nnx

from dynconv_jax.interop import load_torch_state_dict, to_torch_state_dict
from dynconv_jax.models.create import create_model
from dynconv_jax.models.resnet import ARCHITECTURES

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch_twin  # noqa: E402

# Full width if that is fast; the structure is that of full width in any case.
_FULL = ('resnet18', 'resnet50', 'cifar_resnet8', 'cifar_resnet20')
_QUICK = ('cifar_resnet8', 'cifar_resnet14')


def _network(name, method, width_multiplier, **kwargs):
  """Returns the evaluation view of an abstract network."""
  model = nnx.eval_shape(
    lambda: create_model(
      name,
      method=method,
      num_classes=5,
      width_multiplier=width_multiplier,
      rngs=nnx.Rngs(0),
      **kwargs,
    )
  )
  return nnx.view(model, deterministic=True, use_running_average=True)


def _compare(name, model, twin):
  gated = [block for block in twin.blocks if block.gate != 'dense']
  # Images whose decisions do not depend on rounding, and whose masks are
  # neither all ones nor all zeros, which would hide most of the network.
  for seed in range(40):
    images = torch_twin.random_images(name, 3, seed)
    with torch.no_grad():
      expected = twin(images).numpy()
    masks = [block.mask.numpy().ravel() for block in gated] or [[0.5]]
    if twin.margin() > 1e-5 and 0.1 < np.concatenate(masks).mean() < 0.9:
      break
  else:
    pytest.fail('no images of mixed decisions away from the threshold')
  inputs = images.numpy().transpose(0, 2, 3, 1)
  # Not compiled as a whole: a deep network has few shapes and many layers.
  logits, masks = model(inputs)
  assert np.abs(expected - expected.mean(0)).max() > 1e-2
  np.testing.assert_allclose(
    logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max()
  )
  assert [m.name for m in masks] == [
    f'layer{s}.{i}'
    for s in range(1, 5)
    for i, block in enumerate(getattr(twin, f'layer{s}', []))
    if block.gate != 'dense'
  ]
  for mask, block in zip(masks, gated, strict=True):
    np.testing.assert_array_equal(mask.hard, block.mask[:, 0].round())
    np.testing.assert_array_equal(mask.dilated, block.dilated[:, 0])


@pytest.mark.parametrize('method', ['dense', 'dynconv', 'convnet_aig'])
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n not in _QUICK))
    for n in ARCHITECTURES
  ],
)
def test_same_logits_and_masks(name, method):
  width = 1.0 if name in _FULL else 0.25
  twin = torch_twin.create_twin(name, method, width_multiplier=width)
  model = _network(name, method, width)
  state = twin.state_dict()
  assert set(torch_twin.STRUCTURES) == set(ARCHITECTURES)
  variances = state['layer3.0.bn2.running_var']
  assert (variances - 1).abs().max() > 0.1
  load_torch_state_dict(model, state)
  _compare(name, model, twin)

  # And back: the same bits, in a module that accepts nothing else.
  exported = to_torch_state_dict(model)
  assert exported.keys() == state.keys()
  for key, array in exported.items():
    if not key.endswith('num_batches_tracked'):
      assert array.dtype == np.float32
      np.testing.assert_array_equal(array, state[key].numpy(), key)
  twin.load_state_dict({k: torch.from_numpy(v) for k, v in exported.items()})
