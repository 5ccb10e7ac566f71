"""Tests of path patterns and of the parameters that they freeze."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.training import schedules, selection, state, workdir
from dynconv_jax.training.config import Config


@pytest.mark.parametrize(
  'pattern, path, expected',
  [
    ('conv_stem', ('conv_stem', 'kernel'), True),
    ('conv', ('conv_stem', 'kernel'), False),
    ('blocks.0', ('blocks', 0, 1, 'bn1', 'scale'), True),
    ('blocks.0', ('blocks', 1, 0, 'bn1', 'scale'), False),
    ('*.conv_dw', ('blocks', 1, 0, 'conv_dw', 'kernel'), True),
    ('*.masker.*bias', ('blocks', 1, 1, 'masker', 'conv', 'bias'), True),
    ('*', ('fc', 'bias'), True),
    ('blocks.1', ('blocks', 1, 1, 'masker', 'conv', 'bias'), False),
    ('blocks.1.*', ('blocks', 1, 1, 'masker', 'conv', 'bias'), True),
    ('*.masker', ('blocks', 1, 1, 'masker', 'conv', 'bias'), True),
  ],
)
def test_patterns(pattern, path, expected):
  assert selection.matches(pattern, path) == expected


def _run(steps=3, **options):
  """Returns weights and statistics before and after some steps."""
  config = Config.make(
    model='cifar_resnet8', method='dynconv', image_size=16, batch_size=4,
    optimizer='adamw', weight_decay=0.1, **options,
  )  # fmt: skip
  model = workdir.build_model(config, 3)
  optimization = config.optimization
  selection.freeze_statistics(
    model, (*optimization.frozen, *optimization.frozen_statistics)
  )
  tx = schedules.optimizer(
    optimization, schedules.learning_rate(optimization, 10)
  )
  step = state.make_train_step(state.split(model)[0], tx, config, 10)
  current = state.create_state(model, tx, config)
  images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
  batch = {
    'image': jnp.asarray(images, jnp.float32),
    'label': jax.nn.one_hot(jnp.arange(4) % 3, 3),
  }
  found = []
  for _ in range(steps + 1):
    trees = (current.params, current.model_state)
    found.append(jax.tree.map(np.array, nnx.to_pure_dict(nnx.State(
      {'params': trees[0], 'statistics': trees[1]}))))  # fmt: skip
    current = step(current, batch)
  return found[0], found[-1]


def _changed(before, after):
  flat = jax.tree_util.tree_flatten_with_path(before)[0]
  names = ['.'.join(str(k.key) for k in path) for path, _ in flat]
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  changed = [not np.array_equal(a, b) for a, b in pairs]
  return dict(zip(names, changed, strict=True))


def test_what_is_frozen_stays_and_nothing_else():
  changed = _changed(*_run(frozen=('conv1', 'bn1', 'layer1.*.bn?')))
  frozen = ('conv1', 'bn1', 'layer1.0.bn1', 'layer1.0.bn2')
  for name, change in changed.items():
    path = name.removeprefix('params.').removeprefix('statistics.')
    assert change != any(path.startswith(f'{p}.') for p in frozen), name


def test_gates_of_frozen_blocks_are_trained():
  changed = _changed(*_run(frozen=('layer1',)))
  assert any('.masker.' in name for name in changed)
  for name, change in changed.items():
    assert change == ('.masker.' in name or 'layer1' not in name), name


def test_statistics_alone_stay():
  changed = _changed(*_run(frozen_statistics=('layer2',)))
  for name, change in changed.items():
    assert change != name.startswith('statistics.layer2'), name


def test_a_factor_scales_the_update():
  (before, plain), (_, scaled) = (
    _run(steps=1, learning_rate_factors=f)
    for f in ((), ('conv1:1', 'fc:0.5', 'fc.bias:0'))
  )
  # Only the first step, because later ones have different gradients.
  for leaf, factor in (('kernel', 0.5), ('bias', 0)):
    expected, got = (
      after['params']['fc'][leaf] - before['params']['fc'][leaf]
      for after in (plain, scaled)
    )
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(got, factor * expected, rtol=1e-3, atol=1e-7)


def test_a_repeated_pattern_counts_where_it_is_last():
  config = Config.make(
    learning_rate_factors=('fc:2', 'conv1:2', '*:3', 'fc:4'),
    frozen=('conv1',),
  )
  params = {name: jnp.zeros(()) for name in ('bn1', 'conv1', 'fc')}
  factors = selection.factors_of(params, config.optimization.factors)
  assert factors == {'bn1': 3, 'conv1': 0, 'fc': 4}


def test_bad_input():
  with pytest.raises(ValueError, match='PATTERN:FACTOR.*got fc'):
    Config.make(learning_rate_factors=('fc',)).check()
  with pytest.raises(ValueError, match='got fc:-1'):
    Config.make(learning_rate_factors=('fc:-1',)).check()
  model = workdir.build_model(Config.make(), 3, abstract=True)
  with pytest.raises(
    ValueError, match=r'matches frozen: stem\. .*conv1.*such as'
  ):
    selection.check_patterns(model, {'frozen': ('stem', 'conv1')})
