"""Tests of PyTorch's side of the benchmarks."""

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='pip install -e .[torch]')

from dynconv_jax.masks import dilate  # noqa: E402
from experiments.torch_resnet import ResNet  # noqa: E402


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
  x, masks = model.stem(images), []
  for block in model.blocks:
    shortcut = x if block.projection is None else block.projection(x)
    y = x
    for conv, norm in zip(block.convs[:-1], block.norms[:-1], strict=True):
      y = torch.relu(norm(conv(y)))
    y = block.norms[-1](block.convs[-1](y))
    hard = torch.rand(2, *y.shape[2:]) < 0.3
    bottleneck = len(block.convs) == 3
    stride = block.stride if bottleneck else 1
    dilated = np.array(dilate(hard.float().numpy(), stride)) > 0
    if bottleneck:
      dilated = dilated[:, : x.shape[2], : x.shape[3]]
    masks.append((hard, torch.from_numpy(dilated)))
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
