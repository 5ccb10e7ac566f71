"""Tests of sparse networks: any network, custom blocks, custom backends."""

import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.methods.mask_unit import (
  InheritedMask,
  MaskUnit,
  RecordedMaskUnit,
)
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.models.gated import Gating, gated_blocks
from dynconv_jax.sparse import Backend, SparseBlock, SparseExecutor, sparsify
from dynconv_jax.sparse.backends.dense import run_dense
from dynconv_jax.sparse.sparsify import trace_blocks

FEATURES = 6


class SiluBlock(BasicBlock):
  """Does not compute what its inherited branch describes."""

  def run_branch(self, x):
    return self.bn2(self.conv2(nnx.silu(self.conv1(x))))


class InvertedGateBlock(BasicBlock):
  """Its gate reads the negative features."""

  def decide(self, x, gating):
    return super().decide(-x, gating)


class SqueezeExciteBlock(BasicBlock):
  """The result at one position depends on all others."""

  describable = False

  def run_branch(self, x):
    y = super().run_branch(x)
    return y * nnx.sigmoid(jnp.mean(y, axis=(1, 2), keepdims=True))


class UNet(nnx.Module):
  """Blocks at two resolutions, joined by concatenation."""

  foldable = (('stem', 'norm'),)

  def __init__(self, kind=BasicBlock, *, dtype=jnp.float32, rngs):
    self.stem = conv(3, FEATURES, 3, rngs=rngs)
    self.norm = BatchNorm(FEATURES, activation='relu', rngs=rngs)

    def block(name, in_features, planes, strides=1):
      gate = MaskUnit(in_features, strides=strides, rngs=rngs)
      return kind(
        in_features,
        planes,
        strides,
        name=name,
        gate=gate,
        dtype=dtype,
        rngs=rngs,
        input_activated=True,
      )

    # Not in alphabetical order.
    self.first = block('first', FEATURES, FEATURES)
    self.down = nnx.Dict(a=block('down', FEATURES, 2 * FEATURES, 2))
    self.after = block('after', 3 * FEATURES, FEATURES)
    self.head = nnx.Conv(FEATURES, 2, (1, 1), rngs=rngs)

  def __call__(self, images, *, rngs=None, masks=None):
    gating = Gating(rngs=rngs, masks=masks)
    x = self.first(self.norm(self.stem(images)), gating)
    y = self.down['a'](x, gating)
    y = jnp.repeat(jnp.repeat(y, 2, 1), 2, 2)
    y = self.after(jnp.concatenate([x, y], -1), gating)
    return self.head(y), gating.finish()


@pytest.fixture
def images():
  x = np.random.default_rng(0).normal(size=(2, 10, 12, 3))
  return jnp.asarray(x, jnp.float32)


def make(kind=BasicBlock, **kwargs):
  model = UNet(kind, **kwargs, rngs=nnx.Rngs(1))
  rng = np.random.default_rng(0)
  for _, node in nnx.iter_modules(model):
    if isinstance(node, nnx.BatchNorm):
      shape = node.mean.shape
      node.mean[...] = jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
      node.var[...] = jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
  return nnx.view(model, deterministic=True, use_running_average=True)


def assert_same(got, expected, tolerance=1e-5):
  scale = float(jnp.max(jnp.abs(expected)))
  assert scale > 0 and got.dtype == expected.dtype
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


def test_a_network_that_is_no_resnet(images, backend):
  model = make()
  expected, masks = jax.jit(lambda x: model(x))(images)
  densities = [float(m.density().mean()) for m in masks]
  assert min(densities) > 0 and max(densities) < 1
  sparse = sparsify(model, backend)
  out, got = jax.jit(lambda x: sparse(x))(images)
  assert_same(out, expected)
  for mine, theirs in zip(got, masks, strict=True):
    np.testing.assert_array_equal(mine.hard, theirs.hard)
    assert (mine.name, mine.layers) == (theirs.name, theirs.layers)
  assert not gated_blocks(sparse)
  assert len(gated_blocks(model)) == 3  # the model is unchanged
  # The stem is one convolution now.
  assert not isinstance(sparse.norm, BatchNorm)
  # By name, as bool and int, and with the masks that a network returned.
  by_name = {m.name: np.asarray(m.hard) > 0 for m in masks}
  assert_same(sparse(images, masks=by_name)[0], expected)
  in_order = [np.asarray(m.hard, np.int32) for m in masks]
  assert_same(sparse(images, masks=in_order)[0], expected)


class Contained(nnx.Module):
  """Blocks in a plain container."""

  def __init__(self, container, *, rngs):
    self.blocks = nnx.data(
      container(
        BasicBlock(
          3, 3, name=name, gate=MaskUnit(3, strides=1, rngs=rngs), rngs=rngs
        )
        for name in 'ab'
      )
    )

  def __call__(self, x, masks=None):
    gating = Gating(masks=masks)
    for block in jax.tree.leaves(self.blocks, is_leaf=callable):
      x = block(x, gating)
    return x, gating.finish()


@pytest.mark.parametrize(
  'container',
  [list, tuple, lambda blocks: {'first': next(blocks), 'rest': [*blocks]}],
)
def test_blocks_in_plain_containers(images, container):
  model = nnx.view(
    Contained(container, rngs=nnx.Rngs(0)),
    deterministic=True,
    use_running_average=True,
  )
  sparse = sparsify(model, 'xla')
  assert not gated_blocks(sparse)
  assert len(gated_blocks(model)) == 2
  assert_same(sparse(images)[0], model(images)[0])
  traces = trace_blocks(model, images.shape)
  assert [(t.name, t.follows) for t in traces] == [('a', False), ('b', True)]


@pytest.mark.parametrize('backend', ('auto', 'xla', 'dense'))
@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float32))
def test_blocks_with_a_dtype_of_their_own(images, backend, dtype):
  model = make(dtype=dtype)
  sparse = sparsify(model, backend)
  other = jnp.float32 if dtype == jnp.bfloat16 else jnp.bfloat16
  x = jnp.repeat(jnp.abs(images), 2, -1).astype(other)
  # An identity and a projection as the shortcut.
  pairs = ((model.first, sparse.first), (model.down['a'], sparse.down['a']))
  tolerance = 0.02 if dtype == jnp.bfloat16 else 1e-5
  for block, own in pairs:
    hard = jnp.ones((2, 10, 12))[:, :: block.strides, :: block.strides]
    masks = [hard.at[:, ::3].set(0)]
    assert_same(own(x), block(x), tolerance)
    got, expected = (b(x, Gating(masks=masks)) for b in (own, block))
    assert_same(got, expected, tolerance)


def test_with_float64_enabled(images, backend):
  model = make()
  with jax.enable_x64(True):
    sparse = sparsify(model, backend)
    got, expected = (jax.jit(lambda x, m=m: m(x)[0]) for m in (sparse, model))
    assert_same(got(images), expected(images))


def test_the_order_of_execution_is_traced(images):
  traces = trace_blocks(make(), images.shape)
  assert [t.name for t in traces] == ['first', 'down', 'after']
  assert [t.follows for t in traces] == [False, True, False]
  assert traces[2].shape == (2, 10, 12, 18)


class Reading(UNet):
  """Reads the attributes of its blocks."""

  def __call__(self, images, **kwargs):
    for block in (self.first, self.down['a'], self.after):
      assert block.strides == block.branch.strides
      assert (block.name == 'down') == (block.strides > 1)
      assert block.stage == 0 and block.masker is not None
      images = images.astype(block.dtype)
    return super().__call__(images, **kwargs)


def test_a_network_that_reads_its_blocks(images):
  model = nnx.view(
    Reading(rngs=nnx.Rngs(0)), deterministic=True, use_running_average=True
  )
  executor = SparseExecutor(model, images.shape, backend='xla')
  assert_same(executor(images)[0], model(images)[0])


@pytest.mark.parametrize(
  ('kind', 'message'),
  [(SiluBlock, 'do not compute what'), (InvertedGateBlock, 'override')],
)
def test_a_block_that_is_not_what_it_says_is_refused(kind, message):
  with pytest.raises(ValueError, match=message) as error:
    sparsify(make(kind))
  for name in ('first', 'down', 'after', 'describable = False'):
    assert name in str(error.value)


class WrittenOut(BasicBlock):
  """Computes in its own words what its inherited branch describes."""

  def run_branch(self, x):
    return self.bn2(self.conv2(self.bn1(self.conv1(x))))


class Inheriting(nnx.Module):
  """Its second gate needs the carry of the first."""

  def __init__(self, kind, *, rngs):
    gate = RecordedMaskUnit(3, strides=1, rngs=rngs)
    self.first = kind(3, 3, name='first', gate=gate, rngs=rngs)
    gate = InheritedMask(2)
    self.second = kind(3, FEATURES, 2, name='second', gate=gate, rngs=rngs)

  def __call__(self, images, **kwargs):
    gating = Gating(**kwargs)
    x = self.second(self.first(images, gating), gating)
    return x, gating.finish()


def test_blocks_are_compared_without_their_gates(images):
  model = nnx.view(
    Inheriting(WrittenOut, rngs=nnx.Rngs(0)),
    deterministic=True,
    use_running_average=True,
  )
  sparse = sparsify(model, 'xla')
  assert_same(sparse(images)[0], model(images)[0])
  assert_same(sparse(np.asarray(images))[0], model(images)[0])
  assert isinstance(model.second.masker, InheritedMask)
  model.second.bn1.activation = 'silu'
  with pytest.raises(ValueError, match=r'second \(WrittenOut, by'):
    sparsify(model, 'xla')


def test_what_cannot_be_folded_stays(images):
  model = make()
  model.stem = nnx.Linear(3, FEATURES, rngs=nnx.Rngs(0))
  expected, _ = model(images)
  sparse = sparsify(model, 'xla')
  assert isinstance(sparse.norm, BatchNorm)
  assert_same(sparse(images)[0], expected)


def test_a_layer_that_was_exchanged_is_noticed():
  model = make()
  model.first.bn1 = nnx.view(
    BatchNorm(FEATURES, rngs=nnx.Rngs(0)), use_running_average=True
  )  # without its activation
  with pytest.raises(ValueError, match=r'first \(BasicBlock, by'):
    sparsify(model)
  model.first.bn1 = nnx.GroupNorm(FEATURES, 2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='first .* does not match its branch'):
    sparsify(model)


def test_what_cannot_be_described_is_executed_densely(images):
  model = make(SqueezeExciteBlock)
  model.first = make().first
  expected, _ = jax.jit(lambda x: model(x))(images)
  sparse = sparsify(model)
  kinds = [type(sparse.first), type(sparse.down['a']), type(sparse.after)]
  assert kinds == [SparseBlock, SqueezeExciteBlock, SqueezeExciteBlock]
  assert_same(sparse(images)[0], expected)


@pytest.mark.parametrize(
  'convert', [sparsify, lambda model: SparseExecutor(model, (1, 10, 12, 3))]
)
def test_names_are_unique(convert):
  model = make()
  model.after.name = 'down'
  with pytest.raises(ValueError, match='must be unique; .* named down$'):
    convert(model)


class Doubling(Backend):
  """A custom backend with a wrong result, to see that it was used."""

  name = 'doubling'

  def supports(self, branch, dtype, platform):
    return branch.strides == 1

  def pack(self, block):
    return block

  def run(self, packed, x, mask):
    return 2 * run_dense(packed, x, mask.hard)


def test_a_backend_from_outside(images):
  model = make()
  here = mock.patch.dict(sys.modules, {'outside': mock.Mock(Kind=Doubling)})
  for backend in (Doubling(), 'outside:Kind'):
    with here:
      sparse = sparsify(model, backend)
    x = jnp.abs(images[..., :1]) * jnp.ones(FEATURES)
    mask = jnp.ones(x.shape[:3])
    got = sparse.first(x, Gating(masks=[mask]))
    assert_same(got, 2 * model.first(x, Gating(masks=[mask])))
    # Blocks that it does not support are executed anyway.
    assert sparse.down['a'].plan.backend.name == 'xla'


def test_given_masks(images):
  model = make()
  _, masks = model(images)
  hard = [mask.hard for mask in masks]

  def error(message, masks):
    with pytest.raises(ValueError, match=re.escape(message)):
      model(images, masks=masks)

  error('masks must be one per block; got 2, none for after', hard[:2])
  error('masks must be one per block (3); got 4', [*hard, hard[0]])
  error('masks are given for third; the gated blocks are', {'third': hard[0]})
  error(
    'the mask of down must be (2, 5, 6) or (2, 1, 1); got (2, 10, 12)',
    [hard[0]] * 3,
  )
  error('must be float, int or bool', [hard[0].astype(complex)] * 3)
  # Without a given mask, the gate decides.
  out, got = model(images, masks=[None, 1 - hard[1], None])
  np.testing.assert_array_equal(got[0].hard, hard[0])
  np.testing.assert_array_equal(got[1].hard, 1 - hard[1])
  again, _ = model(images, masks={'down': 1 - hard[1]})
  np.testing.assert_array_equal(out, again)
