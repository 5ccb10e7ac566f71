"""Triton kernels that compute residual blocks at the active positions of masks.

Positions are numbered (image * height + row) * width + column; channels are
last. Each program computes a tile of the rows at listed positions. The list's
length is read on the device, and programs past its end return immediately.
Products of bfloat16 are summed in float32. Products of float32 do not use TF32.
"""

import triton
import triton.language as tl


@triton.jit
def convolve(
  table,  # [rows, DEPTH]: a map, or its listed rows with LOOKUP.
  rows,  # int32[N * HEIGHT * WIDTH]: table rows, used with LOOKUP; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]: the number of output positions.
  kernel,  # [TAPS, TAPS, DEPTH, FEATURES]
  bias,  # float32[FEATURES]
  out,  # Output, [..., FEATURES]: rows in the order of the list.
  LOOKUP: tl.constexpr,
  MAXIMUM: tl.constexpr,  # Upper bound of the output; 0: none.
  REVERSED: tl.constexpr,
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
  """Computes relu(convolution) at the listed positions."""
  tiles: tl.constexpr = (FEATURES + BLOCK_FEATURES - 1) // BLOCK_FEATURES
  number = _number(REVERSED)
  start = number // tiles * BLOCK_ROWS
  row = start + tl.arange(0, BLOCK_ROWS)
  size, position = tl.load(count), tl.load(indices + row)
  if start >= size:
    return
  feature = number % tiles * BLOCK_FEATURES
  feature += tl.arange(0, BLOCK_FEATURES)
  listed = row < size
  total = _products(
    tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32),
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
  if MAXIMUM > 0:
    total = tl.where(total > MAXIMUM, MAXIMUM, total)
  at = row[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = listed[:, None] & (feature < FEATURES)[None, :]
  tl.store(out + at, total.to(out.dtype.element_ty), stored)


@triton.jit
def convolve_add(
  table,  # [rows, DEPTH]: listed rows; a 3x3 looks them up in `rows`.
  rows,  # int32[N * HEIGHT * WIDTH]: table rows, used by a 3x3; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]: the number of output positions.
  kernel,  # [TAPS, TAPS, DEPTH, FEATURES]
  bias,  # float32[FEATURES]
  x,  # [N * X_HEIGHT * X_WIDTH, X_DEPTH]: the block's input.
  projection,  # [X_DEPTH, FEATURES]
  base,  # [..., FEATURES]: the shortcut; aliased to out.
  out,  # Output, [..., FEATURES]
  X_STRIDES: tl.constexpr,
  X_HEIGHT: tl.constexpr,
  X_WIDTH: tl.constexpr,
  X_DEPTH: tl.constexpr,  # 0: the shortcut is the identity, read from base.
  X_BLOCK_DEPTH: tl.constexpr,
  REVERSED: tl.constexpr,
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
  number = _number(REVERSED)
  start = number // tiles * BLOCK_ROWS
  row = start + tl.arange(0, BLOCK_ROWS)
  size, position = tl.load(count), tl.load(indices + row)
  if start >= size:
    return
  feature = number % tiles * BLOCK_FEATURES
  feature += tl.arange(0, BLOCK_FEATURES)
  listed = row < size
  position = tl.where(listed, position, 0)
  # Load early, so that the load overlaps with the products.
  before = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], out.dtype.element_ty)
  if X_DEPTH == 0:
    before = _read(base, position, listed, feature, FEATURES)
  total = _products(
    tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], tl.float32),
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
  total = _project(
    total,
    x,
    projection,
    position,
    listed,
    feature,
    X_STRIDES,
    X_HEIGHT,
    X_WIDTH,
    X_DEPTH,
    FEATURES,
    X_BLOCK_DEPTH,
  )
  _add(total, bias, before, out, position, listed, feature, FEATURES)


@triton.jit
def convolve_matmul_add(
  table,  # [rows, DEPTH]: the listed rows of a map.
  rows,  # int32[N * HEIGHT * WIDTH]: table row of each position; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]: the number of output positions.
  kernel,  # [3, 3, DEPTH, DEPTH]
  bias,  # float32[DEPTH]
  last_kernel,  # [DEPTH, FEATURES]
  last_bias,  # float32[FEATURES]
  x,  # [N * X_HEIGHT * X_WIDTH, X_DEPTH]: the block's input.
  projection,  # [X_DEPTH, FEATURES]
  columns,  # [PARTS, FEATURES, COLUMNS_WIDTH]: weights, see `squeeze`.
  base,  # [..., FEATURES]: the shortcut; aliased to out.
  before_terms,  # See `before` of `squeeze`; aliased to terms.
  out,  # Output, [..., FEATURES]
  terms,  # Output, float32[FIRST + COLUMNS, SIZE]: see `squeeze`.
  zero,  # Output, int32[1]: 0, for `decide`.
  dilated_zero,  # Output, int32[1]: 0, for `decide`.
  X_STRIDES: tl.constexpr,
  X_HEIGHT: tl.constexpr,
  X_WIDTH: tl.constexpr,
  X_DEPTH: tl.constexpr,  # 0: the shortcut is the identity, read from base.
  X_BLOCK_DEPTH: tl.constexpr,
  PARTS: tl.constexpr,  # 0: no mask unit reads the map; terms are not written.
  SIZE: tl.constexpr,
  FIRST: tl.constexpr,
  COLUMNS: tl.constexpr,
  COLUMNS_WIDTH: tl.constexpr,
  REVERSED: tl.constexpr,
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
  """Writes relu(base + conv1x1(relu(conv3x3))) at the listed positions.

  Also computes the products of the written values with the weights of the next
  mask unit.
  """
  if tl.program_id(0) == 0:
    tl.store(zero, 0)
    tl.store(dilated_zero, 0)
  start = _number(REVERSED) * BLOCK_ROWS
  row = start + tl.arange(0, BLOCK_ROWS)
  size, position = tl.load(count), tl.load(indices + row)
  if start >= size:
    return
  listed = row < size
  position = tl.where(listed, position, 0)
  inner, feature = tl.arange(0, BLOCK_INNER), tl.arange(0, BLOCK_FEATURES)
  ahead = tl.zeros([BLOCK_ROWS, BLOCK_FEATURES], out.dtype.element_ty)
  if X_DEPTH == 0:
    ahead = _read(base, position, listed, feature, FEATURES)
  total = _products(
    tl.zeros([BLOCK_ROWS, BLOCK_INNER], tl.float32),
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
  column = tl.arange(0, COLUMNS_WIDTH)
  squeezed = tl.zeros([BLOCK_ROWS, COLUMNS_WIDTH], tl.float32)
  for first in range(0, FEATURES, BLOCK_FEATURES):
    feature = first + tl.arange(0, BLOCK_FEATURES)
    before = ahead
    if X_DEPTH == 0:
      ahead = _read(base, position, listed, feature + BLOCK_FEATURES, FEATURES)
    weights = tl.load(
      last_kernel + inner[:, None] * FEATURES + feature[None, :],
      (inner < DEPTH)[:, None] & (feature < FEATURES)[None, :],
      other=0.0,
    )
    added = tl.dot(hidden, weights, input_precision='ieee')
    added = _project(
      added,
      x,
      projection,
      position,
      listed,
      feature,
      X_STRIDES,
      X_HEIGHT,
      X_WIDTH,
      X_DEPTH,
      FEATURES,
      X_BLOCK_DEPTH,
    )
    added = _add(
      added, last_bias, before, out, position, listed, feature, FEATURES
    )
    for part in tl.static_range(PARTS):
      weights = tl.load(
        columns
        + (part * FEATURES + feature)[:, None] * COLUMNS_WIDTH
        + column[None, :],
        (feature < FEATURES)[:, None],
        other=0.0,
      )
      squeezed = tl.dot(added, weights, squeezed, input_precision='ieee')
  if PARTS > 0:
    at = (FIRST + column)[None, :] * SIZE + position[:, None]
    tl.store(
      terms + at, squeezed, listed[:, None] & (column < COLUMNS)[None, :]
    )


@triton.jit
def _number(REVERSED: tl.constexpr):
  """Returns the number of a program, counting down if REVERSED.

  Counting down reads first what the previous kernel wrote last, which is still
  in the L2 cache.
  """
  number = tl.program_id(0)
  if REVERSED:
    number = tl.num_programs(0) - 1 - number
  return number


@triton.jit
def _project(
  total,
  x,
  kernel,
  position,
  listed,
  feature,
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  FEATURES: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Returns total plus the projection of the shortcut, if DEPTH is not 0."""
  if DEPTH > 0:
    out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
    out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
    top = position // out_width % out_height * STRIDES
    left = position % out_width * STRIDES
    row = (position // (out_height * out_width) * HEIGHT + top) * WIDTH + left
    total = _products(
      total,
      x,
      x,  # Not read, because LOOKUP is False.
      kernel,
      row,
      listed,
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
  return total


@triton.jit
def _products(
  total,
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
  """Returns total plus a convolution, float32[positions, features].

  A single loop over taps and channels lets loads of the next tap overlap with
  the product of the current one. A 1x1 reads the rows `position`.

  Rows are looked up one step ahead. If a row were looked up in the same step,
  its load would queue behind the loads of tiles, all of which would have to
  finish before the next tile could be requested.
  """
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  steps: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
  # If BLOCK_DEPTH divides DEPTH, loads need no mask over channels.
  whole: tl.constexpr = DEPTH % BLOCK_DEPTH == 0
  image = position // (out_height * out_width)
  top = position // out_width % out_height * STRIDES - 1
  left = position % out_width * STRIDES - 1
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
  """Returns the row that a tap of a 3x3 reads, or -1 for zeros."""
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
  """Writes relu(before + total + bias) at the positions, and returns it."""
  at = position[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = listed[:, None] & (feature < FEATURES)[None, :]
  total += tl.load(bias + feature, feature < FEATURES, other=0.0)[None, :]
  total = _relu(total + before.to(tl.float32)).to(out.dtype.element_ty)
  tl.store(out + at, total, stored)
  return total


@triton.jit
def _relu(x):
  return tl.where(x < 0, 0.0, x)  # Keeps NaN.
