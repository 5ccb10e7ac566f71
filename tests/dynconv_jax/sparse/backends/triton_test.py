"""Tests of the kernels for a GPU: by Triton's interpreter, by its compiler.

With a GPU they are run on it too; without one those tests are skipped.
"""

import collections
import functools
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxlib import gpu_triton

from dynconv_jax.layers import max_pool
from dynconv_jax.masks import dilate
from dynconv_jax.methods.dynconv import MaskUnit
from dynconv_jax.sparse import BlockPlan, SparseExecutor, cost, cudnn, gpu
from dynconv_jax.sparse.cost import clustered_masks
from dynconv_jax.sparse.dense import convolve, run_dense
from dynconv_jax.sparse.fold import FoldedBlock, FoldedNetwork, Layer
from dynconv_jax.sparse.plan import run_block

DTYPES = (jnp.float32, jnp.bfloat16)
on_gpu = pytest.mark.skipif(
  jax.default_backend() != 'gpu', reason='needs a GPU'
)


@pytest.fixture(autouse=True)
def precision():
  """On a GPU XLA rounds float32 to TF32 unless it is told not to."""
  with jax.default_matmul_precision('highest'):
    yield


def need(*packages):
  for package in packages:
    pytest.importorskip(
      package, reason=f'needs {package}', exc_type=ImportError
    )


@pytest.fixture(scope='module')
def interpreter():
  need('triton', 'torch')
  import triton_interpreter

  with triton_interpreter.Interpreter() as launch:
    yield launch


@pytest.fixture
def interpreted(interpreter):
  # Blocks that are too wide for a fused kernel take their time.
  widths = dict.fromkeys(gpu.FUSED_WIDTH, 40)
  with (
    mock.patch.object(gpu, 'launch', interpreter),
    mock.patch.dict(gpu.FUSED_WIDTH, widths),
  ):
    yield


@pytest.fixture
def as_on_gpu():
  """What is decided by the kind of backend is decided as on a GPU."""
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
    yield


@jax.jit
def masked_dense(block, x, hard):
  """In sums of float32, also where cuDNN's form rounds the branch by itself."""
  with mock.patch.object(jax, 'default_backend', lambda: 'cpu'):
    return run_dense(block, x, hard)


def make_layer(rng, size, in_features, features, strides, dtype):
  kernel = rng.normal(size=(size, size, in_features, features))
  return Layer(
    jnp.asarray(kernel / np.sqrt(size**2 * in_features), dtype),
    jnp.asarray(rng.normal(size=features), jnp.float32),
    strides,
  )


def make_block(kind, in_features, planes, features, strides, dtype):
  layer = functools.partial(
    make_layer, np.random.default_rng(features), dtype=dtype
  )
  projection = None
  if strides > 1 or features != in_features:
    projection = layer(1, in_features, features, strides)
  if kind == 'basic':
    return FoldedBlock(
      layer(3, in_features, features, strides),
      layer(3, features, features, 1),
      None,
      projection,
    )
  return FoldedBlock(
    layer(1, in_features, planes, 1),
    layer(3, planes, planes, strides),
    layer(1, planes, features, 1),
    projection,
  )


def make_input(shape, dtype):
  x = np.random.default_rng(1).normal(size=shape)
  return jnp.asarray(np.maximum(x, 0), dtype)


def make_masks(shape):
  rng = np.random.default_rng(2)
  one, odd = np.zeros((2, np.prod(shape)), np.float32)
  one[-1] = 1
  odd[rng.choice(odd.size, odd.size // 3 | 1, replace=False)] = 1
  return {
    'none': np.zeros(shape, np.float32),
    'one': one.reshape(shape),
    'odd': odd.reshape(shape),
    'clustered': clustered_masks(rng, shape, 0.4),
    'all': np.ones(shape, np.float32),
  }


def dilated_mask(block, x, hard):
  _, h, w = block.first.output_shape(x.shape)
  return dilate(hard, block.second.strides)[:, :h, :w]


def assert_near(got, expected, name=''):
  """Up to the order of sums, and in bfloat16 to what that may round otherwise.

  Sums on both sides of a tie are rounded to neighbours, which are 2**-7 apart
  or less; so may values between the layers be, whose sums are off by less.
  """
  assert got.dtype == expected.dtype
  rtol, tolerance = 0, 2e-6
  if got.dtype == jnp.bfloat16:
    rtol, tolerance = 2**-7, 2**-9
  got, expected = (np.asarray(v, np.float32) for v in (got, expected))
  atol = tolerance * np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=name)


def run_lists(block, x, hard, dilated):
  lists = gpu.Lists(gpu.list_positions(hard), gpu.list_positions(dilated))
  return gpu.run_triton(block, x, lists)


def compare(block, shape):
  x = make_input(shape, block.first.kernel.dtype)
  for name, hard in make_masks(block.output_shape(shape)).items():
    hard = jnp.asarray(hard)
    out = run_block(
      block,
      x,
      hard,
      dilated_mask(block, x, hard),
      jnp.mean(hard),
      BlockPlan('triton'),
    )
    assert_near(out, masked_dense(block, x, hard), name)


BLOCKS = {
  'basic': ('basic', 20, 20, 20),
  'basic_projected': ('basic', 17, 33, 33),
  'bottleneck': ('bottleneck', 20, 9, 20),
  'bottleneck_projected': ('bottleneck', 17, 40, 70),
  # Too wide for one kernel after its first convolution.
  'bottleneck_wide': ('bottleneck', 20, 42, 20),
}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('strides', (1, 2))
@pytest.mark.parametrize('kind', BLOCKS)
def test_blocks_equal_xla(interpreted, kind, strides, dtype):
  compare(make_block(*BLOCKS[kind], strides, dtype), (2, 7, 9, BLOCKS[kind][1]))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', ((1, 1, 1), (3, 1, 6), (1, 12, 23)))
@pytest.mark.parametrize('strides', (1, 2))
def test_maps_of_any_size(interpreted, shape, strides, dtype):
  compare(make_block('bottleneck', 8, 5, 8, strides, dtype), (*shape, 8))


def check_list(found, mask):
  """A list holds each active position once, and their places in it."""
  expected, count = np.flatnonzero(mask), int(found.count[0])
  assert count == len(expected)
  listed = np.asarray(found.indices)[:count]
  np.testing.assert_array_equal(np.sort(listed), expected)
  rows = np.asarray(found.rows)
  np.testing.assert_array_equal(rows[listed], np.arange(count))
  assert (np.delete(rows, expected) == -1).all()


def test_positions_of_many_tiles(interpreted):
  mask = np.random.default_rng(0).random((3, 29, 31)) < 0.3
  assert mask.size > 2 * gpu._LIST_BLOCK
  check_list(gpu.list_positions(jnp.asarray(mask, jnp.float32)), mask)


@pytest.mark.parametrize('shape', ((1, 1, 1), (3, 1, 6), (2, 17, 23)))
@pytest.mark.parametrize('strides', (1, 2))
def test_dilated_positions(interpreted, shape, strides):
  n, h, w = shape
  for mask in make_masks((n, -(-h // strides), -(-w // strides))).values():
    mask = jnp.asarray(mask)
    zero = jnp.zeros(1, jnp.int32)
    found = gpu.list_dilated(gpu.list_positions(mask), zero, shape, strides)
    check_list(found, dilate(mask, strides)[:, :h, :w])


@pytest.mark.parametrize('kind', ('basic', 'bottleneck', 'bottleneck_wide'))
def test_nothing_is_read_that_was_not_computed(interpreted, kind):
  """What is not a number at inactive positions stays there."""
  block = make_block(*BLOCKS[kind], 1, jnp.float32)
  x = make_input((2, 7, 9, 20), jnp.float32)
  hard = jnp.zeros(x.shape[:3]).at[0, 2:4, 2:5].set(1)
  dilated = dilated_mask(block, x, hard)
  # A basic block's first convolution reads one position further.
  read = dilate(dilated) if kind == 'basic' else dilated
  spoilt = jnp.where(read[..., None] != 0, x, jnp.nan)
  out = jax.jit(run_lists)(block, spoilt, hard, dilated)
  active = hard != 0
  assert_near(out[active], masked_dense(block, x, hard)[active])
  np.testing.assert_array_equal(jnp.isnan(out), jnp.isnan(spoilt))


def test_what_is_no_number_stays_so(interpreted):
  block = make_block('bottleneck', 8, 5, 8, 1, jnp.float32)
  x = make_input((2, 3, 3, 8), jnp.float32).at[1, 1, 1, 0].set(jnp.nan)
  ones = jnp.ones(x.shape[:3])
  out = jax.jit(run_lists)(block, x, ones, ones)
  assert jnp.isnan(out[1]).all() and not jnp.isnan(out[0]).any()


@pytest.mark.parametrize(
  'family,method,options',
  (
    ('bottleneck', 'dynconv', {}),
    ('bottleneck', 'dynconv', {'mask_granularity': (2,)}),
    ('basic', 'convnet_aig', {}),
  ),
)
def test_the_executor_equals_the_model(
  interpreted, as_on_gpu, make_network, family, method, options
):
  model = make_network(family, method, **options)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 21, 27, 3)), jnp.float32)
  with mock.patch.object(gpu, 'load'):
    executor = SparseExecutor(model, images.shape, mode='sparse', native=True)
  assert executor.kernels == 'triton'
  assert {plan.form for plan in executor.plans} == {'triton'}
  logits, stats = executor(images)
  graphdef, state = nnx.split(model)
  expected, masks = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(
    nnx.as_pure(state), images
  )
  np.testing.assert_allclose(
    logits, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max())
  )
  assert stats.positions.tolist() == [int(m.hard.sum()) for m in masks]
  if method == 'dynconv':
    given = [clustered_masks(rng, m.hard.shape, 0.3) for m in masks]
    logits, stats = executor(images, masks=given)
    assert stats.positions.tolist() == [int(m.sum()) for m in given]


def test_on_a_gpu_kernels_serve_where_they_are_asked_for(
  as_on_gpu, make_network
):
  model = make_network('bottleneck', 'dynconv')
  executor = SparseExecutor(model, (1, 9, 9, 3), mode='sparse')
  assert not executor.native
  assert {plan.form for plan in executor.plans} == {'buckets'}
  forms = {plan.form for plan in cost._candidates((1, 9, 9), False, True)}
  assert forms == {'dense', 'triton'}
  with pytest.raises(ValueError, match='native needs a CPU'):
    SparseExecutor(model, (1, 9, 9, 3), plans=[BlockPlan('native')] * 4)
  with pytest.raises(ValueError, match='or a GPU'):
    SparseExecutor(model, (1, 9, 9, 3), native=True, mode='dense')


@pytest.mark.parametrize('installed', (False, True))
def test_on_a_gpu_kernels_serve_in_bfloat16(as_on_gpu, make_network, installed):
  model = make_network('bottleneck', 'dynconv', jnp.bfloat16)
  missing = None if installed else ImportError
  with mock.patch.object(gpu, 'load', side_effect=missing):
    executor = SparseExecutor(model, (1, 9, 9, 3), mode='sparse')
  assert executor.kernels == ('triton' if installed else None)


def test_a_cpu_has_no_kernels_for_a_gpu(make_network):
  model = make_network('bottleneck', 'dynconv')
  with (
    mock.patch.object(jax, 'default_backend', lambda: 'cpu'),
    pytest.raises(ValueError, match='native needs a CPU.*on cpu'),
  ):
    SparseExecutor(model, (1, 9, 9, 3), plans=[BlockPlan('triton')] * 4)


def test_a_missing_package_is_told(as_on_gpu, make_network):
  model = make_network('bottleneck', 'dynconv')
  gpu.load.cache_clear()
  with (
    mock.patch.dict(sys.modules, {'jax_triton': None}),
    pytest.raises(ImportError, match=re.escape("'dynconv-jax[gpu]' installs")),
  ):
    SparseExecutor(model, (1, 9, 9, 3), native=True, mode='sparse')


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('granularity', (1, 3))
@pytest.mark.parametrize('kernel_size', (1, 3))
@pytest.mark.parametrize('strides', (1, 2))
@pytest.mark.parametrize('size', ((1, 1), (5, 8), (15, 19)))
def test_mask_units(
  interpreted, kernel_size, strides, granularity, size, dtype
):
  """Logits, and where they are not negative; or a mask instead of that.

  Three units read a map, of which some positions are changed in between.
  """
  units = [
    make_mask_unit(20, kernel_size, s, g, seed)
    for seed, (s, g) in enumerate(((1, 1), (1, 16), (strides, granularity)))
  ]
  rng = np.random.default_rng(0)
  shape, squeezed = (3, *size), None
  x = jnp.asarray(rng.normal(size=(*shape, 20)), dtype)
  for index, unit in enumerate(units):
    expected = mask_logits(unit, x)
    columns = gpu.ColumnSqueeze(units, index)
    squeezed, zero = columns.squeeze(x, squeezed)
    read = (squeezed.terms, x.shape, expected.shape)
    logits, found, zero = columns.list_positions(*read, None, zero)
    assert_near(logits, expected)
    check_list(found, logits >= 0)
    assert zero.tolist() == [0]
    given = jnp.asarray(rng.random(logits.shape) < 0.4, jnp.float32)
    again, found, _ = columns.list_positions(*read, given, zero)
    np.testing.assert_array_equal(again, logits)
    check_list(found, given)
    changed = jnp.asarray(rng.random(shape) < 0.4)
    new = jnp.asarray(rng.normal(size=x.shape), dtype)
    x = jnp.where(changed[..., None], new, x)
    found = gpu.list_positions(changed.astype(jnp.float32))
    squeezed = squeezed._replace(changed=found)


def make_mask_unit(in_features, kernel_size, strides, granularity, seed=1):
  return MaskUnit(
    in_features,
    strides=strides,
    kernel_size=kernel_size,
    granularity=granularity,
    rngs=nnx.Rngs(seed),
  )


def mask_logits(unit, x):
  """A mask unit's logits at each position, patches averaged one by one."""
  n, height, width, _ = x.shape
  if unit.granularity == 1:
    return unit.maskconv(x)
  side = unit.granularity * unit.strides
  means = [
    [
      np.mean(
        np.asarray(x, np.float32)[:, top : top + side, left : left + side],
        (1, 2),
      )
      for left in range(0, width, side)
    ]
    for top in range(0, height, side)
  ]
  logits = unit.maskconv(jnp.asarray(means).transpose(2, 0, 1, 3))
  for axis, length in ((1, height), (2, width)):
    logits = jnp.repeat(logits, unit.granularity, axis)
    logits = logits.take(jnp.arange(-(-length // unit.strides)), axis)
  return logits


@pytest.mark.parametrize('features', (40, 64))
@pytest.mark.parametrize('size', ((1, 1), (23, 18), (40, 31)))
def test_stem_and_pooling(interpreted, size, features):
  rng = np.random.default_rng(0)
  layer = make_layer(rng, 7, 3, features, 2, jnp.bfloat16)
  x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.bfloat16)
  out = gpu.stem(x, cudnn.lay_out(FoldedNetwork(layer, (), layer)).stem)
  rounded = layer.replace(bias=layer.bias.astype(jnp.bfloat16).astype(float))
  expected = jax.nn.relu(convolve(x, rounded)).astype(x.dtype)
  assert_near(out, expected)
  for x in (out, out.at[0, 0, 0, 0].set(jnp.nan)):
    pooled, expected = (v.astype(float) for v in (gpu.max_pool(x), max_pool(x)))
    np.testing.assert_array_equal(pooled, expected)


@pytest.mark.skipif(
  jax.default_backend() == 'gpu', reason='what stands in would be kept'
)
def test_a_network_is_lowered_for_cuda(as_on_gpu, make_network, monkeypatch):
  """All that jax-triton does short of a launch; jaxlib's part is recorded."""
  need('triton')
  monkeypatch.setenv('TRITON_CACHE_DIR', '')  # jax-triton sets it.
  calls = []

  def make_call(kernel, x, y, z, parameters):
    calls.append((kernel, x, parameters))
    return mock.Mock(to_proto=lambda *_: b'')

  stand_ins = {
    'get_compute_capability': lambda device: 90,
    'get_serialized_metadata': None,
    'TritonKernel': collections.namedtuple(
      'TritonKernel', 'name warps clusters shared ptx ttir capability'
    ),
    'TritonKernelCall': make_call,
    'create_array_parameter': lambda zeroed, divisible: (zeroed, divisible),
  }
  model = make_network('bottleneck', 'dynconv', jnp.bfloat16)
  with mock.patch.multiple(gpu_triton, create=True, **stand_ins):
    need('jax_triton')
    executor = SparseExecutor(model, (1, 33, 33, 3), mode='sparse', native=True)
    lowered = executor._run.trace(
      executor._arrays, jnp.zeros((1, 33, 33, 3)), None
    ).lower(lowering_platforms=('cuda',))
  text = lowered.as_text()
  # Each of the four blocks: its mask unit and its lists take three, the branch
  # two, two projections one; stem and pooling. In place: both counts and the
  # output of each block, and the products of the two that share a map.
  assert text.count('@triton_kernel_call') == 24
  assert text.count('#stablehlo.output_operand_alias') == 13
  assert {kernel.name for kernel, _, _ in calls} == {
    *('squeeze', 'decide', 'list_dilated', 'project', 'convolve'),
    *('convolve_matmul_add', 'convolve_rows', 'max_pool'),
  }
  for kernel, programs, parameters in calls:
    entry = kernel.ptx[kernel.ptx.index('.entry') :]
    # Triton adds two, for scratch memory; jaxlib's launcher gives them.
    assert entry[: entry.index(')')].count('.param') == len(parameters) + 2
    assert programs >= 1
    assert not any(size for size, _ in parameters)  # Nothing is zeroed.


def _resnet_blocks(widths, dtype):
  """Shapes of the blocks of ResNet-50 or ResNet-18 at 224 pixels, batch 128."""

  def layer(size, in_features, features, strides=1):
    shape = (size, size, in_features, features)
    bias = jax.ShapeDtypeStruct((features,), jnp.float32)
    return Layer(jax.ShapeDtypeStruct(shape, dtype), bias, strides)

  side, depth = 56, 64
  for planes, strides in zip((64, 128, 256, 512), (1, 2, 2, 2), strict=True):
    for s in (strides, 1):
      features = planes * widths
      layers = [layer(1, depth, planes), layer(3, planes, planes, s)]
      layers.append(layer(1, planes, features))
      if widths == 1:
        layers = [layer(3, depth, planes, s), layer(3, planes, planes), None]
      projected = s > 1 or depth != features
      block = FoldedBlock(
        *layers, layer(1, depth, features, s) if projected else None
      )
      yield block, jax.ShapeDtypeStruct((128, side, side, depth), dtype)
      side, depth = side // s, features


def _list_both(block, columns, index, x, hard):
  """What a mask unit launches, the first that reads a map or a later one."""
  squeezed = None
  if index:
    total = columns.first + columns.columns
    squeezed = gpu.Squeezed(
      jnp.zeros((total, x.size // x.shape[-1])),
      gpu.list_positions(jnp.ones(x.shape[:3])),
    )
  squeezed, zero = columns.squeeze(x, squeezed)
  _, active, zero = columns.list_positions(
    squeezed.terms, x.shape, hard.shape, None, zero
  )
  return gpu.list_dilated(active, zero, x.shape[:3], block.second.strides)


@pytest.mark.parametrize(
  ('capability', 'generation'),
  (('8.0', 8), ('9.0', 9), ('10.0', 10), ('gfx90a', 9), (None, 9)),
)
def test_generation(capability, generation, monkeypatch):
  device = mock.Mock(spec=[] if capability is None else ['compute_capability'])
  if capability is not None:
    device.compute_capability = capability
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert gpu.generation() == generation


@pytest.mark.slow
@pytest.mark.parametrize('generation', (8, 9))
@pytest.mark.parametrize('dtype', DTYPES)
def test_kernels_fit_into_a_multiprocessor(
  dtype, generation, tmp_path, monkeypatch
):
  """Compiled for an A100 and an H100, with what ptxas says of them."""
  need('triton')
  import triton_compiler

  monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
  monkeypatch.setattr(gpu, 'generation', lambda: generation)
  launches = []
  with mock.patch.object(gpu, 'launch', triton_compiler.record(launches)):
    for widths in (1, 4):
      for block, x in _resnet_blocks(widths, dtype):
        hard, dilated = (
          jax.ShapeDtypeStruct(shape, jnp.float32)
          for shape in (
            block.output_shape(x.shape),
            block.first.output_shape(x.shape),
          )
        )
        traced = functools.partial(run_lists)  # Not what was traced before.
        out = jax.eval_shape(traced, block, x, hard, dilated)
        assert out.shape[:3] == hard.shape and out.dtype == dtype
        strides = x.shape[1] // out.shape[1]
        for side in {56: (1, 4), 28: (1, 2), 14: (1, 14), 7: (1,)}[x.shape[1]]:
          unit = make_mask_unit(x.shape[-1], 3, strides, side)
          # So many columns are rounded up to 64, 32 and 16.
          for index in (0, 1, gpu.UNITS - 2, gpu.UNITS - 1):
            columns = gpu.ColumnSqueeze([unit] * gpu.UNITS, index)
            jax.eval_shape(
              functools.partial(_list_both, block, columns, index), x, hard
            )
    for features in (64, 40):
      layer = make_layer(np.random.default_rng(0), 7, 3, features, 2, dtype)
      network = cudnn.lay_out(FoldedNetwork(layer, (), layer))
      images = jax.ShapeDtypeStruct((128, 224, 224, 3), dtype)
      jax.eval_shape(
        lambda x, n=network: gpu.max_pool(gpu.stem(x, n.stem)), images
      )
  variants = triton_compiler.variants(launches)
  assert {kernel for kernel, *_ in variants} == {
    *('list_positions', 'squeeze', 'decide', 'list_dilated', 'project'),
    *('convolve', 'convolve_add', 'convolve_matmul_add', 'max_pool'),
    *(('convolve_rows',) if dtype == jnp.bfloat16 else ()),
  }
  # Some of a thread's 255 registers may lie in memory, if not at each product:
  # 8 in the fused kernel of 128 channels with stride 2, on an H100 13 of tiles
  # of 128 x 128. Both were the fastest on an H200.
  spilled = {8: 8 * 4, 9: 16 * 4}[generation]
  for variant in variants:
    used = triton_compiler.compile_launch(*variant, generation * 10)
    # Two programs share an H100's multiprocessor, one fits on an A100's.
    assert used.shared <= 227 * 1024 // 2, (variant, used)
    assert used.spilled <= spilled, (variant, used)
    if dtype == jnp.bfloat16 and 'DEPTH' in dict(variant[2]):
      assert used.tensor_cores, (variant, used)


@on_gpu
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('strides', (1, 2))
@pytest.mark.parametrize(
  'sizes',
  (
    *BLOCKS.values(),
    ('bottleneck', 512, 128, 512),
    ('bottleneck', 256, 256, 256),
  ),
)
def test_blocks_equal_xla_on_a_gpu(sizes, strides, dtype):
  need('triton', 'jax_triton')
  compare(make_block(*sizes, strides, dtype), (8, 29, 31, sizes[1]))


@on_gpu
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
  'mode,side', (('sparse', 1), ('sparse', 3), ('auto', 1))
)
@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_the_executor_equals_the_model_on_a_gpu(
  make_network, family, mode, side, dtype
):
  need('triton', 'jax_triton')
  model = make_network(family, 'dynconv', dtype, mask_granularity=(side,))
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(5, 65, 97, 3)), jnp.float32)
  executor = SparseExecutor(model, images.shape, mode=mode, native=True)
  _, masks = jax.eval_shape(lambda x: model(x), images)
  masks = [clustered_masks(rng, m.hard.shape, 0.4) for m in masks]
  logits, _ = executor(images, masks=masks)
  dense = SparseExecutor(model, images.shape, mode='dense')
  expected, _ = dense(images, masks=masks)
  tolerance = 1e-5 if dtype == jnp.float32 else 2**-6
  scale = float(jnp.abs(expected).max())
  np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * scale)
