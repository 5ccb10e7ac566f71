"""PyTorch networks built from descriptions, dense or with gathered positions.

Supports networks of this library that consist of a stem, gated blocks, an
optional last convolution, and a linear layer on the mean. Needs PyTorch
(pip install -e .[torch]).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flax import nnx
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynconv_jax import create_model, interop
from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import MaxPool
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.sparse.fold import describe_conv

_ACTIVATIONS = {
  'relu': nn.ReLU,
  'relu6': nn.ReLU6,
  'silu': nn.SiLU,
  'gelu': lambda: nn.GELU('tanh'),
}


class _Units(nn.Module):
  """A container of convolutions, batch norms, and activations by name."""

  def add(self, conv: Conv, epsilon: float) -> None:
    same = conv.padding == 'same' and conv.strides > 1
    self.add_module(
      conv.name,
      (_SameConv if same else nn.Conv2d)(
        conv.in_features,
        conv.features,
        conv.kernel_size,
        conv.strides,
        conv.kernel_size // 2,
        groups=conv.groups,
        bias=False,
      ),
    )
    self.add_module(conv.norm, nn.BatchNorm2d(conv.features, epsilon))
    self.add_activation(conv.activation)

  def add_activation(self, activation: str | None) -> None:
    if activation is not None:
      self.add_module(activation, _ACTIVATIONS[activation]())

  def activate(self, x, activation: str | None):
    return x if activation is None else getattr(self, activation)(x)

  def run(self, x, convs: Sequence[Conv]):
    for conv in convs:
      x = getattr(self, conv.norm)(getattr(self, conv.name)(x))
      x = self.activate(x, conv.activation)
    return x

  def _fold(self, convs: Sequence[Conv]) -> None:
    for conv in convs:
      module = getattr(self, conv.name)
      folded = fuse_conv_bn_eval(module, getattr(self, conv.norm))
      self.add_module(conv.name, folded)
      self.add_module(conv.norm, nn.Identity())


class _SameConv(nn.Conv2d):
  """A convolution with TensorFlow's SAME padding."""

  def forward(self, x):
    k, s = self.kernel_size[0], self.stride[0]
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[:1:-1]]
    x = functional.pad(x, [p for t in totals for p in (t // 2, t - t // 2)])
    return functional.conv2d(x, self.weight, self.bias, s, groups=self.groups)


class Block(_Units):
  """A residual block with the names of the JAX block.

  Args:
    branch: description of the branch.
    epsilon: epsilon of the batch norms.
  """

  def __init__(self, branch: Branch, epsilon: float = 1e-5):
    super().__init__()
    self.branch = branch
    for conv in branch.convs:
      self.add(conv, epsilon)
    self.add_activation(branch.activation)
    self.downsample = None
    if branch.projection is not None:
      self.downsample = _Units()
      self.projection = dataclasses.replace(
        branch.projection, name='0', norm='1'
      )
      self.downsample.add(self.projection, epsilon)

  def shortcut(self, x):
    """Returns the shortcut, a tensor or 0."""
    if self.downsample is not None:
      return self.downsample.run(x, [self.projection])
    return x if self.branch.shortcut == 'identity' else 0

  def forward(self, x, maps=None):
    shortcut = self.shortcut(x)
    if maps is not None:
      return self._by_positions(x, shortcut, maps)
    y = self.run(x, self.branch.convs)
    if self.branch.shortcut != 'none':
      y += shortcut
    return self.activate(y, self.branch.activation)

  def fold(self) -> None:
    """Folds batch norm into the convolutions, for evaluation."""
    self._fold(self.branch.convs)
    if self.downsample is not None:
      self.downsample._fold([self.projection])

  def _by_positions(self, x, shortcut, maps):
    """Runs the folded block with index_select, GEMM, and index_add_."""
    table, known = _rows(x), torch.ones(len(x), *x.shape[2:], dtype=torch.bool)
    for conv, level in zip(self.branch.convs, self.branch.levels, strict=True):
      module = getattr(self, conv.name)
      at = maps[level]
      if not conv.is_pointwise:
        table = _windows(table, known, at, conv)
      elif at is not known:
        table = table.index_select(0, at.flatten().nonzero()[:, 0])
      table = _multiply(table, module.weight, conv) + module.bias
      table = self.activate(table, conv.activation)
      known = at
    if self.branch.shortcut == 'none':
      shortcut = x.new_zeros(len(x), table.shape[1], *known.shape[1:])
    out = shortcut.contiguous(memory_format=torch.channels_last).clone()
    _rows(out).index_add_(0, known.flatten().nonzero()[:, 0], table)
    return self.activate(out, self.branch.activation)


class Network(_Units):
  """A dense network with the weight names of `interop`.

  Args:
    model: a network of this package, which may be abstract; only its structure
      is used.

  Raises:
    ValueError: the network's structure is not supported.
  """

  def __init__(self, model: nnx.Module):
    super().__init__()
    modules = {
      type(module): '.'.join(map(str, path))
      for path, module in nnx.iter_modules(model)
      if type(module) in (nnx.Linear, MaxPool) and len(path) == 1
    }
    described, epsilons = [], set()
    for conv, norm in getattr(model, 'foldable', ()):
      what = describe_conv(getattr(model, conv), getattr(model, norm))
      described.append(dataclasses.replace(what, name=conv, norm=norm))
      epsilons.add(getattr(model, norm).epsilon)
    if not described or nnx.Linear not in modules:
      raise ValueError(
        f'{type(model).__name__} has no stem in `foldable`, or no linear layer'
      )
    (epsilon,) = epsilons
    self.convs = described  # The stem, and convolutions after the blocks.
    for conv in described:
      self.add(conv, epsilon)
    self.maxpool = nn.Identity()
    if MaxPool in modules:
      self.maxpool = nn.MaxPool2d(3, 2, 1)
    self.blocks_by_name = {}
    for block in gated_blocks(model):
      own = Block(block.branch, epsilon)
      self.blocks_by_name[block.name] = own
      *parents, last = block.name.split('.')
      _submodule(self, parents).add_module(last, own)
    self.avgpool = nn.AdaptiveAvgPool2d(1)
    self.head = modules[nnx.Linear]
    linear = getattr(model, self.head)
    self.add_module(
      self.head, nn.Linear(linear.in_features, linear.out_features)
    )

  def forward(
    self,
    x: torch.Tensor,
    masks: Mapping[str, Sequence[torch.Tensor]] | None = None,
  ) -> torch.Tensor:
    """Returns logits, float[N, classes].

    Args:
      x: float[N, 3, H, W].
      masks: bool[N, h, w] for each level, by block name, or None. Masks need a
        folded network.
    """
    x = self.stem(x)
    for name, block in self.blocks_by_name.items():
      x = block(x, masks and masks[name])
    x = self.avgpool(self.run(x, self.convs[1:])).flatten(1)
    return getattr(self, self.head)(x)

  def stem(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the input of the first block."""
    return self.maxpool(self.run(x, self.convs[:1]))

  def fold(self) -> Network:
    """Folds batch norm, for evaluation; returns self."""
    self.eval()
    self._fold(self.convs)
    for block in self.blocks_by_name.values():
      block.fold()
    return self

  def load(self, model: nnx.Module) -> Network:
    """Loads the weights of a network without gates; returns self."""
    weights = interop.to_torch_state_dict(model)
    self.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    return self


def create(name: str, num_classes: int, **options: Any) -> Network:
  """Returns a freshly initialized network.

  Args:
    name: see `create_model`.
    num_classes: number of outputs.
    **options: other arguments of `create_model`.
  """
  return Network(
    nnx.eval_shape(
      lambda: create_model(
        name, num_classes=num_classes, rngs=nnx.Rngs(0), **options
      )
    )
  )


def use_all_cores() -> None:
  """Sets PyTorch's threads to the number of cores this process may use."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))


def _submodule(module: nn.Module, path: Sequence[str]) -> nn.Module:
  """Returns the module at a path, creating missing modules."""
  for name in path:
    if not hasattr(module, name):
      module.add_module(name, nn.Module())
    module = getattr(module, name)
  return module


def _rows(x):
  """Returns channels-last [N, C, H, W] as [N * H * W, C], without a copy."""
  return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _multiply(table, weight, conv):
  """Multiplies rows [K, k * k * C] by a kernel [F, C / groups, k, k]."""
  if conv.groups == 1:
    return table @ weight.permute(2, 3, 1, 0).flatten(0, 2)
  windows = table.view(len(table), -1, conv.groups, weight.shape[1])
  kernel = weight.view(conv.groups, -1, *weight.shape[1:]).flatten(3)
  return torch.einsum('nkgc,gfck->ngf', windows, kernel).flatten(1)


def _windows(table, known, at, conv):
  """Returns the windows of a convolution, [positions, k * k * C].

  Args:
    table: a row for each position of `known`.
    known: bool[N, H, W], input positions.
    at: bool[N, h, w], output positions.
    conv: description of the convolution.
  """
  k, s = conv.kernel_size, conv.strides
  # The row of each position; the last row is zero.
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
