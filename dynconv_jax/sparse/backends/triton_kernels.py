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
  zero,  # int32[1]; count is the same memory.
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
  x,  # [SIZE, DEPTH]
  weights,  # [PARTS, DEPTH, WIDTH]: COLUMNS of mask units, then zeros.
  indices,  # int32[...]: with LISTED, the positions to compute.
  count,  # int32[1]: with LISTED, how many.
  before,  # float32[FIRST + COLUMNS, SIZE]: terms is the same memory.
  terms,  # Out, likewise: products from FIRST on, all others as they were.
  zero,  # Out, int32[1]: 0, for `decide`.
  LISTED: tl.constexpr,
  SIZE: tl.constexpr,  # N * H * W
  PARTS: tl.constexpr,
  DEPTH: tl.constexpr,
  FIRST: tl.constexpr,
  COLUMNS: tl.constexpr,
  WIDTH: tl.constexpr,
  BLOCK_ROWS: tl.constexpr,
  BLOCK_DEPTH: tl.constexpr,
):
  """Multiplies a map by the weights of mask units, which are a sum of parts."""
  if tl.program_id(0) == 0:
    tl.store(zero, 0)
  start = tl.program_id(0) * BLOCK_ROWS
  position = start + tl.arange(0, BLOCK_ROWS)
  size = SIZE
  if LISTED:
    size, listed = tl.load(count), tl.load(indices + position)
    if start >= size:
      return
    inside = position < size
    position = tl.where(inside, listed, 0)
  else:
    inside = position < size
  column = tl.arange(0, WIDTH)
  total = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
  for first in range(0, DEPTH, BLOCK_DEPTH):
    depth = first + tl.arange(0, BLOCK_DEPTH)
    tile = tl.load(
      x + position[:, None].to(tl.int64) * DEPTH + depth[None, :],
      inside[:, None] & (depth < DEPTH)[None, :],
      other=0.0,
    )
    for part in tl.static_range(PARTS):
      columns = tl.load(
        weights + (part * DEPTH + depth)[:, None] * WIDTH + column[None, :],
        (depth < DEPTH)[:, None],
        other=0.0,
      )
      total = tl.dot(tile, columns, total, input_precision='ieee')
  at = (FIRST + column)[None, :] * SIZE + position[:, None]
  tl.store(terms + at, total, inside[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def decide(
  terms,  # float32[columns, N * HEIGHT * WIDTH], of `squeeze`.
  bias,  # float32[1]
  given,  # float32[SIZE]: with OBEY, the mask to list; else not read.
  zero,  # int32[1], of `squeeze`; count is the same memory.
  logits,  # Out, float32[SIZE]
  indices,  # Out, int32[SIZE], as of `list_positions`.
  rows,  # Out, int32[SIZE]
  count,  # Out, int32[1], zero at first.
  dilated_count,  # Out, int32[1]: 0, for `list_dilated`.
  SIZE: tl.constexpr,  # N * h * w
  OBEY: tl.constexpr,
  FIRST: tl.constexpr,  # Column of the unit's first tap; its average is last.
  TAPS: tl.constexpr,
  STRIDES: tl.constexpr,
  GRANULARITY: tl.constexpr,  # Side of the patches of h x w that it decides on.
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  BLOCK: tl.constexpr,  # Patches of a program.
  CELLS: tl.constexpr,  # GRANULARITY**2, rounded up to a power of two.
  WINDOW: tl.constexpr,  # The same of the map's positions that a tap averages.
  LANES: tl.constexpr,  # Positions of the map that are summed up at a time.
):
  """Sums up the logits of a mask unit and lists where they are not negative.

  A tap reads the mean of a patch; without patches, one position. A program's
  patches are of one image, whose average it sums up too.
  """
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  patch_rows: tl.constexpr = (out_height + GRANULARITY - 1) // GRANULARITY
  patch_columns: tl.constexpr = (out_width + GRANULARITY - 1) // GRANULARITY
  tiles: tl.constexpr = (patch_rows * patch_columns + BLOCK - 1) // BLOCK
  area: tl.constexpr = out_height * out_width
  plane: tl.constexpr = SIZE // area * HEIGHT * WIDTH
  # What a decision, and the mean that a tap reads, extend over in the map.
  spacing: tl.constexpr = STRIDES * GRANULARITY
  side: tl.constexpr = 1 if GRANULARITY == 1 else spacing
  means: tl.constexpr = (
    HEIGHT * WIDTH if GRANULARITY == 1 else patch_rows * patch_columns
  )
  if tl.program_id(0) == 0:
    tl.store(dilated_count, 0)
  image = tl.program_id(0) // tiles
  map_of = terms + image * (HEIGHT * WIDTH)
  average = map_of + (FIRST + TAPS * TAPS) * plane
  summed = tl.zeros([LANES], tl.float32)
  for start in range(0, HEIGHT * WIDTH, LANES):
    at = start + tl.arange(0, LANES)
    value = tl.load(average + at, at < HEIGHT * WIDTH, other=0.0)
    y, x = at // WIDTH // side * side, at % WIDTH // side * side
    summed += value / _extent(y, x, side, HEIGHT, WIDTH)
  patch = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
  inside = (patch < patch_rows * patch_columns)[:, None]
  row, column = patch // patch_columns, patch % patch_columns
  cell = tl.arange(0, WINDOW)[None, :]
  total = tl.zeros([BLOCK], tl.float32)
  total += tl.sum(summed, 0) / means + tl.load(bias)
  for tap in tl.static_range(TAPS * TAPS):
    top = row * spacing + (tap // TAPS - TAPS // 2) * side
    left = column * spacing + (tap % TAPS - TAPS // 2) * side
    y, x = top[:, None] + cell // side, left[:, None] + cell % side
    read = inside & (cell < side * side)
    read &= (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    at = (FIRST + tap) * plane + y * WIDTH + x
    value = tl.load(map_of + at, read, other=0.0)
    total += tl.sum(value, 1) / _extent(top, left, side, HEIGHT, WIDTH)
  cell = tl.arange(0, CELLS)[None, :]
  y = row[:, None] * GRANULARITY + cell // GRANULARITY
  x = column[:, None] * GRANULARITY + cell % GRANULARITY
  inside &= (cell < GRANULARITY * GRANULARITY) & (y < out_height)
  inside = tl.reshape(inside & (x < out_width), [BLOCK * CELLS])
  position = image * area + y * out_width + x
  position = tl.reshape(position, [BLOCK * CELLS])
  total = tl.broadcast_to(total[:, None], [BLOCK, CELLS])
  total = tl.reshape(total, [BLOCK * CELLS])
  tl.store(logits + position, total, inside)
  active = inside & (total >= 0)
  if OBEY:
    active = tl.load(given + position, inside, other=0.0) != 0
  _list(active, position, inside, indices, rows, count)


@triton.jit
def _extent(
  top, left, SIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
  """Returns how many positions of a patch are of the map, 1 at least."""
  extent = 1
  if SIDE > 1:
    extent = tl.minimum(SIDE, HEIGHT - top) * tl.minimum(SIDE, WIDTH - left)
    extent = tl.maximum(extent, 1)
  return extent


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
