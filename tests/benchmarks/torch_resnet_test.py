"""Tests of PyTorch's side of the benchmarks."""

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='pip install -e .[torch]')

from benchmarks.torch_resnet import ResNet  # noqa: E402
from dynconv_jax.masks import execution_mask  # noqa: E402


def _network(name):
  torch.manual_seed(0)
  model = ResNet(name, 6).eval()
  for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.running_mean.normal_()
      module.running_var.uniform_(0.5, 2)
      module.weight.data.uniform_(0.5, 1.5)
  return model


@pytest.mark.parametrize(
  'name, size', [('resnet50', 65), ('resnet18', 64), ('cifar_resnet8', 18)]
)
@torch.inference_mode()
def test_folded_and_by_positions_equal_masked(name, size):
  model = _network(name)
  images = torch.randn(2, 3, size, size)
  images = images.contiguous(memory_format=torch.channels_last)
  x, masks = model.stem(images), {}
  for name, block in model.blocks.items():
    shortcut = x if block.downsample is None else block.downsample(x)
    y = x
    for i in range(1, len(block.branch.convs) + 1):
      y = torch.relu(y) if i > 1 else y
      y = getattr(block, f'bn{i}')(getattr(block, f'conv{i}')(y))
    hard = torch.rand(2, *y.shape[2:]) < 0.3
    maps = execution_mask(
      block.branch, hard.float().numpy(), tuple(x.shape[2:]), name=name
    ).maps
    masks[name] = [torch.from_numpy(np.array(m) > 0) for m in maps]
    x = torch.relu(shortcut + y * hard[:, None])
  masked, dense = model.fc(x.mean((2, 3))), model(images)
  assert (masked - dense).abs().max() > 0.01
  folded = model.fold()
  torch.testing.assert_close(folded(images), dense, rtol=1e-4, atol=1e-5)
  torch.testing.assert_close(
    folded(images, masks), masked, rtol=1e-4, atol=1e-5
  )


def test_parameters_are_those_of_torchvision():
  # torchvision's ResNet-50 has 25,557,032 parameters.
  model = ResNet('resnet50', 1000)
  assert sum(p.numel() for p in model.parameters()) == 25_557_032
  assert 'layer2.0.downsample.1.running_var' in model.state_dict()


def test_channels_are_multiplied():
  model = ResNet('cifar_resnet8', 3, width_multiplier=0.5)
  assert model.conv1.out_channels == 8 and model.fc.in_features == 32
