"""How each residual block is executed, and executing it so."""

from __future__ import annotations

import dataclasses
import functools

import jax

from dynconv_jax.sparse.dense import run_dense, run_images
from dynconv_jax.sparse.fold import FoldedBlock
from dynconv_jax.sparse.gpu import Lists, list_positions, run_triton
from dynconv_jax.sparse.native import run_native
from dynconv_jax.sparse.rows import run_buckets, run_chunks

FORMS = ('dense', 'native', 'triton', 'chunks', 'buckets', 'images')


@dataclasses.dataclass(frozen=True)
class BlockPlan:
  """How a block is executed; every plan gives the same result.

  Attributes:
    form: 'dense', all positions; 'native', active positions by kernels of this
      machine's CPU, see `native.run_native`; 'triton', by those for a GPU, see
      `gpu.run_triton`; 'chunks' or 'buckets', active positions by XLA, see
      `rows.run_chunks` and `rows.run_buckets`; 'images', whole active images by
      XLA.
    sizes: rows a chunk, or images at a time, decreasing.
    nine: whether a 3x3 on rows is nine products added up.
    im2col: whether a dense 3x3 is gathered windows and one product.
    buckets: how many static numbers of rows there are, evenly spaced.
    limit: share of the branch's dense MACs above which a batch is executed
      densely after all.
  """

  form: str
  sizes: tuple[int, ...] = ()
  nine: bool = False
  im2col: bool = False
  buckets: int = 8
  limit: float = 1.0

  def __post_init__(self):
    if self.form not in FORMS:
      raise ValueError(f'form must be {", ".join(FORMS)}; got {self.form!r}')

  @property
  def may_overflow(self) -> bool:
    """Whether a batch may be executed densely though the plan is sparse."""
    return self.form != 'dense' and self.limit < 1

  def limited(self, limit: float) -> BlockPlan:
    """Returns the plan with a limit that is not above the given one."""
    return dataclasses.replace(self, limit=min(self.limit, limit))


def default_plan(
  shape: tuple[int, int, int], per_image: bool, native: bool = False
) -> BlockPlan:
  """Returns a plan that is good on most machines, without measuring.

  Args:
    shape: (N, h, w) of the block's output.
    per_image: whether its mask is constant over an image.
    native: whether there are kernels for this machine.
  """
  if native:
    return BlockPlan(kernel_form())
  num_images, h, w = shape
  if per_image:
    # Enough rows for the matrix products of a small map to be efficient.
    return BlockPlan('images', (min(num_images, -(-196 // (h * w))),))
  if jax.default_backend() != 'cpu':
    # A loop of dynamic length asks the host before each of its steps.
    return BlockPlan('buckets')
  return BlockPlan('chunks', chunk_sizes(num_images * h * w, 4))


def kernel_form() -> str:
  """Returns the form of a plan by kernels for JAX's default backend."""
  return 'triton' if jax.default_backend() == 'gpu' else 'native'


def chunk_sizes(size: int, parts: int) -> tuple[int, ...]:
  """Returns two sizes of chunks, the second for the rest, or one.

  Args:
    size: positions of the map, all images.
    parts: about how many of the large chunks would hold them.
  """
  large = min(1024, max(16, 1 << (size // parts).bit_length()))
  return tuple(sorted({large, max(16, large // 8)}, reverse=True))


@functools.partial(jax.jit, static_argnames='plan')
def run_block(
  block: FoldedBlock,
  x: jax.Array,
  hard: jax.Array,
  dilated: jax.Array,
  load: jax.Array,
  plan: BlockPlan,
  lists: Lists | None = None,
) -> jax.Array:
  """Returns a block's output, float[N, h, w, features].

  Jitted by itself so that equal blocks of a network are traced once.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features], rectified.
    hard: float32[N, h, w] of {0, 1}, where the branch is executed.
    dilated: float32 of {0, 1}, where its first convolution is.
    load: float32[], share of the branch's dense MACs.
    plan: how.
    lists: of the positions of both masks, where they are known: for 'triton'.
  """

  def dense():
    return run_dense(block, x, hard, im2col=plan.im2col)

  def sparse():
    if plan.form == 'native':
      return run_native(block, x, hard, dilated)
    if plan.form == 'triton':
      found = lists or Lists(list_positions(hard), list_positions(dilated))
      return run_triton(block, x, found)
    if plan.form == 'chunks':
      return run_chunks(
        block, x, hard, dilated, sizes=plan.sizes, nine=plan.nine
      )
    if plan.form == 'buckets':
      return run_buckets(
        block, x, hard, dilated, buckets=plan.buckets, nine=plan.nine
      )
    return run_images(
      block, x, hard[:, 0, 0], images=plan.sizes[0], im2col=plan.im2col
    )

  if plan.may_overflow:
    return jax.lax.cond(load > plan.limit, dense, sparse)
  return dense() if plan.form == 'dense' else sparse()
