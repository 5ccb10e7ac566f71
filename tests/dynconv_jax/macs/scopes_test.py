"""Tests of layer names in unmodified models of four libraries."""

import contextlib
import functools
import warnings

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax import macs

_X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
_SQUARE = jax.ShapeDtypeStruct((3, 3), jnp.bfloat16)

count = functools.partial(macs.count_macs, convention='conv+linear')


class Block(nnx.Module):
  def __init__(self, features, rngs):
    self.conv1 = nnx.Conv(features, features, (3, 3), rngs=rngs)
    self.fc = nnx.Sequential(
      nnx.Linear(features, features, rngs=rngs), nnx.relu
    )

  def __call__(self, x):
    return self.fc(self.conv1(x))


class Model(nnx.Module):
  def __init__(self, rngs):
    self.layer1 = nnx.List([Block(3, rngs), Block(3, rngs)])
    self.heads = nnx.Dict({'a': nnx.Linear(3, 2, rngs=rngs)})

  def __call__(self, x):
    for block in self.layer1:
      x = block(x)
    return self.heads['a'](x)

  def features(self, x):
    return self.layer1[1](x)


_NAMES = [
  *('layer1.0.conv1', 'layer1.0.fc.layers.0'),
  *('layer1.1.conv1', 'layer1.1.fc.layers.0', 'heads.a'),
]


def zeros(state):
  """Fills an abstract tree: faster than drawing its weights."""
  return jax.tree.map(
    lambda x: (
      np.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
    ),
    state,
  )


def make_model():
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
  return nnx.merge(graphdef, zeros(state))


@pytest.fixture(scope='module')
def model():
  return make_model()


@pytest.mark.parametrize(
  'wrap',
  [
    lambda model: model,
    lambda model: lambda x: model(x),
    lambda model: jax.jit(lambda x: model(x)),
    lambda model: jax.vmap(lambda x: model(x)),
    lambda model: functools.partial(lambda m, x: m(x), model),
  ],
)
def test_nnx_modules_are_named_by_their_path(model, wrap):
  assert list(count(wrap(model), _X).by_layer) == _NAMES


def test_nnx_models_may_be_abstract_arguments_or_methods(model):
  abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
  assert list(count(abstract, _X).by_layer) == _NAMES
  for call in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
    assert list(count(call, abstract, _X).by_layer) == _NAMES
  for f in (abstract.features, model.features, lambda x: model.features(x)):
    assert list(count(f, _X).by_layer) == _NAMES[2:4]


def test_nnx_gradients_belong_to_the_layer(model):
  def loss(model, x):
    return jnp.sum(model(x) ** 2)

  forward = count(model, _X)
  gradient = count(nnx.grad(loss), model, _X)
  assert list(gradient.by_layer) == _NAMES
  times = [
    gradient.by_layer[name].macs / forward.by_layer[name].macs
    for name in _NAMES
  ]
  assert times == [2, 3, 3, 3, 3]
  for field in ('output_shape', 'positions', 'activations'):
    before, after = (
      [getattr(layer, field) for layer in counted.by_layer.values()]
      for counted in (forward, gradient)
    )
    assert before == after


def test_nnx_gradients_of_several_models_are_named_apart(model):
  def loss(student, teacher, x):
    return jnp.sum((student(x) - teacher(x)) ** 2)

  counted = count(nnx.grad(loss), model, make_model(), _X)
  assert sorted(counted.by_layer) == [
    f'{which}.{name}' for which in ('arg0', 'arg1') for name in sorted(_NAMES)
  ]


def test_nnx_state_functions_are_named(model):
  graphdef, state = nnx.split(model)

  def f(state, x):
    return jnp.sum(nnx.merge(graphdef, state)(x) ** 2)

  counted = count(jax.value_and_grad(f), state, _X)
  assert list(counted.by_layer) == _NAMES


def test_several_models_are_named_apart(model):
  teacher = make_model()
  counted = count(lambda student, x: (teacher(x), student(x)), model, _X)
  assert list(counted.by_layer) == [
    f'{which}.{name}' for which in ('teacher', 'student') for name in _NAMES
  ]


def test_scopes_around_and_within_modules_are_kept(model):
  def f(x):
    with jax.named_scope('ema'):
      y = model(x)
    with jax.named_scope('loss'), jax.named_scope('kernel'):
      return y @ y.mT

  counted = count(f, _X)
  assert list(counted.by_layer) == [
    *(f'ema.{name}' for name in _NAMES),
    'loss.kernel',
  ]


def test_shared_modules_are_one_layer(model):
  counted = count(lambda model, x: model(model.layer1[0](x)), model, _X)
  single = count(model, _X)
  assert sorted(counted.by_layer) == sorted(_NAMES)
  name = _NAMES[0]
  assert counted.by_layer[name].macs == 2 * single.by_layer[name].macs
  assert counted.parameters == single.parameters


class Rematerialised(nnx.Module):
  def __init__(self, rngs):
    self.block = Block(3, rngs)

  def __call__(self, x):
    return rematerialise(self, x)


@nnx.remat
def rematerialise(module, x):
  return module.block(x)


def test_copies_made_by_transformations_are_recognised():
  class Copying(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([Rematerialised(rngs), Rematerialised(rngs)])
      self.rnn = nnx.RNN(nnx.SimpleCell(3, 4, rngs=rngs))

    def __call__(self, x):
      for layer in self.layers:
        x = layer(x)
      return self.rnn(x[:, 0])

  counted = count(nnx.eval_shape(lambda: Copying(nnx.Rngs(0))), _X)
  assert list(counted.by_layer) == [
    *('layers.0.block.conv1', 'layers.0.block.fc.layers.0'),
    *('layers.1.block.conv1', 'layers.1.block.fc.layers.0'),
    *('rnn.cell.dense_i', 'rnn.cell.dense_h'),
  ]
  assert counted.by_layer['rnn.cell.dense_h'].macs == 2 * 8 * 4 * 4


def test_gradients_of_rematerialized_nnx_layers_belong_to_the_layer():
  class Dense(nnx.Module):
    def __init__(self, rngs):
      self.fc = nnx.Linear(4, 4, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
      return jnp.tanh(self.fc(x))

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.blocks = nnx.List([Dense(rngs), Dense(rngs)])

    def __call__(self, x):
      return self.blocks[1](self.blocks[0](x))

  net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
  x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
  counted = count(nnx.grad(lambda net, x: jnp.sum(net(x))), net, x)
  # Forward, forward again, weights; the first has no gradient of its input.
  once = 2 * 4 * 4
  found = {name: layer.macs for name, layer in counted.by_layer.items()}
  assert found == {'blocks.0.fc': 3 * once, 'blocks.1.fc': 4 * once}


def test_gradients_of_rematerialized_linen_layers_belong_to_the_layer():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      dense = nn.remat(nn.Dense)
      return dense(4, name='b')(jnp.tanh(dense(4, name='a')(x)))

  net, x = Net(), jax.ShapeDtypeStruct((2, 4), jnp.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  counted = count(
    jax.grad(lambda v, x: jnp.sum(net.apply(v, x) ** 2)), variables, x
  )
  # A product's gradients do not need its output, so it does not run again.
  once = 2 * 4 * 4
  found = {name: layer.macs for name, layer in counted.by_layer.items()}
  assert found == {'Net.a': 2 * once, 'Net.b': 3 * once}


@pytest.mark.parametrize('jit_inside', [False, True])
@pytest.mark.parametrize('scopes', ['', 'out', 'out/out'])
@pytest.mark.parametrize('around', ['', 'train'])
def test_gradients_of_rematerialized_scopes_keep_their_names(
  around, scopes, jit_inside
):
  @jax.checkpoint
  def layer(x, w):
    with jax.named_scope('layer'):
      return jnp.sin(x @ w)

  def loss(w, x):
    with contextlib.ExitStack() as entered:
      for scope in filter(None, scopes.split('/')):
        entered.enter_context(jax.named_scope(scope))
      return jnp.sum(layer(x, w))

  def gradient(w, x):
    with jax.named_scope(around) if around else contextlib.nullcontext():
      return jax.grad(jax.jit(loss) if jit_inside else loss)(w, x)

  x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  counted = count(gradient, _SQUARE.update(dtype=jnp.float32), x)
  name = '.'.join(filter(None, [around, *scopes.split('/'), 'layer']))
  found = {name: layer.macs for name, layer in counted.by_layer.items()}
  # Forward, forward again, weights.
  assert found == {name: 3 * 2 * 3 * 3}


def test_unnamed_rematerialized_products_are_apart():
  @jax.checkpoint
  def f(w, x):
    return jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))

  x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  counted = count(jax.grad(f), _SQUARE.update(dtype=jnp.float32), x)
  # Two forward, two forward again, two for weights, one for an input.
  assert list(counted.by_layer) == [f'matmul_{i}' for i in range(7)]
  assert counted.total == 7 * 2 * 3 * 3


def test_classes_are_left_as_they_were(model):
  before = nnx.Conv.__call__, Block.__call__, eqx.nn.Linear.__call__
  count(model, _X)
  with pytest.raises(ValueError, match='cannot be traced'):
    count(model, jax.ShapeDtypeStruct((2, 8, 8, 7), jnp.float32))
  assert before == (nnx.Conv.__call__, Block.__call__, eqx.nn.Linear.__call__)
  # A trace elsewhere does not contain our names.
  jaxpr = jax.make_jaxpr(lambda x: model(x))(jnp.ones(_X.shape))
  stacks = {str(eqn.source_info.name_stack) for eqn in jaxpr.eqns}
  assert stacks == {''}


def test_functions_traced_before_are_named_still(model):
  @jax.jit
  def f(x):
    return jax.checkpoint(lambda x: model(x))(x)

  f(jnp.ones(_X.shape))
  assert list(count(f, _X).by_layer) == _NAMES


class EquinoxModel(eqx.Module):
  convs: list
  linear: eqx.nn.Linear
  attention: eqx.nn.MultiheadAttention

  def __init__(self, key):
    self.convs = [
      eqx.nn.Conv2d(3, 4, 3, padding=1, key=key),
      eqx.nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, key=key),
    ]
    self.linear = eqx.nn.Linear(4, 2, key=key)
    self.attention = eqx.nn.MultiheadAttention(2, 4, key=key)

  def __call__(self, x):
    for conv in self.convs:
      x = jax.nn.relu(conv(x))
    x = jnp.mean(x, axis=1).T
    return jax.vmap(self.linear)(self.attention(x, x, x))


def test_equinox_modules_are_named_by_their_path():
  x = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32)
  abstract = eqx.filter_eval_shape(EquinoxModel, jax.random.key(0))
  model = zeros(abstract)

  def loss(model, x):
    return jnp.sum(jax.vmap(model)(x))

  names = {
    'convs.0': (2 * 64 * 9 * 3 * 4, 9 * 12 + 4),
    'convs.1': (2 * 64 * 9 * 4 * 4, 9 * 16 + 4),
    'attention.query_proj': (2 * 15 * 16, 16),
    'attention.key_proj': (2 * 15 * 16, 16),
    'attention.value_proj': (2 * 15 * 16, 16),
    'attention': (2 * 2 * 2 * 15 * 15 * 2, 0),
    'attention.output_proj': (2 * 15 * 16, 16),
    'linear': (2 * 15 * 8, 8 + 2),
  }
  for f, args in (
    (jax.vmap(model), (x,)),
    (lambda m, x: jax.vmap(m)(x), (abstract, x)),
  ):
    counted = count(f, *args)
    found = {n: (la.macs, la.parameters) for n, la in counted.by_layer.items()}
    assert found == names
  gradient = count(eqx.filter_grad(loss), model, x)
  assert list(gradient.by_layer) == list(names)


def test_parameters_are_all_that_a_model_has():
  """Norms, embeddings and unused weights; each weight once; no statistics."""

  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(11, 4, rngs=rngs)
      self.norm = nnx.BatchNorm(4, rngs=rngs)
      self.first = nnx.Linear(4, 4, rngs=rngs)
      self.again = self.first
      self.unused = nnx.Linear(4, 7, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
      x = self.again(self.first(self.norm(self.embed(x))))
      return self.embed.attend(x)

  tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
  model = Tied(nnx.Rngs(0))
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  gradient = nnx.grad(lambda m, x: jnp.sum(m(x)))
  for f, args in (
    (model, (tokens,)),
    (lambda m, x: m(x), (model, tokens)),
    (gradient, (model, tokens)),
  ):
    counted = count(f, *args)
    assert counted.parameters == sum(leaf.size for leaf in params)
    assert counted.parameters == 44 + 8 + 20 + 35
    assert counted.parameter_bytes == sum(leaf.nbytes for leaf in params)
    assert counted.parameters_by_module['norm'] == 8
    # If a layer has two names, NNX's comes first.
    assert counted.by_layer['again'].parameters == 20
  two = count(lambda a, b, x: a(x) + b(x), model, Tied(nnx.Rngs(1)), tokens)
  assert two.parameters == 2 * counted.parameters
  assert two.by_layer['b.again'].parameters == 20

  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x))

  net, x = Normed(), jax.ShapeDtypeStruct((2, 3), jnp.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  counted = count(lambda v, x: net.apply(v, x), variables, x)
  assert counted.parameters == 15 + 5 + 10
  assert counted.parameters_by_module['Normed.BatchNorm_0'] == 10

  layers = [eqx.nn.Linear(4, 3, key=jax.random.key(0)), eqx.nn.LayerNorm(3)]
  model = eqx.nn.Sequential(layers)
  counted = count(model, jax.ShapeDtypeStruct((4,), jnp.float32))
  assert counted.parameters == 15 + 6


def test_activations_are_what_products_output():
  counted = count(lambda x, w: (x.astype(jnp.bfloat16) @ w) @ w, _X, _SQUARE)
  assert counted.activations == 2 * 2 * 64 * 3
  assert counted.activation_bytes == 2 * counted.activations


def test_linen_modules_are_named_by_their_own_scopes():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(4, (3, 3), name='conv1')(x)
      x = nn.MultiHeadDotProductAttention(2)(x.reshape(2, 64, 4))
      return nn.Dense(5)(x)

  net = Net()
  variables = jax.eval_shape(net.init, jax.random.key(0), _X)
  counted = count(net.apply, variables, _X)
  attention = 'Net.MultiHeadDotProductAttention_0'
  found = {name: layer.macs for name, layer in counted.by_layer.items()}
  assert found == {
    'Net.conv1': 2 * 64 * 9 * 3 * 4,
    f'{attention}.query': 2 * 64 * 16,
    f'{attention}.key': 2 * 64 * 16,
    f'{attention}.value': 2 * 64 * 16,
    attention: 2 * 2 * 2 * 64 * 64 * 2,
    f'{attention}.out': 2 * 64 * 16,
    'Net.Dense_0': 2 * 64 * 20,
  }
  parameters = sum(leaf.size for leaf in jax.tree.leaves(variables))
  assert counted.parameters == parameters
  assert counted.by_layer['Net.conv1'].parameters == 9 * 12 + 4


def test_haiku_modules_are_named_by_their_own_scopes():
  def net(x):
    x = hk.Conv2D(4, 3, stride=2, name='conv1')(x)
    return hk.nets.MLP([5, 2])(jnp.mean(x, axis=(1, 2)))

  transformed = hk.without_apply_rng(hk.transform(net))
  with warnings.catch_warnings():
    # Haiku 0.0.17 calls functions that jax 0.10 deprecates.
    warnings.simplefilter('ignore', DeprecationWarning)
    params = jax.eval_shape(transformed.init, jax.random.key(0), _X)
    counted = macs.count_macs(transformed.apply, params, _X, convention='flops')
  found = {
    name: (layer.kind, layer.parameters)
    for name, layer in counted.by_layer.items()
    if layer.parameters
  }
  assert found == {
    'conv1': ('conv', 9 * 12 + 4),
    'mlp.linear_0': ('matmul', 25),
    'mlp.linear_1': ('matmul', 12),
  }
