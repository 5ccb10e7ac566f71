"""Tests of grids against lists written by hand."""

import jax
import pytest
from flax import nnx
from jax.interpreters import partial_eval

from dynconv_jax.cli.grid import make_runs, matters
from dynconv_jax.methods.method import METHODS
from dynconv_jax.training import workdir
from dynconv_jax.training.config import Config

BASE = {'model': 'cifar_resnet14'}


def _names(*grids, base=BASE):
  return [run.name for run in make_runs(base, grids)]


def test_the_seed_comes_last_in_a_name():
  names = ['dynconv_budget0.3_seed0', 'dynconv_budget0.3_seed1']
  assert _names('seed=0,1', 'method=dynconv', 'budget=0.3') == names
  assert _names('method=dynconv', 'budget=0.3', 'seed=0,1') == names


def test_flags_that_do_not_matter_do_not_multiply():
  runs = make_runs(
    BASE,
    [
      'method=dense,dynconv,skipnet,sact',
      'budget=0.3,0.50',
      'skip_weight=0.1,0.2',
      'ponder_weight=0.01,0.02,0.030',
      'seed=0,1',
    ],
  )
  one_seed = [
    'dense_seed{}',
    'dynconv_budget0.3_seed{}',
    'dynconv_budget0.5_seed{}',
    'skipnet_skip_weight0.1_seed{}',
    'skipnet_skip_weight0.2_seed{}',
    'sact_ponder_weight0.01_seed{}',
    'sact_ponder_weight0.02_seed{}',
    'sact_ponder_weight0.03_seed{}',
  ]
  # Seed by seed: an interrupted sweep has fewer seeds.
  assert [run.name for run in runs] == [
    name.format(seed) for seed in (0, 1) for name in one_seed
  ]
  configs = {run.name: run.config for run in runs}
  assert configs['dense_seed1'] == Config.make(**BASE, method='dense', seed=1)
  assert configs['dynconv_budget0.3_seed0'] == Config.make(
    **BASE, method='dynconv', budget=0.3
  )
  assert len(set(configs.values())) == len(runs)
  settings = {run.name: run.settings for run in runs}
  assert settings['sact_ponder_weight0.01_seed0'] == {
    'method': 'sact',
    'budget': '',
    'skip_weight': '',
    'ponder_weight': '0.01',
    'seed': '0',
  }
  assert {run.recipe for run in runs} == {''}


def test_a_value_given_twice_is_one_run():
  assert _names('budget=0.5,0.50,.5') == ['budget0.5']
  assert _names('budget=0.3,0.5', base={'method': 'dense'}) == ['dense']


def test_a_grid_for_one_method_is_in_place_of_that_for_all():
  runs = make_runs(
    BASE,
    [
      'method=dense,dynconv,skipnet',
      'dense:width_multiplier=0.5,1.0',
      'skipnet:mask_bias=2',
      'learning_rate=0.1',
      'dynconv:learning_rate=0.1,0.2',
    ],
  )
  assert [run.name for run in runs] == [
    'dense_width_multiplier0.5_learning_rate0.1',
    'dense_width_multiplier1_learning_rate0.1',
    'dynconv_learning_rate0.1',
    'dynconv_learning_rate0.2',
    # A single value for one method is a setting, not an axis.
    'skipnet_learning_rate0.1',
  ]
  assert [run.config.model.width_multiplier for run in runs] == [
    0.5,
    1,
    1,
    1,
    1,
  ]
  assert [run.config.flat().get('mask_bias') for run in runs] == [None] * 4 + [
    2
  ]
  assert [run.settings['mask_bias'] for run in runs] == [''] * 4 + ['2']
  # The figure shows widths by itself, but not learning rates.
  assert [run.recipe for run in runs] == [
    '',
    '',
    'learning_rate 0.1',
    'learning_rate 0.2',
    '',
  ]


def test_names_of_text_lists_and_paths():
  assert _names('mask_granularity=1;4,2,1', 'flip=true,false') == [
    'mask_granularity-1_flip-true',
    'mask_granularity-1_flip-false',
    'mask_granularity-4-2-1_flip-true',
    'mask_granularity-4-2-1_flip-false',
  ]
  assert _names('init_from=x/v1.0,x/v1') == ['init_from-v1.0', 'init_from-v1']
  # Different, although equal as file names.
  assert _names('init_from=,x/a b,y/a-b/') == [
    'init_from-none',
    'init_from-a-b',
    'init_from-a-b-2',
  ]
  assert _names('model=cifar_resnet14,cifar_resnet20', 'mask_bias=,2') == [
    'cifar_resnet14_mask_bias-none',
    'cifar_resnet14_mask_bias2',
    'cifar_resnet20_mask_bias-none',
    'cifar_resnet20_mask_bias2',
  ]


def test_input_sizes_move_along_a_curve_where_nothing_else_does():
  recipes = [run.recipe for run in make_runs(BASE, ['image_size=32,64'])]
  assert recipes == ['', '']
  runs = make_runs(BASE, ['image_size=32,64', 'budget=0.3,0.5'])
  assert {run.recipe for run in runs} == {'image_size 32', 'image_size 64'}


def test_every_error_is_named_at_once():
  grids = {
    'bugdet=0.5': "has no flag 'bugdet'",
    'seed=0,one': "seed must be an integer; got 'one'",
    'flip=yes': "flip must be true or false; got 'yes'",
    'milestones=0.5;x': "must be numbers separated by commas; got 'x'",
    'num_workers=0,2': 'num_workers does not affect the result',
    'epochs': 'must be NAME=VALUE,VALUE or METHOD:NAME=VALUE,VALUE',
    ':epochs=3': 'must be NAME=VALUE,VALUE or METHOD:NAME=VALUE,VALUE',
    'dense:method=act': 'method cannot be set for one method',
    'method=dense,dynconv': None,
    'batch_size=8': None,
    'batch_size=16': '--grid=batch_size=16: this flag already has a grid',
    'dense:budget=0.3': 'budget does not affect dense',
    'sact:ponder_weight=0.1': "no runs of 'sact', only of dense, dynconv",
    'budget=0.5,1.3': r'budget must be in [0, 1]; got 1.3',
  }
  with pytest.raises(ValueError) as error:
    make_runs(BASE, list(grids))
  for message in filter(None, grids.values()):
    assert message in str(error.value)


def test_an_invalid_run_is_named_once_for_all_like_it():
  with pytest.raises(ValueError) as error:
    make_runs(BASE, ['method=dense,dynamic', 'image_size=32,0', 'seed=0,1'])
  # Once for each of the two sizes, not for each seed.
  assert str(error.value).count("'dynamic'") == 2
  assert '(dense_image_size0_seed0 and 1 more)' in str(error.value)
  assert '(dynamic_image_size32_seed0 and 1 more)' in str(error.value)


_CHANGED = {
  'budget': 0.25,
  'budget_warmup': 0.5,
  'mask_bias': 3.0,
  'mask_granularity': (2,),
  'mask_kernel_size': 1,
  'ponder_weight': 0.5,
  'reinforce_weight': 0.5,
  'skip_gate': 'ff2',
  'skip_temperature': 0.5,
  'skip_training': 'reinforce',
  'skip_weight': 0.7,
  'sparsity_weight': 3.0,
  'target_rate_weight': 3.0,
  'target_rates': 'resnet50',
}
_GUMBEL = {'gumbel_milestones', 'gumbel_noise_until', 'gumbel_temperatures'}


@pytest.mark.parametrize('method', METHODS)
def test_what_does_not_matter_is_no_part_of_a_run(method):
  idle = {n: v for n, v in _CHANGED.items() if not matters(n, method)}
  config = Config.make(**BASE, method=method)
  assert Config.make(**BASE, method=method, **idle) == config
  for name in _CHANGED.keys() - idle.keys():
    assert Config.make(**BASE, method=method, **_CHANGED) != config, name
  assert all(matters(name, method) for name in ('seed', 'crop', 'model'))


@pytest.mark.parametrize('method', METHODS)
def test_gates_that_use_temperature_and_noise(method):
  config = Config.make(**BASE, method=method, width_multiplier=0.25)
  model = workdir.build_model(config, 3, abstract=True)
  graphdef, weights = nnx.split(model)

  def forward(temperature, noise, weights, key, images):
    return nnx.merge(graphdef, weights)(
      images,
      rngs=nnx.Rngs(gumbel=key),
      temperature=temperature,
      gumbel_noise=noise,
    )

  program = jax.make_jaxpr(forward)(
    *(1.0, True, nnx.as_pure(weights), jax.random.key(0)),
    jax.ShapeDtypeStruct((2, 16, 16, 3), 'float32'),
  ).jaxpr
  _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
  for name in _GUMBEL:
    assert used[:2] == [matters(name, method)] * 2
