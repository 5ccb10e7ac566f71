"""A Triton kernel for inverted residuals at the active positions of masks.

Positions are numbered (image * height + row) * width + column; channels are
last. See `triton_kernels.py`.
"""

import triton
import triton.language as tl


@triton.jit
def depthwise_matmul_add(
  table,  # [rows, DEPTH]: the listed rows of a map.
  rows,  # int32[N * HEIGHT * WIDTH]: table row of each position; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]
  kernel,  # [SIDE, SIDE, DEPTH]
  bias,  # float32[DEPTH]
  last_kernel,  # [DEPTH, FEATURES]
  last_bias,  # float32[FEATURES]
  base,  # [..., FEATURES]: the shortcut or zeros; aliased to out.
  out,  # Output, [..., FEATURES]
  ADDED: tl.constexpr,  # Whether to add base.
  MAXIMUM: tl.constexpr,  # Upper bound of the depthwise output; 0: none.
  SIDE: tl.constexpr,  # Side of the depthwise kernel.
  STRIDES: tl.constexpr,
  TOP: tl.constexpr,  # Padding above the map.
  LEFT: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,  # FEATURES, rounded up to a power of two.
  BLOCK_DEPTH: tl.constexpr,
  UNROLLED: tl.constexpr,  # Taps at a time, a divisor of SIDE * SIDE.
):
  """Writes base + conv1x1(relu(depthwise)) at the listed positions.

  Values between the two convolutions stay in registers.
  """
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  start = tl.program_id(0) * BLOCK_ROWS
  row = start + tl.arange(0, BLOCK_ROWS)
  size, position = tl.load(count), tl.load(indices + row)
  if start >= size:
    return
  listed = row < size
  position = tl.where(listed, position, 0)
  image = position // (out_height * out_width)
  top = position // out_width % out_height * STRIDES - TOP
  left = position % out_width * STRIDES - LEFT
  feature = tl.arange(0, BLOCK_FEATURES)
  stored = listed[:, None] & (feature < FEATURES)[None, :]
  at = position[:, None].to(tl.int64) * FEATURES + feature[None, :]
  total = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
  for first in range(0, DEPTH, BLOCK_DEPTH):
    depth = first + tl.arange(0, BLOCK_DEPTH)
    known = depth < DEPTH
    hidden = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], tl.float32)
    # Loads of unrolled taps are in flight together, and need registers.
    for start_tap in range(0, SIDE * SIDE, UNROLLED):
      for step in tl.static_range(UNROLLED):
        tap = start_tap + step
        y, x = top + tap // SIDE, left + tap % SIDE
        inside = listed & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
        here = tl.load(
          rows + (image * HEIGHT + y) * WIDTH + x, inside, other=-1
        )
        tile = tl.load(
          table + here[:, None].to(tl.int64) * DEPTH + depth[None, :],
          (here >= 0)[:, None] & known[None, :],
          other=0.0,
        )
        weights = tl.load(kernel + tap * DEPTH + depth, known, other=0.0)
        hidden += tile.to(tl.float32) * weights.to(tl.float32)[None, :]
    hidden += tl.load(bias + depth, known, other=0.0)[None, :]
    hidden = tl.where(hidden < 0, 0.0, hidden)  # Keeps NaN.
    if MAXIMUM > 0:
      hidden = tl.where(hidden > MAXIMUM, MAXIMUM, hidden)
    weights = tl.load(
      last_kernel + depth[:, None] * FEATURES + feature[None, :],
      known[:, None] & (feature < FEATURES)[None, :],
      other=0.0,
    )
    hidden = hidden.to(table.dtype.element_ty)
    total = tl.dot(hidden, weights, total, input_precision='ieee')
  total += tl.load(last_bias + feature, feature < FEATURES, other=0.0)[None, :]
  if ADDED:
    total += tl.load(base + at, stored, other=0.0).to(tl.float32)
  tl.store(out + at, total.to(out.dtype.element_ty), stored)
