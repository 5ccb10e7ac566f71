"""Tests of the work of primitives, traced, against counts by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.experimental import sparse

from dynconv_jax import macs
from dynconv_jax.macs import formulas

convolutions = functools.partial(macs.count_macs, convention='conv')
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

  counted = convolutions(f, shape(*x), shape(*kernel), padding=padding)
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
  counted = convolutions(f, shape(1, 5, 5, 3), shape(3, 3, 3, 7))
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
  forward = convolutions(f, *arguments).total
  for argnums, times in ((0, 2), (1, 2), ((0, 1), 3)):
    total = convolutions(jax.grad(f, argnums), *arguments).total
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
    # An outer product is one multiply-accumulate per output.
    (functools.partial(jnp.einsum, 'i,j->ij'), [(4,), (5,)], 20),
    (functools.partial(jnp.einsum, 'i,i->i'), [(4,), (4,)], 4),
    # Labels of only one operand are summed first.
    (functools.partial(jnp.einsum, 'ij,kl->il'), [(3, 4), (5, 6)], 18),
    (functools.partial(jnp.einsum, 'ij,j->i'), [(3, 4), (4,)], 12),
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
    # JAX also compares each row's maximum with -inf.
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


def test_labels_that_are_summed_alone_are_additions():
  f = functools.partial(jnp.einsum, 'ij,kl->il')
  additions = 3 * (4 - 1) + (5 - 1) * 6
  assert flops(f, shape(3, 4), shape(5, 6)).total == 2 * 18 + additions


def complex_shape(*sizes):
  return shape(*sizes, dtype=jnp.complex64)


def test_a_complex_multiply_accumulate_is_four():
  """Four multiplications and four additions of real numbers."""
  left, right = complex_shape(4, 8), complex_shape(8, 4)
  assert products(jnp.matmul, left, right).total == 4 * 128
  assert flops(jnp.matmul, left, right).total == 8 * 128
  # As real numbers, written out.
  parts = [shape(4, 8)] * 2 + [shape(8, 4)] * 2

  def written_out(a, b, c, d):
    return jnp.concatenate([a, b], 1) @ jnp.block([[c, d], [-d, c]])

  assert products(written_out, *parts).total == 4 * 128

  def biased(x, k, b):
    y = lax.conv_general_dilated(
      x, k, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
    )
    return y + b

  arguments = [complex_shape(*n) for n in ((1, 9, 3), (2, 3, 5), (5,))]
  assert convolutions(biased, *arguments).total == 8 * 5 * (4 * 6 + 2)


@pytest.mark.parametrize(
  'f,steps',
  [
    (jnp.add, 2),
    (jnp.multiply, 6),
    (jnp.divide, 11),
    (lambda x, y: jnp.abs(x), 4),
    (lambda x, y: jnp.exp(x), 2),
    (lambda x, y: jnp.conj(x), 0),
  ],
)
def test_complex_arithmetic_by_its_real_operations(f, steps):
  assert flops(f, complex_shape(7), complex_shape(7)).total == steps * 7


def test_fourier_transform_agrees_with_complex_arithmetic():
  """Two points: a sum and a difference. Radix 2: one more product for each."""
  butterflies = 4 * 3
  assert flops(jnp.fft.fft, complex_shape(8)).total == butterflies * (6 + 2 + 2)


def by_loops(n, columns, steps):
  """Counts multiply-accumulates of the textbook's triple loop."""
  return sum(1 for i in range(n) for j in range(columns) for _ in steps(i, j))


@pytest.mark.parametrize(
  'f,shapes,total',
  [
    # Row i of L: element j needs the products of the elements before it.
    (
      lax.linalg.cholesky,
      [(6, 6)],
      by_loops(6, 6, lambda i, j: range(j) if j <= i else ()),
    ),
    # Element (i, j) needs the products before the smaller of i and j.
    (
      lax.linalg.lu,
      [(7, 5)],
      by_loops(7, 5, lambda i, j: range(min(i, j))),
    ),
    (
      functools.partial(lax.linalg.triangular_solve, left_side=True),
      [(6, 6), (6, 3)],
      by_loops(6, 3, lambda i, j: range(i)),
    ),
    (
      functools.partial(lax.linalg.triangular_solve, left_side=False),
      [(2, 6, 6), (2, 3, 6)],
      2 * by_loops(6, 3, lambda i, j: range(i)),
    ),
    # Reflector k: a norm, and two products for each column after it.
    (
      lambda x: lax.linalg.qr(x, full_matrices=False)[1],
      [(5, 3)],
      # Q with three columns is formed as well.
      sum((5 - k) * (2 * (2 - k) + 1 + 2 * (3 - k)) for k in range(3)),
    ),
    (lax.linalg.householder_product, [(5, 3), (3,)], 2 * (15 + 8 + 3)),
    (lambda x: lax.linalg.eigh(x)[0], [(4, 4)], 9 * 64 // 2),
    (lax.linalg.svd, [(6, 4)], (14 * 6 * 16 + 8 * 64) // 2),
    (
      lambda x: lax.linalg.svd(x, compute_uv=False),
      [(4, 6)],
      (4 * 6 * 16 - 4 * 64 // 3) // 2,
    ),
    (lax.linalg.schur, [(4, 4)], 25 * 64 // 2),
    (lax.linalg.eig, [(4, 4)], 25 * 64 // 2),
    (lax.linalg.hessenberg, [(4, 4)], 5 * 64 // 3),
    (lax.linalg.tridiagonal, [(4, 4)], 2 * 64 // 3),
    (
      lax.linalg.tridiagonal_solve,
      [(7,), (7,), (7,), (7, 2)],
      # Down: one for the matrix and one per side; up: one per side.
      6 * (1 + 2 + 2),
    ),
    (
      lambda a, c: lax.linalg.symmetric_product(a, c),
      [(4, 3), (4, 4)],
      4 * 4 * 3,
    ),
    (
      lambda a, taus, c: lax.linalg.ormqr(a, taus, c),
      [(5, 3), (3,), (5, 2)],
      2 * 2 * (5 + 4 + 3),
    ),
    (lax.linalg.cholesky_update, [(4, 4), (4,)], 10 * 4),
  ],
)
def test_linear_algebra(f, shapes, total):
  counted = products(f, *(shape(*size) for size in shapes))
  assert counted.total == total
  assert counted.uncounted == ()
  # No convolutions, so nothing to warn about.
  assert convolutions(f, *(shape(*size) for size in shapes)).total == 0


def test_solving_a_system_counts_its_factorization_and_its_solver():
  matrix, sides = shape(6, 6), shape(6, 2)
  lu = by_loops(6, 6, lambda i, j: range(min(i, j)))
  triangle = by_loops(6, 2, lambda i, j: range(i))
  solved = products(jnp.linalg.solve, matrix, sides)
  assert solved.total == lu + 2 * triangle
  cholesky = by_loops(6, 6, lambda i, j: range(j) if j <= i else ())

  def f(matrix, sides):
    return jax.scipy.linalg.solve(matrix, sides, assume_a='pos')

  assert products(f, matrix, sides).total == cholesky + 2 * triangle
  # Its gradient solves with the transpose, and has an outer product.
  gradient = jax.grad(lambda a, b: jnp.sum(jnp.linalg.solve(a, b)), (0, 1))
  backward = products(gradient, matrix, sides).total
  assert backward == lu + 4 * triangle + 6 * 6 * 2


def test_iterative_solver_is_named_by_its_loop():
  def f(matrix, side):
    return jax.scipy.sparse.linalg.cg(matrix, side, maxiter=9)[0]

  with pytest.warns(macs.UncountedWarning, match='while in .* not counted'):
    counted = products(f, shape(6, 6), shape(6))
  (loop,) = counted.uncounted
  trips = products(f, shape(6, 6), shape(6), trip_counts={loop.layer: 9})
  # One matrix-vector product per step and one for the residual before the first
  # step; two inner products per step and before.
  assert trips.total == (9 + 1) * (6 * 6 + 2 * 6)


def sparse_matrix(format):
  dense = jnp.zeros((6, 5)).at[jnp.array([0, 2, 2, 5]), jnp.arange(4)].set(1.0)
  return getattr(sparse, format).fromdense(dense)


@pytest.mark.parametrize('format', ['BCOO', 'BCSR', 'COO', 'CSR'])
def test_sparse_matrices_cost_their_stored_elements(format):
  matrix = sparse_matrix(format)
  assert matrix.nse == 4
  counted = products(lambda m, x: m @ x, matrix, shape(5, 3))
  assert counted.total == 4 * 3 and counted.uncounted == ()
  assert products(lambda m, x: m @ x, matrix, shape(5)).total == 4
  assert flops(lambda m: m.todense(), matrix).total == 0


def test_products_at_the_places_of_a_sparse_matrix():
  matrix = sparse_matrix('BCOO')
  counted = products(
    lambda a, b, m: sparse.bcoo_dot_general_sampled(
      a, b, m.indices, dimension_numbers=(((1,), (0,)), ((), ()))
    ),
    shape(6, 7),
    shape(7, 5),
    matrix,
  )
  assert counted.total == 4 * 7


@pytest.mark.parametrize('sizes', [(16, 64, 32)])
def test_scaled_products_of_blocks(sizes):
  rows, inner, columns = sizes

  def f(a, b, a_scales, b_scales):
    return jax.nn.scaled_matmul(a, b, a_scales, b_scales)

  counted = products(
    f,
    shape(2, rows, inner, dtype=jnp.float8_e4m3fn),
    shape(2, columns, inner, dtype=jnp.float8_e4m3fn),
    shape(2, rows, inner // 32, dtype=jnp.float8_e8m0fnu),
    shape(2, columns, inner // 32, dtype=jnp.float8_e8m0fnu),
  )
  assert counted.total == 2 * rows * inner * columns


def test_mutable_arrays_are_not_work_but_what_is_added_to_them():
  def f(x):
    ref = jax.new_ref(x)
    ref[0] = ref[0] @ x
    ref[1] += 2.0
    ref[...]
    return jax.ref.freeze(ref)

  assert products(f, shape(4, 4)).total == 16
  assert flops(f, shape(4, 4)).total == 2 * 16 + 4
  assert convolutions(f, shape(4, 4)).uncounted == ()


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
  # Training also updates two averages, 3 per channel each, and clips the
  # variance.
  assert counted == expected + (0 if running else 2 * 3 * 4 + 4)
