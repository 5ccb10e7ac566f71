"""PyTorch's side of the benchmarks: ResNets, dense and by gathered positions.

Needs PyTorch (pip install -e .[torch]).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from flax import nnx
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynconv_jax import create_model
from dynconv_jax.branch import Branch, Conv


class Block(nn.Module):
  """A residual block, ReLU its only activation, with torchvision's names.

  Args:
    branch: its description.
  """

  def __init__(self, branch: Branch):
    super().__init__()
    self.branch = branch
    self.relu = nn.ReLU()
    for conv in branch.convs:
      self.add_module(conv.name, _conv(conv))
      self.add_module(conv.norm, nn.BatchNorm2d(conv.features))
    self.downsample = None
    if (projection := branch.projection) is not None:
      self.downsample = nn.Sequential(
        _conv(projection), nn.BatchNorm2d(projection.features)
      )

  def forward(self, x, maps=None):
    shortcut = x if self.downsample is None else self.downsample(x)
    if maps is not None:
      return self._by_positions(x, shortcut, maps)
    for conv in self.branch.convs:
      x = getattr(self, conv.norm)(getattr(self, conv.name)(x))
      x = self._activate(x, conv.activation)
    x += shortcut
    return self._activate(x, self.branch.activation)

  def _activate(self, x, activation):
    return x if activation is None else getattr(self, activation)(x)

  def _by_positions(self, x, shortcut, maps):
    """The block by index_select, GEMM and index_add_, batch norm folded."""
    table, known = _rows(x), torch.ones(len(x), *x.shape[2:], dtype=torch.bool)
    for conv, level in zip(self.branch.convs, self.branch.levels, strict=True):
      module = getattr(self, conv.name)
      at = maps[level]
      if not conv.is_pointwise:
        table = _windows(table, known, at, conv)
      elif at is not known:
        table = table.index_select(0, at.flatten().nonzero()[:, 0])
      matrix = module.weight.permute(2, 3, 1, 0).flatten(0, 2)
      table = self._activate(table @ matrix + module.bias, conv.activation)
      known = at
    out = shortcut.contiguous(memory_format=torch.channels_last).clone()
    _rows(out).index_add_(0, known.flatten().nonzero()[:, 0], table)
    return self._activate(out, self.branch.activation)


class ResNet(nn.Module):
  """A dense ResNet, with torchvision's names.

  Args:
    name: a key of ARCHITECTURES.
    num_classes: outputs of the head.
    width_multiplier: scales the channels.
  """

  def __init__(
    self, name: str, num_classes: int, width_multiplier: float = 1.0
  ):
    super().__init__()
    described = nnx.eval_shape(
      lambda: create_model(
        name,
        num_classes=num_classes,
        width_multiplier=width_multiplier,
        rngs=nnx.Rngs(0),
      )
    )
    stem = described.conv1
    k, features = stem.kernel_size[0], stem.out_features
    self.conv1 = nn.Conv2d(3, features, k, stem.strides, k // 2, bias=False)
    self.bn1 = nn.BatchNorm2d(features)
    self.relu = nn.ReLU()
    self.maxpool = nn.Identity()
    if described.maxpool is not None:
      self.maxpool = nn.MaxPool2d(3, 2, 1)
    self.blocks = {}  # By name; registered by stages.
    for number, stage in enumerate(described.stages, 1):
      blocks = [Block(block.branch) for block in stage]
      self.blocks |= {b.name: own for b, own in zip(stage, blocks, strict=True)}
      self.add_module(f'layer{number}', nn.Sequential(*blocks))
    self.avgpool = nn.AdaptiveAvgPool2d(1)
    self.fc = nn.Linear(described.fc.in_features, num_classes)

  def forward(
    self,
    x: torch.Tensor,
    masks: Mapping[str, Sequence[torch.Tensor]] | None = None,
  ) -> torch.Tensor:
    """Returns logits, float[N, classes].

    Args:
      x: float[N, 3, H, W].
      masks: bool[N, h, w] of each level of a branch by the blocks' names, or
        None; of a folded network.
    """
    x = self.stem(x)
    for name, block in self.blocks.items():
      x = block(x, masks and masks[name])
    return self.fc(self.avgpool(x).flatten(1))

  def stem(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the input of the first block."""
    return self.maxpool(self.relu(self.bn1(self.conv1(x))))

  def fold(self) -> ResNet:
    """Returns self in evaluation, batch norm folded into the convolutions."""
    self.eval()
    _fold(self, 'conv1', 'bn1')
    for block in self.blocks.values():
      for conv in block.branch.convs:
        _fold(block, conv.name, conv.norm)
      if block.downsample is not None:
        _fold(block.downsample, '0', '1')
    return self


def use_all_cores() -> None:
  """Lets PyTorch run on every core that this process may use."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))


def _conv(conv: Conv) -> nn.Conv2d:
  return nn.Conv2d(
    conv.in_features,
    conv.features,
    conv.kernel_size,
    conv.strides,
    conv.kernel_size // 2,
    groups=conv.groups,
    bias=False,
  )


def _fold(module, conv, norm):
  folded = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
  setattr(module, conv, folded)
  setattr(module, norm, nn.Identity())


def _rows(x):
  """Channels-last [N, C, H, W] as [N * H * W, C], without a copy."""
  return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _windows(table, known, at, conv):
  """What a convolution reads at some positions, [positions, k * k * C].

  Args:
    table: a row for each position of `known`.
    known: bool[N, H, W].
    at: bool[N, h, w].
    conv: its description.
  """
  k, s = conv.kernel_size, conv.strides
  # Where each position lies among the rows; the last row is zero.
  table = torch.cat([table, table.new_zeros(1, table.shape[1])])
  numbers = torch.full(known.shape, len(table) - 1)
  numbers[known] = torch.arange(len(table) - 1)
  pads = [conv.pads(size) for size in known.shape[:0:-1]]
  numbers = functional.pad(numbers, sum(pads, ()), value=len(table) - 1)
  image, i, j = at.nonzero(as_tuple=True)
  near = [
    numbers[image, i * s + a, j * s + b] for a in range(k) for b in range(k)
  ]
  rows = table.index_select(0, torch.stack(near, 1).flatten())
  return rows.view(len(image), k * k * table.shape[1])
