"""An own gate: each block runs at the k best positions of an image.

python -m experiments.train --method=examples.top_k_gate:METHOD --keep=0.3 \
  --flagfile=experiments/flags/spots_dynconv.flags --workdir=workdir/top_k

A learned score orders the positions. How many run is fixed, so the cost of an
image is known beforehand and no loss has to price it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.methods.gumbel import straight_through
from dynconv_jax.methods.method import Method
from dynconv_jax.options import Range, option


class TopKGate(Gate):
  """Executes a block at the positions of the highest scores.

  Args:
    in_features: channels of the block's input.
    strides: of the block.
    keep: share of positions that run, in (0, 1].
    rngs: stream `params`.
  """

  def __init__(
    self, in_features: int, *, strides: int, keep: float, rngs: nnx.Rngs
  ):
    super().__init__()
    self.keep = keep
    self.score = nnx.Conv(
      in_features, 1, (3, 3), strides=strides, padding=1, rngs=rngs
    )

  def __call__(self, x, carry=None, **kwargs):
    del kwargs  # Nothing is sampled.
    score = self.score(x.astype(jnp.float32))[..., 0]
    flat = score.reshape(len(score), -1)
    k = max(1, round(self.keep * flat.shape[1]))
    least = jax.lax.top_k(flat, k)[0][:, -1:, None]
    hard = (score >= least).astype(jnp.float32)
    soft = nnx.sigmoid(score - jax.lax.stop_gradient(least))
    return Decision(straight_through(hard, soft)), carry


@dataclasses.dataclass(frozen=True)
class Options:
  """What becomes a flag."""

  keep: float = option(
    0.3,
    'Share of positions at which a block runs.',
    allowed=Range(lambda keep: 0 < keep <= 1, 'in (0, 1]'),
  )


def make_gates(options, sites, rngs):
  """Returns what makes the gate of a block."""
  del sites
  return lambda site: TopKGate(
    site.in_features, strides=site.strides, keep=options.keep, rngs=rngs
  )


METHOD = Method(
  'top_k',
  Options,
  make_gates,
  target=lambda options, progress: options.keep,
  knob='keep',
  label='top-k',
)
