"""Tests of the executor against the model's masked dense forward pass."""

import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.masks import ExecutionMask
from dynconv_jax.sparse import (
  BlockPlan,
  ExecutionStats,
  SparseExecutor,
  get_backend,
)
from dynconv_jax.sparse.calibrate import clustered_masks

# Odd sizes in every stage; numbers of positions that no chunk size divides.
SHAPE = (3, 21, 27, 3)
FAMILIES = ('basic', 'bottleneck')
METHODS = ('dynconv', 'convnet_aig', 'skipnet', 'sact', 'act')


def make_images(shape=SHAPE, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def masked_dense(model, images, masks=None):
  """Returns the model's own jitted forward pass."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, images, masks):
    return nnx.merge(graphdef, state)(images, masks=masks)

  return run(nnx.as_pure(state), images, masks)


def mask_shapes(model, images):
  _, masks = jax.eval_shape(lambda x: model(x), images)
  return [mask.hard.shape for mask in masks]


def assert_same(got, expected, tolerance=1e-5):
  scale = float(jnp.max(jnp.abs(expected)))
  assert np.isfinite(scale) and scale > 0
  chex.assert_trees_all_equal_dtypes(got, expected)
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
  ('method', 'options'),
  [
    *((method, {}) for method in METHODS),
    ('dynconv', {'inherited_masks': True}),
    ('dynconv', {'inherited_masks': True, 'mask_units': ('layer1.1',)}),
  ],
  ids=[*METHODS, 'inherited', 'one_unit'],
)
def test_the_executor_equals_the_masked_dense_forward(
  make_network, backend, family, method, options
):
  model, images = make_network(family, method, **options), make_images()
  expected, masks = masked_dense(model, images)
  executor = SparseExecutor(model, images.shape, backend=backend)
  logits, stats = executor(images, return_masks=True)
  assert_same(logits, expected)
  assert stats.names == tuple(mask.name for mask in masks)
  for got, mask, positions, dilated in zip(
    stats.masks,
    masks,
    stats.positions,
    stats.dilated_positions,
    strict=True,
  ):
    np.testing.assert_array_equal(got.hard, mask.hard)
    assert positions == mask.hard.sum()
    assert dilated == mask.dilated.sum()
  assert not stats.fallbacks.any()


def test_masks_are_returned_on_request_only(make_network, backend):
  model, images = make_network('bottleneck', 'dynconv'), make_images()
  executor = SparseExecutor(
    model, images.shape, mode='sparse', backend=backend, limit=0.5
  )
  # The logits, and active positions, dilated ones, fallbacks of four blocks.
  results = r'->\(f32\[3,5\]\{[01,]+\}, s32\[4,3\]\{[01,]+\}\)'
  compiled = executor.lower().compile()
  assert re.search(results, compiled.as_text().splitlines()[0])
  logits, stats = executor(images)
  with pytest.raises(ValueError, match='call .* with return_masks=True to get'):
    stats.masks  # noqa: B018
  given = [np.ones(s, np.float32) for s in mask_shapes(model, images)]
  for masks in (None, given):
    logits, stats = executor(images, masks=masks)
    again, known = executor(images, masks=masks, return_masks=True)
    chex.assert_trees_all_equal(again, logits)
    chex.assert_trees_all_equal(known.counts, stats.counts)
    got = [[m.hard.sum(), m.dilated.sum(), m.fallback] for m in known.masks]
    np.testing.assert_array_equal(stats.counts, got)
  # A dense fallback changes no count.
  assert stats.fallbacks.all()


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('batch', (1, 3))
def test_given_masks_are_obeyed_and_nothing_is_traced_again(
  make_network, backend, family, batch
):
  model, images = (
    make_network(family, 'dynconv'),
    make_images((batch, 21, 27, 3)),
  )
  shapes = mask_shapes(model, images)
  rng = np.random.default_rng(1)
  one = [np.zeros(shape, np.float32) for shape in shapes]
  odd = [np.zeros(shape, np.float32) for shape in shapes]
  for few, many in zip(one, odd, strict=True):
    few[-1, -1, -1] = 1
    many.reshape(-1)[rng.choice(many.size, many.size // 3 | 1, False)] = 1
  cases = {
    'none': [np.zeros(shape, np.float32) for shape in shapes],
    'one': one,
    'odd': odd,
    'all': [np.ones(shape, np.float32) for shape in shapes],
    'clustered': [clustered_masks(rng, shape, 0.3) for shape in shapes],
  }
  graphdef, state = nnx.split(model)
  dense = jax.jit(
    lambda state, images, masks: nnx.merge(graphdef, state)(images, masks=masks)
  )
  expected = {
    name: dense(nnx.as_pure(state), images, masks)[0]
    for name, masks in cases.items()
  }
  executor = SparseExecutor(model, images.shape, backend=backend)
  chex.clear_trace_counter()
  once = chex.assert_max_traces(ExecutionStats.pack, n=1)
  with mock.patch.object(ExecutionStats, 'pack', once):
    for name, masks in cases.items():
      logits, stats = executor(images, masks=masks)
      assert_same(logits, expected[name])
      assert stats.positions.tolist() == [int(m.sum()) for m in masks]


def test_whole_images_are_given_by_one_value_each(make_network, backend):
  model, images = make_network('bottleneck', 'convnet_aig'), make_images()
  shapes = mask_shapes(model, images)
  active = [np.array(a, np.float32) for a in ((1, 0, 1), (0, 0, 0))] * 2
  executor = SparseExecutor(model, images.shape, backend=backend)
  full = [
    np.broadcast_to(a[:, None, None], shape)
    for a, shape in zip(active, shapes, strict=True)
  ]
  expected, _ = masked_dense(model, images, full)
  logits, stats = executor(images, masks=[a[:, None, None] for a in active])
  assert_same(logits, expected)
  assert stats.positions.tolist() == [int(m.sum()) for m in full]
  # Masks that differ within an image are used as well.
  rng = np.random.default_rng(0)
  mixed = [clustered_masks(rng, shape, 0.4) for shape in shapes]
  assert_same(
    executor(images, masks=mixed)[0], masked_dense(model, images, mixed)[0]
  )


def test_what_is_above_the_limit_is_exact_and_counted(make_network, backend):
  model, images = make_network('bottleneck', 'dynconv'), make_images()
  shapes = mask_shapes(model, images)
  rng = np.random.default_rng(0)
  densities = (0.05, 1.0, 0.05, 0.9)
  masks = [
    clustered_masks(rng, shape, density)
    for shape, density in zip(shapes, densities, strict=True)
  ]
  executor = SparseExecutor(model, images.shape, limit=0.5, backend=backend)
  logits, stats = executor(images, masks=masks)
  assert stats.fallbacks.tolist() == [0, 1, 0, 1]
  assert_same(logits, masked_dense(model, images, masks)[0])


def test_the_limit_holds_for_any_number_of_macs(make_network, backend):
  model, shape = make_network('basic', 'dynconv'), (1024, 512, 512, 3)
  block = model.layer1[0].branch
  assert block.executed_macs((512**2,) * 2) * shape[0] > 2**31
  executor = SparseExecutor(model, shape, limit=0.5, backend=backend)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  logits, stats = jax.eval_shape(executor, images)
  assert (logits.shape, stats.counts.shape) == ((1024, 5), (4, 3))


@pytest.mark.parametrize('limit', (0.5, 1.0))
def test_only_weights_that_are_read_are_kept(make_network, backend, limit):
  """A block's weights count once; twice if it may also run densely."""
  model, images = make_network('bottleneck', 'dynconv'), make_images()
  executor = SparseExecutor(model, images.shape, limit=limit, backend=backend)
  kernels = sum(leaf.ndim == 4 for leaf in executor._arrays)
  blocks = 4 * 3 + 2  # convolutions and projections
  dense = blocks if limit < 1 else 0
  # XLA also has the convolutions of the stem and the mask units; the CPU
  # kernels also have weights for Winograd tiles.
  assert kernels == dense + (4 * 3 if backend == 'cpu' else blocks + 1 + 4)


def test_statistics_pass_a_jitted_function(make_network):
  model, images = make_network('basic', 'dynconv'), make_images()
  executor = SparseExecutor(model, images.shape, mode='sparse')
  _, expected = executor(images, return_masks=True)

  @jax.jit
  def run(images):
    logits, stats = executor(images, return_masks=True)
    return logits, stats, stats.positions

  _, stats, positions = run(images)
  chex.assert_trees_all_equal(stats, expected)
  chex.assert_trees_all_equal(positions, expected.positions)
  assert stats.fallbacks.dtype == jnp.int32
  for got, mask in zip(stats.masks, expected.masks, strict=True):
    assert got.layers == mask.layers
    np.testing.assert_array_equal(got.dilated, mask.dilated)


def test_a_network_without_gates_returns_no_masks(make_network):
  model, images = make_network('basic', 'dense'), make_images((1, 13, 9, 3))
  executor = SparseExecutor(model, images.shape, mode='sparse')
  logits, stats = executor(images, return_masks=True)
  assert_same(logits, masked_dense(model, images)[0])
  assert stats.masks == []
  assert stats.counts.shape == (0, 3)


def test_every_mode_gives_the_same(make_network):
  model, images = make_network('basic', 'dynconv'), make_images((1, 13, 9, 3))
  expected, _ = masked_dense(model, images)
  dense = SparseExecutor(model, images.shape, mode='dense')
  assert {plan.backend.name for plan in dense.plans.values()} == {'dense'}
  assert_same(dense(images)[0], expected)
  plans = {'layer2.1': BlockPlan(get_backend('xla'), limit=0.5)}
  given = SparseExecutor(model, images.shape, mode='dense', plans=plans)
  assert given.plans == dense.plans | plans
  assert_same(given(images)[0], expected)


def test_auto_measures_what_may_be_slower_than_dense(make_network):
  model, images = make_network('basic', 'dynconv'), make_images((1, 13, 9, 3))
  xla = [get_backend('xla')]
  with mock.patch('dynconv_jax.sparse.plan.auto_backends', lambda *_: xla):
    executor = SparseExecutor(model, images.shape, density=0.1)
  limits = [plan.limit for plan in executor.plans.values()]
  assert all(0 < limit <= 1 for limit in limits)
  names = {plan.backend.name for plan in executor.plans.values()}
  assert names <= {'xla', 'dense'}
  assert_same(executor(images)[0], masked_dense(model, images)[0])


def test_bfloat16_is_as_near_to_float32_as_the_dense_forward(make_network):
  """Allows twice the bfloat16 error of the dense network, plus one rounding.

  Both round each layer's result to 8 bits. The dense network also rounds the
  normalized values, the folded one the folded kernels.
  """
  images = make_images()
  exact, rounded = (
    make_network('bottleneck', 'dynconv', dtype)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  rng = np.random.default_rng(0)
  masks = [clustered_masks(rng, s, 0.4) for s in mask_shapes(exact, images)]
  expected, _ = masked_dense(exact, images, masks)
  dense, _ = masked_dense(rounded, images, masks)
  executor = SparseExecutor(rounded, images.shape, mode='sparse')
  logits, _ = executor(images, masks=masks)
  assert logits.dtype == jnp.float32
  scale = jnp.max(jnp.abs(expected))
  error = jnp.max(jnp.abs(logits - expected)) / scale
  bound = 2 * jnp.max(jnp.abs(dense - expected)) / scale + 2**-8
  assert 0 < error < bound


def test_an_image_that_is_no_number_leaves_the_others_alone(
  make_network, backend
):
  model, images = make_network('bottleneck', 'dynconv'), make_images()
  executor = SparseExecutor(model, images.shape, backend=backend)
  expected, _ = executor(images)
  logits, _ = executor(images.at[-1].set(jnp.nan))
  # The order of sums in a 3x3 depends on the positions of all images.
  assert_same(logits[:-1], expected[:-1])
  assert jnp.isnan(logits[-1]).all()


def test_what_cannot_be_executed_is_an_error(make_network):
  model = make_network('basic', 'dynconv')
  shape = (1, 9, 9, 3)

  def error(message, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
      SparseExecutor(*args, **kwargs)

  error('image_shape must be (N, H, W, C); got (9, 9, 3)', model, (9, 9, 3))
  error(
    'image_shape must be (N, H, W, C); got (0, 9, 9, 3)', model, (0, 9, 9, 3)
  )
  error("unknown mode 'fast'", model, shape, mode='fast')
  error('limit must be in (0, 1]; got 0', model, shape, limit=0)
  error('density must be in (0, 1]; got 1.5', model, shape, density=1.5)
  with pytest.raises(ValueError, match=r"must be a Backend, .* got 'dense'"):
    BlockPlan('dense')
  for limit in (0, 1.5):
    with pytest.raises(ValueError, match=rf'in \(0, 1\]; got {limit}'):
      BlockPlan(get_backend('dense'), limit)
  plans = {'layer3.0': BlockPlan(get_backend('dense'))}
  error('plans name layer3.0; the gated blocks are', model, shape, plans=plans)
  error('backend must be auto, cpu, triton', model, shape, backend='fast')
  error("'json:dumps' is not a Backend", model, shape, backend='json:dumps')
  error("backend 'json:Fast' not found", model, shape, backend='json:Fast')
  message = "mode 'dense' has no backend"
  error(message, model, shape, mode='dense', backend='cpu')
  rounded = make_network('basic', 'dynconv', jnp.bfloat16)
  message = 'backend cpu cannot execute this network on cpu in bfloat16'
  error(message, rounded, shape, backend='cpu')
  error(
    'the network has no gated block', nnx.Linear(3, 3, rngs=nnx.Rngs(0)), shape
  )
  training = nnx.view(model, deterministic=False, use_running_average=False)
  error('needs the evaluation view', training, shape)
  sampling = nnx.view(model, deterministic=False, use_running_average=True)
  error('needs the evaluation view', sampling, shape)

  executor = SparseExecutor(model, shape, mode='dense')
  with pytest.raises(ValueError, match=r'images must be \(1, 9, 9, 3\); got'):
    executor(jnp.zeros((2, 9, 9, 3)))
  with pytest.raises(ValueError, match='masks must be one per block.*got 1'):
    executor(jnp.zeros(shape), masks=[jnp.zeros((1, 9, 9))])
  with pytest.raises(
    ValueError,
    match=r'mask of layer1.0 must be \(1, 9, 9\) or .*; got \(1, 3, 3\)',
  ):
    executor(jnp.zeros(shape), masks=[jnp.zeros((1, 3, 3))] * 4)


def test_what_is_shown_is_short(make_network):
  model, images = make_network('basic', 'dynconv'), make_images()
  _, masks = masked_dense(model, images)
  _, stats = SparseExecutor(model, images.shape, mode='dense')(images)
  density = np.mean([np.mean(mask.maps[0]) for mask in masks])
  assert repr(stats) == f'ExecutionStats(4 blocks, density={density:.3f})'
  mask = ExecutionMask((jnp.eye(2, 4)[None],), 'layer1.0')
  shown = "ExecutionMask('layer1.0', maps=(float32[1, 2, 4])"
  assert repr(mask) == f'{shown}, density=0.250)'
  # Traced arrays have no values.
  traced = []
  jax.eval_shape(lambda m: traced.append(repr(m)), mask)
  assert traced == [f'{shown})']
