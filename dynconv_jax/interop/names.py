"""Names and layouts of a network's weights in PyTorch.

They are derived from the modules of the network. Names are those of
torchvision, which timm and DynConv's checkpoints also use, unless the gates
define how their method's checkpoints rename modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from dynconv_jax.models.gated import GATE, GatedBlock, gated_blocks

HEADS = ('fc', 'linear', 'classifier', 'classifier.1', '_fc')

# Maps names of modules in torchvision to another naming; None: omitted.
Naming = Mapping[str, str | None]
TORCHVISION: Naming = {}

_BATCH_NORM = {
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


@dataclasses.dataclass(frozen=True)
class Weight:
  """A weight or batch statistic of a network.

  Attributes:
    path: path in the network's state.
    shape: shape in PyTorch.
    dtype: dtype in the network.
    is_kernel: whether it is the kernel of a convolution or linear layer, whose
      layout is (..., in, out) in the network and (out, in, ...) in PyTorch.
  """

  path: tuple[Any, ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  is_kernel: bool

  @property
  def is_gate(self) -> bool:
    """Whether it belongs to a gate, which dense networks do not have."""
    return GATE in self.path

  def to_torch(self, array: np.ndarray) -> np.ndarray:
    """Returns a writable copy of an array in PyTorch's layout."""
    if self.is_kernel:
      array = array.transpose(_kernel_axes(array.ndim))
    return np.array(array, order='C')

  def from_torch(self, array: np.ndarray) -> np.ndarray:
    """Returns a PyTorch array in the network's layout and dtype."""
    if self.is_kernel:
      array = array.transpose(np.argsort(_kernel_axes(array.ndim)))
    return array.astype(self.dtype)


def _kernel_axes(ndim: int) -> tuple[int, ...]:
  """Returns the axes that transpose (..., in, out) to (out, in, ...)."""
  return (ndim - 1, ndim - 2, *range(ndim - 2))


def own_naming(model: nnx.Module) -> Naming:
  """Returns the naming of public checkpoints of the model's method."""
  gates = [b.masker for b in gated_blocks(model) if b.masker is not None]
  return gates[0].checkpoint_modules if gates else TORCHVISION


def torch_names(model: nnx.Module, naming: Naming) -> dict[str, Weight]:
  """Returns the model's weights and batch statistics by their PyTorch names.

  Args:
    model: network of arrays, or of shapes and dtypes.
    naming: the naming of modules.
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


def _modules(path: list[Any], naming: Naming) -> list[str]:
  modules = map(str, path)
  return list(filter(None, (naming.get(m, m) for m in modules)))


def step_counts(weights: dict[str, Weight]) -> list[str]:
  """Returns the names of PyTorch's batch counts, one per batch norm."""
  suffix = '.running_mean'
  return [
    f'{name.removesuffix(suffix)}.num_batches_tracked'
    for name in weights
    if name.endswith(suffix)
  ]


def gateless_blocks(
  model: nnx.Module, names: list[str]
) -> dict[str, list[str]]:
  """Returns names that belong to gates of blocks without a gate in the model.

  Some public checkpoints, such as those of ConvNet-AIG, contain unused gates of
  blocks that are always executed.

  Args:
    model: the network.
    names: names in the naming of the method's public checkpoints.

  Returns:
    The matching names by block. Empty if the model has no gates or uses
    torchvision's naming.
  """
  naming, blocks = own_naming(model), gated_blocks(model)
  if naming == TORCHVISION:
    return {}
  parts = {part for block in blocks for part in _parts_of_gate(block)}
  unused = {}
  for block in blocks:
    if block.masker is None:
      starts = tuple(
        '.'.join([*_modules([*block.name.split('.'), GATE], naming), part, ''])
        for part in parts
      )
      if entries := [name for name in names if name.startswith(starts)]:
        unused[block.name] = entries
  return unused


def _parts_of_gate(block: GatedBlock) -> set[str]:
  """Returns the names of the modules of a block's gate."""
  if block.masker is None:
    return set()
  return {str(path[0]) for path, _ in nnx.iter_modules(block.masker) if path}
