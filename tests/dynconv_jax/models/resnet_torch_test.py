"""Compares training and evaluation with a twin in PyTorch, weights copied."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax.gating.mask_unit import MaskUnit
from dynconv_jax.losses import sparsity_loss
from dynconv_jax.models.blocks import Bottleneck
from dynconv_jax.models.create import create_model
from dynconv_jax.models.resnet import Architecture, ResNet

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

TEMPERATURE, BUDGET, PROGRESS = 2.0, 0.3, 0.1


class TorchMaskUnit(nn.Module):
  """The authors' `MaskUnit` without noise, straight-through in training."""

  def __init__(self, features, stride):
    super().__init__()
    self.maskconv = nn.Module()
    self.maskconv.conv = nn.Conv2d(features, 1, 3, stride, 1)
    self.maskconv.fc = nn.Linear(features, 1)

  def forward(self, x):
    squeezed = self.maskconv.fc(x.mean((2, 3)))
    logits = self.maskconv.conv(x) + squeezed[:, :, None, None]
    # Too close to the threshold, rounding would decide.
    assert logits.abs().min() > 1e-4
    hard = (logits >= 0).to(x.dtype)
    soft = torch.sigmoid(logits / TEMPERATURE)
    return (hard - soft).detach() + soft


class TorchBlock(nn.Module):
  """torchvision's block; `costs` holds its (executed, dense) MACs."""

  def __init__(self, inputs, planes, stride, bottleneck):
    super().__init__()
    outputs = 4 * planes if bottleneck else planes
    shapes = [(inputs, planes, 3, stride), (planes, planes, 3, 1)]
    if bottleneck:
      shapes = [
        (inputs, planes, 1, 1),
        (planes, planes, 3, stride),
        (planes, outputs, 1, 1),
      ]
    self.number, self.stride = len(shapes), stride if bottleneck else 1
    for i, (a, b, k, s) in enumerate(shapes, start=1):
      setattr(self, f'conv{i}', nn.Conv2d(a, b, k, s, k // 2, bias=False))
      setattr(self, f'bn{i}', nn.BatchNorm2d(b))
    self.downsample = nn.Identity()
    if stride != 1 or inputs != outputs:
      self.downsample = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False),
        nn.BatchNorm2d(outputs),
      )
    self.masker = TorchMaskUnit(inputs, stride)

  def forward(self, x):
    mask = self.masker(x)
    y, sizes = x, []
    for i in range(1, self.number + 1):
      y = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(y))
      sizes.append(y.shape)
      y = F.relu(y) if i < self.number else y
    stuffed = torch.zeros(len(x), 1, *sizes[0][2:], dtype=x.dtype)
    stuffed[:, :, :: self.stride, :: self.stride] = mask.detach()
    dilated = F.max_pool2d(stuffed, 3, 1, 1)
    executed, dense = 0, 0
    for i, size in enumerate(sizes, start=1):
      kernel = getattr(self, f'conv{i}').weight.numel()
      executed = executed + kernel * (dilated if i == 1 else mask).sum()
      dense += kernel * size[0] * size[2] * size[3]
    self.costs, self.mask, self.dilated = (executed, dense), mask, dilated
    return F.relu(self.downsample(x) + mask * y)


class TorchResNet(nn.Module):
  def __init__(self, depths, width, classes, bottleneck, imagenet):
    super().__init__()
    self.imagenet = imagenet
    kernel, stride = (7, 2) if imagenet else (3, 1)
    self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    inputs, self.blocks = width, []
    for stage, depth in enumerate(depths):
      planes, blocks = width * 2**stage, []
      for i in range(depth):
        s = 2 if stage and not i else 1
        blocks.append(TorchBlock(inputs, planes, s, bottleneck))
        inputs = 4 * planes if bottleneck else planes
      setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))
      self.blocks += blocks
    self.fc = nn.Linear(inputs, classes)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
    for block in self.blocks:
      x = block(x)
    return self.fc(x.mean((2, 3)))

  def sparsity(self):
    """The authors' `SparsityCriterion`."""
    q = np.cos(np.pi / 2 * PROGRESS / 0.33) ** 2
    upper, lower = 1 - q * (1 - BUDGET), q * BUDGET
    outside = 0
    for executed, dense in (block.costs for block in self.blocks):
      outside += F.relu(executed / dense - upper) ** 2
      outside += F.relu(lower - executed / dense) ** 2
    executed, dense = map(
      sum, zip(*(b.costs for b in self.blocks), strict=True)
    )
    return (executed / dense - BUDGET) ** 2 + outside / len(self.blocks)


def _named(state):
  """Arrays of an NNX state by PyTorch's names, in PyTorch's layouts."""
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
  return model, TorchResNet((1, 1, 1), 4, 5, False, False), (3, 9, 8, 3)


def _imagenet():
  model = ResNet(
    Architecture(Bottleneck, (1, 2), 4),
    num_classes=5,
    width_multiplier=1.0,
    gate=lambda stage, i, features, strides: MaskUnit(
      features, strides=strides, rngs=nnx.Rngs(features)
    ),
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  return model, TorchResNet((1, 2), 4, 5, True, True), (3, 26, 24, 3)


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

    # PyTorch in float64.
    arrays = _named(params) | _named(rest)
    twin = twin.double()
    missing, unexpected = twin.load_state_dict(
      {k: torch.tensor(v) for k, v in arrays.items()}, strict=False
    )
    self.assertEmpty(unexpected)
    self.assertTrue(all(m.endswith('num_batches_tracked') for m in missing))
    torch_images = torch.tensor(images.transpose(0, 3, 1, 2)).double()
    torch_logits = twin(torch_images)
    torch_loss = F.cross_entropy(torch_logits, torch.tensor(labels))
    torch_loss = torch_loss + 10 * twin.sparsity()
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
    # Masks of ones, or of zeros, would hide most of the network.
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
