"""Conversion between networks and PyTorch state_dicts, without PyTorch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from dynconv_jax.interop import mobilenet
from dynconv_jax.interop import names as names_lib

# Entries where training scripts store the weights, and prefixes of wrappers.
_NESTS = ('state_dict', 'model_state_dict', 'model', 'module', 'net', 'network')
_PREFIXES = (*_NESTS, '_orig_mod', 'backbone')
# Other entries next to the weights in checkpoints that are not nested.
_BESIDE = re.compile(r'(optim\w*|(lr_)?scheduler|scaler|amp)\..*')


def load_torch_state_dict(
  model: nnx.Module, state_dict: Mapping[str, Any]
) -> None:
  """Loads all weights and batch statistics of a network from PyTorch.

  Names are those of torchvision or of the public checkpoints of the network's
  method (DynConv, ConvNet-AIG). The gates of other methods use the paths of
  this package. Gates of blocks that are always executed in the network are
  ignored and logged.

  Args:
    model: the network, modified in place unless an error is raised. It may be
      abstract, with shapes and dtypes instead of arrays.
    state_dict: floating-point NumPy arrays or tensors by name, or a checkpoint
      that contains such a mapping. Prefixes such as `module.` and optimizer
      state are ignored.

  Raises:
    ValueError: entries are missing, unexpected, of the wrong shape, not
      floating-point, unreadable, NaN or infinite, or are negative variances.
      The message lists each.
  """
  match = _match(model, state_dict)
  match.check(_hint(match))
  match.load(model)


def load_pretrained(
  model: nnx.Module, state_dict: Mapping[str, Any]
) -> list[str]:
  """Initializes a network from PyTorch weights before training.

  Gates keep their initialization if the state_dict has no gates at all, because
  gated methods start from dense weights, as in their papers. A classifier with
  another number of classes keeps its initialization too. Everything else must
  be present, as in `load_torch_state_dict`.

  Args:
    model: the network, modified in place unless an error is raised.
    state_dict: as in `load_torch_state_dict`.

  Returns:
    The PyTorch names of weights that keep their initialization, which are also
    logged.

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
  """Returns a network's weights and batch statistics by PyTorch name.

  See `load_torch_state_dict` for the names. The result also contains
  `num_batches_tracked` of every batch norm, always 0, so a PyTorch module of
  the same structure can load it with `strict=True`. Arrays are copies in
  PyTorch's layout and the network's dtype.
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
    ValueError: there is no classifier with a known name.
  """
  found = _find_weights(state_dict)
  for name in (f'{head}.bias' for head in names_lib.HEADS):
    if name in found and len(np.shape(found[name])) == 1:
      return len(found[name])
  raise ValueError(
    'the state_dict has no classifier, such as fc.bias or linear.bias; it has '
    f'{_first(found)}'
  )


@dataclasses.dataclass
class _Match:
  """Result of matching the entries of a state_dict with a network.

  Attributes:
    weights: weights of the network by PyTorch name.
    arrays: the entries that fit, by name.
    missing: names that the state_dict lacks.
    unexpected: names that the network lacks.
    misfits: reasons why entries do not fit, by name.
    shapes: shapes of the entries whose shape is wrong, by name.
  """

  weights: dict[str, names_lib.Weight]
  arrays: dict[str, Any]
  missing: list[str]
  unexpected: list[str]
  misfits: dict[str, str]
  shapes: dict[str, tuple[int, ...]]

  def forgive(self, names: list[str]) -> None:
    """Allows entries to be missing or to have another shape."""
    self.missing = [name for name in self.missing if name not in names]
    for name in names:
      self.misfits.pop(name, None)

  def check(self, hint: str = '') -> None:
    """Raises ValueError listing every entry that does not fit."""
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
    """Loads the weights that fit."""
    state = {
      self.weights[name].path: jnp.array(
        self.weights[name].from_torch(_to_numpy(array))
      )
      for name, array in self.arrays.items()
    }
    nnx.update(model, nnx.from_flat_state(state))


def _match(model: nnx.Module, state_dict: Mapping[str, Any]) -> _Match:
  # Try the naming of the network's method and that of torchvision.
  candidates = [
    names_lib.torch_names(model, naming)
    for naming in (names_lib.own_naming(model), names_lib.TORCHVISION)
  ]
  own = {n for c in candidates for n in (*c, *names_lib.step_counts(c))}
  found = _find_weights(state_dict, own)
  candidates += mobilenet.published_names(model, candidates[-1], found)
  weights = max(candidates, key=lambda names: len(names.keys() & found.keys()))
  expected = {*weights, *names_lib.step_counts(weights)}
  unexpected = [name for name in found if name not in expected]
  if always := names_lib.gateless_blocks(model, unexpected):
    dropped = {name for entries in always.values() for name in entries}
    unexpected = [name for name in unexpected if name not in dropped]
    logging.info(
      'ignored the gates of blocks that are always executed: %s',
      ', '.join(always),
    )
  arrays, misfits, shapes = {}, {}, {}
  for name in weights.keys() & found.keys():
    shape, weight = tuple(found[name].shape), weights[name]
    if shape != weight.shape:
      shapes[name] = shape
      misfits[name] = f'is {shape}, not {weight.shape}'
    elif not _is_floating(found[name]):
      misfits[name] = f'is {found[name].dtype}, not floating-point'
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
    return ', whose gates it lacks (to train from it, use `pretrained`)'
  return ''


def _find_weights(
  state_dict: Mapping[str, Any], own: Collection[str] = ()
) -> dict[str, Any]:
  """Returns the weights of a checkpoint by name, without wrappers' prefixes.

  Args:
    state_dict: as in `load_torch_state_dict`.
    own: names of the network, which keep their prefixes.
  """
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
  for key, array in state_dict.items():
    name = str(key)
    while name not in own and name.partition('.')[0] in _PREFIXES:
      name = name.partition('.')[2]
    # Skip epochs, accuracies, arguments, and optimizer state.
    is_number = '.' not in name and np.ndim(array) == 0
    if is_number or not hasattr(array, 'shape') or _BESIDE.fullmatch(name):
      continue
    if name in found:
      raise ValueError(f'the state_dict has {name} twice, also as {key}')
    found[name] = array
  if not found:
    raise ValueError(
      f'no weights in the state_dict; its entries are {_first(state_dict)}'
    )
  return found


def _is_floating(array: Any) -> bool:
  if hasattr(array, 'is_floating_point'):  # A PyTorch tensor.
    return array.is_floating_point()
  return jnp.issubdtype(array.dtype, jnp.floating)


def _wrong_values(name: str, array: Any, weight: names_lib.Weight) -> str:
  """Returns an error if the values of an entry are invalid, or else ''."""
  try:
    with np.errstate(over='ignore'):  # Overflow gives infinity, checked below.
      values = _to_numpy(array).astype(weight.dtype)
  # PyTorch tensors with another layout or on the device `meta`.
  except (NotImplementedError, RuntimeError, TypeError) as error:
    return f'has no readable values ({str(error).splitlines()[0]})'
  finite = np.isfinite(values)
  if not finite.all():
    return (
      f'contains NaN or infinity ({(~finite).sum()} of {finite.size} values)'
    )
  if name.endswith('.running_var') and (values < 0).any():
    return f'is negative ({(values < 0).sum()} of {values.size} variances)'
  return ''


def _to_numpy(array: Any) -> np.ndarray:
  if not hasattr(array, 'detach'):
    return np.asarray(array)
  array = array.detach().cpu()
  try:
    return array.numpy()
  except TypeError:  # bfloat16 and narrower types, which NumPy lacks.
    return array.float().numpy()


def _first(names: Mapping[str, Any], count: int = 8) -> str:
  names = [str(name) for name in names]
  rest = [f'and {len(names) - count} more'] * (len(names) > count)
  return ', '.join(names[:count] + rest) or 'none'
