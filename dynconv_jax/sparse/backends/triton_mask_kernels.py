"""Triton kernels that decide where residual blocks run, and list positions.

Positions are numbered (image * height + row) * width + column; channels are
last. The length of a list is read on the device, and programs past its end
return at once. Products of bfloat16 are summed in float32, those of float32 are
exact: no TF32.
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
  position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
  inside = position < SIZE
  active = _dilated(active_rows, position, inside, STRIDES, HEIGHT, WIDTH)
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
  dilated_zero,  # Out, int32[1]: 0, likewise.
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
  terms,  # float32[columns, N * HEIGHT * WIDTH], of `squeeze`.
  bias,  # float32[1]
  given,  # float32[SIZE]: with OBEY, the mask to list; else not read.
  zero,  # int32[1], of `squeeze`; count is the same memory.
  dilated_zero,  # int32[1], likewise; dilated_count is the same memory.
  logits,  # Out, float32[SIZE]
  indices,  # Out, int32[SIZE], as of `list_positions`.
  rows,  # Out, int32[SIZE]
  count,  # Out, int32[1], zero at first.
  dilated_indices,  # Out, with DILATED as of `list_dilated`.
  dilated_rows,  # Out, likewise.
  dilated_count,  # Out, int32[1]: zero at first.
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
  DILATED: tl.constexpr,  # An image is a program's, which dilates it too.
  D_STRIDES: tl.constexpr,  # Of the convolution that reads the dilated map.
  D_HEIGHT: tl.constexpr,
  D_WIDTH: tl.constexpr,
  D_BLOCK: tl.constexpr,
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
    # Other threads read what this one has stored.
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
  """Returns whether a 3x3 convolution at listed positions reads others."""
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
