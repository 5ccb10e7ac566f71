"""The definition of a method, and a registry of methods by name.

Each method is one file that defines a `Method`, by convention `METHOD`. Methods
outside the package are named package.module:METHOD.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from dynconv_jax import references
from dynconv_jax.checks import check_choice
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.methods.gate import Gate, GateSite, MakeGate
from dynconv_jax.options import NoOptions

# The methods of this package, one file each, in the order shown in figures.
METHODS = ('dense', 'drop', 'dynconv', 'convnet_aig', 'skipnet', 'sact', 'act')

Progress = float | jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
  """A method that decides where a network computes.

  Attributes:
    name: name of the method, for messages and tables.
    options: a frozen dataclass whose fields, made by `options.option`, become
      flags. Methods that share an option share its definition.
    make_gates: (options, sites, rngs) -> function that returns the gate of a
      site, or None. `sites` are all sites of the network. Raises ValueError
      before using `rngs` if the options do not fit the sites. None for a dense
      network.
    loss: (options, masks, cross-entropy of each image, progress) -> (weight,
      unweighted loss). None for no additional loss.
    target: (options, progress) -> target executed fraction or execution rate of
      the loss. None if there is no target to report.
    anneal: (options, progress) -> (temperature, whether gates add noise).
    open_gate: (options, gate): modifies a new gate before weights are loaded.
      None leaves gates unchanged.
    start_gate: (options, gate): modifies a gate after weights are loaded. None
      leaves gates unchanged.
    needs_trained: (options) -> the option that requires a trained network, such
      as 'skip_training=reinforce', or ''.
    samples: whether gates can sample in evaluation as in training.
    knob: the option to vary for a curve of accuracy against compute.
    label: label in figures; the default is the name.
    color: a color of `plotting.style.PALETTE`.
    marker: a Matplotlib marker.
  """

  name: str
  options: type = NoOptions
  make_gates: (
    Callable[[Any, Sequence[GateSite], nnx.Rngs | None], MakeGate] | None
  ) = None
  loss: (
    Callable[
      [Any, Sequence[ExecutionMask], jax.Array, Progress],
      tuple[float | jax.Array, jax.Array],
    ]
    | None
  ) = None
  target: Callable[[Any, Progress], float | jax.Array] | None = None
  anneal: Callable[
    [Any, Progress], tuple[float | jax.Array, bool | jax.Array]
  ] = lambda options, progress: (1.0, True)
  open_gate: Callable[[Any, Gate], None] | None = None
  start_gate: Callable[[Any, Gate], None] | None = None
  needs_trained: Callable[[Any], str] = lambda options: ''
  samples: bool = False
  knob: str = ''
  label: str = ''
  color: str = 'sky_blue'
  marker: str = 'X'

  @property
  def gated(self) -> bool:
    """Whether networks of the method have gates."""
    return self.make_gates is not None


def load_method(method: str | Method) -> Method:
  """Returns a method.

  Args:
    method: one of METHODS, package.module:NAME, or a `Method`.

  Raises:
    ValueError: the method does not exist.
  """
  if isinstance(method, Method):
    return method
  if ':' not in str(method):
    check_choice('method', method, METHODS)
    method = f'{__package__}.{method}:METHOD'
  return references.load(method, Method, 'method')
