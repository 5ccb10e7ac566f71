"""The interface shared by all gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class GateSite:
  """A place in a network where a method may put a gate: one gated block.

  Attributes:
    name: the block's path in the model, such as 'layer2.0'.
    index: of the block in the network, from 0.
    stage: of the network, from 0.
    stage_index: of the block in its stage, from 0.
    in_features: channels of the block's input.
    strides: of the block.
    identity: whether its shortcut is the identity.
  """

  name: str
  index: int
  stage: int
  stage_index: int
  in_features: int
  strides: int = 1
  identity: bool = True


class Decision(NamedTuple):
  """Where a gate lets its block's branch be executed.

  Attributes:
    hard: float32[N, h, w] of {0, 1} at the block's output resolution, or
      float32[N, 1, 1] of a gate that decides per image.
    score: what the decision was made from, of the shape of `hard`, where a
      loss needs it: the probability of executing (SkipNet), the halting score
      (SACT, ACT). Otherwise None.
  """

  hard: jax.Array
  score: jax.Array | None = None


# Makes the gate of a block, or None: the branch is executed everywhere.
MakeGate = Callable[[GateSite], 'Gate | None']


class Gate(nnx.Module):
  """Decides from a block's input whether and where its branch is executed.

  Attributes:
    deterministic: whether decisions are those of evaluation; set by
      ``nnx.view``.
    per_image: whether a decision holds for all positions of an image.
    spans_stage: whether a stage's output is not that of its last block, but
      what `end_stage` makes of it.
    checkpoint_modules: how the public checkpoints of networks with such gates
      rename modules; None for one that they leave out of names.
    interpolates: whether the gradient of a decision is that of
      `m relu(s + b) + (1 - m) relu(s)`, with shortcut s and branch b, not that
      of `relu(s + m b)`. The values are the same.
  """

  per_image = False
  spans_stage = False
  interpolates = False
  checkpoint_modules: Mapping[str, str | None] = {}

  def __init__(self):
    self.deterministic = False

  def __call__(
    self,
    x: jax.Array,
    carry: Any = None,
    *,
    rngs: nnx.Rngs | None = None,
    temperature: float | jax.Array = 1.0,
    gumbel_noise: bool | jax.Array = True,
  ) -> tuple[Decision, Any]:
    """Returns the decision for one block, and what later gates need.

    Args:
      x: float[N, H, W, C], the block's input.
      carry: what the gate before returned; None at first.
      rngs: stream `gumbel`, for gates that sample.
      temperature: of a Gumbel-softmax, > 0.
      gumbel_noise: whether noise is added in training.
    """
    raise NotImplementedError

  def end_stage(self, x: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """Returns a stage's output and the carry of the next stage's gates.

    Args:
      x: float[N, h, w, C], the output of the stage's last block.
      carry: what that block's gate returned.
    """
    return x, carry

  def key(self, rngs: nnx.Rngs | None) -> jax.Array:
    """Returns the key of a sample.

    Raises:
      ValueError: there is no `gumbel` stream.
    """
    if rngs is None or not ('gumbel' in rngs or 'default' in rngs):
      given = None if rngs is None else [name for name, _ in rngs.items()]
      raise ValueError(
        'a gate in training needs rngs=nnx.Rngs(gumbel=key); got '
        f'{given}. For evaluation use nnx.view(model, deterministic=True, '
        'use_running_average=True)'
      )
    # By name: where there is only `default`, which stands in for any stream,
    # `rngs.gumbel` is a method that draws a sample.
    return rngs['gumbel']()

  def set_view(self, deterministic: bool | None = None):
    """Class method used by ``nnx.view``.

    Args:
      deterministic: if True, decisions are those of evaluation.
    """
    if deterministic is not None:
      self.deterministic = deterministic


def conv1x1(in_features: int, out_features: int, **kwargs) -> nnx.Conv:
  """Returns a float32 1x1 convolution with a bias, as gates have them.

  Args:
    in_features: channels of the input.
    out_features: channels of the output.
    **kwargs: `rngs`, and others of nnx.Conv.
  """
  kwargs = {
    'kernel_init': nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    **kwargs,
  }
  return nnx.Conv(
    in_features, out_features, (1, 1), dtype=jnp.float32, **kwargs
  )
