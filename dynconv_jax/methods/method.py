"""What a method is, and the methods by name.

A method is one file that exposes a `Method`, by convention `METHOD`, and may
lie outside the package: package.module:METHOD.
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

# The methods of this package, one file each, in the order of figures.
METHODS = ('dense', 'drop', 'dynconv', 'convnet_aig', 'skipnet', 'sact', 'act')

Progress = float | jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to decide where a network computes.

  Attributes:
    name: for messages and tables.
    options: a frozen dataclass; its fields, made by `options.option`, become
      flags. Options that two methods share have one definition.
    make_gates: (options, sites, rngs) -> what makes the gate of a site, or
      None for one without. `sites` are all sites of the network. Raises
      ValueError where the options do not fit them, before it uses `rngs`.
      None: the network is dense.
    loss: (options, masks, cross-entropy of each image, progress) -> (weight,
      unweighted loss) of what computing costs; None: nothing.
    target: (options, progress) -> the executed fraction, or rate of execution,
      that the loss aims at; None: there is none to report.
    anneal: (options, progress) -> (temperature, whether gates add noise).
    open_gate: (options, gate): changes a fresh gate before any weights are
      loaded; None: gates start as they are made.
    start_gate: (options, gate): changes a gate after weights are loaded.
    needs_trained: (options) -> the option that only a trained network can be
      trained with, such as 'skip_training=reinforce'; '' where there is none.
    samples: whether gates can sample in evaluation as in training.
    knob: the option that a curve of accuracy against compute moves along.
    label: in figures; by default the name.
    color: of `plotting.style.PALETTE`.
    marker: Matplotlib's.
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
    method: one of METHODS, or package.module:NAME; or the method itself.

  Raises:
    ValueError: there is no such method.
  """
  if isinstance(method, Method):
    return method
  if ':' not in str(method):
    check_choice('method', method, METHODS)
    method = f'{__package__}.{method}:METHOD'
  return references.load(method, Method, 'method')
