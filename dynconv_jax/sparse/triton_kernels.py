"""Triton kernels that compute residual blocks at the active positions of masks.

Positions are numbered (image * height + row) * width + column; channels are
last. A program computes a tile of the rows that a list of positions stands for;
its length is read on the device, and programs past its end return at once.
Products of bfloat16 are summed in float32, those of float32 are exact: no TF32.
"""

import triton
import triton.language as tl


@triton.jit
def list_positions(
  mask,  # float32[SIZE]
  indices,  # Out, int32[SIZE]: the active positions.
  rows,  # Out, int32[SIZE]: the place of each in the list; -1: inactive.
  count,  # Out, int32[1], zero at first: how many there are.
  SIZE: tl.constexpr,
  BLOCK: tl.constexpr,
):
  """Lists the active positions of a mask."""
  position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
  inside = position < SIZE
  active = tl.load(mask + position, inside, other=0.0) != 0
  _list(active, position, inside, indices, rows, count)


@triton.jit
def list_dilated(
  active_rows,  # int32[N * h * w]: -1 where the mask is inactive.
  indices,  # Out, int32[SIZE], as of `list_positions`.
  rows,  # Out, int32[SIZE]
  count,  # Out, int32[1], zero at first.
  SIZE: tl.constexpr,  # N * HEIGHT * WIDTH
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  BLOCK: tl.constexpr,
):
  """Lists the positions that a 3x3 convolution at those of a list reads."""
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
  inside = position < SIZE
  image = position // (HEIGHT * WIDTH)
  top, left = position // WIDTH % HEIGHT - 1, position % WIDTH - 1
  active = position < 0
  for tap in tl.static_range(9):
    y, x = top + tap // 3, left + tap % 3
    read = inside & (y >= 0) & (x >= 0)
    read &= (y % STRIDES == 0) & (x % STRIDES == 0)
    y, x = y // STRIDES, x // STRIDES
    read &= (y < out_height) & (x < out_width)
    at = (image * out_height + y) * out_width + x
    active |= tl.load(active_rows + at, read, other=-1) >= 0
  _list(active, position, inside, indices, rows, count)


@triton.jit
def squeeze(
  x,  # [N * HEIGHT * WIDTH, DEPTH]
  weights,  # [PARTS, DEPTH, 16]: columns of the taps, of the average, zeros.
  terms,  # Out, float32[TAPS * TAPS, N * HEIGHT * WIDTH]: products of the taps.
  sums,  # Out, float32[N, tiles]: of the average's products, a tile each.
  SIZE: tl.constexpr,  # N * HEIGHT * WIDTH
  PARTS: tl.constexpr,
  TAPS: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  DEPTH: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Multiplies a map by the weights of a mask unit, which are a sum of parts.

  A tile of rows is of one image.
  """
  area: tl.constexpr = HEIGHT * WIDTH
  tiles: tl.constexpr = (area + BLOCK_ROWS - 1) // BLOCK_ROWS
  row = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
  inside = row < area
  position = tl.program_id(0) // tiles * area + row
  column = tl.arange(0, 16)
  total = tl.zeros([BLOCK_ROWS, 16], tl.float32)
  for start in range(0, DEPTH, BLOCK_DEPTH):
    depth = start + tl.arange(0, BLOCK_DEPTH)
    tile = tl.load(
      x + position[:, None].to(tl.int64) * DEPTH + depth[None, :],
      inside[:, None] & (depth < DEPTH)[None, :],
      other=0.0,
    )
    for part in tl.static_range(PARTS):
      columns = tl.load(
        weights + (part * DEPTH + depth)[:, None] * 16 + column[None, :],
        (depth < DEPTH)[:, None],
        other=0.0,
      )
      total = tl.dot(tile, columns, total, input_precision='ieee')
  stored = inside[:, None] & (column < TAPS * TAPS)[None, :]
  tl.store(terms + column[None, :] * SIZE + position[:, None], total, stored)
  average = tl.where((column == TAPS * TAPS)[None, :], total, 0.0)
  tl.store(sums + tl.program_id(0), tl.sum(tl.sum(average, 1), 0))


@triton.jit
def decide(
  terms,  # float32[TAPS * TAPS, N * HEIGHT * WIDTH], of `squeeze`.
  sums,  # float32[N, tiles], of `squeeze`.
  bias,  # float32[1]
  given,  # float32[SIZE]: with OBEY, the mask to list; else not read.
  logits,  # Out, float32[SIZE]
  indices,  # Out, int32[SIZE], as of `list_positions`.
  rows,  # Out, int32[SIZE]
  count,  # Out, int32[1], zero at first.
  SIZE: tl.constexpr,  # N * h * w
  OBEY: tl.constexpr,
  TAPS: tl.constexpr,
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,  # Of `squeeze`.
  BLOCK: tl.constexpr,
):
  """Sums up the logits of a mask unit and lists where they are not negative."""
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  plane: tl.constexpr = SIZE // (out_height * out_width) * HEIGHT * WIDTH
  tiles: tl.constexpr = (HEIGHT * WIDTH + BLOCK_ROWS - 1) // BLOCK_ROWS
  position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
  inside = position < SIZE
  image = position // (out_height * out_width)
  top = position // out_width % out_height * STRIDES - TAPS // 2
  left = position % out_width * STRIDES - TAPS // 2
  total = tl.zeros([BLOCK], tl.float32)
  for tile in range(tiles):
    total += tl.load(sums + image * tiles + tile, inside, other=0.0)
  total = total / (HEIGHT * WIDTH) + tl.load(bias)
  for tap in tl.static_range(TAPS * TAPS):
    y, x = top + tap // TAPS, left + tap % TAPS
    read = inside & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    at = tap * plane + (image * HEIGHT + y) * WIDTH + x
    total += tl.load(terms + at, read, other=0.0)
  tl.store(logits + position, total, inside)
  active = inside & (total >= 0)
  if OBEY:
    active = tl.load(given + position, inside, other=0.0) != 0
  _list(active, position, inside, indices, rows, count)


@triton.jit
def _list(active, position, inside, indices, rows, count):
  """Adds the active ones of a program's positions to a list.

  Programs take places in the order in which they come. Positions increase
  within a program's tile only; no result depends on the place of its row.
  """
  rank = tl.cumsum(active.to(tl.int32), 0)
  row = tl.atomic_add(count, tl.max(rank, 0)) + rank - 1
  tl.store(rows + position, tl.where(active, row, -1), inside)
  tl.store(indices + row, position, active)


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
  size = tl.load(count)
  if start >= size:
    return
  row = start + tl.arange(0, BLOCK_ROWS)
  feature = tl.program_id(0) % tiles * BLOCK_FEATURES
  feature += tl.arange(0, BLOCK_FEATURES)
  listed = row < size
  total = _products(
    table,
    rows,
    kernel,
    tl.load(indices + row, listed, other=0),
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
  size = tl.load(count)
  if start >= size:
    return
  row = start + tl.arange(0, BLOCK_ROWS)
  feature = tl.program_id(0) % tiles * BLOCK_FEATURES
  feature += tl.arange(0, BLOCK_FEATURES)
  listed = row < size
  position = tl.load(indices + row, listed, other=0)
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
  _add(total, bias, base, out, position, listed, feature, FEATURES)


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
  size = tl.load(count)
  if start >= size:
    return
  row = start + tl.arange(0, BLOCK_ROWS)
  listed = row < size
  position = tl.load(indices + row, listed, other=0)
  inner = tl.arange(0, BLOCK_INNER)
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
    weights = tl.load(
      last_kernel + inner[:, None] * FEATURES + feature[None, :],
      (inner < DEPTH)[:, None] & (feature < FEATURES)[None, :],
      other=0.0,
    )
    added = tl.dot(hidden, weights, input_precision='ieee')
    _add(added, last_bias, base, out, position, listed, feature, FEATURES)


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
  for step in range(TAPS * TAPS * steps):
    tap = step // steps
    depth = step % steps * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    row, inside = position, listed
    if TAPS > 1:
      y, x = top + tap // TAPS, left + tap % TAPS
      inside &= (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
      row = (image * HEIGHT + y) * WIDTH + x
    if LOOKUP:
      row = tl.load(rows + row, inside, other=-1)
      inside = row >= 0
    left_tile = tl.load(
      table + row[:, None].to(tl.int64) * DEPTH + depth[None, :],
      inside[:, None] & (whole | (depth < DEPTH))[None, :],
      other=0.0,
    )
    right_tile = tl.load(
      kernel + (tap * DEPTH + depth)[:, None] * FEATURES + feature[None, :],
      (whole | (depth < DEPTH))[:, None] & (feature < FEATURES)[None, :],
      other=0.0,
    )
    total = tl.dot(left_tile, right_tile, total, input_precision='ieee')
  return total


@triton.jit
def _add(
  total, bias, base, out, position, listed, feature, FEATURES: tl.constexpr
):
  """Writes relu(base + total + bias) at positions."""
  at = position[:, None].to(tl.int64) * FEATURES + feature[None, :]
  stored = listed[:, None] & (feature < FEATURES)[None, :]
  total += tl.load(bias + feature, feature < FEATURES, other=0.0)[None, :]
  total += tl.load(base + at, stored, other=0.0).to(tl.float32)
  tl.store(out + at, _relu(total).to(out.dtype.element_ty), stored)


@triton.jit
def _relu(x):
  return tl.where(x < 0, 0.0, x)  # Keeps NaN.
