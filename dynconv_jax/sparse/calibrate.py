"""Calibration: short measurements of whether blocks run faster sparsely."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dynconv_jax.masks import execution_mask
from dynconv_jax.models.gated import GatedBlock
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.fold import fold_block
from dynconv_jax.sparse.plan import BlockPlan

# Densities to measure; times are interpolated linearly. With per-image masks,
# the batch may be a single image, which is either skipped or executed.
_DENSITIES = (0.2, 0.6)
_IMAGE_DENSITIES = (0.0, 1.0)
_REPEATS = 4
# Limits on the number and total seconds of consecutive timed calls.
_CALLS, _SECONDS = 10, 0.01


def calibrate(
  block: GatedBlock,
  plan: BlockPlan,
  shape: tuple[int, int, int, int],
  *,
  per_image: bool,
  density: float,
  budget: float | None = None,
) -> BlockPlan:
  """Returns the faster of a sparse plan and the dense plan, with its limit.

  Times both on clustered masks: the sparse plan at two densities, the dense one
  at a single density, because its time does not depend on the mask. Assumes
  that the sparse time is linear in the executed fraction of the branch's dense
  MACs.

  Args:
    block: the block, in evaluation.
    plan: the sparse plan.
    shape: (N, H, W, C) of the block's input.
    per_image: whether the block's mask is constant over an image.
    density: expected density of masks.
    budget: expected executed fraction; None to derive it from the density.
  """
  rng = np.random.default_rng(0)
  x = jnp.asarray(np.maximum(rng.normal(size=shape), 0), block.dtype)
  size = block.branch.sizes(shape[1:3])[-1]
  densities = _IMAGE_DENSITIES if per_image else _DENSITIES
  masks = [
    execution_mask(
      block.branch,
      jnp.asarray(clustered_masks(rng, (shape[0], *size), d, per_image)),
      shape[1:3],
      name=block.name,
    )
    for d in densities
  ]
  folded = fold_block(block)
  backends = {'dense': get_backend('dense'), 'sparse': plan.backend}
  runs = {
    name: (
      jax.jit(
        backend.run,
        compiler_options=backend.compiler_options(jax.default_backend()),
      ),
      backend.pack(folded),
    )
    for name, backend in backends.items()
  }
  # The dense time does not depend on the mask.
  cases = [('dense', 0), ('sparse', 0), ('sparse', 1)]
  times = dict.fromkeys(cases, np.inf)

  def seconds(case, calls):
    (run, packed), mask = runs[case[0]], masks[case[1]]
    start = time.perf_counter()
    for _ in range(calls):
      out = run(packed, x, mask)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls

  for case in cases:
    seconds(case, 1)  # Compiles.
  # Time several short calls in a row: on a GPU, calls queue up while others
  # run, as in a network.
  once = max(seconds(case, 1) for case in cases)
  calls = int(np.clip(_SECONDS / once, 1, _CALLS))
  for _ in range(_REPEATS):
    for case in cases:
      times[case] = min(times[case], seconds(case, calls))
  fractions = [
    float(jnp.mean(mask.executed_macs())) / mask.dense_macs() for mask in masks
  ]
  if budget is None:
    # Interpolate linearly between the measured densities, 0, and 1.
    budget = float(np.interp(density, (0, *densities, 1), (0, *fractions, 1)))
  chosen = choose_plan(
    plan,
    times['dense', 0],
    (times['sparse', 0], times['sparse', 1]),
    fractions,
    budget,
  )
  logging.info('%s of %s: %s', block.name, shape, chosen)
  return chosen


def choose_plan(
  plan: BlockPlan,
  dense: float,
  sparse: tuple[float, float],
  loads: Sequence[float],
  expected: float,
) -> BlockPlan:
  """Returns the faster plan at an executed fraction, with its limit.

  A backend that cannot fall back to dense execution without waiting for the
  host is used for all batches or for none.

  Args:
    plan: the sparse plan.
    dense: seconds of dense execution.
    sparse: seconds of sparse execution at the two loads.
    loads: two executed fractions of the branch's dense MACs, increasing.
    expected: the expected executed fraction.
  """
  slope = max((sparse[1] - sparse[0]) / max(loads[1] - loads[0], 1e-6), 1e-12)
  limit = (dense - (sparse[0] - slope * loads[0])) / slope
  if limit <= 0 or (not plan.backend.falls_back and expected > limit):
    return BlockPlan(get_backend('dense'))
  if not plan.backend.falls_back:
    return plan
  return BlockPlan(plan.backend, min(float(limit), 1.0))


def clustered_masks(
  rng: np.random.Generator,
  shape: tuple[int, int, int],
  density: float,
  per_image: bool = False,
  *,
  side: int = 1,
) -> np.ndarray:
  """Returns float32[N, h, w] of {0, 1}: thresholded smooth random fields.

  Each mask has round(density * h * w) active positions, or one if this rounds
  to 0 for a density above 0. With per-image masks, the first round(density * N)
  images are active, or one.

  Args:
    rng: NumPy random generator.
    shape: (N, h, w).
    density: fraction of active positions, in [0, 1].
    per_image: whether to activate whole images.
    side: side of the patches whose positions are active together. The density
      then counts patches; patches at the edge are cropped.
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
  # A periodic Gaussian low-pass filter.
  decay = np.add.outer(
    (np.fft.fftfreq(h) * h / 8) ** 2, (np.fft.fftfreq(w) * w / 8) ** 2
  )
  smooth = np.fft.ifft2(np.fft.fft2(field) * np.exp(-8 * decay)).real
  ranks = smooth.reshape(n, -1).argsort(-1).argsort(-1).reshape(shape)
  return (ranks < max(density > 0, round(density * h * w))).astype(np.float32)
