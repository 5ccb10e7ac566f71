"""What a network's weights are called, and how they lie, in PyTorch.

Names and layouts follow from the modules of the network itself. Two namings
are in use: torchvision's, which timm and the checkpoints of DynConv share, and
that of ConvNet-AIG's checkpoints.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
from flax import nnx

from dynconv_jax.methods.convnet_aig import LayerGate
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.models.resnet import ResNet

NAMINGS = ('torchvision', 'convnet_aig')
HEADS = ('fc', 'linear', 'classifier', 'classifier.1', '_fc')

_BATCH_NORM = {
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_AIG_MODULES = {'downsample': 'shortcut', 'fc': 'linear', 'masker': None}


@dataclasses.dataclass(frozen=True)
class Weight:
  """One weight or statistic of a network.

  Attributes:
    path: in the network's state.
    shape: in PyTorch.
    dtype: in the network.
    is_kernel: whether its layout differs: (..., in, out) here, (out, in, ...)
      in PyTorch, for convolutions and linear layers alike.
  """

  path: tuple[Any, ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  is_kernel: bool

  @property
  def is_gate(self) -> bool:
    """Whether a dense network of the same architecture lacks it."""
    return 'masker' in self.path

  def to_torch(self, array: np.ndarray) -> np.ndarray:
    """Returns a writable copy of the network's array in PyTorch's layout."""
    if self.is_kernel:
      array = array.transpose(_kernel_axes(array.ndim))
    return np.array(array, order='C')

  def from_torch(self, array: np.ndarray) -> np.ndarray:
    """Returns PyTorch's array in the network's layout and dtype."""
    if self.is_kernel:
      array = array.transpose(np.argsort(_kernel_axes(array.ndim)))
    return array.astype(self.dtype)


def _kernel_axes(ndim: int) -> tuple[int, ...]:
  """Returns the axes that lead from (..., in, out) to (out, in, ...)."""
  return (ndim - 1, ndim - 2, *range(ndim - 2))


def own_naming(model: ResNet) -> str:
  """Returns how public checkpoints of the model's method name its weights."""
  gated = any(isinstance(b.masker, LayerGate) for b in gated_blocks(model))
  return 'convnet_aig' if gated else 'torchvision'


def torch_names(model: ResNet, naming: str) -> dict[str, Weight]:
  """Returns the model's weights and batch statistics by their PyTorch names.

  Args:
    model: of arrays, or of shapes and dtypes.
    naming: one of NAMINGS.
  """
  kinds = {path: type(module) for path, module in nnx.iter_modules(model)}
  weights = {}
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  for path, variable in nnx.to_flat_state(state):
    *parents, leaf = path
    kind = kinds[tuple(parents)]
    is_kernel = leaf == 'kernel' and issubclass(kind, nnx.Conv | nnx.Linear)
    if issubclass(kind, nnx.BatchNorm):
      leaf = _BATCH_NORM[leaf]
    elif is_kernel:
      leaf = 'weight'
    shape = variable.shape
    if is_kernel:
      shape = tuple(shape[axis] for axis in _kernel_axes(len(shape)))
    name = '.'.join([*_modules(parents, naming), leaf])
    weights[name] = Weight(path, shape, np.dtype(variable.dtype), is_kernel)
  return weights


def _modules(path: list[Any], naming: str) -> list[str]:
  modules = map(str, path)
  if naming == 'convnet_aig':
    modules = filter(None, (_AIG_MODULES.get(m, m) for m in modules))
  return list(modules)


def step_counts(weights: dict[str, Weight]) -> list[str]:
  """Returns the names of PyTorch's counts of batches, one a batch norm."""
  suffix = '.running_mean'
  return [
    f'{name.removesuffix(suffix)}.num_batches_tracked'
    for name in weights
    if name.endswith(suffix)
  ]


def gateless_blocks(model: ResNet, names: list[str]) -> dict[str, list[str]]:
  """Returns gate entries of ConvNet-AIG for blocks that have no gate here.

  A block whose target rate is 1 is always executed; public checkpoints hold a
  gate for it all the same, which nothing reads.

  Args:
    model: whose blocks are asked.
    names: in ConvNet-AIG's naming.

  Returns:
    The names among `names`, by block; none for a model that has no gates.
  """
  if own_naming(model) != 'convnet_aig':
    return {}
  found = {}
  for block in gated_blocks(model):
    if block.masker is None:
      gate = re.compile(rf'{re.escape(block.name)}\.(fc1|fc1bn|fc2)\.\w+')
      if entries := [name for name in names if gate.fullmatch(name)]:
        found[block.name] = entries
  return found
