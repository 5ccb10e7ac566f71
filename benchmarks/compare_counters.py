"""Counts four PyTorch networks in all conventions and with other counters.

  python -m benchmarks.compare_counters

prints a table of docs/macs_comparison.md in Markdown, in millions of MACs (or
FLOPs for `flops`). Needs `pip install torch ptflops==0.7.5`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from absl import app, flags
from torch import nn
from torch.utils import flop_counter

from benchmarks import torch_networks
from dynconv_jax.macs import conventions
from dynconv_jax.macs.torch import count_macs

_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 224, 'height and width of the images', lower_bound=32
)


def resnet18() -> nn.Module:
  """Returns ResNet-18."""
  return torch_networks.create('resnet18', 1000)


def resnet50() -> nn.Module:
  """Returns ResNet-50."""
  return torch_networks.create('resnet50', 1000)


def resnet101() -> nn.Module:
  """Returns ResNet-101."""
  return torch_networks.create('resnet101', 1000)


def depthwise() -> nn.Module:
  """Returns MobileNetV1: a strided stem, 13 depthwise-pointwise pairs."""
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
  """Returns ptflops's MACs for one example."""
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
  """Returns half the FLOPs of torch.utils.flop_counter."""
  counter = flop_counter.FlopCounterMode(display=False)
  with torch.no_grad(), counter:
    module.eval()(torch.zeros(*shape))
  return counter.get_total_flops() // 2


def compare(module: nn.Module, shape: Sequence[int]) -> dict[str, int]:
  """Returns {counter: count} for one example."""
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
