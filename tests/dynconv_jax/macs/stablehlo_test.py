"""Tests of exported functions, against the original functions."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dynconv_jax import macs

_IMAGES = jax.ShapeDtypeStruct((2, 8, 9, 4), jnp.float32)
_KERNEL = jax.ShapeDtypeStruct((3, 2, 2, 6), jnp.float32)
_SQUARE = jax.ShapeDtypeStruct((5, 5), jnp.float32)
_COMPLEX = jax.ShapeDtypeStruct((5, 8), jnp.complex64)


def exported(f, *args):
  """Returns a function that calls the exported `f`."""
  return export.export(jax.jit(f))(*args).call


def network(x, kernel):
  with jax.named_scope('stem'):
    x = lax.conv_general_dilated(
      x,
      kernel,
      (2, 1),
      [(1, 1), (0, 2)],
      rhs_dilation=(1, 2),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=2,
    )
  x = jnp.tanh(x).mean((1, 2))
  with jax.named_scope('head'):
    return jax.nn.softmax(x @ jnp.ones((6, 5)))


def looping(x):
  with jax.named_scope('loop'):
    body = functools.partial(lax.fori_loop, 0, 3, lambda _, x: jnp.sin(x @ x))
    return lax.fori_loop(1, 6, lambda _, x: body(x) @ x, x)


def branching(x):
  return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)


def of_many_kinds(x):
  x = jnp.sort(x @ x, axis=0) + jnp.max(x, axis=1, keepdims=True)
  x = x.at[jnp.array([0, 2])].add(1.0) + jnp.fft.rfft(x).real[:, :1]
  x = lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), 'SAME')
  return jnp.where(x > 0, x.T, jnp.exp(x)).astype(jnp.bfloat16)


@pytest.mark.parametrize('convention', ['conv', 'conv+linear', 'flops'])
@pytest.mark.parametrize(
  'f,args',
  [
    (network, (_IMAGES, _KERNEL)),
    (looping, (_SQUARE,)),
    (branching, (_SQUARE,)),
    (of_many_kinds, (_SQUARE,)),
    (lambda x: jnp.abs(jnp.fft.fft(x * x) @ x.T), (_COMPLEX,)),
    (lambda x: jnp.sum(jnp.arange(8) * x), (_SQUARE.update(shape=(8,)),)),
  ],
)
def test_costs_what_the_function_costs(f, args, convention):
  count = functools.partial(macs.count_macs, convention=convention)
  expected = count(f, *args)
  counted = count(exported(f, *args), *args)
  assert counted.total == expected.total
  assert counted.uncounted == ()


@pytest.mark.parametrize('convention', ['conv', 'conv+linear'])
def test_gradients_cost_what_the_gradient_costs(convention):
  """In multiply-accumulates only: exporting simplifies element-wise work."""
  gradient = jax.grad(lambda *args: network(*args)[0, 0], (0, 1))
  count = functools.partial(macs.count_macs, convention=convention)
  expected = count(gradient, _IMAGES, _KERNEL)
  counted = count(exported(gradient, _IMAGES, _KERNEL), _IMAGES, _KERNEL)
  assert counted.total == expected.total


def test_layers_are_named_by_their_scopes():
  call = exported(network, _IMAGES, _KERNEL)

  def wrapped(x, kernel):
    with jax.named_scope('backbone'):
      return call(x, kernel)

  counted = macs.count_macs(wrapped, _IMAGES, _KERNEL)
  direct = macs.count_macs(network, _IMAGES, _KERNEL)
  assert {n: layer.macs for n, layer in counted.by_layer.items()} == {
    f'backbone.{n}': layer.macs for n, layer in direct.by_layer.items()
  }
  assert counted.by_layer['backbone.stem'].output_shape == (2, 4, 9, 6)


@pytest.mark.parametrize('branch,products', [('max', 2), ('min', 1), (0, 1)])
def test_branches_are_chosen(branch, products):
  call = exported(branching, _SQUARE)
  counted = macs.count_macs(call, _SQUARE, branch=branch)
  assert counted.total == products * 125


@pytest.mark.parametrize('branch', [-1, 3, 7])
def test_a_branch_that_does_not_exist_is_refused(branch):
  def f(x):
    choices = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    with jax.named_scope('choice'):
      return lax.switch(jnp.int32(x[0, 0]), choices, x)

  call = exported(f, _SQUARE)
  for index in range(3):
    counted = macs.count_macs(call, _SQUARE, branch=index)
    assert counted.total == index * 125
  message = r'branch must be in \[0, 3\) for the cond in choice; got'
  for function in (f, call):
    with pytest.raises(ValueError, match=f'{message} {branch}'):
      macs.count_macs(function, _SQUARE, branch=branch)


def test_loops_and_calls_that_are_not_known_are_named():
  def f(x):
    with jax.named_scope('loop'):
      x = lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x @ x, x)
    return jnp.linalg.cholesky(x) @ x

  call = exported(f, _SQUARE)
  with pytest.warns(macs.UncountedWarning) as warned:
    counted = macs.count_macs(call, _SQUARE)
  assert counted.uncounted == (('while', 'loop'), ('custom_call', ''))
  assert 'the work of lapack_' in str(warned[1].message)
  assert counted.total == 125
  with pytest.warns(macs.UncountedWarning, match='custom_call'):
    counted = macs.count_macs(call, _SQUARE, trip_counts={'loop': 4})
  assert counted.total == 5 * 125


def convolved(x):
  kernel = jnp.ones((3, 3, 4, 5))
  with jax.named_scope('stem'):
    x = lax.conv_general_dilated(
      x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
  return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))[:, ::2].sum((1, 2))


@pytest.mark.parametrize('platforms', [['cpu'], ['tpu'], ['cpu', 'tpu']])
def test_symbolic_sizes_are_those_of_the_call(platforms):
  def call(f, *shapes):
    scope = export.SymbolicScope()
    args = [
      jax.ShapeDtypeStruct(export.symbolic_shape(s, scope=scope), jnp.float32)
      for s in shapes
    ]
    return export.export(jax.jit(f), platforms=platforms)(*args).call

  def f(x, w):
    with jax.named_scope('head'):
      x = jnp.tanh(x @ w)
    return lax.fori_loop(0, 5, lambda _, x: x @ x.T @ x, x)

  x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((7, 3), (3, 4)))
  counted = macs.count_macs(call(f, 'b, 3', '3, 4'), x, w)
  assert counted.by_layer['head'].macs == 7 * 3 * 4
  assert counted.total == 7 * 3 * 4 + 5 * 2 * 7 * 7 * 4
  images = jax.ShapeDtypeStruct((2, 8, 10, 4), jnp.float32)
  counted = macs.count_macs(
    call(convolved, 'b, 2*h, w, 4'), images, convention='flops'
  )
  macs_of_stem = 2 * (4 * 5 * 5) * (9 * 4)
  assert counted.by_layer['stem'].macs == 2 * macs_of_stem
  # Rows: 4, with padding 6, every other one.
  assert counted.total == 2 * macs_of_stem + 2 * (3 * 5 - 1) * 5


def test_symbolic_sizes_that_cannot_be_set_are_named():
  sharding = NamedSharding(AbstractMesh((2,), ('a',)), PartitionSpec('a'))
  f = jax.jit(lambda x: x @ x.T, in_shardings=sharding)
  x = jax.ShapeDtypeStruct(export.symbolic_shape('2*b, 3'), jnp.float32)
  call = export.export(f)(x).call
  with pytest.warns(macs.UncountedWarning, match='symbolic sizes cannot be se'):
    counted = macs.count_macs(call, x.update(shape=(4, 3)))
  assert counted.uncounted == (('call_exported', ''),)
  assert counted.total == 0


@pytest.mark.parametrize('axes,devices', [('ab', 6), ('a', 2), ('b', 3)])
def test_every_shard_counts(axes, devices):
  mesh = AbstractMesh((2, 3), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  spec = PartitionSpec(axes[0])

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(spec, PartitionSpec()),
    out_specs=spec,
    axis_names=set(axes),
  )
  def f(x, w):
    x = lax.ppermute(x, axes[0], [(0, 1), (1, 0)])
    return lax.fori_loop(0, 5, lambda _, y: y + x @ w, x @ w)

  def constrained(x, w):
    rows = NamedSharding(mesh, PartitionSpec('a'))
    return f(lax.with_sharding_constraint(x, rows), w)

  x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((12, 4), (4, 6)))
  counted = macs.count_macs(exported(constrained, x, w), x, w)
  rows = 12 // dict(a=2, b=3)[axes[0]]
  assert counted.total == devices * (1 + 5) * rows * 4 * 6
  assert counted.uncounted == ()


def test_sharded_counters_of_loops_are_known():
  mesh = AbstractMesh((2,), ('a',), axis_types=(AxisType.Explicit,))

  def f(x):
    def step(c):
      return lax.with_sharding_constraint(c[0] + 1, everywhere), c[1] @ c[1]

    return lax.while_loop(lambda c: c[0] < 5, step, (0, x))[1]

  everywhere = NamedSharding(mesh, PartitionSpec())
  with jax.sharding.use_abstract_mesh(mesh):
    call = exported(f, _SQUARE)
  counted = macs.count_macs(call, _SQUARE)
  assert counted.total == 5 * 125
  assert counted.uncounted == ()
