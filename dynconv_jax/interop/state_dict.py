"""Networks to and from PyTorch's state_dicts; needs no PyTorch itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from dynconv_jax.interop import mobilenet
from dynconv_jax.interop import names as names_lib

# Where training scripts keep the weights, and what wrappers put before a name.
_NESTS = ('state_dict', 'model_state_dict', 'model', 'module', 'net', 'network')
_PREFIXES = (*_NESTS, '_orig_mod', 'backbone')
# What lies beside the weights, in checkpoints that are not nested.
_BESIDE = re.compile(r'(optim\w*|(lr_)?scheduler|scaler|amp)\..*')


def load_torch_state_dict(
  model: nnx.Module, state_dict: Mapping[str, Any]
) -> None:
  """Sets all weights and batch statistics of a network from PyTorch's.

  Names are torchvision's, or those of the public checkpoints of the network's
  method (DynConv's, ConvNet-AIG's); other methods' gates have our own paths.
  Gates of blocks that are always executed here are left out, and logged.

  Args:
    model: is changed, unless an error is raised; may be abstract, of shapes
      and dtypes.
    state_dict: NumPy arrays or tensors, of any floating point, by name; or a
      checkpoint that holds such a mapping, with prefixes such as `module.`
      and an optimizer's state beside it.

  Raises:
    ValueError: names every entry that is missing, unexpected, of another shape,
      not of floating point or without values, that holds NaN or infinity, and
      every negative variance.
  """
  match = _match(model, state_dict)
  match.check(_hint(match))
  match.load(model)


def load_pretrained(
  model: nnx.Module, state_dict: Mapping[str, Any]
) -> list[str]:
  """Starts a network from PyTorch's weights; what they lack stays as it is.

  Gates stay as initialized where the state_dict has none at all: gated methods
  start from dense weights, as in their papers. So does a classifier of another
  number of classes. All else must be there, as in `load_torch_state_dict`.

  Args:
    model: is changed, unless an error is raised.
    state_dict: as in `load_torch_state_dict`.

  Returns:
    PyTorch's names of the weights that stay as initialized; they are logged.

  Raises:
    ValueError: as `load_torch_state_dict`.
  """
  match = _match(model, state_dict)
  fresh = [n for n, weight in match.weights.items() if weight.is_gate]
  if not set(fresh) <= set(match.missing):
    fresh = []
  for name, weight in match.weights.items():
    other = match.shapes.get(name, weight.shape)
    is_head = name.partition('.')[0] in names_lib.HEADS
    if is_head and other != weight.shape and other[1:] == weight.shape[1:]:
      fresh.append(name)
  match.forgive(fresh)
  match.check()
  match.load(model)
  if fresh:
    logging.info('newly initialized: %s', ', '.join(fresh))
  return fresh


def to_torch_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
  """Returns a network's weights and statistics by PyTorch's names.

  The names are those that `load_torch_state_dict` describes, with every batch
  norm's `num_batches_tracked`, which nothing here counts, as 0: a PyTorch
  module of the same structure loads it with `strict=True`. Its arrays are
  copies in PyTorch's layout and the network's dtype.
  """
  weights = names_lib.torch_names(model, names_lib.own_naming(model))
  arrays = dict(nnx.to_flat_state(nnx.state(model)))
  state_dict = {
    name: weight.to_torch(np.asarray(arrays[weight.path][...]))
    for name, weight in weights.items()
  }
  for name in names_lib.step_counts(weights):
    state_dict[name] = np.zeros((), np.int64)
  return state_dict


def num_classes(state_dict: Mapping[str, Any]) -> int:
  """Returns the number of outputs of a state_dict's classifier.

  Args:
    state_dict: as in `load_torch_state_dict`.

  Raises:
    ValueError: it has no classifier of a known name.
  """
  found = _find_weights(state_dict)
  for name in (f'{head}.bias' for head in names_lib.HEADS):
    if name in found and len(np.shape(found[name])) == 1:
      return len(found[name])
  raise ValueError(
    'the state_dict has no classifier, fc.bias or linear.bias; it has '
    f'{_first(found)}'
  )


@dataclasses.dataclass
class _Match:
  """How the entries of a state_dict fit a network.

  Attributes:
    weights: the network's, by PyTorch's names.
    arrays: those entries that fit.
    missing: names that the state_dict lacks.
    unexpected: names that the network lacks.
    misfits: by name, what is wrong with an entry.
    shapes: of the entries whose shape differs, by name.
  """

  weights: dict[str, names_lib.Weight]
  arrays: dict[str, Any]
  missing: list[str]
  unexpected: list[str]
  misfits: dict[str, str]
  shapes: dict[str, tuple[int, ...]]

  def forgive(self, names: list[str]) -> None:
    """Lets these entries be missing or of another shape."""
    self.missing = [name for name in self.missing if name not in names]
    for name in names:
      self.misfits.pop(name, None)

  def check(self, hint: str = '') -> None:
    """Raises ValueError naming every entry that does not fit."""
    kinds = {
      'missing': self.missing,
      'unexpected': self.unexpected,
      'misfitting': [f'{name} {why}' for name, why in self.misfits.items()],
    }
    errors = [f'{kind}: {", ".join(v)}' for kind, v in kinds.items() if v]
    if errors:
      raise ValueError(
        f'the state_dict does not fit the network{hint}; {"; ".join(errors)}'
      )

  def load(self, model: nnx.Module) -> None:
    """Sets the weights that fit."""
    state = {
      self.weights[name].path: jnp.array(
        self.weights[name].from_torch(_to_numpy(array))
      )
      for name, array in self.arrays.items()
    }
    nnx.update(model, nnx.from_flat_state(state))


def _match(model: nnx.Module, state_dict: Mapping[str, Any]) -> _Match:
  found = _find_weights(state_dict)
  # A network is met in its method's naming and in torchvision's.
  candidates = [
    names_lib.torch_names(model, naming)
    for naming in (names_lib.own_naming(model), names_lib.TORCHVISION)
  ]
  candidates += mobilenet.published_names(model, candidates[-1], found)
  weights = max(candidates, key=lambda names: len(names.keys() & found.keys()))
  expected = {*weights, *names_lib.step_counts(weights)}
  unexpected = [name for name in found if name not in expected]
  if always := names_lib.gateless_blocks(model, unexpected):
    dropped = {name for entries in always.values() for name in entries}
    unexpected = [name for name in unexpected if name not in dropped]
    logging.info(
      'left out the gates of blocks that are always executed: %s',
      ', '.join(always),
    )
  arrays, misfits, shapes = {}, {}, {}
  for name in weights.keys() & found.keys():
    shape, weight = tuple(found[name].shape), weights[name]
    if shape != weight.shape:
      shapes[name] = shape
      misfits[name] = f'is {shape}, not {weight.shape}'
    elif not _is_floating(found[name]):
      misfits[name] = f'is {found[name].dtype}, not of floating point'
    elif wrong := _wrong_values(name, found[name], weight):
      misfits[name] = wrong
    else:
      arrays[name] = found[name]
  return _Match(
    weights=weights,
    arrays=arrays,
    missing=[name for name in weights if name not in found],
    unexpected=unexpected,
    misfits=dict(sorted(misfits.items())),
    shapes=shapes,
  )


def _hint(match: _Match) -> str:
  gates = {name for name, weight in match.weights.items() if weight.is_gate}
  if gates and gates <= set(match.missing):
    return ', whose gates it lacks (training can start from it: `pretrained`)'
  return ''


def _find_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arrays of a checkpoint, without what wrappers put around."""
  if not isinstance(state_dict, Mapping):
    raise ValueError(
      'a state_dict must be a mapping of names to arrays; got '
      f'{type(state_dict).__name__}'
    )
  nest = state_dict
  while nest is not None:
    state_dict = nest
    nest = next(
      (nest[k] for k in _NESTS if isinstance(nest.get(k), Mapping)), None
    )
  found = {}
  for given, array in state_dict.items():
    name = str(given)
    while name.partition('.')[0] in _PREFIXES:
      name = name.partition('.')[2]
    # Epochs, accuracies, arguments, an optimizer's state.
    is_number = '.' not in name and np.ndim(array) == 0
    if is_number or not hasattr(array, 'shape') or _BESIDE.fullmatch(name):
      continue
    if name in found:
      raise ValueError(f'the state_dict has {name} twice, as {given} as well')
    found[name] = array
  if not found:
    raise ValueError(
      f'no weights in the state_dict; its entries are {_first(state_dict)}'
    )
  return found


def _is_floating(array: Any) -> bool:
  if hasattr(array, 'is_floating_point'):  # PyTorch's.
    return array.is_floating_point()
  return jnp.issubdtype(array.dtype, jnp.floating)


def _wrong_values(name: str, array: Any, weight: names_lib.Weight) -> str:
  """Returns what is wrong with the values of an entry, or ''."""
  try:
    with np.errstate(over='ignore'):  # Too large for the network: infinity.
      values = _to_numpy(array).astype(weight.dtype)
  # PyTorch's tensors of another layout, or on its device `meta`.
  except (NotImplementedError, RuntimeError, TypeError) as error:
    return f'has no values that can be read ({str(error).splitlines()[0]})'
  finite = np.isfinite(values)
  if not finite.all():
    return f'holds NaN or infinity ({(~finite).sum()} of {finite.size} values)'
  if name.endswith('.running_var') and (values < 0).any():
    return f'is negative ({(values < 0).sum()} of {values.size} variances)'
  return ''


def _to_numpy(array: Any) -> np.ndarray:
  if not hasattr(array, 'detach'):
    return np.asarray(array)
  array = array.detach().cpu()
  try:
    return array.numpy()
  except TypeError:  # bfloat16 and narrower, which NumPy has not.
    return array.float().numpy()


def _first(names: Mapping[str, Any], count: int = 8) -> str:
  names = [str(name) for name in names]
  rest = [f'and {len(names) - count} more'] * (len(names) > count)
  return ', '.join(names[:count] + rest) or 'none'
