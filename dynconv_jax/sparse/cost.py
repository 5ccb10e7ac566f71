"""Which plan is the fastest for a block, by short measurements."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from dynconv_jax.masks import dilate
from dynconv_jax.sparse.fold import FoldedBlock
from dynconv_jax.sparse.plan import (
  BlockPlan,
  chunk_sizes,
  default_plan,
  run_block,
)

# Densities that are measured; times between them are taken as linear. Of whole
# images there may be one only. The kernels for a CPU gain where positions are
# neighbours: what they take of a full mask is not that of a line from below.
_DENSITIES = (0.2, 0.6)
_NATIVE_DENSITIES = (0.2, 1.0)
_IMAGE_DENSITIES = (0.0, 1.0)
_REPEATS = 4


def calibrate(
  block: FoldedBlock,
  shape: tuple[int, int, int, int],
  dtype: jnp.dtype,
  *,
  per_image: bool,
  density: float,
  native: bool = False,
) -> BlockPlan:
  """Returns the fastest plan of a block, and up to which load it is sparse.

  Each candidate is timed on clustered masks of two densities. Its time is
  taken as linear in the load, the executed share of the branch's dense MACs.

  Args:
    block: the folded block.
    shape: (N, H, W, C) of its input.
    dtype: of its input.
    per_image: whether its mask is constant over an image.
    density: the one at which the candidates are compared.
    native: whether a candidate is by the kernels for this machine: on a CPU
      the only one that executes active positions, for which the block is
      packed.
  """
  rng = np.random.default_rng(0)
  x = jnp.asarray(np.maximum(rng.normal(size=shape), 0), dtype)
  output = block.output_shape(shape)
  densities = _NATIVE_DENSITIES if native else _DENSITIES
  if per_image:
    densities = _IMAGE_DENSITIES
  cases = [
    _case(block, shape, clustered_masks(rng, output, d, per_image))
    for d in densities
  ]
  candidates = _candidates(output, per_image, native)
  # On a GPU one waits in the queue while another is executed, as in a network.
  calls = 10 if jax.default_backend() == 'gpu' else 1
  times = {plan: [np.inf] * len(cases) for plan in candidates}
  for repeat in range(_REPEATS + 1):
    for plan in candidates:
      # A dense plan takes as long for any mask.
      for i, case in enumerate(cases[: 1 if plan.form == 'dense' else None]):
        start = time.perf_counter()
        for _ in range(calls):
          out = run_block(block, x, *case, plan)
        jax.block_until_ready(out)
        if repeat:  # The first compiles.
          seconds = (time.perf_counter() - start) / calls
          times[plan][i] = min(times[plan][i], seconds)
  loads = [float(load) for _, _, load in cases]
  return choose_plan(times, densities, loads, density)


def choose_plan(
  times: dict[BlockPlan, list[float]],
  densities: tuple[float, float],
  loads: list[float],
  density: float,
) -> BlockPlan:
  """Returns the fastest plan at a density, and its limit.

  The kernels for a GPU have no limit, which would be a conditional that waits
  for the host at each block: they, or dense, are taken for any batch.

  Args:
    times: seconds of each plan at each density; of dense ones at the first.
    densities: the two that were measured, increasing.
    loads: the shares of dense MACs that they took.
    density: the one to expect; its load is taken as linear between, and 1 at 1.
  """
  dense = min(
    (p for p in times if p.form == 'dense'), key=lambda p: times[p][0]
  )
  dense_time = times[dense][0]
  expected = np.interp(density, (0, *densities, 1), (0, *loads, 1))

  def line(plan):
    low, high = times[plan]
    slope = max((high - low) / max(loads[1] - loads[0], 1e-6), 1e-12)
    return low - slope * loads[0], slope

  def predicted(plan):
    start, slope = line(plan)
    return start + slope * expected

  best = min((p for p in times if p.form != 'dense'), key=predicted)
  start, slope = line(best)
  limit = (dense_time - start) / slope
  if limit <= 0:
    return dense
  if best.form == 'triton':
    return best if expected <= limit else dense
  return dataclasses.replace(
    best,
    im2col=dense.im2col if best.form != 'images' else best.im2col,
    limit=min(limit, 1.0),
  )


def clustered_masks(
  rng: np.random.Generator,
  shape: tuple[int, int, int],
  density: float,
  per_image: bool = False,
  *,
  side: int = 1,
) -> np.ndarray:
  """Returns float32[N, h, w] of {0, 1}: smooth random fields, thresholded.

  Each has round(density * h * w) active positions, at least one above 0; with
  per-image masks the first round(density * N) images are active.

  Args:
    rng: source of randomness.
    shape: (N, h, w).
    density: share of active positions, in [0, 1].
    per_image: whether whole images are active.
    side: of the patches whose positions are active together; they are counted,
      and those at the edge are cut.
  """
  n, h, w = shape
  if side > 1:
    patches = (n, -(-h // side), -(-w // side))
    mask = clustered_masks(rng, patches, density, per_image)
    return mask.repeat(side, 1).repeat(side, 2)[:, :h, :w]
  if per_image:
    active = np.arange(n) < max(density > 0, round(density * n))
    return np.broadcast_to(active[:, None, None], shape).astype(np.float32)
  field = rng.normal(size=shape)
  # A Gaussian low-pass of an eighth of the map, periodic.
  decay = np.add.outer(
    (np.fft.fftfreq(h) * h / 8) ** 2, (np.fft.fftfreq(w) * w / 8) ** 2
  )
  smooth = np.fft.ifft2(np.fft.fft2(field) * np.exp(-8 * decay)).real
  ranks = smooth.reshape(n, -1).argsort(-1).argsort(-1).reshape(shape)
  return (ranks < max(density > 0, round(density * h * w))).astype(np.float32)


def _case(block, shape, hard):
  """The masks and the load of a block."""
  hard = jnp.asarray(hard)
  bottleneck = block.third is not None
  dilated = dilate(hard, block.second.strides if bottleneck else 1)
  if bottleneck:
    dilated = dilated[:, : shape[1], : shape[2]]
  first = block.first.kernel.size
  rest = block.second.kernel.size
  if bottleneck:
    rest += block.third.kernel.size
  dense = float(first * dilated.size + rest * hard.size)
  load = (first * jnp.sum(dilated) + rest * jnp.sum(hard)) / dense
  return hard, dilated, load


def _candidates(shape, per_image, native):
  """The plans that may be the fastest for a block of (N, h, w) outputs."""
  n, h, w = shape
  # On a GPU cuDNN knows what is best for small maps too.
  small = h * w <= 400 and jax.default_backend() != 'gpu'
  plans = [BlockPlan('dense')]
  if small:
    plans.append(BlockPlan('dense', im2col=True))
  if native:
    plans.append(default_plan(shape, per_image, native))
    return plans
  if per_image:
    plan = default_plan(shape, True)
    plans.append(plan)
    if small:
      plans.append(BlockPlan('images', plan.sizes, im2col=True))
    return plans
  size = n * h * w
  plans.append(default_plan(shape, False))
  if plans[-1].form == 'buckets':
    return [*plans, BlockPlan('buckets', nine=True)]
  # Nine products added up are not faster in chunks, which stay in the cache.
  if size > 512:
    plans.append(BlockPlan('chunks', chunk_sizes(size, 16)))
  # Small chunks keep one core busy, one product of all rows all of them; large
  # maps have large chunks.
  if size <= 4096:
    plans.append(BlockPlan('buckets', buckets=16))
  return list(dict.fromkeys(plans))
