"""Initial weights: from another network, and the initial state of gates."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from absl import logging
from flax import nnx

from dynconv_jax.interop.names import HEADS
from dynconv_jax.methods.gate import Gate
from dynconv_jax.models.gated import GATE
from dynconv_jax.training.config import MethodConfig


def initialize_from(model: nnx.Module, source: nnx.Module) -> list[str]:
  """Copies all weights and statistics that both networks have.

  Mask units and classifiers that do not match keep their initialization.

  Args:
    model: the network to initialize, modified in place.
    source: a network of the same architecture, for example a dense one.

  Returns:
    The paths that keep their initialization.

  Raises:
    ValueError: the architectures differ. The message names every weight that
      has a different shape or is missing in one of the networks.
  """
  theirs = dict(nnx.to_flat_state(nnx.state(source)))
  ours = dict(nnx.to_flat_state(nnx.state(model)))
  kept, fresh, differing = {}, [], []
  for path in dict.fromkeys([*ours, *theirs]):
    name = '.'.join(map(str, path))
    mine, other = (
      networks[path].shape if path in networks else None
      for networks in (ours, theirs)
    )
    if mine == other:
      kept[path] = jnp.copy(theirs[path][...])
    elif path[0] not in HEADS and not (GATE in path and None in (mine, other)):
      differing.append(f'{name}: {mine or "none"} from {other or "none"}')
    elif mine:
      fresh.append(name)
  if differing:
    raise ValueError(
      'cannot start from a network of another architecture; differing shapes: '
      f'{"; ".join(differing)}'
    )
  nnx.update(model, nnx.from_flat_state(kept))
  if fresh:
    logging.info('newly initialized: %s', ', '.join(fresh))
  return fresh


def open_gates(model: nnx.Module, config: MethodConfig) -> None:
  """Applies the method's `open_gate` to newly initialized gates.

  Args:
    model: the network, modified in place.
    config: the run's method configuration.
  """
  _change_gates(model, config.record.open_gate, config.options)


def start_gates(model: nnx.Module, config: MethodConfig) -> None:
  """Applies the method's `start_gate` after weights are loaded.

  Args:
    model: the network, modified in place.
    config: the run's method configuration.
  """
  _change_gates(model, config.record.start_gate, config.options)


def _change_gates(model: nnx.Module, change, options: Any) -> None:
  if change is not None:
    for _, gate in nnx.iter_modules(model):
      if isinstance(gate, Gate):
        change(options, gate)
