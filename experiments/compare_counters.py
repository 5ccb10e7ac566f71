"""Counts four PyTorch networks by our conventions and by other counters.

  python -m experiments.compare_counters

prints the table of docs/macs.md in Markdown, in millions of MACs (of FLOPs for
`flops`). Needs `pip install torch ptflops==0.7.5`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from absl import app, flags
from torch import nn
from torch.utils import flop_counter

from dynconv_jax.macs import conventions
from dynconv_jax.macs.torch import count_macs

_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 224, 'height and width of the images', lower_bound=32
)


class Block(nn.Module):
  """A residual block: basic, or a bottleneck where `expansion` is 4."""

  def __init__(self, features: int, planes: int, stride: int, expansion: int):
    super().__init__()
    out = planes * expansion
    sizes = (
      [(features, planes, 3, stride), (planes, planes, 3, 1)]
      if expansion == 1
      else [(features, planes, 1, 1), (planes, planes, 3, stride)]
      + [(planes, out, 1, 1)]
    )
    self.depth = len(sizes)
    for i, (inputs, outputs, kernel, step) in enumerate(sizes, 1):
      conv = nn.Conv2d(inputs, outputs, kernel, step, kernel // 2, bias=False)
      self.add_module(f'conv{i}', conv)
      self.add_module(f'bn{i}', nn.BatchNorm2d(outputs))
    self.relu = nn.ReLU(inplace=True)
    self.downsample = None
    if stride > 1 or features != out:
      conv = nn.Conv2d(features, out, 1, stride, bias=False)
      self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    shortcut = x if self.downsample is None else self.downsample(x)
    for i in range(1, self.depth + 1):
      x = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(x))
      if i < self.depth:
        x = self.relu(x)
    x += shortcut
    return self.relu(x)


class ResNet(nn.Module):
  """torchvision's ResNet, with its names and operations."""

  def __init__(
    self, blocks: Sequence[int], expansion: int, classes: int = 1000
  ):
    super().__init__()
    self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    self.bn1 = nn.BatchNorm2d(64)
    self.relu = nn.ReLU(inplace=True)
    self.maxpool = nn.MaxPool2d(3, 2, 1)
    features = 64
    for stage, count in enumerate(blocks):
      layers = []
      for i in range(count):
        planes, stride = 64 * 2**stage, 2 if stage and not i else 1
        layers.append(Block(features, planes, stride, expansion))
        features = planes * expansion
      self.add_module(f'layer{stage + 1}', nn.Sequential(*layers))
    self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
    self.fc = nn.Linear(features, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
      x = stage(x)
    return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18() -> ResNet:
  """Returns ResNet-18."""
  return ResNet((2, 2, 2, 2), 1)


def resnet50() -> ResNet:
  """Returns ResNet-50."""
  return ResNet((3, 4, 6, 3), 4)


def resnet101() -> ResNet:
  """Returns ResNet-101."""
  return ResNet((3, 4, 23, 3), 4)


def depthwise() -> nn.Module:
  """Returns MobileNetV1: a strided stem, 13 depthwise and pointwise pairs."""
  layers: list[nn.Module] = []

  def add(inputs, outputs, kernel, stride, groups):
    layers.extend(
      [
        nn.Conv2d(
          inputs, outputs, kernel, stride, kernel // 2, 1, groups, bias=False
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
      ]
    )

  add(3, 32, 3, 2, 1)
  features = 32
  strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
  for i, stride in enumerate(strides):
    outputs = features * (2 if stride == 2 or i == 0 else 1)
    add(features, features, 3, stride, features)
    add(features, outputs, 1, 1, 1)
    features = outputs
  return nn.Sequential(
    *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 1000)
  )


class Transformer(nn.Module):
  """Pre-norm blocks of nn.MultiheadAttention and a two-layer perceptron."""

  def __init__(self, features: int = 256, heads: int = 4, depth: int = 4):
    super().__init__()
    self.blocks = nn.ModuleList(
      nn.ModuleDict(
        {
          'norm1': nn.LayerNorm(features),
          'attention': nn.MultiheadAttention(features, heads, batch_first=True),
          'norm2': nn.LayerNorm(features),
          'mlp': nn.Sequential(
            nn.Linear(features, 4 * features),
            nn.GELU(),
            nn.Linear(4 * features, features),
          ),
        }
      )
      for _ in range(depth)
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    for block in self.blocks:
      y = block['norm1'](x)
      x = x + block['attention'](y, y, y, need_weights=False)[0]
      x = x + block['mlp'](block['norm2'](x))
    return x


class Recurrent(nn.Module):
  """A two-layer LSTM and a linear layer on each of its outputs."""

  def __init__(self, features: int = 128, hidden: int = 256, outputs: int = 10):
    super().__init__()
    self.lstm = nn.LSTM(features, hidden, num_layers=2, batch_first=True)
    self.head = nn.Linear(hidden, outputs)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.lstm(x)[0])


def ptflops_macs(module: nn.Module, shape: Sequence[int], backend: str) -> int:
  """Returns the MACs that ptflops counts for one example."""
  import ptflops

  macs, _ = ptflops.get_model_complexity_info(
    module,
    tuple(shape[1:]),
    as_strings=False,
    print_per_layer_stat=False,
    backend=backend,
    ost=io.StringIO(),
  )
  return int(macs)


def torch_macs(module: nn.Module, shape: Sequence[int]) -> int:
  """Returns half the FLOPs that torch.utils.flop_counter counts."""
  counter = flop_counter.FlopCounterMode(display=False)
  with torch.no_grad(), counter:
    module.eval()(torch.zeros(*shape))
  return counter.get_total_flops() // 2


def compare(module: nn.Module, shape: Sequence[int]) -> dict[str, int]:
  """Returns {counter: what it counts} for one example."""
  counts = {
    name: count_macs(module, tuple(shape), convention=name).total
    for name in conventions.CONVENTIONS
  }
  for backend in ('pytorch', 'aten'):
    counts[f'ptflops ({backend})'] = ptflops_macs(module, shape, backend)
  counts['torch.utils.flop_counter / 2'] = torch_macs(module, shape)
  return counts


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  image = (1, 3, _IMAGE_SIZE.value, _IMAGE_SIZE.value)
  columns = {
    'ResNet-50': compare(resnet50(), image),
    'MobileNetV1': compare(depthwise(), image),
    'Transformer': compare(Transformer(), (1, 196, 256)),
    'LSTM': compare(Recurrent(), (1, 64, 128)),
  }
  print('| counter | ' + ' | '.join(columns) + ' |')
  print('|---|' + '---:|' * len(columns))
  for counter in columns['LSTM']:
    cells = [f'{counts[counter] / 1e6:,.3f}' for counts in columns.values()]
    name = f'`{counter}`' if counter in conventions.CONVENTIONS else counter
    print(f'| {name} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
  app.run(main)
