"""A gathered convolution in Gluon, for the tensor cores of Hopper GPUs (sm_90).

Four warps copy rows and weights to shared memory, and the other warps multiply
them. Unlike in a kernel whose warps do both, multiplications do not wait for
the warp's own copies. Follows the gathered products of QuACK and SonicMoE.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
  fence_async_shared,
  mbarrier,
  warpgroup_mma,
  warpgroup_mma_wait,
)


@gluon.jit
def convolve_gathered(
  table,  # bfloat16[rows, DEPTH]: a map, or its listed rows for a 3x3.
  rows,  # int32[N * HEIGHT * WIDTH]: row of each position for a 3x3; -1: zeros.
  indices,  # int32[...]: the output positions.
  count,  # int32[1]
  kernel,  # bfloat16[TAPS, TAPS, DEPTH, FEATURES]
  bias,  # float32[FEATURES]
  out,  # Output, bfloat16[..., FEATURES]: rows in the order of the list.
  REVERSED: gl.constexpr,
  TAPS: gl.constexpr,
  STRIDES: gl.constexpr,
  HEIGHT: gl.constexpr,
  WIDTH: gl.constexpr,
  DEPTH: gl.constexpr,  # A multiple of BLOCK_DEPTH.
  FEATURES: gl.constexpr,  # A multiple of BLOCK_FEATURES.
  BLOCK_ROWS: gl.constexpr,
  BLOCK_FEATURES: gl.constexpr,
  BLOCK_DEPTH: gl.constexpr,
  STAGES: gl.constexpr,  # Number of tiles in shared memory.
  REGISTERS: gl.constexpr,  # Registers per copying thread.
):
  """Computes rows of relu(convolution) at the listed positions."""
  tiles: gl.constexpr = FEATURES // BLOCK_FEATURES
  number = gl.program_id(0)
  if REVERSED:
    number = gl.num_programs(0) - 1 - number
  start = number // tiles * BLOCK_ROWS
  first = number % tiles * BLOCK_FEATURES
  size = gl.load(count)
  if start < size:
    dtype: gl.constexpr = table.dtype.element_ty
    left = gl.allocate_shared_memory(
      dtype,
      [STAGES, BLOCK_ROWS, BLOCK_DEPTH],
      gl.NVMMASharedLayout(128, 16, 2),
    )
    right = gl.allocate_shared_memory(
      dtype,
      [STAGES, BLOCK_DEPTH, BLOCK_FEATURES],
      gl.NVMMASharedLayout(128, 16, 2),
    )
    full = gl.allocate_shared_memory(
      gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()
    )
    empty = gl.allocate_shared_memory(
      gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()
    )
    for stage in gl.static_range(STAGES):
      mbarrier.init(full.index(stage), count=128)  # The copying threads.
      mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
      [
        (
          _multiply,
          (
            bias,
            out,
            size,
            start,
            first,
            left,
            right,
            full,
            empty,
            TAPS * TAPS * DEPTH // BLOCK_DEPTH,
            FEATURES,
            BLOCK_ROWS,
            BLOCK_FEATURES,
            STAGES,
          ),
        ),
        (
          _copy,
          (
            table,
            rows,
            indices,
            kernel,
            size,
            start,
            first,
            left,
            right,
            full,
            empty,
            TAPS,
            STRIDES,
            HEIGHT,
            WIDTH,
            DEPTH,
            FEATURES,
            BLOCK_ROWS,
            BLOCK_FEATURES,
            BLOCK_DEPTH,
            STAGES,
          ),
        ),
      ],
      [4],
      [REGISTERS],
    )


@gluon.jit
def _copy(
  table,
  rows,
  indices,
  kernel,
  size,
  start,
  first,
  left,
  right,
  full,
  empty,
  TAPS: gl.constexpr,
  STRIDES: gl.constexpr,
  HEIGHT: gl.constexpr,
  WIDTH: gl.constexpr,
  DEPTH: gl.constexpr,
  FEATURES: gl.constexpr,
  BLOCK_ROWS: gl.constexpr,
  BLOCK_FEATURES: gl.constexpr,
  BLOCK_DEPTH: gl.constexpr,
  STAGES: gl.constexpr,
):
  """Copies tiles of rows and weights; looks up rows one step ahead."""
  # Each thread copies 16 bytes at a time.
  of_rows: gl.constexpr = gl.BlockedLayout(
    [1, 8], [32 // (BLOCK_DEPTH // 8), BLOCK_DEPTH // 8], [4, 1], [1, 0]
  )
  of_weights: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
  out_height: gl.constexpr = (HEIGHT + STRIDES - 1) // STRIDES
  out_width: gl.constexpr = (WIDTH + STRIDES - 1) // STRIDES
  steps: gl.constexpr = DEPTH // BLOCK_DEPTH
  row = start + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, of_rows))
  listed = row < size
  position = gl.load(indices + row, listed, other=0)
  image = position // (out_height * out_width)
  top = position // out_width % out_height * STRIDES - 1
  side = position % out_width * STRIDES - 1
  depth = gl.arange(0, BLOCK_DEPTH, gl.SliceLayout(0, of_rows))
  weight = gl.arange(0, BLOCK_DEPTH, gl.SliceLayout(1, of_weights))
  feature = first + gl.arange(0, BLOCK_FEATURES, gl.SliceLayout(0, of_weights))
  following = gl.where(listed, position, -1)
  if TAPS > 1:
    following = _row(rows, image, top, side, 0, listed, HEIGHT, WIDTH)
  for step in range(TAPS * TAPS * steps):
    here = following
    if TAPS > 1:
      tap = (step + 1) // steps
      following = _row(rows, image, top, side, tap, listed, HEIGHT, WIDTH)
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
    at = here[:, None].to(gl.int64) * DEPTH
    at += (step % steps * BLOCK_DEPTH + depth)[None, :]
    # Missing rows are zeros.
    known = gl.expand_dims(here >= 0, 1) & gl.expand_dims(depth >= 0, 0)
    async_copy.async_copy_global_to_shared(left.index(stage), table + at, known)
    at = (step * BLOCK_DEPTH + weight)[:, None] * FEATURES + feature[None, :]
    async_copy.async_copy_global_to_shared(right.index(stage), kernel + at)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _row(
  rows,
  image,
  top,
  side,
  tap,
  listed,
  HEIGHT: gl.constexpr,
  WIDTH: gl.constexpr,
):
  """Returns the row that a tap of a 3x3 reads, or -1 for zeros."""
  y, x = top + tap // 3, side + tap % 3
  inside = listed & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
  return gl.load(rows + (image * HEIGHT + y) * WIDTH + x, inside, other=-1)


@gluon.jit
def _multiply(
  bias,
  out,
  size,
  start,
  first,
  left,
  right,
  full,
  empty,
  STEPS: gl.constexpr,
  FEATURES: gl.constexpr,
  BLOCK_ROWS: gl.constexpr,
  BLOCK_FEATURES: gl.constexpr,
  STAGES: gl.constexpr,
):
  """Multiplies tiles as they arrive, with one product in flight."""
  layout: gl.constexpr = gl.NVMMADistributedLayout(
    [3, 0], [gl.num_warps(), 1], [16, BLOCK_FEATURES, 16]
  )
  total = gl.zeros([BLOCK_ROWS, BLOCK_FEATURES], gl.float32, layout)
  for step in range(STEPS):
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    fence_async_shared()  # Makes the copies visible to the tensor cores.
    total = warpgroup_mma(
      left.index(stage), right.index(stage), total, is_async=True
    )
    total = warpgroup_mma_wait(num_outstanding=1, deps=[total])
    # The previous product is complete.
    before = (step + STAGES - 1) % STAGES
    mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
  total = warpgroup_mma_wait(num_outstanding=0, deps=[total])
  feature = first + gl.arange(0, BLOCK_FEATURES, gl.SliceLayout(0, layout))
  total += gl.load(bias + feature)[None, :]
  total = gl.where(total < 0, 0.0, total)  # Keeps NaN.
  stored: gl.constexpr = gl.BlockedLayout(
    [1, 8], [2, 16], [gl.num_warps(), 1], [1, 0]
  )
  y = gl.convert_layout(total.to(out.dtype.element_ty), stored)
  row = start + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, stored))
  feature = first + gl.arange(0, BLOCK_FEATURES, gl.SliceLayout(0, stored))
  at = row[:, None].to(gl.int64) * FEATURES + feature[None, :]
  gl.store(out + at, y, gl.expand_dims(row < size, 1))
