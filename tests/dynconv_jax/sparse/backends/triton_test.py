"""Tests of blocks computed by GPU kernels, in Triton's interpreter.

With a GPU, they also run on it; without one, those tests are skipped.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from triton_cases import (
  BACKEND,
  BLOCKS,
  DTYPES,
  assert_near,
  compare,
  fold,
  make_block,
  make_branch,
  make_conv,
  make_input,
  make_mask_unit,
  mask_of,
  masked_dense,
  need,
  on_gpu,
)

from dynconv_jax import create_model
from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import MaxPool, max_pool
from dynconv_jax.sparse.backends import (
  cudnn,
  triton,
  triton_launch,
  triton_masks,
  triton_stem,
)
from dynconv_jax.sparse.backends.dense import DenseConv, convolve, run_dense

pack = triton.PackedBlock.pack


@pytest.fixture(autouse=True)
def precision():
  """On a GPU, XLA rounds float32 to TF32 unless told otherwise."""
  with jax.default_matmul_precision('highest'):
    yield


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('strides', (1, 2))
@pytest.mark.parametrize('kind', BLOCKS)
def test_blocks_equal_xla(interpreted, kind, strides, dtype):
  compare(
    make_block(*BLOCKS[kind], strides, dtype=dtype), (2, 7, 9, BLOCKS[kind][1])
  )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', ((1, 1, 1), (3, 1, 6), (1, 12, 23)))
@pytest.mark.parametrize('strides', (1, 2))
def test_maps_of_any_size(interpreted, shape, strides, dtype):
  block = make_block('bottleneck', 8, 5, 8, strides, dtype=dtype)
  compare(block, (*shape, 8))


def make_inverted(
  in_features, width, features, strides, side=3, padding='symmetric'
):
  """Returns an inverted residual, as in MobileNetV2 and EfficientNet-Lite."""
  return Branch(
    (
      Conv('a', 'an', in_features, width, activation='relu6'),
      Conv('b', 'bn', width, width, side, strides, width, 'relu6', padding),
      Conv('c', 'cn', width, features),
    ),
    activation=None,
    shortcut='identity' if in_features == features else 'none',
  )


UNUSUAL = {
  'strided_first': Branch(
    (
      Conv('a', 'an', 8, 5, 3, 2, activation='relu'),
      Conv('b', 'bn', 5, 6, 3, 2, activation='relu'),
      Conv('c', 'cn', 6, 7),
    ),
    shortcut='projection',
  ),
  'strided_last': Branch(
    (
      Conv('a', 'an', 8, 5, activation='relu'),
      Conv('b', 'bn', 5, 6, 3, 3),
    ),
    shortcut='projection',
  ),
  'inverted': make_inverted(20, 37, 20, 1),
  'inverted_strided': make_inverted(8, 48, 24, 2),
  'inverted_wide': make_inverted(24, 40, 130, 1),
  'inverted_5x5': make_inverted(20, 24, 20, 1, 5),
  'inverted_5x5_same': make_inverted(8, 24, 12, 2, 5, 'same'),
}


@pytest.mark.parametrize(
  'kind,dtype',
  (
    *((kind, jnp.float32) for kind in UNUSUAL),
    *((kind, jnp.bfloat16) for kind in UNUSUAL),
  ),
)
def test_what_is_supported_is_computed(interpreted, kind, dtype):
  branch = UNUSUAL[kind]
  assert BACKEND.supports(branch, jnp.dtype(dtype), 'gpu')
  compare(fold(branch, dtype), (2, 11, 8, branch.in_features))


@pytest.mark.parametrize('kind', ('basic', 'bottleneck', 'bottleneck_wide'))
def test_nothing_is_read_that_was_not_computed(interpreted, kind):
  """NaNs at inactive positions stay there."""
  block = make_block(*BLOCKS[kind], 1, dtype=jnp.float32)
  x = make_input((2, 7, 9, BLOCKS[kind][1]), jnp.float32)
  hard = jnp.zeros(x.shape[:3]).at[0, 2:4, 2:5].set(1)
  mask = mask_of(block, x, hard)
  read = mask.dilated
  if kind == 'basic':  # its first convolution reads one position further
    read = mask_of(block, x, read).dilated
  spoilt = jnp.where(read[..., None] != 0, x, jnp.nan)
  out = jax.jit(lambda *args: BACKEND.run(*args))(pack(block), spoilt, mask)
  active = hard != 0
  assert_near(out[active], masked_dense(block, x, hard)[active])
  np.testing.assert_array_equal(jnp.isnan(out), jnp.isnan(spoilt))


def test_what_is_no_number_stays_so(interpreted):
  block = make_block('bottleneck', 8, 5, 8, 1, dtype=jnp.float32)
  x = make_input((2, 3, 3, 8), jnp.float32).at[1, 1, 1, 0].set(jnp.nan)
  mask = mask_of(block, x, jnp.ones(x.shape[:3]))
  out = jax.jit(lambda *args: BACKEND.run(*args))(pack(block), x, mask)
  assert jnp.isnan(out[1]).all() and not jnp.isnan(out[0]).any()


@pytest.mark.parametrize('kind', BLOCKS)
def test_without_a_mask_a_block_is_computed_everywhere(kind):
  block = make_block(*BLOCKS[kind], 2, dtype=jnp.float32)
  x = make_input((2, 7, 9, BLOCKS[kind][1]), jnp.float32)
  assert_near(BACKEND.run(pack(block), x, None), run_dense(block, x))


@pytest.mark.parametrize('features', (40, 64))
@pytest.mark.parametrize('size', ((1, 1), (23, 18), (40, 31)))
def test_stem_and_pooling(interpreted, size, features):
  rng = np.random.default_rng(0)
  stem = Conv('conv', 'norm', 3, features, 7, 2, activation='relu')
  layer = make_conv(rng, stem, jnp.bfloat16)
  x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.bfloat16)
  module = BACKEND.convolution(layer)
  assert type(module) is triton.TritonStem
  out = module(x)
  rounded = layer.replace(bias=layer.bias.astype(jnp.bfloat16).astype(float))
  expected = jax.nn.relu(convolve(x, rounded)).astype(x.dtype)
  assert_near(out, expected)
  pool = BACKEND.replacement(MaxPool())
  for x in (out, out.at[0, 0, 0, 0].set(jnp.nan)):
    pooled, expected = (v.astype(float) for v in (pool(x), max_pool(x)))
    np.testing.assert_array_equal(pooled, expected)


@pytest.mark.parametrize(
  'shape,features,generation,programs',
  (
    *(
      (shape, 64, *launch)
      for shape in ((2, 1, 1), (2, 23, 18))
      for launch in (
        *((8, triton_stem._PROGRAMS), (9, triton_stem._PROGRAMS)),
        (9, 1),
      )
    ),
    ((9, 40, 31), 40, 9, triton_stem._PROGRAMS),
  ),
)
def test_stem_pooled_at_once(
  interpreted, shape, features, generation, programs, monkeypatch
):
  """As one after the other, in strips of one line and of several."""
  monkeypatch.setattr(triton_launch, 'generation', lambda: generation)
  monkeypatch.setattr(triton_stem, '_PROGRAMS', programs)
  rng = np.random.default_rng(0)
  stem = Conv('conv', 'norm', 3, features, 7, 2, activation='relu')
  conv = BACKEND.convolution(make_conv(rng, stem, jnp.bfloat16))
  units = [make_mask_unit(features, 3, 1, 1, seed) for seed in range(3)]
  unit = triton_masks.ColumnSqueeze(units, 0)
  x = jnp.asarray(rng.normal(size=(*shape, 3)), jnp.bfloat16)
  x = x.at[0, 0, 0, 0].set(jnp.nan)
  out, squeezed = triton_stem.pooled_stem(x, conv.layer(), unit)
  alone, nothing = triton_stem.pooled_stem(x, conv.layer(), None)
  assert nothing is None
  expected = max_pool(conv(x))
  assert bool(jnp.isfinite(expected[1:]).all()) and (expected[1:] > 0).any()
  for pooled in (out, alone):
    np.testing.assert_array_equal(pooled.astype(float), expected.astype(float))
  terms, *_ = unit.squeeze(out, None)
  # The interpreter multiplies with NumPy's BLAS. On some CPUs, how it rounds a
  # row depends on how many rows there are.
  np.testing.assert_allclose(squeezed.terms, terms, rtol=0, atol=1e-6)
  assert [zero.tolist() for zero in squeezed.zeros] == [[0], [0]]


def test_a_wide_stem_is_not_pooled_at_once():
  for features, kind in ((64, triton_stem.PooledStem), (65, type(None))):
    stem = Conv('conv', 'norm', 3, features, 7, 2, activation='relu')
    layer = make_conv(np.random.default_rng(0), stem, jnp.bfloat16)
    conv = BACKEND.convolution(layer)
    assert type(BACKEND.stem(conv, MaxPool(), None)) is kind
    assert BACKEND.stem(conv, nnx.Sequential(MaxPool()), None) is None
    assert BACKEND.stem(DenseConv(layer), MaxPool(), None) is None


@pytest.mark.parametrize(
  'changed',
  (
    {'activation': None},
    {'activation': 'silu'},
    {'kernel_size': 3},
    {'strides': 1},
    {'padding': 'same'},
    {'in_features': 8},
    {'in_features': 6, 'groups': 3},
  ),
)
def test_other_convolutions_outside_of_blocks_are_cudnn_s(as_on_gpu, changed):
  stem = Conv('conv', 'norm', 3, 6, 7, 2, activation='relu')
  layer = make_conv(
    np.random.default_rng(0), dataclasses.replace(stem, **changed), jnp.bfloat16
  )
  module = BACKEND.convolution(layer)
  assert type(module) is DenseConv
  assert isinstance(module.layout, cudnn.CudnnConv)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', ('resnet18', 'resnet50'))
def test_the_blocks_of_resnets_are_supported(name, dtype):
  model = nnx.eval_shape(
    lambda: create_model(name, method='dynconv', rngs=nnx.Rngs(0))
  )
  for block in model.blocks:
    assert BACKEND.supports(block.branch, jnp.dtype(dtype), 'gpu')
    assert not BACKEND.supports(block.branch, jnp.dtype(dtype), 'cpu')
    assert not BACKEND.supports(block.branch, jnp.dtype(jnp.float16), 'gpu')


def changed(kind, index, of_strides=1, **changes):
  """Returns a branch with changed properties of the convolution at an index."""
  branch = make_branch(kind, 6, 6, 6, of_strides)
  convs = list(branch.convs)
  convs[index] = dataclasses.replace(convs[index], **changes)
  return dataclasses.replace(branch, convs=tuple(convs))


PLAIN = make_branch('bottleneck', 6, 6, 6, 1)


@pytest.mark.parametrize(
  'branch',
  (
    changed('basic', 0, activation='silu'),
    changed('bottleneck', 1, activation='relu6'),
    changed('bottleneck', 0, activation=None),
    changed('bottleneck', 2, activation='relu'),
    changed('basic', 0, kernel_size=5),
    changed('basic', 1, kernel_size=5),
    changed('bottleneck', 1, kernel_size=5),
    changed('bottleneck', 2, kernel_size=3),
    changed('bottleneck', 1, groups=6),  # depthwise
    changed('basic', 0, groups=2),
    changed('bottleneck', 1, padding='same'),
    # A 1x1 does not read the positions at which it is computed.
    changed('bottleneck', 0, 2, strides=2),
    changed('bottleneck', 2, 2, strides=2),
    dataclasses.replace(PLAIN, activation=None),
    dataclasses.replace(PLAIN, activation='silu'),
    dataclasses.replace(PLAIN, shortcut='none'),
    # Positions that are not executed would need rectification.
    dataclasses.replace(PLAIN, input_activated=False),
    dataclasses.replace(PLAIN, convs=PLAIN.convs[:1]),
    dataclasses.replace(UNUSUAL['inverted'], activation='relu'),
    dataclasses.replace(
      UNUSUAL['inverted'], convs=UNUSUAL['inverted'].convs[1:], shortcut='none'
    ),
    dataclasses.replace(PLAIN, convs=PLAIN.convs[:2]),
    dataclasses.replace(PLAIN, convs=(PLAIN.convs[0], *PLAIN.convs)),
  ),
)
def test_what_the_kernels_cannot_do_is_refused(branch):
  dtype = jnp.dtype(jnp.float32)
  assert BACKEND.supports(PLAIN, dtype, 'gpu')
  assert not BACKEND.supports(branch, dtype, 'gpu')


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
  need('triton')
  compare(make_block(*sizes, strides, dtype=dtype), (8, 29, 31, sizes[1]))
