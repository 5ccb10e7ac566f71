"""Tests of every form of executing a block against the masked dense block."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax.models.blocks import BasicBlock, Bottleneck
from dynconv_jax.sparse import native
from dynconv_jax.sparse.cost import clustered_masks
from dynconv_jax.sparse.fold import fold_block
from dynconv_jax.sparse.plan import BlockPlan, run_block

IN_FEATURES = 8
BATCH = 3
POSITION_PLANS = {
  'dense': BlockPlan('dense'),
  'dense_im2col': BlockPlan('dense', im2col=True),
  'chunks': BlockPlan('chunks', (32, 8)),
  'chunks_nine': BlockPlan('chunks', (16,), nine=True),
  'buckets': BlockPlan('buckets', buckets=3),
  'buckets_nine': BlockPlan('buckets', nine=True, buckets=2),
  'limited': BlockPlan('chunks', (32, 8), limit=0.5),
  'native': BlockPlan('native'),
  'native_limited': BlockPlan('native', limit=0.5),
}
IMAGE_PLANS = {
  'images_1': BlockPlan('images', (1,)),
  'images_2': BlockPlan('images', (2,), im2col=True),
  'chunks': BlockPlan('chunks', (64,)),
  'native': BlockPlan('native'),
}
BLOCKS = {
  'basic': (BasicBlock, IN_FEATURES, 1),
  'basic_strided': (BasicBlock, 6, 2),
  'bottleneck': (Bottleneck, IN_FEATURES // 4, 1),
  'bottleneck_projected': (Bottleneck, 3, 1),
  'bottleneck_strided': (Bottleneck, 3, 2),
}


@functools.cache
def make_block(kind):
  """A block in evaluation whose parameters and statistics are all random."""
  make, planes, strides = BLOCKS[kind]
  block = make(
    IN_FEATURES,
    planes,
    strides,
    name='layer1.0',
    gate=None,
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  rng = np.random.default_rng(0)
  nnx.update(
    block,
    jax.tree.map(
      lambda a: jnp.asarray(
        # Positive, so that they serve as variances too; kernels get signs.
        rng.uniform(0.5, 1.5, a.shape) * rng.choice((-1, 1), a.shape) / 4
        if a.ndim == 4
        else rng.uniform(0.5, 1.5, a.shape),
        jnp.float32,
      ),
      nnx.state(block),
    ),
  )
  return nnx.view(block, use_running_average=True)


@functools.cache
def masked_dense(kind):
  """The block's own forward pass, jitted: (x, hard) to (output, mask)."""
  block = make_block(kind)

  @jax.jit
  def run(x, hard):
    mask, _ = block.decide(x, None, hard)
    return block(x, mask), mask

  return run


def folded_block(kind, plan):
  """The block's convolutions, as the plan needs them."""
  folded = fold_block(make_block(kind), jnp.float32)
  if plan.form != 'native':
    return folded
  if not native.usable(jnp.dtype(jnp.float32)):
    raise absltest.SkipTest('the kernels need a CPU and a C++ compiler')
  return native.pack(folded)


def make_input(size=(7, 9)):
  x = np.random.default_rng(1).normal(size=(BATCH, *size, IN_FEATURES))
  return jnp.asarray(np.maximum(x, 0), jnp.float32)


def make_masks(shape):
  """Masks of every kind, by name."""
  rng = np.random.default_rng(2)
  size = np.prod(shape)
  one, corner, odd = (np.zeros(size, np.float32) for _ in range(3))
  one[size // 2 + 1] = 1
  corner[-1] = 1
  odd[rng.choice(size, size // 3 | 1, replace=False)] = 1
  flat = {'one': one, 'corner': corner, 'odd': odd}
  return {
    'none': np.zeros(shape, np.float32),
    'all': np.ones(shape, np.float32),
    'clustered': clustered_masks(rng, shape, 0.4),
    **{name: mask.reshape(shape) for name, mask in flat.items()},
  }


def compare(kind, plan, masks, x):
  folded = folded_block(kind, plan)
  for name, hard in masks.items():
    expected, mask = masked_dense(kind)(x, jnp.asarray(hard))
    load = jnp.sum(mask.executed_macs()) / (mask.dense_macs() * BATCH)
    out = run_block(folded, x, mask.hard, mask.dilated, load, plan)
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(
      out, expected, rtol=0, atol=2e-6 * scale, err_msg=name
    )


class RowsTest(chex.TestCase):
  @parameterized.product(kind=tuple(BLOCKS), plan=tuple(POSITION_PLANS))
  def test_forms_equal_the_masked_dense_block(self, kind, plan):
    x = make_input()
    strides = BLOCKS[kind][2]
    shape = (BATCH, *(-(-n // strides) for n in x.shape[1:3]))
    compare(kind, POSITION_PLANS[plan], make_masks(shape), x)

  @parameterized.product(
    kind=('basic', 'bottleneck_strided'), plan=tuple(IMAGE_PLANS)
  )
  def test_images_equal_the_masked_dense_block(self, kind, plan):
    x = make_input()
    strides = BLOCKS[kind][2]
    h, w = (-(-n // strides) for n in x.shape[1:3])
    masks = {
      str(active): np.ones((BATCH, h, w), np.float32)
      * np.array(active, np.float32)[:, None, None]
      for active in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1))
    }
    compare(kind, IMAGE_PLANS[plan], masks, x)

  @parameterized.parameters('chunks', 'buckets', 'native', 'dense')
  def test_maps_of_one_position(self, plan):
    x = make_input((1, 1))
    masks = {
      'some': np.array([1, 0, 1], np.float32).reshape(3, 1, 1),
      'none': np.zeros((3, 1, 1), np.float32),
    }
    compare('bottleneck', POSITION_PLANS[plan], masks, x)

  @parameterized.parameters('chunks', 'chunks_nine', 'buckets', 'native')
  def test_nothing_is_read_that_was_not_computed(self, plan):
    """What is not a number at inactive positions stays there."""
    x = make_input()
    hard = np.zeros(x.shape[:3], np.float32)
    hard[0, 2:4, 2:5] = 1
    expected, mask = masked_dense('bottleneck')(x, jnp.asarray(hard))
    spoilt = jnp.where(mask.dilated[..., None] != 0, x, jnp.nan)
    out = run_block(
      folded_block('bottleneck', POSITION_PLANS[plan]),
      spoilt,
      mask.hard,
      mask.dilated,
      jnp.float32(0.1),
      POSITION_PLANS[plan],
    )
    active = hard != 0
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(
      out[active], expected[active], rtol=0, atol=2e-6 * scale
    )
    inactive = np.asarray(mask.dilated) == 0
    self.assertTrue(np.isnan(out[inactive]).all())

  def test_an_unknown_form_is_an_error(self):
    with self.assertRaisesRegex(
      ValueError,
      "form must be dense, native, triton, chunks, buckets, images; got 'rows'",
    ):
      BlockPlan('rows')


if __name__ == '__main__':
  absltest.main()
