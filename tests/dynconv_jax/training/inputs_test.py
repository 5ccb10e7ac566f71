"""Tests of a run's data: splits by role, and options that affect the data."""

import types
from unittest import mock

import numpy as np
import pytest

from dynconv_jax.data import decode, image_folder, spots
from dynconv_jax.data.source import Common
from dynconv_jax.training import inputs
from dynconv_jax.training.config import Config


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return Config.make(
    spots_size=24,
    spots_train=30,
    spots_test=10,
    image_size=24,
    crop='none',
    batch_size=4,
    eval_batch_size=4,
    data_dir=str(tmp_path_factory.mktemp('data')),
  )


def _names(source):
  return [source[i]['name'] for i in range(len(source))]


def _numbered(split, numbers):
  return [f'{split}/{i:06d}' for i in numbers]


def test_splits_by_role_and_by_notation(config):
  splits = inputs.open_splits(config.data)
  # TFDS shuffles the examples once, by a hash of their names.
  assert [len(source) for source in splits] == [27, 3, 10]
  names = [_names(source) for source in splits]
  assert sorted(names[0] + names[1]) == _numbered('train', range(30))
  assert sorted(names[2]) == _numbered('test', range(10))
  for role, expected in zip(splits._fields, names, strict=True):
    assert _names(inputs.open_split(config.data, role)) == expected
  mixed = inputs.open_split(config.data, 'train[-3:]+test[:20%]')
  assert _names(mixed) == names[1] + names[2][:2]


def test_roles_are_those_of_the_run(config):
  config = config.replace(
    train_split='train[:4]', validation_split='test[:6]', test_split=''
  )
  names = _names(inputs.open_split(config.data, 'test[:100%]'))
  assert len(inputs.open_split(config.data, 'train')) == 4
  assert _names(inputs.open_split(config.data, 'validation')) == names[:6]
  with pytest.raises(ValueError, match='^this run has no test split'):
    inputs.open_split(config.data, 'test')


def _eval_batches(config, *args):
  return inputs.eval_batches(
    config.data,
    *args,
    image_size=config.model.image_size,
    batch_size=config.run.eval_batch_size,
  )


@pytest.mark.parametrize('none', ['none', ''])
def test_without_a_validation_split(config, none):
  config = config.replace(validation_split=none)
  assert inputs.open_splits(config.data).validation is None
  with pytest.raises(
    ValueError,
    match='^this run has no validation split; it has train and test$',
  ):
    inputs.open_split(config.data, 'validation')


@pytest.mark.parametrize(
  'split, message',
  [
    ('trian', "split 'trian': .*the dataset has train: 30 .*, test: 10"),
    ('train[30:]', "split 'train.30:.' is empty"),
    ('none', "^split must be train, validation, test or .*; got 'none'"),
    (' ', "^split must be train, validation, test or .*; got ' '"),
  ],
)
def test_a_split_that_is_not_there(config, split, message):
  with pytest.raises(ValueError, match=message):
    inputs.open_split(config.data, split)


def test_every_option_of_the_data_reaches_it():
  config = Config.make(
    dataset='image_folder',
    data_dir='data',
    image_folder_dir='folder',
    classes=('b', 'a'),
    train_split='train[:3]',
    validation_split='none',
    skip_corrupt=True,
  )
  with mock.patch.object(inputs.sources, 'open_splits') as open_splits:
    inputs.open_splits(config.data)
  open_splits.assert_called_once_with(
    image_folder.SOURCE,
    image_folder.Options('folder'),
    Common('data', ('b', 'a'), skip_corrupt=True),
    train='train[:3]',
    validation='none',
    test=None,
  )
  config = config.replace(
    dataset='spots',
    spots_size=40,
    spots_train=50,
    spots_test=60,
    spots_seed=7,
  )
  with mock.patch.object(inputs.sources, 'open_source') as open_source:
    inputs.open_split(config.data, 'test[:2]')
  assert open_source.call_args.args[2] == spots.Options(40, 50, 60, 7)


def test_a_source_from_outside(config):
  config = config.replace(dataset=f'{spots.__name__}:SOURCE')
  assert (
    len(inputs.open_split(config.data, 'test'))
    == config.data.options.spots_test
  )


def test_train_batches_follow_the_config(config):
  config = config.replace(label_smoothing=0.3, flip=False, seed=3)
  source = inputs.open_split(config.data, 'train[:4]')
  batches = inputs.train_batches(config, source)
  batch = next(batches)
  batches.close()
  assert batches.steps_per_epoch == 1
  assert batch['image'].shape == (4, 24, 24, 3)
  labels = np.asarray(batch['label'])
  np.testing.assert_allclose(np.sort(labels)[:, :5], 0.05, atol=1e-6)
  np.testing.assert_allclose(labels.max(1), 0.75, atol=1e-6)
  assert sorted(labels.argmax(1)) == sorted(source.labels)


def test_eval_batches_hold_each_image_once(config):
  source = inputs.open_split(config.data, 'test')
  batches = list(_eval_batches(config, source))
  assert [batch['weight'].tolist() for batch in batches] == [
    [1, 1, 1, 1],
    [1, 1, 1, 1],
    [1, 1, 0, 0],
  ]
  images = np.concatenate([batch['image'] for batch in batches])[:10]
  masks = np.concatenate([batch['object_mask'] for batch in batches])[:10]
  labels = np.concatenate([batch['label'] for batch in batches])[:10]
  for i, name in enumerate(_names(source)):
    image, mask, label = spots.draw(spots.Options(24), 'test', int(name[-6:]))
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(images[i], expected, atol=1e-5)
    np.testing.assert_array_equal(masks[i], mask)
    assert labels[i] == label


def test_scenes_reach_training_and_evaluation(config):
  config = config.replace(scene_size=(40,), object_size=(8, 16))
  source = inputs.open_split(config.data, 'test')
  batches = inputs.train_batches(config, source)
  assert next(batches)['image'].shape == (4, 24, 24, 3)
  batches.close()
  for batch in _eval_batches(config, source):
    # The photograph's rectangle, not the mask that the source provides.
    masks = np.asarray(batch['object_mask'])[np.asarray(batch['weight']) > 0]
    sides = masks.any(2).sum(1)
    np.testing.assert_array_equal(
      masks.sum((1, 2)), sides * masks.any(1).sum(1)
    )
    assert sides.min() >= 4 and sides.max() <= 10
  (some,) = inputs.eval_batches(
    config.data, source, image_size=24, indices=[9, 2]
  )
  everything = list(_eval_batches(config, source))
  for i, (number, row) in enumerate([(2, 1), (0, 2)]):
    np.testing.assert_array_equal(
      some['image'][i], everything[number]['image'][row]
    )


def test_batches_are_normalized_as_the_config_says(config):
  config = config.replace(normalization='inception', flip=False)
  source = inputs.open_split(config.data, 'test[:40%]')
  (batch,) = _eval_batches(config, source)
  (number,) = {name[-6:] for name in _names(source)[:1]}
  image, _, _ = spots.draw(spots.Options(24), 'test', int(number))
  expected = (image.astype(np.float32) - 127) / 128
  np.testing.assert_allclose(batch['image'][0], expected, atol=1e-5)
  batches = inputs.train_batches(config, source)
  images = next(batches)['image']
  batches.close()
  assert np.abs(images - expected).max((1, 2, 3)).min() < 1e-5


@pytest.mark.parametrize(
  'eval_batch_size, devices, expected',
  [(4, 1, 4), (250, 1, 10), (250, 4, 12), (4, 3, 6), (1, 2, 2)],
)
def test_eval_batches_suit_split_and_devices(
  config, eval_batch_size, devices, expected
):
  sharding = types.SimpleNamespace(device_set=set(range(devices)))
  config = config.replace(eval_batch_size=eval_batch_size)
  with mock.patch.object(inputs, 'EvalBatches') as made:
    _eval_batches(config, range(10), sharding)
  assert made.call_args.kwargs['batch_size'] == expected
  assert made.call_args.kwargs['sharding'] is sharding


@pytest.mark.parametrize(
  'crop, ratio', [('resized', 8 / 7), ('pad', 1), ('none', 1)]
)
def test_evaluation_sees_what_training_sees(config, crop, ratio):
  config = config.replace(crop=crop)
  with mock.patch.object(inputs, 'EvalBatches') as made:
    _eval_batches(config, range(3))
  assert made.call_args.kwargs['resize_ratio'] == pytest.approx(ratio)
  assert decode.resize_ratio_of(crop) == pytest.approx(ratio)
