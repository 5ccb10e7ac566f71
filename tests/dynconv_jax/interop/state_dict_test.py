"""Tests of names, layouts, prefixes and errors of PyTorch state_dicts."""

import collections

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_networks
from absl.testing import absltest
from flax import nnx

from dynconv_jax import interop
from dynconv_jax.interop import names as names_lib
from dynconv_jax.methods.method import METHODS
from dynconv_jax.models.create import create_model


def _network(method='dense', seed=0, name='cifar_resnet8', **kwargs):
  """Returns a network with random values, without compiling anything."""
  if method in ('sact', 'act'):  # The first block of a stage has no gate.
    name = 'cifar_resnet14'
  kwargs = {'num_classes': 5, 'width_multiplier': 0.25, **kwargs}
  model = nnx.eval_shape(
    lambda: create_model(name, method=method, rngs=nnx.Rngs(0), **kwargs)
  )
  # Positive, because some are variances.
  return small_networks.filled(model, np.random.default_rng(seed).exponential)


def _weights(model):
  return {
    path: np.asarray(variable[...])
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }


def _assert_same(model, expected):
  weights, expected = _weights(model), _weights(expected)
  assert weights.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(weights[path], value, str(path))


def _own(state_dict):
  return {
    name: array
    for name, array in state_dict.items()
    if not name.endswith('num_batches_tracked')
  }


@pytest.mark.parametrize('method', METHODS)
def test_round_trip_is_bit_identical(method):
  model = _network(method)
  state_dict = interop.to_torch_state_dict(model)
  assert len(_own(state_dict)) == len(_weights(model))
  for name, array in state_dict.items():
    assert array.flags.c_contiguous and array.flags.writeable, name
  other = _network(method, seed=1)
  interop.load_torch_state_dict(other, state_dict)
  _assert_same(other, model)
  # A copy, because PyTorch trains its tensors in place.
  for array in state_dict.values():
    array[...] = 0
  _assert_same(other, model)


@pytest.mark.parametrize('gates', ['recurrent', 'ff1', 'ff2'])
def test_every_gate_of_skipnet_makes_the_round_trip(gates):
  model = _network('skipnet', skip_gate=gates)
  other = _network('skipnet', seed=1, skip_gate=gates)
  interop.load_torch_state_dict(other, interop.to_torch_state_dict(model))
  _assert_same(other, model)


def test_names_of_a_bottleneck_are_torchvisions():
  names = interop.to_torch_state_dict(_network(name='resnet50'))
  norm = ('weight', 'bias', 'running_mean', 'running_var')
  norm = (*norm, 'num_batches_tracked')
  block = {f'conv{i}.weight' for i in (1, 2, 3)}
  block |= {f'bn{i}.{leaf}' for i in (1, 2, 3) for leaf in norm}
  projection = {'downsample.0.weight', *(f'downsample.1.{n}' for n in norm)}
  expected = {'conv1.weight', 'fc.weight', 'fc.bias'}
  expected |= {f'bn1.{leaf}' for leaf in norm}
  for stage, depth in enumerate((3, 4, 6, 3), start=1):
    for i in range(depth):
      leaves = block | (projection if i == 0 else set())
      expected |= {f'layer{stage}.{i}.{leaf}' for leaf in leaves}
  assert set(names) == expected
  # The prefix of torchvision's resnet50.
  assert len(names) == 320


def test_layouts_by_hand():
  model = _network('dynconv', width_multiplier=0.5)
  state_dict = interop.to_torch_state_dict(model)
  block = model.layer2[0]
  kernel = np.asarray(block.conv1.kernel[...])
  weight = state_dict['layer2.0.conv1.weight']
  assert (kernel.shape, weight.shape) == ((3, 3, 8, 16), (16, 8, 3, 3))
  assert weight[11, 5, 0, 2] == kernel[0, 2, 5, 11]
  assert state_dict['fc.weight'][4, 7] == model.fc.kernel[7, 4]
  for ours, theirs in (
    (block.bn1.scale, 'bn1.weight'),
    (block.bn1.bias, 'bn1.bias'),
    (block.bn1.mean, 'bn1.running_mean'),
    (block.bn1.var, 'bn1.running_var'),
    (block.downsample[1].var, 'downsample.1.running_var'),
    (block.masker.maskconv.conv.bias, 'masker.maskconv.conv.bias'),
    (block.masker.maskconv.fc.bias, 'masker.maskconv.fc.bias'),
  ):
    np.testing.assert_array_equal(state_dict[f'layer2.0.{theirs}'], ours[...])
  assert state_dict['layer2.0.masker.maskconv.conv.weight'].shape == (
    1,
    8,
    3,
    3,
  )
  assert state_dict['layer2.0.masker.maskconv.fc.weight'].shape == (1, 8)
  count = state_dict['bn1.num_batches_tracked']
  assert (count.shape, count.dtype, count) == ((), np.int64, 0)


def test_names_of_convnet_aig():
  state_dict = interop.to_torch_state_dict(_network('convnet_aig'))
  assert state_dict['layer3.0.fc1.weight'].shape == (16, 8, 1, 1)
  assert state_dict['layer3.0.fc2.weight'].shape == (2, 16, 1, 1)
  for name in (
    'layer3.0.fc1.bias',
    'layer3.0.fc1bn.running_mean',
    'layer3.0.fc1bn.num_batches_tracked',
    'layer3.0.fc2.bias',
    'layer3.0.shortcut.0.weight',
    'layer3.0.shortcut.1.running_var',
    'linear.weight',
    'linear.bias',
  ):
    assert name in state_dict
  for part in ('downsample', 'masker'):
    assert not any(part in name for name in state_dict)
  assert not any(name.startswith('fc.') for name in state_dict)


def test_gates_of_blocks_that_are_always_executed_are_left_out():
  state_dict = interop.to_torch_state_dict(_network('convnet_aig'))
  model = _network('convnet_aig', seed=1, target_rates=(1, 0.5, 1))
  with absltest.TestCase().assertLogs(level='INFO') as logs:
    interop.load_torch_state_dict(model, state_dict)
  assert [line.split(': ')[-1] for line in logs.output] == [
    'layer1.0, layer3.0'
  ]
  assert 'ignored the gates of blocks' in logs.output[0]
  exported = interop.to_torch_state_dict(model)
  left = set(state_dict) - set(exported)
  assert {name.rsplit('.', 1)[0] for name in left} == {
    f'layer{i}.0.{module}' for i in (1, 3) for module in ('fc1', 'fc1bn', 'fc2')
  }
  for name, array in exported.items():
    np.testing.assert_array_equal(array, state_dict[name])
  # A dense network would compute something else, so this must be an error.
  with pytest.raises(ValueError, match=r'unexpected: .*layer1\.0\.fc1\.'):
    interop.load_torch_state_dict(_network(), state_dict)


def test_convnet_aig_knows_torchvisions_names_too():
  model = _network('convnet_aig')
  names = names_lib.torch_names(model, names_lib.TORCHVISION)
  assert 'layer1.0.masker.fc1.weight' in names
  arrays = _weights(model)
  state_dict = {n: w.to_torch(arrays[w.path]) for n, w in names.items()}
  other = _network('convnet_aig', seed=1)
  interop.load_torch_state_dict(other, state_dict)
  _assert_same(other, model)


_WRAPPINGS = {
  'data parallel': lambda s: {f'module.{k}': v for k, v in s.items()},
  'compiled': lambda s: {f'module._orig_mod.{k}': v for k, v in s.items()},
  'training': lambda s: {
    'epoch': 3,
    'arch': 'resnet18',
    'state_dict': collections.OrderedDict(s),
    'best_prec1': np.float32(93.0),
    'optimizer': {'state': {0: {'momentum_buffer': np.zeros(3)}}},
  },
  'both': lambda s: {
    'model': {'state_dict': {f'module.model.{k}': v for k, v in s.items()}},
    'optimizer': {'param_groups': []},
  },
  'flat': lambda s: {
    **{f'model.{k}': v for k, v in s.items()},
    'optimizer.state.0.exp_avg': np.zeros(3),
    'optimizer_state_dict.state.0.exp_avg': np.zeros(3),
    'lr_scheduler.last_epoch': np.zeros(()),
    'epoch': np.array(3),
    'args': None,
  },
  'without counts': lambda s: _own(s),
  'jax arrays': lambda s: {k: jnp.asarray(v) for k, v in _own(s).items()},
  'float64': lambda s: {k: v.astype(np.float64) for k, v in _own(s).items()},
}


@pytest.mark.parametrize('wrap', _WRAPPINGS.values(), ids=_WRAPPINGS)
def test_what_wraps_a_state_dict_is_taken_off(wrap):
  model, other = _network('dynconv'), _network('dynconv', seed=1)
  wrapped = wrap(interop.to_torch_state_dict(model))
  assert interop.num_classes(wrapped) == 5
  interop.load_torch_state_dict(other, wrapped)
  _assert_same(other, model)


@pytest.mark.parametrize('attribute', ['backbone', 'module'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'module._orig_mod.'])
def test_a_networks_own_names_are_no_wrappers(attribute, prefix):
  def make(seed):
    model = nnx.Module()
    layers = [
      nnx.Linear(3, 3, rngs=nnx.Rngs(seed)),
      nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
    ]
    setattr(model, attribute, nnx.List(layers))
    return model

  model, other = make(0), make(1)
  state_dict = interop.to_torch_state_dict(model)
  wrapped = {f'{prefix}{k}': v for k, v in state_dict.items()}
  interop.load_torch_state_dict(other, wrapped)
  _assert_same(other, model)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_the_networks(dtype):
  model, other = _network(), _network(seed=1)
  state_dict = _own(interop.to_torch_state_dict(model))
  halves = {k: v.astype(dtype) for k, v in state_dict.items()}
  interop.load_torch_state_dict(other, halves)
  for name, array in _own(interop.to_torch_state_dict(other)).items():
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, halves[name].astype(np.float32))


def test_tensors_of_pytorch():
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  model, other = _network(), _network(seed=1)
  state_dict = {
    name: torch.nn.Parameter(torch.from_numpy(array))
    for name, array in _own(interop.to_torch_state_dict(model)).items()
  }
  interop.load_torch_state_dict(other, state_dict)
  _assert_same(other, model)
  with torch.no_grad():
    for tensor in state_dict.values():
      tensor.zero_()
  _assert_same(other, model)
  halves = {name: t.detach().bfloat16() for name, t in state_dict.items()}
  interop.load_torch_state_dict(other, halves)
  assert not any(array.any() for array in _weights(other).values())
  state_dict['fc.bias'] = torch.zeros(5, dtype=torch.int8)
  with pytest.raises(ValueError, match=r'fc\.bias is torch\.int8, not flo'):
    interop.load_torch_state_dict(other, state_dict)


@pytest.mark.parametrize(
  'load', [interop.load_torch_state_dict, interop.load_pretrained]
)
def test_one_error_lists_all_and_changes_nothing(load):
  state_dict = interop.to_torch_state_dict(_network())
  del state_dict['conv1.weight'], state_dict['layer2.0.bn1.running_mean']
  state_dict['layer9.0.conv1.weight'] = np.zeros((1, 2))
  state_dict['cls_token'] = np.zeros((1, 2), np.float32)
  state_dict['bn1.bias'] = np.zeros((7,), np.float32)
  state_dict['layer1.0.conv2.weight'] = np.zeros((4, 4, 5, 5), np.float32)
  state_dict['bn1.weight'] = np.ones(4, np.int32)
  model, before = _network(seed=1), _network(seed=1)
  with pytest.raises(ValueError) as error:
    load(model, state_dict)
  assert str(error.value) == (
    'the state_dict does not fit the network; '
    'missing: conv1.weight, layer2.0.bn1.running_mean; '
    'unexpected: layer9.0.conv1.weight, cls_token; '
    'misfitting: bn1.bias is (7,), not (4,), '
    'bn1.weight is int32, not floating-point, '
    'layer1.0.conv2.weight is (4, 4, 5, 5), not (4, 4, 3, 3)'
  )
  _assert_same(model, before)


@pytest.mark.parametrize(
  'load', [interop.load_torch_state_dict, interop.load_pretrained]
)
def test_values_that_no_network_has_are_named(load):
  state_dict = interop.to_torch_state_dict(_network())
  state_dict['conv1.weight'][0, 1, 2, :] = [np.nan, np.inf, -np.inf]
  state_dict['layer1.0.bn1.running_var'][2] = -1e-9
  # Beyond float32.
  state_dict['bn1.bias'] = state_dict['bn1.bias'] + np.array([0, 0, 1e39, 0])
  # A mean may be negative.
  state_dict['layer1.0.bn1.running_mean'][2] = -1
  model, before = _network(seed=1), _network(seed=1)
  with pytest.raises(ValueError) as error:
    load(model, state_dict)
  assert str(error.value) == (
    'the state_dict does not fit the network; misfitting: '
    'bn1.bias contains NaN or infinity (1 of 4 values), '
    'conv1.weight contains NaN or infinity (3 of 108 values), '
    'layer1.0.bn1.running_var is negative (1 of 4 variances)'
  )
  _assert_same(model, before)


@pytest.mark.parametrize('kind', ['meta', 'sparse'])
def test_tensors_without_values_are_named(kind):
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  state_dict = interop.to_torch_state_dict(_network())
  tensor = torch.from_numpy(state_dict['fc.weight'])
  state_dict['fc.weight'] = (
    tensor.to('meta') if kind == 'meta' else tensor.to_sparse()
  )
  with pytest.raises(
    ValueError, match=r'misfitting: fc\.weight has no readable values'
  ):
    interop.load_torch_state_dict(_network(seed=1), state_dict)


def test_dense_weights_in_a_gated_network_are_told_apart():
  state_dict = interop.to_torch_state_dict(_network())
  with pytest.raises(
    ValueError,
    match=r'whose gates it lacks \(to train from it, use `pretrained`',
  ):
    interop.load_torch_state_dict(_network('dynconv'), state_dict)


@pytest.mark.parametrize(
  'given, message',
  [
    ([1, 2], 'must be a mapping of names to arrays; got list'),
    ({}, 'no weights in the state_dict; its entries are none'),
    (
      {f'key{i}': i for i in range(10)},
      'its entries are key0, key1, .*, key7, and 2 more',
    ),
    (
      {'module.fc.bias': np.zeros(2), 'fc.bias': np.zeros(2)},
      r'has fc\.bias twice, also as fc\.bias',
    ),
  ],
)
def test_what_is_no_state_dict(given, message):
  with pytest.raises(ValueError, match=message):
    interop.load_torch_state_dict(_network(), given)


def test_number_of_classes():
  aig = interop.to_torch_state_dict(_network('convnet_aig', num_classes=9))
  assert interop.num_classes(aig) == 9
  with pytest.raises(ValueError, match='no classifier, such as fc.bias or'):
    interop.num_classes({'head.weight': np.zeros((3, 2))})


@pytest.mark.parametrize('method', METHODS)
def test_pretrained_dense_weights_leave_gates_and_another_head(method):
  name = 'cifar_resnet14'
  dense = interop.to_torch_state_dict(_network(name=name, num_classes=1000))
  model, before = (_network(method, seed=1, name=name) for _ in range(2))
  with absltest.TestCase().assertLogs(level='INFO') as logs:
    fresh = interop.load_pretrained(model, dense)
  assert logs.output[-1].endswith(f'newly initialized: {", ".join(fresh)}')
  assert {'fc.weight', 'fc.bias'} <= set(fresh)
  trunk = set(_own(dense)) - set(fresh)
  assert len(trunk) == len(_own(dense)) - 2
  names = names_lib.torch_names(model, names_lib.TORCHVISION)
  assert set(fresh) == set(names) - trunk
  # The control with dropped blocks has no weights of its own.
  assert (method in ('dense', 'drop')) == (len(fresh) == 2)
  after, before = _weights(model), _weights(before)
  for name, weight in names.items():
    expected = before[weight.path]
    if name not in fresh:
      expected = weight.from_torch(dense[name])
    np.testing.assert_array_equal(after[weight.path], expected, name)


@pytest.mark.parametrize('method', ['dynconv', 'convnet_aig'])
def test_pretrained_gates_are_kept(method):
  source = _network(method)
  model = _network(method, seed=1)
  state_dict = interop.to_torch_state_dict(source)
  assert interop.load_pretrained(model, state_dict) == []
  _assert_same(model, source)
  gate = next(n for n in state_dict if 'masker' in n or 'fc1' in n)
  del state_dict[gate]
  with pytest.raises(ValueError, match=f'missing: {gate}$'):
    interop.load_pretrained(model, state_dict)


def test_a_pretrained_network_of_another_width_is_an_error():
  state_dict = interop.to_torch_state_dict(_network(width_multiplier=0.5))
  with pytest.raises(
    ValueError, match=r'fc\.weight is \(5, 32\), not \(5, 16\)'
  ):
    interop.load_pretrained(_network(), state_dict)
