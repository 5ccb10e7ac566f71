"""Tests of dense layers in cuDNN's form against the original layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_cases import make_conv

from dynconv_jax.branch import Conv
from dynconv_jax.sparse import sparsify
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.backends import cudnn
from dynconv_jax.sparse.backends.dense import DenseConv, convolve, run_dense
from dynconv_jax.sparse.fold import describe_conv, fold_block, fold_conv

DENSE = get_backend('dense')


def make_inputs(shape):
  x = np.random.default_rng(0).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def assert_near(got, expected):
  atol = 2e-6 * float(jnp.abs(expected).max())
  np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('size', ((32, 40), (33, 37), (7, 1)))
def test_the_stem_reads_squares(make_network, size):
  model = make_network('bottleneck', 'dynconv')
  what = describe_conv(model.conv1, model.bn1)
  folded = fold_conv(model.conv1, model.bn1, what, jnp.float32)
  stem = cudnn.lay_out_conv(folded)
  assert cudnn.reads_squares(what)
  assert (stem.block, stem.kernel.shape[1:]) == (2, (4, 4, 16))
  x = make_inputs((2, *size, 3))
  assert cudnn.rearrange(x, stem).shape[1:3] == tuple(
    what.output_size(n) for n in size
  )
  assert_near(cudnn.convolve(x, stem), convolve(x, folded))


@pytest.mark.parametrize(
  'conv',
  (
    Conv('a', 'an', 4, 6, 1, 2),
    Conv('a', 'an', 4, 6, 3, 2, groups=2),
    Conv('a', 'an', 4, 4, 5, 2, groups=4, padding='same'),
    Conv('a', 'an', 4, 6, 7, 1),
    Conv('a', 'an', 4, 6, 7, 2, padding='same'),
    Conv('a', 'an', 4, 6, 7, 2, groups=2),
  ),
)
@pytest.mark.parametrize('size', ((8, 6), (7, 5)))
def test_others_have_their_features_first(conv, size):
  folded = make_conv(np.random.default_rng(0), conv, jnp.float32)
  layer = cudnn.lay_out_conv(folded)
  assert layer.block == 1 and not cudnn.reads_squares(conv)
  assert layer.kernel.shape[0] == conv.features
  x = make_inputs((2, *size, 4))
  assert_near(cudnn.convolve(x, layer), convolve(x, folded))


@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_blocks_are_laid_out_where_they_are_dense(
  as_on_gpu, make_network, family
):
  x = make_inputs((2, 9, 7, 8))
  for block in make_network(family, 'dynconv').blocks:
    folded = fold_block(block)
    packed = DENSE.pack(folded)
    for conv in (*packed.convs, *filter(None, [packed.projection])):
      assert isinstance(conv, cudnn.CudnnConv)
      assert conv.kernel.shape[0] == conv.conv.features
    size = block.branch.sizes(x.shape[1:3])[-1]
    hard = (np.random.default_rng(1).random((2, *size)) < 0.5).astype('f4')
    expected = run_dense(folded, x, hard)
    assert_near(
      jax.jit(lambda *args: run_dense(*args))(packed, x, hard), expected
    )
    x = expected


def test_a_network_is_laid_out_where_it_is_dense(as_on_gpu, make_network):
  model = make_network('bottleneck', 'dynconv')
  laid_out = sparsify(model, 'dense')
  assert type(laid_out.conv1) is DenseConv and laid_out.conv1.layout.block == 2
  features = [block.branch.features for block in laid_out.blocks]
  first = [block.packed.tree().convs[-1].kernel for block in laid_out.blocks]
  assert [kernel.shape[0] for kernel in first] == features
  # Blocks of other backends keep their form.
  folded = sparsify(model, 'xla').blocks[0].packed.tree()
  assert not isinstance(folded.convs[0], cudnn.CudnnConv)
