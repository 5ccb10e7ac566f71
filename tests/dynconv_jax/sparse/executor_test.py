"""Tests of the executor against the masked dense forward of the model."""

import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.models.create import METHODS
from dynconv_jax.sparse import BlockPlan, SparseExecutor
from dynconv_jax.sparse import executor as executor_lib
from dynconv_jax.sparse.cost import clustered_masks

# Odd sizes in every stage; positions that no chunk size divides.
SHAPE = (3, 21, 27, 3)
FAMILIES = ('basic', 'bottleneck')


def make_images(shape=SHAPE, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def masked_dense(model, images, masks=None):
  """The model's own forward pass, jitted."""
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
@pytest.mark.parametrize('method', [m for m in METHODS if m != 'dense'])
def test_the_executor_equals_the_masked_dense_forward(
  make_network, native, family, method
):
  model, images = make_network(family, method), make_images()
  expected, masks = masked_dense(model, images)
  executor = SparseExecutor(model, images.shape, mode='sparse', native=native)
  logits, stats = executor(images)
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
  assert not stats.overflows.any()


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('batch', (1, 3))
def test_given_masks_are_obeyed_and_nothing_is_traced_again(
  make_network, native, family, batch
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
  executor = SparseExecutor(model, images.shape, mode='sparse', native=native)
  chex.clear_trace_counter()
  once = chex.assert_max_traces(SparseExecutor._forward, n=1)
  with mock.patch.object(SparseExecutor, '_forward', once):
    for name, masks in cases.items():
      logits, stats = executor(images, masks=masks)
      assert_same(logits, expected[name])
      assert stats.positions.tolist() == [int(m.sum()) for m in masks]


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'dense'])
def test_gates_are_computed_where_masks_are_given(make_network, native, method):
  """They are a part of the cost: what is timed must hold them.

  XLA drops what no output depends on: logits alone, of masks that do not wait
  for the gates, are those of a network without.
  """

  def compiled(method, outputs):
    model, images = make_network('bottleneck', method), make_images()
    executor = SparseExecutor(model, images.shape, mode='sparse', native=native)
    blocks = zip(executor._network.blocks, executor._inputs, strict=True)
    masks = [jnp.ones(block.output_shape(shape)) for block, shape in blocks]
    own, stats = executor(images)[1], executor(images, masks)[1]
    for decision, mask in zip(own.decisions, own.masks, strict=True):
      np.testing.assert_array_equal(decision, mask.hard)
    assert stats.positions.tolist() == [mask.size for mask in masks]
    first = stats.names.index(own.names[0])
    np.testing.assert_array_equal(stats.decisions[first], own.decisions[0])
    inputs = (executor._arrays, images, masks)
    run = jax.jit(lambda *args: outputs(executor._run(*args)))
    return run.lower(*inputs).compile()

  run = compiled(method, outputs=lambda results: results)
  obey = executor_lib._obey
  with mock.patch.object(executor_lib, '_obey', lambda *a: obey(*a[:3], None)):
    without = compiled('dynconv', outputs=lambda results: results[0])
  flops, few = (r.cost_analysis()['flops'] for r in (run, without))
  assert flops > 1.01 * few
  if native and method == 'dynconv':
    assert run.as_text().count('"dynconv_mask_logits') == 4
    assert '"dynconv_mask_logits' not in without.as_text()


def test_whole_images_are_given_by_one_value_each(make_network, native):
  model, images = make_network('bottleneck', 'convnet_aig'), make_images()
  shapes = mask_shapes(model, images)
  active = [np.array(a, np.float32) for a in ((1, 0, 1), (0, 0, 0))] * 2
  executor = SparseExecutor(model, images.shape, mode='sparse', native=native)
  form = 'native' if native else 'images'
  assert {plan.form for plan in executor.plans} == {form}
  full = [
    np.broadcast_to(a[:, None, None], shape)
    for a, shape in zip(active, shapes, strict=True)
  ]
  expected, _ = masked_dense(model, images, full)
  logits, stats = executor(images, masks=[a[:, None, None] for a in active])
  assert_same(logits, expected)
  assert stats.positions.tolist() == [int(m.sum()) for m in full]
  # Masks that differ within an image are obeyed as well.
  rng = np.random.default_rng(0)
  mixed = [clustered_masks(rng, shape, 0.4) for shape in shapes]
  assert_same(
    executor(images, masks=mixed)[0], masked_dense(model, images, mixed)[0]
  )


def test_what_is_above_the_limit_is_exact_and_counted(make_network, native):
  model, images = make_network('bottleneck', 'dynconv'), make_images()
  shapes = mask_shapes(model, images)
  rng = np.random.default_rng(0)
  densities = (0.05, 1.0, 0.05, 0.9)
  masks = [
    clustered_masks(rng, shape, density)
    for shape, density in zip(shapes, densities, strict=True)
  ]
  executor = SparseExecutor(
    model, images.shape, mode='sparse', limit=0.5, native=native
  )
  logits, stats = executor(images, masks=masks)
  assert stats.overflows.tolist() == [0, 1, 0, 1]
  assert_same(logits, masked_dense(model, images, masks)[0])


@pytest.mark.parametrize('limit', (0.5, 1.0))
def test_weights_are_kept_in_the_forms_that_plans_read(
  make_network, native, limit
):
  model, images = make_network('bottleneck', 'dynconv'), make_images()
  executor = SparseExecutor(
    model, images.shape, mode='sparse', limit=limit, native=native
  )
  kernels = sum(leaf.ndim == 4 for leaf in executor._arrays)
  squares = sum(
    layer.squares is not None
    for block in executor._network.blocks
    for layer in (block.first, block.second)
  )
  # Above the limit blocks are dense: 3 convolutions each, 2 projections. XLA
  # has stem, head and the mask units' convolutions too.
  unpacked = 14 if limit < 1 else 0
  assert kernels == (unpacked + squares if native else 14 + 2 + 4)


def test_statistics_pass_a_jitted_function(make_network):
  model, images = make_network('basic', 'dynconv'), make_images()
  executor = SparseExecutor(model, images.shape, mode='sparse')
  _, expected = executor(images)

  @jax.jit
  def run(images):
    logits, stats = executor(images)
    return logits, stats, stats.positions

  _, stats, positions = run(images)
  chex.assert_trees_all_equal(stats, expected)
  chex.assert_trees_all_equal(positions, expected.positions)
  assert stats.overflows.dtype == jnp.int32
  for got, mask in zip(stats.masks, expected.masks, strict=True):
    assert got.layers == mask.layers
    np.testing.assert_array_equal(got.dilated, mask.dilated)


def test_every_mode_gives_the_same(make_network):
  model, images = make_network('basic', 'dynconv'), make_images((1, 13, 9, 3))
  expected, _ = masked_dense(model, images)
  dense = SparseExecutor(model, images.shape, mode='dense')
  assert {plan.form for plan in dense.plans} == {'dense'}
  assert_same(dense(images)[0], expected)
  plans = [BlockPlan('buckets', buckets=2), BlockPlan('chunks', (16,))] * 2
  given = SparseExecutor(model, images.shape, plans=plans)
  assert given.plans == plans
  assert_same(given(images)[0], expected)


def test_bfloat16_is_as_near_to_float32_as_the_dense_forward(make_network):
  """Twice the error of the dense network in bfloat16, plus one rounding.

  Both round each layer's result to 8 bits; the dense one rounds the
  normalised values too, the folded one the folded kernels.
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
  make_network, native
):
  model, images = make_network('bottleneck', 'dynconv'), make_images()
  executor = SparseExecutor(model, images.shape, mode='sparse', native=native)
  expected, _ = executor(images)
  logits, _ = executor(images.at[-1].set(jnp.nan))
  # How a 3x3 is summed up depends on the positions of all images.
  assert_same(logits[:-1], expected[:-1])
  assert jnp.isnan(logits[-1]).all()


def test_what_cannot_be_executed_is_an_error(make_network):
  model = make_network('basic', 'dynconv')
  shape = (1, 9, 9, 3)

  def error(message, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
      SparseExecutor(*args, **kwargs)

  error('image_shape must be (N, H, W, 3); got (9, 9, 3)', model, (9, 9, 3))
  error(
    'image_shape must be (N, H, W, 3); got (0, 9, 9, 3)', model, (0, 9, 9, 3)
  )
  error("unknown mode 'fast'", model, shape, mode='fast')
  error('limit must be in (0, 1]; got 0', model, shape, limit=0)
  error('density must be in (0, 1]; got 1.5', model, shape, density=1.5)
  plans = [BlockPlan('dense')]
  error('plans must be one a block, 4; got 1', model, shape, plans=plans)
  rounded = make_network('basic', 'dynconv', jnp.bfloat16)
  message = 'native needs a CPU, a C++ compiler, a model in float32'
  error(message, rounded, shape, native=True)
  error(message, model, shape, mode='dense', native=True)
  error(message, model, shape, plans=[BlockPlan('native')] * 4, native=False)
  error('the network has no gates', make_network('basic', 'dense'), shape)
  training = nnx.view(model, deterministic=False, use_running_average=False)
  error('needs the evaluation view', training, shape)
  sampling = nnx.view(model, deterministic=False, use_running_average=True)
  error('needs the evaluation view', sampling, shape)

  executor = SparseExecutor(model, shape, mode='dense')
  with pytest.raises(ValueError, match=r'images must be \(1, 9, 9, 3\); got'):
    executor(jnp.zeros((2, 9, 9, 3)))
  with pytest.raises(ValueError, match='masks must be one a block, 4; got 1'):
    executor(jnp.zeros(shape), masks=[jnp.zeros((1, 9, 9))])
  with pytest.raises(
    ValueError, match=r'mask of layer1.0 must be \(1, 9, 9\); got \(1, 3, 3\)'
  ):
    executor(jnp.zeros(shape), masks=[jnp.zeros((1, 3, 3))] * 4)
