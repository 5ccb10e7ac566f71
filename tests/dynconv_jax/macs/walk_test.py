"""Tests of nested jaxprs, biases and weights, against counts by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from dynconv_jax import macs

_X = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
_K = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
_CONV = 2 * 8 * 8 * 9 * 4 * 6
_SQUARE = jax.ShapeDtypeStruct((5, 5), jnp.float32)
_DOT = 5**3
_COST = pl.CostEstimate(flops=101, transcendentals=7, bytes_accessed=1)

count = functools.partial(macs.count_macs, convention='conv+linear')


def conv(x, kernel, **kwargs):
  return lax.conv_general_dilated(
    x,
    kernel,
    kwargs.pop('strides', (1, 1)),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    **kwargs,
  )


@jax.custom_vjp
def with_custom_vjp(x, kernel):
  return conv(x, kernel)


with_custom_vjp.defvjp(
  lambda x, kernel: (conv(x, kernel), kernel),
  lambda kernel, dy: (conv(dy, jnp.swapaxes(kernel, 2, 3)), kernel),
)


@jax.custom_jvp
def with_custom_jvp(x, kernel):
  return conv(x, kernel)


with_custom_jvp.defjvp(
  lambda primals, tangents: (conv(*primals), conv(tangents[0], primals[1]))
)


@jax.checkpoint
def rematerialised(x, kernel):
  return conv(jnp.sin(conv(x, kernel)), kernel.mT)


@pytest.mark.parametrize(
  'f,times',
  [
    (conv, 1),
    (jax.jit(conv), 1),
    (jax.checkpoint(conv), 1),
    (with_custom_vjp, 1),
    (with_custom_jvp, 1),
    (jax.grad(lambda x, k: with_custom_vjp(x, k).sum()), 2),
    (jax.grad(lambda x, k: conv(x, k).sum()), 2),
    (jax.grad(lambda x, k: conv(x, k).sum(), (0, 1)), 3),
    # Two forward, the first of them recomputed, and two backward.
    (jax.grad(lambda x, k: jnp.sum(rematerialised(x, k))), 5),
    (lambda x, k: jax.jvp(lambda x: conv(x, k), (x,), (x,)), 2),
    (jax.named_call(conv, name='a'), 1),
  ],
)
def test_calls_count_as_what_they_call(f, times):
  assert count(f, _X, _K).total == times * _CONV


def test_vmap_counts_the_whole_batch():
  x = jax.ShapeDtypeStruct((7, *_X.shape), _X.dtype)
  k = jax.ShapeDtypeStruct((7, *_K.shape), _K.dtype)
  assert count(jax.vmap(conv, (0, None)), x, _K).total == 7 * _CONV
  assert count(jax.vmap(conv, (None, 0)), _X, k).total == 7 * _CONV
  # A convolution with groups.
  assert count(jax.vmap(conv), x, k).total == 7 * _CONV


def test_scan_counts_its_length():
  def f(x, weights):
    return lax.scan(lambda x, w: (x @ w, x @ x), x, weights)

  weights = jax.ShapeDtypeStruct((9, 5, 5), jnp.float32)
  counted = count(f, _SQUARE, weights)
  assert counted.total == 9 * 2 * _DOT
  assert counted.by_layer['matmul_0'].parameters == 9 * 25
  empty = jax.ShapeDtypeStruct((0, 5, 5), jnp.float32)
  assert count(f, _SQUARE, empty).total == 0
  # Backward, two products for each of the two, except for the last x @ x.
  gradient = count(jax.grad(lambda x, w: f(x, w)[0].sum(), 1), _SQUARE, weights)
  assert gradient.total == 9 * (2 + 2) * _DOT


def test_scan_with_static_bounds_from_fori_loop_and_map():
  looped = count(lambda x: lax.fori_loop(0, 4, lambda _, x: x @ x, x), _SQUARE)
  assert looped.total == 4 * _DOT
  mapped = count(lambda x: lax.map(lambda v: x @ v, x), _SQUARE)
  assert mapped.total == _DOT


def looping(x):
  with jax.named_scope('loop'):
    return lax.while_loop(lambda c: jnp.sum(c @ c) < 3, lambda c: c @ c @ c, x)


def test_while_takes_its_trip_count():
  # The test runs once more than the body.
  assert count(looping, _SQUARE, trip_counts=10).total == (20 + 11) * _DOT
  counted = count(looping, _SQUARE, trip_counts={'loop': 2})
  assert counted.total == (4 + 3) * _DOT
  assert list(counted.by_layer) == ['loop']
  assert count(looping, _SQUARE, trip_counts=0).total == _DOT


def test_while_without_a_trip_count_is_left_out_loudly():
  with pytest.warns(
    macs.UncountedWarning,
    match='while in loop is not counted: its trip count is not in the program',
  ):
    counted = count(looping, _SQUARE)
  assert counted.total == 0
  assert counted.uncounted == (('while', 'loop'),)


def test_while_that_does_nothing_counted_needs_no_trip_count():
  assert macs.count_macs(looping, _SQUARE, convention='conv').uncounted == ()


def test_trip_counts_name_loops_that_there_are():
  message = r"got \['lop', 'other'\], and the loops are in \['loop'\]"
  with pytest.raises(ValueError, match=message):
    count(looping, _SQUARE, trip_counts={'lop': 2, 'other': 5, 'loop': 1})


@pytest.mark.parametrize(
  'start,goes_on,step,trips',
  [
    (0, lambda i: i < 10, lambda i: i + 1, 10),
    (0, lambda i: i < 10, lambda i: 3 + i, 4),
    (2, lambda i: i <= 10, lambda i: i + 4, 3),
    (10, lambda i: i > 0, lambda i: i - 3, 4),
    (10, lambda i: lax.le(0, i), lambda i: i - 1, 11),
    (1, lambda i: i != 7, lambda i: i + 2, 3),
    (5, lambda i: i < 5, lambda i: i + 1, 0),
    (0, lambda i: i + 2 < 10, jax.jit(lambda i: (i + 1) - 0), 8),
    (0, lambda i: i < 2 * 3 + 1, lambda i: i + 1 + 1, 4),
  ],
)
def test_while_that_counts_to_a_constant_needs_no_trip_count(
  start, goes_on, step, trips
):
  def f(x):
    return lax.while_loop(
      lambda c: goes_on(c[0]), lambda c: (step(c[0]), c[1] @ c[1]), (start, x)
    )

  runs, i = 0, start
  while goes_on(i):
    runs, i = runs + 1, step(i)
  assert runs == trips
  assert count(f, _SQUARE).total == trips * _DOT
  # A trip count in the program overrides the single number for all loops; a
  # count by name overrides the program.
  assert count(f, _SQUARE, trip_counts=99).total == trips * _DOT
  assert count(f, _SQUARE, trip_counts={'': 99}).total == 99 * _DOT


def test_fori_loop_to_a_number_that_is_carried():
  def f(x):
    def body(_, x):
      return lax.fori_loop(0, jnp.int32(3), lambda _, x: x @ x, x)

    return lax.fori_loop(jnp.int32(1), jnp.int32(6), body, x)

  assert count(f, _SQUARE).total == 5 * 3 * _DOT


@pytest.mark.parametrize(
  'goes_on,step',
  [
    (lambda i, x: i < x[0, 0].astype(jnp.int32), lambda i, x: i + 1),
    (lambda i, x: i < 10, lambda i, x: i + x[0, 0].astype(jnp.int32)),
    (lambda i, x: i < 10, lambda i, x: i * 2),
    (lambda i, x: (i < 10) & (x[0, 0] < 3), lambda i, x: i + 1),
    (lambda i, x: i != 10, lambda i, x: i + 3),
    (lambda i, x: i < 10, lambda i, x: i - 1),
    (
      lambda i, x: i < 10,
      lambda i, x: lax.cond(x[0, 0] < 3, lambda: i + 1, lambda: i + 2),
    ),
  ],
)
def test_while_that_may_stop_elsewhere_is_left_out(goes_on, step):
  def f(x):
    return lax.while_loop(
      lambda c: goes_on(*c), lambda c: (step(*c), c[1] @ c[1]), (0, x)
    )

  with pytest.warns(macs.UncountedWarning, match='while in the network'):
    assert count(f, _SQUARE).total == 0


@pytest.mark.parametrize('trips', [-1, 1.5, True, {'loop': -2}])
def test_trip_counts_are_checked(trips):
  with pytest.raises(ValueError, match='trip_counts must be integers >= 0'):
    count(looping, _SQUARE, trip_counts=trips)


def twice(x):
  return x @ x @ x


def once(x):
  return x @ x


def unknown(x):
  return jax.pure_callback(lambda x: x, x, x)


def branching(p, x):
  return lax.cond(p, twice, once, x)


@pytest.mark.parametrize(
  'branch,products',
  [('max', 2), ('min', 1), (0, 1), (1, 2), ('once', 1), ('twice', 2)],
)
def test_cond_counts_the_branch_that_is_asked_for(branch, products):
  counted = count(branching, jnp.bool_(True), _SQUARE, branch=branch)
  assert counted.total == products * _DOT


@pytest.mark.parametrize(
  'branch,message',
  [
    (2, r'branch must be in \[0, 2\) for the cond in the function; got 2'),
    (-1, r'branch must be in \[0, 2\)'),
    ('thrice', r"got 'thrice', and the branches are \['once', 'twice'\]"),
    (None, "'max', 'min', an index or a name; got None"),
    (True, 'an index or a name; got True'),
  ],
)
def test_branch_is_checked(branch, message):
  with pytest.raises(ValueError, match=message):
    count(branching, jnp.bool_(True), _SQUARE, branch=branch)


def test_switch_counts_one_of_many_and_names_unknown_work_in_any():
  def f(i, x):
    return lax.switch(i, [once, twice, unknown], x)

  with pytest.warns(macs.UncountedWarning, match='pure_callback'):
    counted = count(f, jnp.int32(0), jnp.eye(5))
  assert counted.total == 2 * _DOT
  assert counted.uncounted == (('pure_callback', ''),)
  assert count(f, jnp.int32(0), jnp.eye(5), branch=0).uncounted == ()


@pytest.mark.parametrize('transform', ['', 'jit', 'vmap', 'grad'])
def test_platform_dependent_counts_the_default_branch(transform):
  """Even though the branch for the CPU costs more, and runs here."""

  def f(x, k):
    y = lax.platform_dependent(
      x,
      k,
      cpu=lambda x, k: conv(conv(x, k), jnp.ones((3, 3, 6, 6))),
      default=conv,
    )
    return jnp.sum(y**2)

  if transform == 'vmap':
    x = jax.ShapeDtypeStruct((3, *_X.shape), _X.dtype)
    assert count(jax.vmap(f, (0, None)), x, _K).total == 3 * _CONV
  elif transform == 'grad':
    assert count(jax.grad(f, (0, 1)), _X, _K).total == 3 * _CONV
  else:
    f = jax.jit(f) if transform else f
    assert count(f, _X, _K, branch='max').total == _CONV


def test_shard_map_counts_every_shard():
  mesh = jax.sharding.AbstractMesh((4, 2), ('a', 'b'), (AxisType.Auto,) * 2)

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(PartitionSpec('a', 'b'), PartitionSpec('b')),
    out_specs=PartitionSpec('a'),
  )
  def f(x, w):
    return lax.psum(x @ w, 'b')

  x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
  w = jax.ShapeDtypeStruct((6, 5), jnp.float32)
  assert count(f, x, w).total == 8 * 6 * 5


@pytest.mark.parametrize('batch', [None, 3])
def test_pallas_call_counts_its_estimate(batch):
  def f(x, cost=_COST):
    kernel = pl.pallas_call(
      lambda x, y: y.__setitem__(..., x[...]), out_shape=x, cost_estimate=cost
    )
    return kernel(x)

  x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  times = batch or 1
  if batch:
    x = jax.ShapeDtypeStruct((batch, 4, 4), jnp.float32)
  g = jax.vmap(f) if batch else f
  assert macs.count_macs(g, x, convention='flops').total == 108 * times
  assert count(g, x).total == 101 * times // 2
  with pytest.warns(macs.UncountedWarning, match='does not name convolutions'):
    assert macs.count_macs(g, x, convention='conv').uncounted
  with pytest.warns(macs.UncountedWarning, match='has no cost_estimate'):
    count(functools.partial(f, cost=None), _SQUARE)


def test_unknown_work_is_named_once_and_listed():
  def f(x):
    for name in ('a', 'b'):
      with jax.named_scope(name):
        x = unknown(x)
    return jax.ffi.ffi_call('mine', x)(x)

  with pytest.warns(macs.UncountedWarning) as warned:
    counted = macs.count_macs(f, _SQUARE)
  assert [str(w.message) for w in warned] == [
    f'{name} is not counted: its work is not known; see'
    ' dynconv_jax.macs.register'
    for name in ('pure_callback in a', 'ffi_call in the network')
  ]
  assert counted.uncounted == (
    ('pure_callback', 'a'),
    ('pure_callback', 'b'),
    ('ffi_call', ''),
  )


class TestBias:
  """A bias is an addition of a broadcast weight to a product without one."""

  def counted(self, f, *args):
    layer = macs.count_macs(f, _X, _K, *args, convention='conv').by_layer[
      'conv_0'
    ]
    return layer.macs - _CONV, layer.parameters - 9 * 4 * 6

  @pytest.mark.parametrize(
    'f',
    [
      lambda x, k, b: conv(x, k) + b,
      lambda x, k, b: b + conv(x, k),
      lambda x, k, b: conv(x, k) + b.reshape(1, 1, 1, 6),
      lambda x, k, b: (
        jax.jit(conv)(x, k).astype(jnp.bfloat16) + b.astype(jnp.bfloat16)
      ),
      lambda x, k, b: jax.jit(lambda y, b: y + b)(conv(x, k), b),
      lambda x, k, b: jax.nn.relu(conv(x, k) + b) + 1,
      lambda x, k, b: conv(x, k) + b + b,
      lambda x, k, b: conv(x, k).reshape(2, 64, 6) + b,
      lambda x, k, b: (
        lax.platform_dependent(
          x, k, cpu=lambda x, k: x[..., :1] + k[0, 0, 0], default=conv
        )
        + b
      ),
    ],
  )
  def test_is_counted_once_an_output(self, f):
    b = jax.ShapeDtypeStruct((6,), jnp.float32)
    assert self.counted(f, b) == (2 * 8 * 8 * 6, 6)

  def test_may_be_a_constant_that_the_function_holds(self):
    b = jnp.arange(6.0)
    assert self.counted(lambda x, k: conv(x, k) + b) == (2 * 8 * 8 * 6, 6)

  @pytest.mark.parametrize(
    'f',
    [
      lambda x, k, y: conv(x, k) + y,
      lambda x, k, y: conv(x, k) + 1.0,
      lambda x, k, y: conv(x, k) + conv(x, k),
      lambda x, k, y: conv(x, k) * y[0, 0, 0],
      lambda x, k, y: conv(x, k) + jnp.mean(y, axis=(0, 1, 2)),
    ],
  )
  def test_is_not_any_addition(self, f):
    assert self.counted(f, jnp.ones((2, 8, 8, 6))) == (0, 0)

  @pytest.mark.parametrize(
    'convention,branch,biases',
    [
      ('conv', 'max', 1),
      ('conv', 'min', 0),
      ('conv', 0, 0),
      ('conv', 1, 1),
      ('flops', 'max', 1),
      ('flops', 'min', 0),
    ],
  )
  @pytest.mark.parametrize('nested', [False, True])
  def test_is_counted_in_the_branch_that_is_taken(
    self, convention, branch, biases, nested
  ):
    def biased(y, b):
      if nested:
        return lax.cond(b[0] > 0, lambda y, b: b + y, lambda y, b: y + b, y, b)
      return y + b

    def f(x, k, b, p):
      y = conv(x, k)
      return lax.cond(p, biased, lambda y, b: y, y, b)

    b = jax.ShapeDtypeStruct((6,), jnp.float32)
    counted = macs.count_macs(
      f, _X, _K, b, np.bool_(True), convention=convention, branch=branch
    )
    steps = 2 if convention == 'flops' else 1
    # The inner test is a comparison.
    test = int(nested and convention == 'flops' and biases)
    assert counted.total == steps * _CONV + biases * 2 * 8 * 8 * 6 + test
    parameters = counted.by_layer['conv_0'].parameters
    assert parameters == 9 * 4 * 6 + biases * 6

  @pytest.mark.parametrize('branch', ['max', 'min'])
  def test_is_counted_once_if_branches_cost_the_same(self, branch):
    def f(x, k, b, p):
      y = conv(x, k)
      return lax.cond(p, lambda y: y + b, lambda y: y * 2.0, y) + b

    b = jax.ShapeDtypeStruct((6,), jnp.float32)
    counted = macs.count_macs(
      f, _X, _K, b, np.bool_(True), convention='flops', branch=branch
    )
    assert counted.total == 2 * _CONV + 2 * (2 * 8 * 8 * 6)

  def test_counts_the_same_in_flops_as_an_addition_would(self):
    b = jax.ShapeDtypeStruct((6,), jnp.float32)
    flops = functools.partial(macs.count_macs, convention='flops')
    biased = flops(lambda x, k, b: conv(x, k) + b, _X, _K, b)
    added = flops(lambda x, k, b: conv(x, k) + 1.0, _X, _K, b)
    assert biased.total == added.total == 2 * _CONV + 2 * 8 * 8 * 6


def test_weights_are_counted_once():
  w = jax.ShapeDtypeStruct((5, 5), jnp.float32)

  def f(w, x):
    return x @ w.astype(jnp.bfloat16).T + (x @ w)

  counted = count(f, w, jax.ShapeDtypeStruct((3, 5), jnp.float32))
  assert [r.parameters for r in counted.by_layer.values()][:2] == [25, 0]
  chex.assert_equal(
    count(lambda w, x: w @ x, w, jax.ShapeDtypeStruct((5,), jnp.float32))
    .by_layer['matmul_0']
    .parameters,
    25,
  )


def test_gradients_have_the_weights_of_the_function():
  def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p['w'] + p['b']) @ p['v'])

  shapes = {'w': (64, 10), 'b': (10,), 'v': (10, 5)}
  p = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
  for f in (loss, jax.grad(loss), jax.grad(jax.jit(jax.checkpoint(loss)))):
    assert count(f, p, x).parameters == 64 * 10 + 10 + 10 * 5


def test_layers_sum_to_the_total_whatever_the_structure():
  def f(x, k, p):
    with jax.named_scope('a'):
      x = conv(x, k)
    x = lax.cond(p, lambda x: x @ jnp.ones((6, 6)), lambda x: x, x)
    return lax.scan(lambda x, _: (jnp.sin(x), None), x, length=3)

  for convention in ('conv', 'conv+linear', 'flops'):
    counted = macs.count_macs(f, _X, _K, np.bool_(True), convention=convention)
    layers = counted.by_layer.values()
    assert counted.total == sum(layer.macs for layer in layers) > 0


def test_loops_may_carry_random_keys():
  def f(x, key):
    def step(c):
      i, key, x = c
      return i + 1, jax.random.fold_in(key, i), x @ x

    return lax.while_loop(lambda c: c[0] < 3, step, (0, key, x))[2]

  assert count(f, _SQUARE, jax.random.key(0)).total == 3 * _DOT
