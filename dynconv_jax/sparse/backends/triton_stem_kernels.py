"""Triton kernels of the stem, which run at all positions.

Positions are numbered (image * height + row) * width + column; channels are
last. Products of bfloat16 are summed in float32.
"""

import triton
import triton.language as tl


@triton.jit
def convolve_rows(
  x,  # [N, HEIGHT, WIDTH, DEPTH]
  kernel,  # [FEATURES, TAPS, TAPS * DEPTH]
  bias,  # [FEATURES]
  out,  # Output, [N, HEIGHT, WIDTH, FEATURES]
  SIZE: tl.constexpr,  # N * HEIGHT * WIDTH
  TAPS: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,  # FEATURES, rounded up to a power of two.
):
  """Computes relu(convolution) of a map with few channels.

  The inputs of a row of taps are contiguous in memory and form one tile.
  """
  position = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
  column, feature = tl.arange(0, TAPS * DEPTH), tl.arange(0, BLOCK_FEATURES)
  known = feature < FEATURES
  top = position // WIDTH % HEIGHT - TAPS // 2
  left = position % WIDTH - TAPS // 2
  x_of = left[:, None] + (column // DEPTH)[None, :]
  inside = (position < SIZE)[:, None] & (x_of >= 0) & (x_of < WIDTH)
  start = (position - (TAPS // 2) * (WIDTH + 1)).to(tl.int64) * DEPTH
  total = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
  for tap in range(TAPS):
    y_inside = (top + tap >= 0) & (top + tap < HEIGHT)
    tile = tl.load(
      x + (start + tap * WIDTH * DEPTH)[:, None] + column[None, :],
      inside & y_inside[:, None],
      other=0.0,
    )
    row = feature[None, :] * TAPS + tap
    weights = tl.load(
      kernel + row * (TAPS * DEPTH) + column[:, None], known[None, :], other=0.0
    )
    total = tl.dot(tile, weights, total, input_precision='ieee')
  total += tl.load(bias + feature, known, other=0.0).to(tl.float32)[None, :]
  at = position[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = (position < SIZE)[:, None] & known[None, :]
  tl.store(
    out + at, tl.where(total < 0, 0.0, total).to(out.dtype.element_ty), stored
  )


@triton.jit
def max_pool(
  x,  # [N, HEIGHT, WIDTH, FEATURES]
  out,  # Output, [N, h, w, FEATURES]
  SIZE: tl.constexpr,  # N * h * w
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,  # FEATURES, rounded up to a power of two.
):
  """Computes the 3x3 max pooling at stride 2."""
  out_height: tl.constexpr = (HEIGHT + 1) // 2
  out_width: tl.constexpr = (WIDTH + 1) // 2
  position = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
  feature = tl.arange(0, BLOCK_FEATURES)
  known = (feature < FEATURES)[None, :]
  image = position // (out_height * out_width)
  top = position // out_width % out_height * 2 - 1
  left = position % out_width * 2 - 1
  total = tl.full([BLOCK_ROWS, BLOCK_FEATURES], float('-inf'), tl.float32)
  for tap in tl.static_range(9):
    y, x_of = top + tap // 3, left + tap % 3
    inside = (position < SIZE) & (y >= 0) & (y < HEIGHT)
    inside &= (x_of >= 0) & (x_of < WIDTH)
    row = (image * HEIGHT + y) * WIDTH + x_of
    value = tl.load(
      x + row[:, None].to(tl.int64) * FEATURES + feature[None, :],
      inside[:, None] & known,
      other=float('-inf'),
    ).to(tl.float32)
    # Keeps NaN.
    total = tl.where((value > total) | (value != value), value, total)
  at = position[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = (position < SIZE)[:, None] & known
  tl.store(out + at, total.to(out.dtype.element_ty), stored)
