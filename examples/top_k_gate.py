"""A custom gate: each block runs at the k best positions of an image.

python -m experiments.train --method=examples.top_k_gate:METHOD --keep=0.3 \
  --flagfile=experiments/flags/spots_dynconv.flags --workdir=workdir/top_k

A learned score ranks the positions. The number of active positions is fixed, so
the cost of an image is known in advance and needs no loss.
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
  """Runs a block at the positions with the highest scores.

  Args:
    in_features: number of channels of the block's input.
    strides: stride of the block.
    keep: fraction of active positions, in (0, 1].
    rngs: random streams; uses `params`.
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
    flat = score.reshape(score.shape[0], -1)
    k = max(1, round(self.keep * flat.shape[1]))
    values, indices = jax.lax.top_k(flat, k)
    least, last = values[:, -1:], indices[:, -1:]
    # Of equal scores, top_k takes the first.
    tied = (flat == least) & (jnp.arange(flat.shape[1]) <= last)
    hard = ((flat > least) | tied).astype(jnp.float32)
    soft = nnx.sigmoid(flat - jax.lax.stop_gradient(least))
    return Decision(straight_through(hard, soft).reshape(score.shape)), carry


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the method. Each becomes a flag."""

  keep: float = option(
    0.3,
    'Fraction of the positions at which a block runs.',
    allowed=Range(lambda keep: 0 < keep <= 1, 'in (0, 1]'),
  )


def make_gates(options, sites, rngs):
  """Returns a function that makes the gate of a block."""
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
