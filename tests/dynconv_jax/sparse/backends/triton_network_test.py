"""Tests of whole networks with GPU kernels, and of when kernels apply."""

import collections
import contextlib
import importlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import jaxlib
import jaxlib.version
import numpy as np
import pytest
from flax import nnx
from triton_cases import DTYPES, need, on_gpu

from dynconv_jax.masks import ExecutionMask
from dynconv_jax.methods.mask_unit import MaskUnit
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.models.gated import Gating
from dynconv_jax.models.resnet import ResNet
from dynconv_jax.sparse import (
  BlockPlan,
  SparseExecutor,
  backends,
  executor,
  sparsify,
)
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.backends import triton, triton_launch
from dynconv_jax.sparse.calibrate import clustered_masks

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


@pytest.fixture(autouse=True)
def precision():
  """On a GPU, XLA rounds float32 to TF32 unless told otherwise."""
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture
def loaded():
  """Works without Triton and without JAX's CUDA support."""
  with mock.patch.object(triton_launch, 'load'):
    yield


def run_dense(model, images, masks=None):
  graphdef, state = nnx.split(model)
  return jax.jit(lambda s, x, m: nnx.merge(graphdef, s)(x, masks=m))(
    nnx.as_pure(state), images, masks
  )


def make_images(shape):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_same(got, expected, tolerance=1e-5):
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
  'family,method,options',
  (
    ('bottleneck', 'dynconv', {}),
    ('bottleneck', 'dynconv', {'mask_granularity': (2,)}),
    ('basic', 'convnet_aig', {}),
  ),
)
def test_the_executor_equals_the_model(
  interpreted, as_on_gpu, loaded, make_network, family, method, options
):
  model, images = make_network(family, method, **options), make_images(SHAPE)
  run = SparseExecutor(model, SHAPE, mode='sparse', backend='triton')
  assert {plan.backend.name for plan in run.plans.values()} == {'triton'}
  logits, stats = run(images)
  expected, masks = run_dense(model, images)
  assert_same(logits, expected)
  assert_counted(stats, masks)
  _, known = run(images, return_masks=True)
  assert_counted(known, known.masks)
  np.testing.assert_array_equal(known.counts, stats.counts)
  if method == 'dynconv':
    rng = np.random.default_rng(0)
    given = [clustered_masks(rng, m.hard.shape, 0.3) for m in masks]
    logits, stats = run(images, masks=given)
    expected, masks = run_dense(model, images, given)
    assert_same(logits, expected)
    assert_counted(stats, masks)


def assert_counted(stats, masks, fallbacks=None):
  assert stats.positions.tolist() == [int(m.hard.sum()) for m in masks]
  dilated = [int(m.dilated.sum()) for m in masks]
  assert stats.dilated_positions.tolist() == dilated
  assert stats.fallbacks.tolist() == (fallbacks or [0] * len(masks))


@pytest.mark.parametrize('method', ('dynconv', 'convnet_aig'))
def test_counts_are_those_of_the_lists(
  interpreted, as_on_gpu, loaded, make_network, method
):
  """Also where all is computed after all; no map is summed up for them."""
  model, images = make_network('basic', method), make_images(SHAPE)
  run = SparseExecutor(
    model, SHAPE, mode='sparse', backend='triton', limit=1e-6
  )
  _, masks = run_dense(model, images)
  active = [int(mask.hard.any()) for mask in masks]
  assert any(active)
  summed = mock.PropertyMock(side_effect=AssertionError('maps are summed up'))
  with mock.patch.object(ExecutionMask, 'counts', summed):
    _, stats = run(images)
  assert_counted(stats, masks, fallbacks=active)


SHAPE = (2, 21, 27, 3)


@pytest.mark.parametrize('image_shape', (None, SHAPE))
def test_a_sparse_network_equals_the_model(
  interpreted, as_on_gpu, loaded, make_network, image_shape
):
  model = make_network('bottleneck', 'dynconv')
  sparse = sparsify(model, 'triton', image_shape=image_shape)
  # The third unit reads the map that the second block has changed.
  shared = [block.masker.maskconv.before for block in sparse.blocks]
  known = [None, None, 'layer1.1', None]
  assert shared == (known if image_shape else [None] * 4)
  # Any other input is also accepted.
  images = make_images((1, 18, 23, 3))
  logits, got = jax.jit(lambda x: sparse(x))(images)
  expected, masks = run_dense(model, images)
  assert_same(logits, expected)
  for mine, theirs in zip(got, masks, strict=True):
    assert (mine.name, mine.layers) == (theirs.name, theirs.layers)
    for one, other in zip(mine.maps, theirs.maps, strict=True):
      np.testing.assert_array_equal(one, other)


def test_a_network_in_bfloat16_equals_the_model(
  interpreted, as_on_gpu, loaded, make_network
):
  model, images = (
    make_network('bottleneck', 'dynconv', BF16),
    make_images(SHAPE),
  )
  rng = np.random.default_rng(0)
  _, masks = jax.eval_shape(lambda x: model(x), images)
  masks = [clustered_masks(rng, m.hard.shape, 0.4) for m in masks]
  sparse = sparsify(model, 'triton', image_shape=SHAPE)
  assert type(sparse.stem) is triton.PooledStem
  # The stem, not the first unit, multiplies its map.
  launched, launch = [], triton_launch.launch

  def record(kernel, *args, **kwargs):
    launched.append(kernel)
    return launch(kernel, *args, **kwargs)

  with mock.patch.object(triton_launch, 'launch', record):
    logits, _ = jax.jit(lambda x: sparse(x, masks=masks))(images)
  assert launched[:3] == ['convolve_pool', 'decide', 'convolve']
  assert launched.count('squeeze') == 2 and 'max_pool' not in launched
  expected, _ = run_dense(model, images, masks)
  assert_same(logits, expected, 2**-6)


def test_a_stem_leaves_products_to_the_block_that_reads_it(
  as_on_gpu, loaded, make_network
):
  model = make_network('bottleneck', 'dynconv', BF16)
  units = []
  for plans in ({}, {'layer1.0': BlockPlan(get_backend('dense'))}):
    sparse = sparsify(model, 'triton', image_shape=SHAPE, plans=plans)
    units.append(sparse.stem.unit)
  assert units[0] is not None and units[1] is None
  # Which block comes first is not known; and a network without gates.
  assert sparsify(model, 'triton').stem.unit is None
  dense = make_network('bottleneck', 'dense', BF16)
  assert sparsify(dense, 'triton', image_shape=SHAPE).stem.unit is None


class OwnStem(ResNet):
  """Has another stem."""

  def stem(self, images, gating=None):
    return 2 * super().stem(images, gating)


def test_a_stem_that_does_more_is_left_alone(as_on_gpu, loaded, make_network):
  model = make_network('bottleneck', 'dynconv', BF16)
  model.__class__ = OwnStem
  sparse = sparsify(model, 'triton', image_shape=SHAPE)
  assert type(sparse.conv1) is triton.TritonStem
  assert type(sparse.maxpool) is triton.TritonMaxPool


class Irregular(nnx.Module):
  """Calls one block twice, and another without its gate."""

  def __init__(self, *, rngs):
    def block(name):
      gate = MaskUnit(3, strides=1, rngs=rngs)
      return BasicBlock(
        3, 3, name=name, gate=gate, input_activated=True, rngs=rngs
      )

    self.first, self.twice = block('first'), block('twice')
    self.everywhere, self.last = block('everywhere'), block('last')

  def __call__(self, x, *, masks=None):
    gating = Gating(masks=masks)
    x = self.first(nnx.relu(x), gating)
    x = self.twice(self.twice(x, gating), gating)
    x = self.last(self.everywhere(x), gating)
    return x, gating.finish()


def test_a_unit_takes_over_what_it_may(interpreted, as_on_gpu, loaded):
  model = nnx.view(
    Irregular(rngs=nnx.Rngs(14)), deterministic=True, use_running_average=True
  )
  images = make_images((2, 5, 6, 3))
  expected, masks = run_dense(model, images)
  assert all(0 < float(mask.hard.mean()) < 1 for mask in masks)
  sparse = sparsify(model, 'triton', image_shape=images.shape)
  # The block in between has no decision, so its products are not used.
  assert sparse.last.masker.maskconv.before == 'everywhere'
  logits, got = jax.jit(lambda x: sparse(x))(images)
  assert_same(logits, expected)
  for mine, theirs in zip(got, masks, strict=True):
    np.testing.assert_array_equal(mine.hard, theirs.hard)


def test_on_a_gpu_kernels_serve_where_they_are_asked_for(
  as_on_gpu, make_network
):
  model = make_network('bottleneck', 'dynconv')
  run = SparseExecutor(model, (1, 9, 9, 3), mode='sparse')
  assert {plan.backend.name for plan in run.plans.values()} == {'xla'}
  with pytest.raises(ValueError, match='cpu cannot execute .* on gpu'):
    SparseExecutor(model, (1, 9, 9, 3), mode='sparse', backend='cpu')
  plans = {'layer2.0': BlockPlan(get_backend('cpu'))}
  with pytest.raises(ValueError, match='on gpu in float32: cpu for layer2.0'):
    sparsify(model, plans=plans)
  with pytest.raises(ValueError, match="mode 'dense' has no backend"):
    SparseExecutor(model, (1, 9, 9, 3), mode='dense', backend='triton')


@pytest.mark.parametrize('installed', (False, True))
def test_on_a_gpu_kernels_serve_in_bfloat16(as_on_gpu, make_network, installed):
  model = make_network('bottleneck', 'dynconv', BF16)
  missing = None if installed else ImportError
  with mock.patch.object(triton_launch, 'load', side_effect=missing):
    run = SparseExecutor(model, (1, 9, 9, 3), mode='sparse')
  expected = 'triton' if installed else 'xla'
  assert {plan.backend.name for plan in run.plans.values()} == {expected}


def test_auto_times_the_kernels_against_dense_execution(
  as_on_gpu, loaded, make_network
):
  model = make_network('bottleneck', 'dynconv', BF16)
  asked = []

  def calibrate(block, plan, shape, **_):
    asked.append((block.name, plan.backend.name, plan.limit))
    return plan

  with mock.patch.object(executor, 'calibrate', calibrate):
    SparseExecutor(model, (1, 9, 9, 3))
  # All four blocks have different shapes.
  assert asked == [(b.name, 'triton', 1.0) for b in model.blocks]


def test_a_cpu_has_no_kernels_for_a_gpu(make_network, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  model = make_network('bottleneck', 'dynconv')
  with pytest.raises(ValueError, match='triton cannot execute .* on cpu'):
    SparseExecutor(model, (1, 9, 9, 3), backend='triton')
  plans = {'layer1.0': BlockPlan(get_backend('triton'))}
  with pytest.raises(ValueError, match='on cpu in .*: triton for layer1.0'):
    SparseExecutor(model, (1, 9, 9, 3), mode='sparse', plans=plans)


def test_a_missing_package_is_told(as_on_gpu, make_network, monkeypatch):
  model = make_network('bottleneck', 'dynconv')
  kernels = 'dynconv_jax.sparse.backends.triton_kernels'
  # First, because modules imported during patching are lost afterwards.
  with contextlib.suppress(ImportError):
    importlib.import_module(kernels)
    importlib.import_module('dynconv_jax.sparse.backends.gluon_kernels')
  # Otherwise the package returns its module that was imported before.
  monkeypatch.delattr(backends, 'triton_kernels', raising=False)
  for absent, version, message in (
    ({kernels: None}, '0.11.2', r"pip install 'dynconv-jax\[gpu\]' installs"),
    ({}, '0.10.0', 'jaxlib 0.10.1 or newer, .* got 0.10.0'),
    ({}, '0.10.1', "JAX's CUDA support, which this jaxlib 0.10.1 lacks"),
  ):
    info = tuple(map(int, version.split('.')))
    triton_launch.load.cache_clear()
    if not absent:
      need('triton')
    with (
      mock.patch.dict(sys.modules, absent),
      mock.patch.multiple(
        jaxlib.version, __version__=version, __version_info__=info
      ),
      mock.patch.object(jaxlib, 'gpu_triton', mock.Mock(spec=[])),
      pytest.raises(ImportError, match=message),
    ):
      SparseExecutor(model, (1, 9, 9, 3), mode='sparse', backend='triton')


@pytest.mark.skipif(
  jax.default_backend() == 'gpu', reason='what stands in would be kept'
)
def test_a_network_is_lowered_for_cuda(as_on_gpu, make_network):
  """Does everything except the launch; jaxlib's part is recorded."""
  need('triton')
  calls = []

  def make_call(kernel, x, y, z, parameters):
    calls.append((kernel, x, parameters))
    return mock.Mock(to_proto=lambda *_: b'')

  stand_ins = {
    'TritonKernel': collections.namedtuple(
      'TritonKernel', 'name warps clusters shared ptx ttir capability'
    ),
    'TritonKernelCall': make_call,
    'create_array_parameter': lambda zeroed, divisible: (zeroed, divisible),
  }
  model = make_network('bottleneck', 'dynconv', BF16)
  shape = (1, 33, 33, 3)
  triton_launch.load.cache_clear()
  triton_launch._kernel.cache_clear()
  with mock.patch.object(jaxlib, 'gpu_triton', mock.Mock(**stand_ins)):
    run = SparseExecutor(model, shape, mode='sparse', backend='triton')
    lowered = run._run.trace(
      run._arrays, jnp.zeros(shape), None, return_masks=False
    ).lower(lowering_platforms=('cuda',))
  triton_launch.load.cache_clear()
  triton_launch._kernel.cache_clear()
  text = lowered.as_text()
  # For each of the four blocks, the mask unit with its lists takes two launches
  # and the branch two. The first block's unit has its products from the stem,
  # which is one launch with its pooling, and the third block's from the second
  # block. In place: both counts and the output of each block, and what two
  # units share.
  assert text.count('@triton_kernel_call_ffi') == 4 * 4 - 2 + 1
  assert text.count('#stablehlo.output_operand_alias') == 13
  assert {kernel.name for kernel, _, _ in calls} == {
    *('squeeze', 'decide', 'convolve', 'convolve_matmul_add'),
    'convolve_pool',
  }
  for kernel, programs, parameters in calls:
    entry = kernel.ptx[kernel.ptx.index('.entry') :]
    # Triton adds two for scratch memory; jaxlib's launcher provides them.
    assert entry[: entry.index(')')].count('.param') == len(parameters) + 2
    assert programs >= 1
    assert not any(size for size, _ in parameters)  # nothing is zeroed


@pytest.mark.parametrize(
  ('capability', 'number'),
  (('8.6', 86), ('9.0', 90), ('10.0', 100), ('gfx90a', 90), (None, 90)),
)
def test_capability(capability, number, monkeypatch):
  device = mock.Mock(spec=[] if capability is None else ['compute_capability'])
  if capability is not None:
    device.compute_capability = capability
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert triton_launch.capability() == number
  assert triton_launch.generation() == number // 10


@on_gpu
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
  'backend,side', (('triton', 1), ('triton', 3), ('auto', 1))
)
@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_the_executor_equals_the_model_on_a_gpu(
  make_network, family, backend, side, dtype
):
  need('triton')
  model = make_network(family, 'dynconv', dtype, mask_granularity=(side,))
  images = make_images((5, 65, 97, 3))
  run = SparseExecutor(model, images.shape, backend=backend)
  _, masks = jax.eval_shape(lambda x: model(x), images)
  rng = np.random.default_rng(0)
  masks = [clustered_masks(rng, m.hard.shape, 0.4) for m in masks]
  logits, _ = run(images, masks=masks)
  dense = SparseExecutor(model, images.shape, mode='dense')
  expected, _ = dense(images, masks=masks)
  tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
  assert_same(logits, expected, tolerance)
