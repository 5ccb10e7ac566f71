"""Compares and times gathered products in Gluon and Triton on a GPU.

python -m benchmarks.gpu_gluon [--check]

Runs the 3x3 and first 1x1 convolutions of ResNet-50's stages 3 and 4 in
bfloat16, on masks with no, one, some, and all positions active. Raises an error
if the results differ. --check only compares, on few images; use it with
compute-sanitizer. The last line is JSON: microseconds of Triton, and of the
Gluon kernel with each tile size.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.cases import check_equal
from dynconv_jax.branch import Conv
from dynconv_jax.cli import program
from dynconv_jax.masks import dilate
from dynconv_jax.sparse.backends import gluon, triton
from dynconv_jax.sparse.backends.triton_masks import list_positions
from dynconv_jax.sparse.calibrate import clustered_masks
from dynconv_jax.sparse.fold import FoldedConv

_CHECK = flags.DEFINE_bool(
  'check', False, 'Only compare results, on few images.'
)
# Side of the map, and number of channels.
_STAGES = ((14, 256), (7, 512))
_CALLS = 50


def main(argv: Sequence[str]) -> None:
  """Compares and times the kernels."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  if jax.default_backend() != 'gpu':
    print(json.dumps({'skipped': 'there is no GPU'}))
    return
  results = []
  for side, features in _STAGES:
    shape = (2 if _CHECK.value else 128, side, side)
    for name, hard in _masks(shape).items():
      for kernel_size in (3, 1):
        results.append(_compare(name, hard, features, kernel_size))
        print(json.dumps(results[-1]), flush=True)
  print(json.dumps(results))


def _masks(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
  one = np.zeros(shape, np.float32)
  one[-1, -1, -1] = 1
  rng = np.random.default_rng(0)
  some = {d: clustered_masks(rng, shape, d) for d in (0.1, 0.3, 0.5)}
  return {'none': 0 * one, 'one': one, 'all': one * 0 + 1} | some


def make_layer(
  rng: np.random.Generator, features: int, kernel_size: int
) -> FoldedConv:
  """Returns a bottleneck's first 1x1 or its 3x3 convolution, in bfloat16.

  Args:
    rng: source of the weights.
    features: number of output channels.
    kernel_size: 1 or 3.
  """
  inputs = features if kernel_size == 3 else 4 * features
  conv = Conv('conv', 'norm', inputs, features, kernel_size, activation='relu')
  kernel = rng.normal(size=conv.kernel_shape) / (kernel_size * inputs**0.5)
  return FoldedConv(
    jnp.asarray(kernel, jnp.bfloat16),
    jnp.asarray(rng.normal(size=features), jnp.float32),
    conv,
  )


def _compare(name, hard, features, kernel_size):
  rng = np.random.default_rng(1)
  lookup = kernel_size == 3
  layer = make_layer(rng, features, kernel_size)
  inputs = layer.conv.in_features
  active = list_positions(jnp.asarray(hard))
  needed = list_positions(dilate(jnp.asarray(hard), 1))
  rows = (hard.size,) if lookup else hard.shape  # Listed rows, or the map.
  table = jnp.asarray(rng.normal(size=(*rows, inputs)), jnp.bfloat16)
  args = (table, (*hard.shape, inputs), needed, active, layer)
  count = int(active.count[0])

  def measure(convolve):
    run = jax.jit(lambda table: convolve(table, *args[1:], lookup=lookup))
    rows = np.asarray(run(table)[:count], np.float32)
    start = time.perf_counter()
    for _ in range(_CALLS if not _CHECK.value else 0):
      out = run(table)
    jax.block_until_ready(out if not _CHECK.value else run(table))
    return rows, 1e6 * (time.perf_counter() - start) / _CALLS

  expected, microseconds = measure(triton.convolve)
  result = {'side': hard.shape[1], 'kernel_size': kernel_size}
  result |= {'mask': name, 'rows': count}
  result['triton'] = microseconds
  for number, tiles in enumerate(gluon.TILES[: 1 if _CHECK.value else None]):
    if not gluon.fits(layer, tiles):
      continue
    convolve = functools.partial(gluon.convolve_gathered, tiles=tiles)
    rows, microseconds = measure(convolve)
    if count:
      # The kernels sum in different orders and round to bfloat16.
      check_equal(f'gluon {tiles}', rows, expected, 2**-7)
    result[f'gluon_{number}'] = microseconds
  return result


if __name__ == '__main__':
  program.run(main)
