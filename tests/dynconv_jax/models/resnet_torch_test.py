"""Compares training and evaluation with a PyTorch twin with equal weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax.losses import sparsity_loss
from dynconv_jax.methods.mask_unit import MaskUnit
from dynconv_jax.models.blocks import Bottleneck
from dynconv_jax.models.create import create_model
from dynconv_jax.models.resnet import Architecture, ResNet

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch.nn.functional as F  # noqa: E402
from torch_twin import TorchResNet  # noqa: E402

TEMPERATURE, BUDGET, PROGRESS = 2.0, 0.3, 0.1


def _sparsity(twin):
  """The authors' `SparsityCriterion`."""
  q = np.cos(np.pi / 2 * PROGRESS / 0.33) ** 2
  upper, lower = 1 - q * (1 - BUDGET), q * BUDGET
  outside = 0
  for executed, dense in (block.costs for block in twin.blocks):
    outside += F.relu(executed / dense - upper) ** 2
    outside += F.relu(lower - executed / dense) ** 2
  executed, dense = map(sum, zip(*(b.costs for b in twin.blocks), strict=True))
  return (executed / dense - BUDGET) ** 2 + outside / len(twin.blocks)


def _named(state):
  """Returns the arrays of an NNX state with PyTorch's names and layouts."""
  renamed = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
  }
  arrays = {}
  for path, value in jax.tree_util.tree_flatten_with_path(state)[0]:
    keys = re.findall(r'\w+', jax.tree_util.keystr(path))
    array = np.asarray(value)
    array = array.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])
    arrays['.'.join([*keys[:-1], renamed[keys[-1]]])] = array
  return arrays


def _cifar():
  model = create_model(
    'cifar_resnet8',
    method='dynconv',
    num_classes=5,
    width_multiplier=0.25,
    rngs=nnx.Rngs(0),
  )
  twin = TorchResNet((1, 1, 1), 4, 5, False, False, temperature=TEMPERATURE)
  return model, twin, (3, 9, 8, 3)


def _imagenet():
  model = ResNet(
    Architecture(Bottleneck, (1, 2), 4),
    num_classes=5,
    width_multiplier=1.0,
    gate=lambda site: MaskUnit(
      site.in_features,
      strides=site.strides,
      rngs=nnx.Rngs(site.in_features),
    ),
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  twin = TorchResNet((1, 2), 4, 5, True, True, temperature=TEMPERATURE)
  return model, twin, (3, 26, 24, 3)


class TwinTest(parameterized.TestCase):
  @parameterized.parameters(_cifar, _imagenet)
  def test_training_step_and_evaluation(self, make):
    model, twin, shape = make()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure((params, rest))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params
    )
    images = rng.normal(size=shape).astype(np.float32)
    labels = np.array([0, 3, 1])

    # PyTorch runs in float64.
    arrays = _named(params) | _named(rest)
    twin = twin.double()
    missing, unexpected = twin.load_state_dict(
      {k: torch.tensor(v) for k, v in arrays.items()}, strict=False
    )
    self.assertEmpty(unexpected)
    self.assertTrue(all(m.endswith('num_batches_tracked') for m in missing))
    torch_images = torch.tensor(images.transpose(0, 3, 1, 2)).double()
    torch_logits = twin(torch_images)
    # Too close to the threshold, rounding would decide.
    self.assertGreater(twin.margin(), 1e-4)
    torch_loss = F.cross_entropy(torch_logits, torch.tensor(labels))
    torch_loss = torch_loss + 10 * _sparsity(twin)
    torch_loss.backward()

    def objective(params):
      model = nnx.merge(graphdef, params, rest)
      logits, masks = model(images, temperature=TEMPERATURE, gumbel_noise=False)
      loss = jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      )
      loss += 10 * sparsity_loss(masks, budget=BUDGET, progress=PROGRESS)
      moved = nnx.as_pure(nnx.split(model, nnx.Param, ...)[2])
      return loss, (logits, masks, moved)

    (loss, (logits, masks, moved)), grads = jax.jit(
      jax.value_and_grad(objective, has_aux=True)
    )(params)
    self._assert_close(logits, torch_logits)
    self._assert_close(loss, torch_loss)
    for mask, block in zip(masks, twin.blocks, strict=True):
      np.testing.assert_array_equal(
        mask.hard, block.mask.detach()[:, 0].round()
      )
      np.testing.assert_array_equal(mask.dilated, block.dilated[:, 0])
    # Masks of all ones or zeros would hide most of the network.
    density = np.concatenate([m.hard.ravel() for m in masks]).mean()
    self.assertBetween(density, 0.1, 0.9)
    grads = _named(grads)
    for name, parameter in twin.named_parameters():
      self._assert_close(grads[name], parameter.grad, name, 1e-3)
    state = twin.state_dict()
    for name, value in _named(moved).items():
      self._assert_close(value, state[name], name)

    # Evaluation with the running statistics of that step.
    twin.eval()
    with torch.no_grad():
      torch_logits = twin(torch_images)
    view = nnx.view(
      nnx.merge(graphdef, params, moved),
      deterministic=True,
      use_running_average=True,
    )
    logits, masks = nnx.jit(lambda m, x: m(x))(view, images)
    self._assert_close(logits, torch_logits)
    for mask, block in zip(masks, twin.blocks, strict=True):
      np.testing.assert_array_equal(
        mask.hard, block.mask.detach()[:, 0].round()
      )

  def _assert_close(self, given, expected, name='', rtol=1e-4):
    expected = expected.detach().numpy()
    scale = max(np.abs(expected).max(), 1e-2)
    np.testing.assert_allclose(
      np.asarray(given) / scale, expected / scale, atol=rtol, err_msg=name
    )


if __name__ == '__main__':
  absltest.main()
