"""Triton kernels that decide where residual blocks run, and list positions.

Positions are numbered (image * height + row) * width + column; channels are
last. The length of a list is read on the device, and programs past its end
return immediately. Products of bfloat16 are summed in float32. Products of
float32 do not use TF32.
"""

import triton
import triton.language as tl


@triton.jit
def list_positions(
  mask,  # float32[SIZE]
  indices,  # Output, int32[SIZE]: the active positions.
  rows,  # Output, int32[SIZE]: index of each in the list; -1: inactive.
  count,  # Output, int32[1], initially 0: the number of active positions.
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
  zero,  # int32[1], 0; aliased to count.
  indices,  # Output, int32[SIZE]: see `list_positions`.
  rows,  # Output, int32[SIZE]: see `list_positions`.
  count,  # Output, int32[1], initially 0: see `list_positions`.
  SIZE: tl.constexpr,  # N * HEIGHT * WIDTH
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  BLOCK: tl.constexpr,
):
  """Lists the positions that a 3x3 convolution at listed positions reads."""
  position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
  inside = position < SIZE
  active = _dilated(active_rows, position, inside, STRIDES, HEIGHT, WIDTH)
  _list(active, position, inside, indices, rows, count)


@triton.jit
def squeeze(
  x,  # [SIZE, DEPTH]
  weights,  # [PARTS, DEPTH, WIDTH]: COLUMNS columns of mask units, then zeros.
  indices,  # int32[...]: the positions to compute, used with LISTED.
  count,  # int32[1]: the number of positions, used with LISTED.
  before,  # float32[FIRST + COLUMNS, SIZE]: aliased to terms.
  terms,  # Output, like `before`: products from row FIRST on; others unchanged.
  zero,  # Output, int32[1]: 0, for `decide`.
  dilated_zero,  # Output, int32[1]: 0, for `decide`.
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
  """Multiplies a map by the weights of mask units, given as a sum of parts."""
  if tl.program_id(0) == 0:
    tl.store(zero, 0)
    tl.store(dilated_zero, 0)
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
  terms,  # float32[columns, N * HEIGHT * WIDTH]: see `squeeze`.
  bias,  # float32[1]
  given,  # float32[SIZE]: the mask to list, used with OBEY.
  zero,  # int32[1], 0, from `squeeze`; aliased to count.
  dilated_zero,  # int32[1], 0, from `squeeze`; aliased to dilated_count.
  logits,  # Output, float32[SIZE]
  indices,  # Output, int32[SIZE]: see `list_positions`.
  rows,  # Output, int32[SIZE]: see `list_positions`.
  count,  # Output, int32[1], initially 0: see `list_positions`.
  dilated_indices,  # Output, written with DILATED: see `list_dilated`.
  dilated_rows,  # Output, written with DILATED: see `list_dilated`.
  dilated_count,  # Output, int32[1], initially 0: see `list_dilated`.
  SIZE: tl.constexpr,  # N * h * w
  OBEY: tl.constexpr,
  FIRST: tl.constexpr,  # Column of the first tap; the last one is the average.
  TAPS: tl.constexpr,
  STRIDES: tl.constexpr,
  GRANULARITY: tl.constexpr,  # Side of the patches, in positions of h x w.
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
  BLOCK: tl.constexpr,  # Patches per program.
  CELLS: tl.constexpr,  # GRANULARITY**2, rounded up to a power of two.
  WINDOW: tl.constexpr,  # Map positions that a tap averages, rounded up too.
  LANES: tl.constexpr,  # Map positions to sum at a time.
  DILATED: tl.constexpr,  # Each program decides on and dilates a whole image.
  D_STRIDES: tl.constexpr,  # Strides of the conv that reads the dilated map.
  D_HEIGHT: tl.constexpr,
  D_WIDTH: tl.constexpr,
  D_BLOCK: tl.constexpr,
):
  """Sums the logits of a mask unit and lists positions with logits >= 0.

  Each tap reads the mean of a patch, or one position if GRANULARITY is 1. All
  patches of a program belong to one image, whose average it computes too.
  """
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  patch_rows: tl.constexpr = (out_height + GRANULARITY - 1) // GRANULARITY
  patch_columns: tl.constexpr = (out_width + GRANULARITY - 1) // GRANULARITY
  tiles: tl.constexpr = (patch_rows * patch_columns + BLOCK - 1) // BLOCK
  area: tl.constexpr = out_height * out_width
  plane: tl.constexpr = SIZE // area * HEIGHT * WIDTH
  # Sides, in map positions, of a decision and of the patch that a tap averages.
  spacing: tl.constexpr = STRIDES * GRANULARITY
  side: tl.constexpr = 1 if GRANULARITY == 1 else spacing
  means: tl.constexpr = (
    HEIGHT * WIDTH if GRANULARITY == 1 else patch_rows * patch_columns
  )
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
  if DILATED:
    # Other threads read the rows that this thread stored.
    tl.debug_barrier()
    for first in range(0, D_HEIGHT * D_WIDTH, D_BLOCK):
      place = first + tl.arange(0, D_BLOCK)
      known = place < D_HEIGHT * D_WIDTH
      place += image * (D_HEIGHT * D_WIDTH)
      needed = _dilated(rows, place, known, D_STRIDES, D_HEIGHT, D_WIDTH)
      _list(needed, place, known, dilated_indices, dilated_rows, dilated_count)


@triton.jit
def _dilated(
  rows,
  position,
  inside,
  STRIDES: tl.constexpr,
  HEIGHT: tl.constexpr,
  WIDTH: tl.constexpr,
):
  """Returns whether a 3x3 convolution at active positions reads `position`."""
  out_height: tl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: tl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
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
    active |= tl.load(rows + at, read, other=-1) >= 0
  return active


@triton.jit
def _extent(
  top, left, SIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
  """Returns the number of positions of a patch in the map, at least 1."""
  extent = 1
  if SIDE > 1:
    extent = tl.minimum(SIDE, HEIGHT - top) * tl.minimum(SIDE, WIDTH - left)
    extent = tl.maximum(extent, 1)
  return extent


@triton.jit
def _list(active, position, inside, indices, rows, count):
  """Appends the active positions of a program to a list.

  Programs append in the order in which they run, so positions increase only
  within each program's tile. Results do not depend on the order of rows.
  """
  rank = tl.cumsum(active.to(tl.int32), 0)
  row = tl.atomic_add(count, tl.max(rank, 0)) + rank - 1
  tl.store(rows + position, tl.where(active, row, -1), inside)
  tl.store(indices + row, position, active)
