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


@triton.jit
def convolve_pool(
  x,  # [N, HEIGHT, WIDTH, DEPTH]
  kernel,  # [FEATURES, TAPS, TAPS * DEPTH]
  bias,  # [FEATURES]
  columns,  # [PARTS, FEATURES, COLUMNS_WIDTH], of `squeeze`.
  out,  # Out, [N, h, w, FEATURES]
  terms,  # Out, float32[COLUMNS, SIZE]: as of `squeeze`.
  zero,  # Out, int32[1]: 0, for `decide`.
  dilated_zero,  # Out, int32[1]: 0, likewise.
  SIZE: tl.constexpr,  # N * h * w
  TAPS: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  PARTS: tl.constexpr,  # 0: no mask unit reads the map, terms are not written.
  COLUMNS: tl.constexpr,
  COLUMNS_WIDTH: tl.constexpr,
  LINES: tl.constexpr,  # Of the output, that a program computes.
  BLOCK_ROWS: tl.constexpr,  # Positions of a line, one more than are written.
  BLOCK_FEATURES: tl.constexpr,  # FEATURES, rounded up to a power of two.
):
  """Computes relu(convolution), and what `max_pool` does of it.

  A program goes down a strip: the last line of a window is the first one of the
  next. A window's first column is the last one of the position before it, which
  is why a program's first position is not written. All values of windows are
  zero or more, as is what stands for those outside of the map.
  """
  if tl.program_id(0) == 0:
    tl.store(zero, 0)
    tl.store(dilated_zero, 0)
  out_height: tl.constexpr = (HEIGHT + 1) // 2
  out_width: tl.constexpr = (WIDTH + 1) // 2
  strips: tl.constexpr = (out_height + LINES - 1) // LINES
  place = tl.arange(0, BLOCK_ROWS)
  feature = tl.arange(0, BLOCK_FEATURES)
  column = tl.arange(0, COLUMNS_WIDTH)
  # Lines of all images, one after the other.
  across = tl.program_id(0) // strips * (BLOCK_ROWS - 1) - 1 + place
  known = (across >= 0) & (across < SIZE // out_height)
  across = tl.where(known, across, 0)
  image, left = across // out_width, across % out_width
  written, known_feature = known & (place > 0), feature < FEATURES
  first = tl.program_id(0) % strips * LINES
  before = tl.broadcast_to(
    tl.maximum(place - 1, 0)[:, None], [BLOCK_ROWS, BLOCK_FEATURES]
  )
  added = tl.load(bias + feature, known_feature, other=0.0).to(tl.float32)
  even_most = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.uint16)
  odd_most = even_most
  for step in range(2 * LINES + 1):
    top = 2 * first - 1 + step
    even = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    odd = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32)
    for tap in range(TAPS):
      y = top + tap - TAPS // 2
      inside = known & (y >= 0) & (y < HEIGHT)
      line = (image * HEIGHT + y).to(tl.int64) * WIDTH
      depth = tl.arange(0, TAPS * DEPTH)
      weights = tl.load(
        kernel
        + (feature * TAPS + tap)[None, :] * (TAPS * DEPTH)
        + depth[:, None],
        known_feature[None, :],
        other=0.0,
      )
      tile = _taps(x, line, 2 * left, inside, TAPS, WIDTH, DEPTH)
      even = tl.dot(tile, weights, even)
      tile = _taps(x, line, 2 * left + 1, inside, TAPS, WIDTH, DEPTH)
      odd = tl.dot(tile, weights, odd)
    inside = known & (top >= 0) & (top < HEIGHT)
    even = _rectified(even, added, inside)
    inside &= 2 * left + 1 < WIDTH
    odd = _rectified(odd, added, inside)
    even_most = tl.maximum(even_most, even)
    odd_most = tl.maximum(odd_most, odd)
    if step % 2 == 0:
      row = first + step // 2 - 1
      stored = written & (step > 0) & (row < out_height)
      position = (image * out_height + row) * out_width + left
      most = tl.gather(odd_most, before, 0)
      most = tl.where((left > 0)[:, None], most, tl.zeros_like(most))
      most = tl.maximum(most, tl.maximum(even_most, odd_most))
      pooled = most.to(tl.bfloat16, bitcast=True)
      tl.store(
        out + position[:, None].to(tl.int64) * FEATURES + feature[None, :],
        pooled,
        stored[:, None] & known_feature[None, :],
      )
      if PARTS > 0:
        squeezed = tl.zeros([BLOCK_ROWS, COLUMNS_WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
          matrix = tl.load(
            columns
            + (part * FEATURES + feature)[:, None] * COLUMNS_WIDTH
            + column[None, :],
            known_feature[:, None],
            other=0.0,
          )
          squeezed = tl.dot(pooled, matrix, squeezed)
        tl.store(
          terms + column[None, :] * SIZE + position[:, None],
          squeezed,
          stored[:, None] & (column < COLUMNS)[None, :],
        )
      even_most, odd_most = even, odd


@triton.jit
def _taps(
  x,
  line,
  left,
  inside,
  TAPS: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
):
  """Returns [positions, TAPS * DEPTH], what a row of taps reads of a line."""
  column = tl.arange(0, TAPS * DEPTH)
  x_of = (left - TAPS // 2)[:, None] + (column // DEPTH)[None, :]
  at = (line + left - TAPS // 2) * DEPTH
  return tl.load(
    x + at[:, None] + column[None, :],
    inside[:, None] & (x_of >= 0) & (x_of < WIDTH),
    other=0.0,
  )


@triton.jit
def _rectified(total, bias, inside):
  """Returns the bits of bfloat16: relu(total + bias), 0 outside of the map.

  As integers, numbers from 0 up are in order, and NaN is above them all.
  """
  total += bias[None, :]
  total = tl.where(inside[:, None] & ~(total <= 0), total, 0.0)
  return total.to(tl.bfloat16).to(tl.uint16, bitcast=True)
