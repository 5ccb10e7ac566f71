"""Tests of user formulas for primitives, functions and kernels."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.extend import core

from dynconv_jax import macs
from dynconv_jax.macs import formulas, primitives

count = functools.partial(macs.count_macs, convention='conv+linear')

_X = jax.ShapeDtypeStruct((6, 5), jnp.float32)
_COST = 6 * 5 * 5


@pytest.fixture(autouse=True)
def registry(monkeypatch):
  """Undoes the registrations of a test."""
  monkeypatch.setattr(primitives, '_REGISTERED', {})


def gram(operation):
  """The product of a matrix and its transpose."""
  assert operation.outputs[0].shape == operation.inputs[0].shape
  assert isinstance(operation.params, dict)
  rows, inner = operation.inputs[0].shape
  return macs.formulas.matmul(rows, inner, inner)


def _primitive():
  primitive = core.Primitive('my_gram')
  primitive.def_abstract_eval(lambda x: x)
  return primitive.bind


def _kernel(x, out):
  out[...] = x[...] @ x[...].T @ x[...]


@jax.custom_vjp
def with_own_gradient(x):
  return x * 2.0


with_own_gradient.defvjp(lambda x: (x, x), lambda x, dy: (dy,))


@jax.jit
def my_jitted(x):
  return x @ x.T @ x


def host(x):
  return x


@pytest.mark.parametrize(
  'name,f',
  [
    ('my_gram', _primitive()),
    ('my_jitted', my_jitted),
    ('with_own_gradient', with_own_gradient),
    ('my_kernel', lambda x: pl.pallas_call(_kernel, x, name='my_kernel')(x)),
    ('host', lambda x: jax.pure_callback(host, x, x)),
  ],
)
def test_a_registered_formula_is_the_price(name, f):
  def network(x):
    with jax.named_scope('layer'):
      return jax.lax.fori_loop(0, 3, lambda _, x: f(x), x)

  assert macs.register(name)(gram) is gram
  counted = count(network, _X)
  ((layer, counted_layer),) = counted.by_layer.items()
  # Pallas enters a scope with the kernel's name.
  assert layer.removesuffix('.my_kernel') == 'layer'
  assert counted_layer.macs == counted.total == 3 * _COST
  assert counted.uncounted == ()


def test_a_registered_formula_may_say_that_something_is_free():
  @macs.register('pure_callback')
  def free(operation):
    del operation
    return formulas.elementwise(0)

  counted = count(lambda x: jax.pure_callback(host, x, x), _X)
  assert counted.total == 0 and counted.uncounted == ()


@pytest.mark.parametrize(
  'name,framework,message',
  [
    ('x', 'mxnet', r"must be one of \['jax', 'onnx', 'torch'\]; got 'mxnet'"),
    ('', 'jax', "must be the name of an operation; got ''"),
    (jnp.tanh, 'jax', 'must be the name of an operation'),
  ],
)
def test_names_and_frameworks_are_checked(name, framework, message):
  with pytest.raises(ValueError, match=message):
    macs.register(name, framework)


def test_a_formula_returns_work():
  macs.register('tanh')(lambda operation: 30)
  with pytest.raises(
    TypeError, match="for 'tanh' must return a macs.Work; got"
  ):
    count(jnp.tanh, _X)


def test_operations_of_pytorch_are_registered_alike(monkeypatch):
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  from dynconv_jax.macs import torch_ops
  from dynconv_jax.macs.torch import count_macs

  monkeypatch.setattr(torch_ops, '_REGISTERED', {})
  macs.register('aten::erf', 'torch')(gram)

  class Module(torch.nn.Module):
    def forward(self, x):
      return torch.erf(x)

  assert count_macs(Module(), (6, 5)).total == _COST
