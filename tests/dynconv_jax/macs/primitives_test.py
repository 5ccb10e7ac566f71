"""The work of primitives, through the tracer, against counts by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from dynconv_jax import macs
from dynconv_jax.macs import formulas

flops = functools.partial(macs.count_macs, convention='flops')
products = functools.partial(macs.count_macs, convention='conv+linear')


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
  'numbers,x,kernel',
  [
    (('NWC', 'WIO', 'NWC'), (2, 9, 4), (3, 2, 6)),
    (('NCW', 'OIW', 'NCW'), (2, 4, 9), (6, 2, 3)),
    (('NCHW', 'OIHW', 'NCHW'), (2, 4, 9, 8), (6, 2, 3, 5)),
    (('NHWC', 'HWIO', 'NHWC'), (2, 9, 8, 4), (3, 5, 2, 6)),
    (('HWCN', 'IOHW', 'CNHW'), (9, 8, 4, 2), (2, 6, 3, 5)),
    (('NHWDC', 'HWDIO', 'NHWDC'), (2, 9, 8, 7, 4), (3, 5, 2, 2, 6)),
    (('NCHWD', 'OIHWD', 'NDHWC'), (2, 4, 9, 8, 7), (6, 2, 3, 5, 2)),
  ],
)
@pytest.mark.parametrize('padding', [True, False])
def test_convolutions_of_any_layout_and_rank(numbers, x, kernel, padding):
  """Strided, padded, dilated and in two groups."""
  rank = len(x) - 2
  options = {
    'padding': [(1, 2)] * rank,
    'kernel_dilation': [2, 1, 3][:rank],
    'strides': [2, 3, 1][:rank],
  }

  def f(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      options['strides'],
      options['padding'],
      rhs_dilation=options['kernel_dilation'],
      dimension_numbers=numbers,
      feature_group_count=2,
    )

  counted = macs.count_macs(f, shape(*x), shape(*kernel), padding=padding)
  expected = formulas.convolution(
    batch=2,
    in_features=4,
    out_features=6,
    input_size=[9, 8, 7][:rank],
    kernel_size=[3, 5, 2][:rank],
    feature_groups=2,
    **options,
  )
  outputs = jax.eval_shape(f, shape(*x), shape(*kernel))
  layer = counted.by_layer['conv_0']
  assert layer.macs == (expected.macs if padding else expected.inside_macs)
  assert layer.output_shape == outputs.shape
  assert layer.positions == expected.positions == outputs.size // 6
  assert layer.parameters == math.prod(kernel)
  if padding:
    assert layer.macs == outputs.size * math.prod(kernel) // 6


def test_transposed_convolution_counts_its_inputs():
  f = functools.partial(
    lax.conv_transpose,
    strides=(2, 2),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  counted = macs.count_macs(f, shape(1, 5, 5, 3), shape(3, 3, 3, 7))
  assert counted.total == 25 * 9 * 3 * 7


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('strides', [1, 2])
def test_gradients_of_a_padded_convolution_cost_the_forward_pass(
  groups, strides
):
  """With respect to the input and to the kernel, each."""

  def f(x, kernel):
    y = lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides),
      [(1, 1), (1, 1)],
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )
    return jnp.sum(y**2)

  arguments = shape(2, 8, 8, 4), shape(3, 3, 4 // groups, 8)
  forward = macs.count_macs(f, *arguments).total
  for argnums, times in ((0, 2), (1, 2), ((0, 1), 3)):
    total = macs.count_macs(jax.grad(f, argnums), *arguments).total
    assert total == times * forward


@pytest.mark.parametrize(
  'f,args,total',
  [
    (jnp.dot, [(5,), (5,)], 5),
    (jnp.matmul, [(2, 3), (3, 4)], 24),
    (jnp.matmul, [(7, 2, 3), (7, 3, 4)], 7 * 24),
    (functools.partial(jnp.einsum, 'abc,cbd->ad'), [(2, 3, 4), (4, 3, 5)], 120),
    (
      functools.partial(jnp.einsum, 'abc,abd->bcd'),
      [(2, 3, 4), (2, 3, 5)],
      120,
    ),
    (functools.partial(jnp.tensordot, axes=0), [(2, 3), (4,)], 24),
    (jnp.matmul, [(0, 3), (3, 4)], 0),
  ],
)
def test_matrix_products(f, args, total):
  assert products(f, *(shape(*size) for size in args)).total == total


def test_ragged_products_meet_their_own_group():
  f = lax.ragged_dot
  arguments = shape(6, 3), shape(2, 3, 4), shape(2, dtype=jnp.int32)
  assert products(f, *arguments).total == 6 * 3 * 4

  def loss(x, w, sizes):
    return jnp.sum(f(x, w, sizes) ** 2)

  assert products(jax.grad(loss, (0, 1)), *arguments).total == 3 * 6 * 3 * 4


@pytest.mark.parametrize(
  'f,args,total',
  [
    (jnp.tanh, [(3, 4)], 12),
    (jax.nn.relu, [(3, 4)], 12),
    (lambda x: jnp.where(x > 0, x, 0.0), [(3, 4)], 12),
    (lambda x: x.T.reshape(2, 6)[:, ::2], [(3, 4)], 0),
    (lambda x: jnp.concatenate([x, x]).astype(jnp.bfloat16), [(3, 4)], 0),
    (lambda x: jnp.sum(x, axis=0), [(3, 4)], 8),
    (lambda x: jnp.max(x, axis=0), [(3, 4)], 8),
    (lambda x: jnp.argmax(x, axis=0), [(3, 4)], 8),
    (lambda x: jnp.cumsum(x, axis=0), [(3, 4)], 8),
    (lambda x: jnp.sort(x, axis=0), [(8, 2)], 48),
    (lambda x: lax.top_k(x, 2)[0], [(2, 8)], 48),
    (lambda x: jnp.fft.fft(x.astype(complex)), [(2, 8)], 5 * 16 * 3),
    (jnp.fft.rfft, [(2, 8)], 5 * 8 * 3),
    # JAX compares each row's maximum once more, with -inf.
    (jax.nn.softmax, [(3, 4)], 5 * 12 - 2 * 3 + 3),
    (lambda x: x.at[jnp.array([0, 2])].add(1.0), [(3, 4)], 8),
    (lambda x: nnx.max_pool(x, (2, 2), (2, 2)), [(1, 4, 4, 2)], 8 * 3),
    (lambda x: nnx.avg_pool(x, (2, 2), (2, 2)), [(1, 4, 4, 2)], 8 * 4),
    (jnp.matmul, [(2, 3), (3, 4)], 48),
  ],
)
def test_flops_of_other_work(f, args, total):
  assert flops(f, *(shape(*size) for size in args)).total == total


def test_gradient_of_a_maximum_pool_finds_and_adds():
  def f(x):
    return jnp.sum(nnx.max_pool(x, (2, 2), (2, 2)))

  pooled, elements = 8, 32
  forward = pooled * 3 + pooled - 1
  assert flops(f, shape(1, 4, 4, 2)).total == forward
  counted = flops(jax.grad(f), shape(1, 4, 4, 2))
  assert counted.total == forward + pooled * 4
  assert elements == 1 * 4 * 4 * 2


def test_integers_are_not_flops():
  x = shape(8, dtype=jnp.int32)
  assert flops(lambda x: jnp.sum(x * 2 + jnp.arange(8)), x).total == 0
  assert products(lambda x: x @ x, x).total == 8


def test_random_bits_are_not_work():
  f = functools.partial(jax.random.bits, shape=(8,))
  assert flops(f, jax.random.key(0)).total == 0


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('running', [True, False])
def test_batch_norm_costs_what_its_formula_says(running, affine):
  layer = nnx.BatchNorm(
    4,
    use_running_average=running,
    use_scale=affine,
    use_bias=affine,
    rngs=nnx.Rngs(0),
  )
  counted = flops(layer, shape(2, 3, 3, 4)).total
  expected = formulas.norm(
    72, 4, affine=affine, statistics_groups=0 if running else 4
  ).operations
  # Training also moves two averages, 3 a channel each, and clips the variance.
  assert counted == expected + (0 if running else 2 * 3 * 4 + 4)
