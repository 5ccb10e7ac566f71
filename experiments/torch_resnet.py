"""PyTorch's side of the benchmarks: ResNets, dense and by gathered positions.

Needs PyTorch (pip install -e .[torch]).
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynconv_jax.models.resnet import ARCHITECTURES


class Block(nn.Module):
  """A basic or bottleneck residual block, as torchvision's."""

  def __init__(
    self, in_features: int, planes: int, stride: int, expansion: int
  ):
    super().__init__()
    features = planes * expansion
    if expansion == 1:
      layers = [(in_features, planes, 3, stride), (planes, planes, 3, 1)]
    else:
      layers = [
        (in_features, planes, 1, 1),
        (planes, planes, 3, stride),
        (planes, features, 1, 1),
      ]
    self.convs = nn.ModuleList([_conv(*layer) for layer in layers])
    self.norms = nn.ModuleList([nn.BatchNorm2d(layer[1]) for layer in layers])
    self.projection = None
    if stride != 1 or in_features != features:
      self.projection = nn.Sequential(
        _conv(in_features, features, 1, stride), nn.BatchNorm2d(features)
      )
    self.stride = stride

  def forward(self, x, hard=None, dilated=None):
    shortcut = x if self.projection is None else self.projection(x)
    if hard is not None:
      return self._by_positions(x, shortcut, hard, dilated)
    for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
      x = functional.relu(norm(conv(x)))
    x = self.norms[-1](self.convs[-1](x))
    return functional.relu(x + shortcut)

  def _by_positions(self, x, shortcut, hard, dilated):
    """The block by index_select, GEMM and index_add_, batch norm folded."""
    first, second, *third = self.convs
    n, height, width = dilated.shape
    at = dilated.flatten().nonzero()[:, 0]
    # Where each position lies among the gathered rows; the last row is zero.
    rows = torch.full((n, height + 2, width + 2), len(at))
    inner = rows[:, 1:-1, 1:-1].reshape(-1)
    inner[at] = torch.arange(len(at))
    rows[:, 1:-1, 1:-1] = inner.view(n, height, width)
    image, i, j = hard.nonzero(as_tuple=True)
    if third:
      y = _rows(x).index_select(0, at) @ first.weight.flatten(1).T
    else:
      image0, i0, j0 = dilated.nonzero(as_tuple=True)
      padded = functional.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
      s = self.stride
      y = _windows(padded, image0, i0 * s, j0 * s) @ _matrix(first)
    y = functional.relu(y + first.bias)
    y = torch.cat([y, y.new_zeros(1, y.shape[1])])
    s = second.stride[0]
    near = torch.stack(
      [rows[image, i * s + a, j * s + b] for a in range(3) for b in range(3)], 1
    )
    y = y.index_select(0, near.flatten()).view(-1, 9 * y.shape[1])
    y = y @ _matrix(second) + second.bias
    if third:
      y = functional.relu(y) @ third[0].weight.flatten(1).T + third[0].bias
    out = shortcut.contiguous(memory_format=torch.channels_last).clone()
    index = hard.flatten().nonzero()[:, 0]
    _rows(out).index_add_(0, index, y)
    return functional.relu_(out)


class ResNet(nn.Module):
  """A dense ResNet of ARCHITECTURES.

  Args:
    name: of the architecture.
    num_classes: outputs of the head.
  """

  def __init__(self, name: str, num_classes: int):
    super().__init__()
    architecture = ARCHITECTURES[name]
    width, expansion = architecture.width, architecture.block.expansion
    imagenet = architecture.stem == 'imagenet'
    self.stem = nn.Sequential(
      _conv(3, width, 7, 2) if imagenet else _conv(3, width, 3, 1),
      nn.BatchNorm2d(width),
      nn.ReLU(),
      nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity(),
    )
    self.blocks = nn.ModuleList()
    features = width
    for stage, depth in enumerate(architecture.depths):
      for i in range(depth):
        planes, stride = width * 2**stage, 2 if stage and not i else 1
        self.blocks.append(Block(features, planes, stride, expansion))
        features = planes * expansion
    self.fc = nn.Linear(features, num_classes)

  def forward(self, x, masks=None):
    """Returns logits, float[N, classes].

    Args:
      x: float[N, 3, H, W].
      masks: a pair (hard, dilated) of bool[N, h, w] a block, or None.
    """
    x = self.stem(x)
    for i, block in enumerate(self.blocks):
      x = block(x, *(masks[i] if masks else ()))
    return self.fc(x.mean((2, 3)))

  def fold(self) -> ResNet:
    """Returns self in evaluation, batch norm folded into the convolutions."""
    self.eval()
    self.stem[0] = fuse_conv_bn_eval(self.stem[0], self.stem[1])
    self.stem[1] = nn.Identity()
    for block in self.blocks:
      for i, norm in enumerate(block.norms):
        block.convs[i] = fuse_conv_bn_eval(block.convs[i], norm)
        block.norms[i] = nn.Identity()
      if block.projection is not None:
        conv, norm = block.projection
        block.projection = nn.Sequential(fuse_conv_bn_eval(conv, norm))
    return self


def use_all_cores() -> None:
  """Lets PyTorch run on every core that this process may use."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))


def _conv(in_features, features, size, stride):
  return nn.Conv2d(in_features, features, size, stride, size // 2, bias=False)


def _matrix(conv):
  """The kernel as [k * k * in_features, features]."""
  return conv.weight.permute(2, 3, 1, 0).flatten(0, 2)


def _rows(x):
  """Channels-last [N, C, H, W] as [N * H * W, C], without a copy."""
  return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _windows(padded, image, i, j):
  """The 3x3 windows at some positions, [positions, 9 * C]."""
  return torch.cat(
    [padded[image, i + a, j + b] for a in range(3) for b in range(3)], 1
  )
