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
  """A block of a network that can have a gate.

  Attributes:
    name: the block's path in the model, such as 'layer2.0'.
    index: index of the block in the network.
    stage: index of the stage in the network.
    stage_index: index of the block in its stage.
    in_features: channels of the block's input.
    strides: stride of the block.
    identity: whether the block's shortcut is the identity.
  """

  name: str
  index: int
  stage: int
  stage_index: int
  in_features: int
  strides: int = 1
  identity: bool = True


class Decision(NamedTuple):
  """The decision of a gate: where its block's branch is executed.

  Attributes:
    hard: [N, h, w] of {0, 1} at the block's output resolution, or [N, 1, 1]
      from a per-image gate; float, int, or bool. Becomes float32.
    score: the basis of the decision, in the shape of `hard`, if a loss needs
      it: the probability of executing (SkipNet) or the halting score (SACT,
      ACT). Otherwise None.
  """

  hard: jax.Array
  score: jax.Array | None = None


# Makes a block's gate, or returns None to execute the branch everywhere.
MakeGate = Callable[[GateSite], 'Gate | None']


class Gate(nnx.Module):
  """A module that decides where a block's branch runs, given the block's input.

  Attributes:
    deterministic: whether to decide as in evaluation; set by ``nnx.view``.
    per_image: whether a decision covers all positions of an image.
    spans_stage: whether `end_stage` computes a stage's output from the output
      of the stage's last block.
    checkpoint_modules: maps module names to the names that public checkpoints
      of networks with this gate use; None for a module that their names omit.
    interpolates: whether the gradient of a decision m is that of
      `m relu(s + b) + (1 - m) relu(s)`, with shortcut s and branch b, instead
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
    """Returns the decision for one block, and the carry for the next gate.

    Args:
      x: float[N, H, W, C], the block's input.
      carry: the carry of the previous gate; None for the first.
      rngs: random streams; gates that sample use `gumbel`.
      temperature: temperature of the Gumbel-softmax, > 0.
      gumbel_noise: whether to add noise in training.
    """
    raise NotImplementedError

  def record(self, hard: jax.Array, carry: Any) -> Any:
    """Returns the carry for the next gate if a mask was given to the block.

    Args:
      hard: float32[N, h, w] of {0, 1}, used instead of this gate's decision.
      carry: the carry of the previous gate; None for the first.
    """
    del hard
    return carry

  def end_stage(self, x: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """Returns a stage's output, and the carry for the next stage's gates.

    Args:
      x: float[N, h, w, C], the output of the stage's last block.
      carry: the carry that the last block's gate returned.
    """
    return x, carry

  def key(self, rngs: nnx.Rngs | None) -> jax.Array:
    """Returns a PRNG key to sample with.

    Raises:
      ValueError: `rngs` has neither a `gumbel` nor a `default` stream.
    """
    if rngs is None or not ('gumbel' in rngs or 'default' in rngs):
      given = None if rngs is None else [name for name, _ in rngs.items()]
      raise ValueError(
        'a gate in training needs rngs=nnx.Rngs(gumbel=key); got '
        f'{given}. For evaluation use nnx.view(model, deterministic=True, '
        'use_running_average=True)'
      )
    # Index by name: if only `default` exists, `rngs.gumbel` is the method that
    # draws Gumbel samples.
    return rngs['gumbel']()

  def set_view(self, deterministic: bool | None = None):
    """Sets attributes for ``nnx.view``.

    Args:
      deterministic: if True, the gate decides as in evaluation.
    """
    if deterministic is not None:
      self.deterministic = deterministic


def conv1x1(in_features: int, out_features: int, **kwargs) -> nnx.Conv:
  """Returns a float32 1x1 convolution with a bias, for gates.

  Args:
    in_features: channels of the input.
    out_features: channels of the output.
    **kwargs: `rngs` and other arguments of `nnx.Conv`.
  """
  kwargs = {
    'kernel_init': nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    **kwargs,
  }
  return nnx.Conv(
    in_features, out_features, (1, 1), dtype=jnp.float32, **kwargs
  )
