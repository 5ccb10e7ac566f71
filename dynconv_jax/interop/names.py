"""What a network's weights are called, and how they lie, in PyTorch.

Names and layouts follow from the modules of the network itself. Names are
torchvision's, which timm and the checkpoints of DynConv share, unless the gates
say how the checkpoints of their method rename modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from dynconv_jax.models.gated import GatedBlock, gated_blocks

HEADS = ('fc', 'linear', 'classifier', 'classifier.1', '_fc')

# How a naming calls the modules that it calls otherwise than torchvision;
# None: leaves out.
Naming = Mapping[str, str | None]
TORCHVISION: Naming = {}

_BATCH_NORM = {
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_GATE = 'masker'


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
    return _GATE in self.path

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


def own_naming(model: nnx.Module) -> Naming:
  """Returns how public checkpoints of the model's method name its weights."""
  gates = [b.masker for b in gated_blocks(model) if b.masker is not None]
  return gates[0].checkpoint_modules if gates else TORCHVISION


def torch_names(model: nnx.Module, naming: Naming) -> dict[str, Weight]:
  """Returns the model's weights and batch statistics by their PyTorch names.

  Args:
    model: of arrays, or of shapes and dtypes.
    naming: of modules.
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
  """Returns the names of PyTorch's counts of batches, one a batch norm."""
  suffix = '.running_mean'
  return [
    f'{name.removesuffix(suffix)}.num_batches_tracked'
    for name in weights
    if name.endswith(suffix)
  ]


def gateless_blocks(
  model: nnx.Module, names: list[str]
) -> dict[str, list[str]]:
  """Returns entries of gates for blocks that have no gate here.

  A block that is always executed may have a gate in public checkpoints all the
  same, which nothing reads, as ConvNet-AIG's have.

  Args:
    model: whose blocks are asked.
    names: in the naming of the method's public checkpoints.

  Returns:
    The names among `names`, by block; none for a model that has no gates.
  """
  naming, blocks = own_naming(model), gated_blocks(model)
  if naming == TORCHVISION:
    return {}
  parts = {part for block in blocks for part in _parts_of_gate(block)}
  found = {}
  for block in blocks:
    if block.masker is None:
      starts = tuple(
        '.'.join([*_modules([*block.name.split('.'), _GATE], naming), part, ''])
        for part in parts
      )
      if entries := [name for name in names if name.startswith(starts)]:
        found[block.name] = entries
  return found


def _parts_of_gate(block: GatedBlock) -> set[str]:
  """Returns the names of the modules of a block's gate."""
  if block.masker is None:
    return set()
  return {str(path[0]) for path, _ in nnx.iter_modules(block.masker) if path}
