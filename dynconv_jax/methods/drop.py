"""Blocks that are never executed: the control for what gates decide.

A gated network may save most where it never executes some blocks. Without those
blocks, a network without gates saves as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.methods.gate import Decision, Gate, GateSite, MakeGate
from dynconv_jax.methods.method import Method
from dynconv_jax.options import option


class Closed(Gate):
  """Executes the block's branch for no image."""

  per_image = True

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    return Decision(jnp.zeros((len(x), 1, 1), jnp.float32)), carry


@dataclasses.dataclass(frozen=True)
class Options:
  """The control's options."""

  dropped_blocks: tuple[str, ...] = option(
    (), 'Blocks that are never executed, such as blocks.3.1,blocks.4.2.'
  )


def make_gates(
  options: Options, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns what makes the gates of the blocks to drop; others have none."""
  del rngs
  names = [site.name for site in sites if site.identity]
  unknown = [name for name in options.dropped_blocks if name not in names]
  if unknown:
    raise ValueError(
      'dropped_blocks must name blocks with an identity shortcut, '
      f'{", ".join(names)}; got {", ".join(unknown)}'
    )
  return lambda site: Closed() if site.name in options.dropped_blocks else None


METHOD = Method(
  'drop',
  Options,
  make_gates,
  knob='dropped_blocks',
  label='blocks dropped',
  color='sky_blue',
  marker='h',
)
