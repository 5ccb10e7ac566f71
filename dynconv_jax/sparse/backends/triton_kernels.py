"""Triton kernels that compute residual blocks at the active positions of masks.

Positions are numbered (image * height + row) * width + column; channels are
last. A program computes a tile of the rows that a list of positions stands for;
its length is read on the device, and programs past its end return at once.
Products of bfloat16 are summed in float32, those of float32 are exact: no TF32.
"""

import triton
import triton.language as tl


@triton.jit
def convolve(
  table,  # [rows, DEPTH]: a map, or with LOOKUP its listed rows.
  rows,  # int32[N * HEIGHT * WIDTH]: with LOOKUP, their places; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]
  kernel,  # [TAPS, TAPS, DEPTH, FEATURES]
  bias,  # float32[FEATURES]
  out,  # Out, [..., FEATURES]: rows in the order of the list.
  LOOKUP: tl.constexpr,
  TAPS: tl.constexpr,
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Computes rows of relu(convolution) at the listed positions."""
  tiles: tl.constexpr = (FEATURES + BLOCK_FEATURES - 1) // BLOCK_FEATURES
  start = tl.program_id(0) // tiles * BLOCK_ROWS
  row = start + tl.arange(0, BLOCK_ROWS)
  size, position = tl.load(count), tl.load(indices + row)
  if start >= size:
    return
  feature = tl.program_id(0) % tiles * BLOCK_FEATURES
  feature += tl.arange(0, BLOCK_FEATURES)
  listed = row < size
  total = _products(
    table,
    rows,
    kernel,
    tl.where(listed, position, 0),
    listed,
    feature,
    LOOKUP,
    TAPS,
    STRIDES,
    HEIGHT,
    WIDTH,
    DEPTH,
    FEATURES,
    BLOCK_DEPTH,
  )
  total = _relu(total + tl.load(bias + feature, feature < FEATURES)[None, :])
  at = row[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = listed[:, None] & (feature < FEATURES)[None, :]
  tl.store(out + at, total.to(out.dtype.element_ty), stored)


@triton.jit
def convolve_add(
  table,  # [rows, DEPTH]: of a 1x1 the listed rows, of a 3x3 looked up.
  rows,  # int32[N * HEIGHT * WIDTH]: of a 3x3, their places; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]
  kernel,  # [TAPS, TAPS, DEPTH, FEATURES]
  bias,  # float32[FEATURES]
  base,  # [..., FEATURES]: the shortcut; out is the same memory.
  out,  # Out, [..., FEATURES]
  TAPS: tl.constexpr,
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Writes relu(base + convolution) at the listed positions of a map."""
  tiles: tl.constexpr = (FEATURES + BLOCK_FEATURES - 1) // BLOCK_FEATURES
  start = tl.program_id(0) // tiles * BLOCK_ROWS
  row = start + tl.arange(0, BLOCK_ROWS)
  size, position = tl.load(count), tl.load(indices + row)
  if start >= size:
    return
  feature = tl.program_id(0) % tiles * BLOCK_FEATURES
  feature += tl.arange(0, BLOCK_FEATURES)
  listed = row < size
  position = tl.where(listed, position, 0)
  # Before the products, during which it comes.
  before = _read(base, position, listed, feature, FEATURES)
  total = _products(
    table,
    rows,
    kernel,
    row if TAPS == 1 else position,
    listed,
    feature,
    TAPS > 1,
    TAPS,
    STRIDES,
    HEIGHT,
    WIDTH,
    DEPTH,
    FEATURES,
    BLOCK_DEPTH,
  )
  _add(total, bias, before, out, position, listed, feature, FEATURES)


@triton.jit
def convolve_matmul_add(
  table,  # [rows, DEPTH]: listed rows of a map, looked up.
  rows,  # int32[N * HEIGHT * WIDTH]: their places; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]
  kernel,  # [3, 3, DEPTH, DEPTH]
  bias,  # float32[DEPTH]
  last_kernel,  # [DEPTH, FEATURES]
  last_bias,  # float32[FEATURES]
  base,  # [..., FEATURES]: the shortcut; out is the same memory.
  out,  # Out, [..., FEATURES]
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_INNER: tl.constexpr,  # DEPTH, rounded up to a power of two.
  BLOCK_FEATURES: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Writes relu(base + 1x1 of relu(3x3)) at the listed positions of a map."""
  start = tl.program_id(0) * BLOCK_ROWS
  row = start + tl.arange(0, BLOCK_ROWS)
  size, position = tl.load(count), tl.load(indices + row)
  if start >= size:
    return
  listed = row < size
  position = tl.where(listed, position, 0)
  inner, feature = tl.arange(0, BLOCK_INNER), tl.arange(0, BLOCK_FEATURES)
  ahead = _read(base, position, listed, feature, FEATURES)
  total = _products(
    table,
    rows,
    kernel,
    position,
    listed,
    inner,
    True,
    3,
    STRIDES,
    HEIGHT,
    WIDTH,
    DEPTH,
    DEPTH,
    BLOCK_DEPTH,
  )
  total += tl.load(bias + inner, inner < DEPTH, other=0.0)[None, :]
  hidden = _relu(total).to(table.dtype.element_ty)
  for first in range(0, FEATURES, BLOCK_FEATURES):
    feature = first + tl.arange(0, BLOCK_FEATURES)
    before = ahead
    ahead = _read(base, position, listed, feature + BLOCK_FEATURES, FEATURES)
    weights = tl.load(
      last_kernel + inner[:, None] * FEATURES + feature[None, :],
      (inner < DEPTH)[:, None] & (feature < FEATURES)[None, :],
      other=0.0,
    )
    added = tl.dot(hidden, weights, input_precision='ieee')
    _add(added, last_bias, before, out, position, listed, feature, FEATURES)


@triton.jit
def convolve_rows(
  x,  # [N, HEIGHT, WIDTH, DEPTH]
  kernel,  # [FEATURES, TAPS, TAPS * DEPTH]
  bias,  # [FEATURES]
  out,  # Out, [N, HEIGHT, WIDTH, FEATURES]
  SIZE: tl.constexpr,  # N * HEIGHT * WIDTH
  TAPS: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,  # FEATURES, rounded up to a power of two.
):
  """Computes relu(convolution) of a map of few channels.

  The taps of a row lie one after the other in memory: they are one tile.
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
  tl.store(out + at, _relu(total).to(out.dtype.element_ty), stored)


@triton.jit
def max_pool(
  x,  # [N, HEIGHT, WIDTH, FEATURES]
  out,  # Out, [N, h, w, FEATURES]
  SIZE: tl.constexpr,  # N * h * w
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,  # FEATURES, rounded up to a power of two.
):
  """Computes the maxima of windows of 3x3 positions, two apart."""
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
def project(
  table,  # [N * HEIGHT * WIDTH, DEPTH]
  rows,  # int32[SIZE]: -1 where the mask is inactive.
  kernel,  # [DEPTH, FEATURES]
  bias,  # float32[FEATURES]
  out,  # Out, [SIZE, FEATURES]
  SIZE: tl.constexpr,  # N * h * w
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_FEATURES: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Computes the projection of a shortcut, rectified where nothing is added."""
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  tiles: tl.constexpr = (FEATURES + BLOCK_FEATURES - 1) // BLOCK_FEATURES
  row = tl.program_id(0) // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
  feature = tl.program_id(0) % tiles * BLOCK_FEATURES
  feature += tl.arange(0, BLOCK_FEATURES)
  inside = row < SIZE
  active = tl.load(rows + row, inside, other=0) >= 0
  image = row // (out_height * out_width)
  y, x = row // out_width % out_height, row % out_width
  total = _products(
    table,
    rows,
    kernel,
    (image * HEIGHT + y * STRIDES) * WIDTH + x * STRIDES,
    inside,
    feature,
    False,
    1,
    1,
    HEIGHT,
    WIDTH,
    DEPTH,
    FEATURES,
    BLOCK_DEPTH,
  )
  total += tl.load(bias + feature, feature < FEATURES, other=0.0)[None, :]
  total = tl.where(active[:, None], total, _relu(total))
  at = row[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = inside[:, None] & (feature < FEATURES)[None, :]
  tl.store(out + at, total.to(out.dtype.element_ty), stored)


@triton.jit
def _products(
  table,
  rows,
  kernel,
  position,
  listed,
  feature,
  LOOKUP: tl.constexpr,
  TAPS: tl.constexpr,
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Returns float32[positions, features]: a convolution without its bias.

  One loop over taps and channels, so that loads of the next tap are on their
  way while this one is multiplied. A 1x1 reads the rows `position`.

  A row is looked up a step ahead. Were it in the same one, its load would stand
  in one queue with those of the tiles, which would all have to be there before
  the next tile can be asked for.
  """
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  steps: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
  # Where there is no rest of channels no load is masked for it.
  whole: tl.constexpr = DEPTH % BLOCK_DEPTH == 0
  image = position // (out_height * out_width)
  top = position // out_width % out_height * STRIDES - 1
  left = position % out_width * STRIDES - 1
  total = tl.zeros([position.shape[0], feature.shape[0]], tl.float32)
  row = tl.where(listed, position, -1)
  if TAPS > 1:
    row = _row(rows, image, top, left, 0, listed, LOOKUP, HEIGHT, WIDTH)
  for step in range(TAPS * TAPS * steps):
    here = row
    if TAPS > 1:
      tap = (step + 1) // steps
      row = _row(rows, image, top, left, tap, listed, LOOKUP, HEIGHT, WIDTH)
    depth = step % steps * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    rest = whole | (depth < DEPTH)
    left_tile = tl.load(
      table + here[:, None].to(tl.int64) * DEPTH + depth[None, :],
      (here >= 0)[:, None] & rest[None, :],
      other=0.0,
    )
    depth += step // steps * DEPTH
    right_tile = tl.load(
      kernel + depth[:, None] * FEATURES + feature[None, :],
      rest[:, None] & (feature < FEATURES)[None, :],
      other=0.0,
    )
    total = tl.dot(left_tile, right_tile, total, input_precision='ieee')
  return total


@triton.jit
def _row(
  rows,
  image,
  top,
  left,
  tap,
  listed,
  LOOKUP: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
):
  """Returns the rows that a tap of a 3x3 reads; -1: zeros."""
  y, x = top + tap // 3, left + tap % 3
  inside = listed & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
  row = (image * HEIGHT + y) * WIDTH + x
  if LOOKUP:
    return tl.load(rows + row, inside, other=-1)
  return tl.where(inside, row, -1)


@triton.jit
def _read(base, position, listed, feature, FEATURES: tl.constexpr):
  """Returns a tile of a map."""
  return tl.load(
    base + position[:, None].to(tl.int64) * FEATURES + feature[None, :],
    listed[:, None] & (feature < FEATURES)[None, :],
    other=0.0,
  )


@triton.jit
def _add(
  total, bias, before, out, position, listed, feature, FEATURES: tl.constexpr
):
  """Writes relu(before + total + bias) at positions."""
  at = position[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = listed[:, None] & (feature < FEATURES)[None, :]
  total += tl.load(bias + feature, feature < FEATURES, other=0.0)[None, :]
  total += before.to(tl.float32)
  tl.store(out + at, _relu(total).to(out.dtype.element_ty), stored)


@triton.jit
def _relu(x):
  return tl.where(x < 0, 0.0, x)  # Keeps NaN.
