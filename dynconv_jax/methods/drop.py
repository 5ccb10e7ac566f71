"""A control for learned gates: named blocks never run.

If a gated network saves most of its MACs by never running certain blocks, a
network without those blocks and without gates saves as much.
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
  """A gate that never executes the block's branch."""

  per_image = True

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    return Decision(jnp.zeros((x.shape[0], 1, 1), jnp.float32)), carry


@dataclasses.dataclass(frozen=True)
class Dropping:
  """Blocks that never run."""

  dropped_blocks: tuple[str, ...] = option(
    (),
    'Blocks that never run, such as blocks.3.1,blocks.4.2. They count toward a '
    'budget as not executed.',
  )

  def drop(self, sites: Sequence[GateSite], make_gate: MakeGate) -> MakeGate:
    """Returns a function that makes `Closed` gates for dropped blocks.

    Args:
      sites: all sites of the network.
      make_gate: makes the gates of the other blocks.

    Raises:
      ValueError: there is no such block, or it has no identity shortcut.
    """
    names = [site.name for site in sites if site.identity]
    unknown = [name for name in self.dropped_blocks if name not in names]
    if unknown:
      raise ValueError(
        'dropped_blocks must name blocks with an identity shortcut, '
        f'{", ".join(names)}; got {", ".join(unknown)}'
      )

    def make(site: GateSite) -> Gate | None:
      return Closed() if site.name in self.dropped_blocks else make_gate(site)

    return make


def make_gates(
  options: Dropping, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns a function that makes a block's gate: `Closed` if it is dropped."""
  del rngs
  return options.drop(sites, lambda site: None)


METHOD = Method(
  'drop',
  Dropping,
  make_gates,
  knob='dropped_blocks',
  label='blocks dropped',
  color='sky_blue',
  marker='h',
)
