import pathlib
import pickle
import re
import shutil

import grain
import numpy as np
import pytest

from dynconv_jax.data import sources, spots

_REAL = pathlib.Path(__file__).parents[4] / 'shared' / 'data' / 'food-101'


@pytest.fixture
def food101(food101_dir, tmp_path):
  """Options that open the small folder of Food-101's layout."""
  return {
    'dataset': 'food101',
    'food101_dir': food101_dir,
    'data_dir': tmp_path / 'data',
  }


def _names(source):
  return [source[i]['name'] for i in range(len(source))]


def test_examples_are_the_files(food101, food101_dir):
  opened = sources.open_splits(**food101)
  names = []
  for source in opened:
    for i in range(len(source)):
      example = source[i]
      path = food101_dir / 'images' / f'{example["name"]}.jpg'
      assert example['image'] == path.read_bytes()
      assert source.class_names[example['label']] == path.parent.name
      assert source.labels[i] == example['label']
      names.append(example['name'])
    assert source.labels.dtype == np.int32
  assert len(set(names)) == len(names) == 30
  assert [len(s) for s in opened] == [17, 2, 11]


def test_order_is_fixed_and_mixed(food101, tmp_path):
  first = sources.open_source(split='train', **food101)
  food101['data_dir'] = tmp_path / 'other'
  second = sources.open_source(split='train', **food101)
  assert _names(first) == _names(second)
  # Not sorted by class: a change of class comes more often than twice.
  assert np.count_nonzero(np.diff(first.labels)) > 5
  part = sources.open_source(split='train[25%:75%]', **food101)
  assert _names(part) == _names(first)[5:14]


def test_test_is_another_name_of_validation(food101):
  test = sources.open_source(split='test[:5]', **food101)
  assert _names(test) == _names(
    sources.open_source(split='validation[:5]', **food101)
  )
  both = sources.open_source(split='test[:2]+train[-2:]+test[4:]', **food101)
  train = sources.open_source(split='train', **food101)
  whole = _names(sources.open_source(split='test', **food101))
  assert _names(both) == whole[:2] + _names(train)[-2:] + whole[4:]
  assert both.labels.tolist() == [both[i]['label'] for i in range(len(both))]


def test_classes_are_numbered_in_the_order_given(food101):
  everything = sources.open_source(split='train', **food101)
  source = sources.open_source(
    split='train', classes=['cheese_plate', 'apple_pie'], **food101
  )
  assert source.class_names == ('cheese_plate', 'apple_pie')
  expected = [n for n in _names(everything) if not n.startswith('cheesecake')]
  assert _names(source) == expected
  for i, name in enumerate(expected):
    assert source.labels[i] == int(name.startswith('apple_pie'))
    assert source[i]['label'] == source.labels[i]


def test_other_classes_do_not_move_the_splits(food101, food101_dir):
  kept = ('apple_pie', 'cheese_plate')
  subset = sources.open_splits(classes=kept, **food101)
  shutil.rmtree(food101_dir / 'images' / 'cheesecake')
  folder = sources.open_splits(classes=kept, **food101)
  for a, b in zip(subset, folder, strict=True):
    assert _names(a) == _names(b)


def test_default_splits():
  for dataset in sources.DATASETS:
    train, validation, test = sources.default_splits(dataset)
    assert (train, validation) == ('train[:90%]', 'train[90%:]')
    assert test == ('validation' if dataset == 'food101' else 'test')


@pytest.mark.parametrize('nothing', ['', 'none', 'None'])
def test_no_validation_split(food101, nothing):
  opened = sources.open_splits(train='train', validation=nothing, **food101)
  assert opened.validation is None
  assert len(opened.train) == 19
  assert sources.open_source(split=nothing, **food101) is None


def test_spots(tmp_path):
  options = {
    'data_dir': tmp_path,
    'spots_size': 24,
    'spots_train': 20,
    'spots_test': 6,
    'spots_seed': 5,
  }
  config = spots.SpotsConfig(24, 20, 6, 5)
  opened = sources.open_splits('spots', **options)
  assert [len(s) for s in opened] == [18, 2, 6]
  for source in opened:
    assert source.class_names == spots.CLASS_NAMES
    for i in range(len(source)):
      example = source[i]
      split, index = example['name'].split('/')
      image, mask, label = spots.draw(config, split, int(index))
      assert example['label'] == label
      assert example['image'] == spots.to_png(image)
      assert example['object_mask'] == spots.to_png(mask)
  options['spots_seed'] = 6
  other = sources.open_splits('spots', **options)
  assert other.test[0]['image'] != opened.test[0]['image']


def test_image_folder(image_folder_dir, tmp_path):
  options = {
    'dataset': 'image_folder',
    'data_dir': tmp_path / 'data',
    'image_folder_dir': image_folder_dir,
  }
  opened = sources.open_splits(**options)
  assert [len(s) for s in opened] == [11, 1, 4]
  for source in opened:
    for i in range(len(source)):
      path = image_folder_dir / source[i]['name']
      assert source[i]['image'] == path.read_bytes()
      assert source.class_names[source[i]['label']] == path.parent.name
  shutil.rmtree(image_folder_dir / 'test')
  assert sources.open_splits(**options).test is None
  with pytest.raises(ValueError, match="Unknown split 'test'.*train: 12 exam"):
    sources.open_source(split='test', **options)


def test_zero_byte_files_with_skip_corrupt(food101, food101_dir):
  (food101_dir / 'images/apple_pie/1002.jpg').write_bytes(b'')
  with pytest.raises(ValueError, match='zero-byte files: apple_pie/1002.jpg'):
    sources.open_source(split='train', **food101)
  source = sources.open_source(split='train', skip_corrupt=True, **food101)
  empty = [e['name'] for e in source if not e['image']]
  assert (len(source), empty) == (19, ['apple_pie/1002'])
  # Letting it through once does not hide it later.
  with pytest.raises(ValueError, match='zero-byte'):
    sources.open_source(split='train', **food101)


def test_labels_that_cannot_be_kept(food101, monkeypatch):
  def full(file, **arrays):
    raise OSError('No space left on device')

  with monkeypatch.context() as patched:
    patched.setattr(np, 'savez', full)
    first = sources.open_source(split='train', **food101)
  assert not list(food101['data_dir'].rglob('labels.*.tmp'))
  assert not list(food101['data_dir'].rglob('labels.npz'))
  second = sources.open_source(split='train', **food101)
  assert len(list(food101['data_dir'].rglob('labels.npz'))) == 1
  third = sources.open_source(split='train', **food101)
  for source in (first, second, third):
    np.testing.assert_array_equal(
      source.labels, [example['label'] for example in source]
    )
    assert [source.class_names[i] for i in source.labels] == [
      name.split('/')[0] for name in _names(source)
    ]


def test_behaves_as_a_sequence(food101):
  source = sources.open_source(split='train[:7]', **food101)
  assert source[-1] == source[6]
  assert source[np.int64(2)] == source[2]
  for index in (7, -8):
    with pytest.raises(IndexError):
      source[index]
  copy = pickle.loads(pickle.dumps(source))
  assert [copy[i] for i in range(7)] == [source[i] for i in range(7)]
  assert repr(copy) == repr(source)
  assert repr(source) == (
    'ImageSource(food101:train[0:7], 7 examples, 3 classes)'
  )


def test_grain_reads_it(food101):
  source = sources.open_source(split='train', **food101)
  sampler = grain.samplers.IndexSampler(
    len(source),
    shuffle=True,
    seed=0,
    num_epochs=1,
    shard_options=grain.sharding.NoSharding(),
  )
  loader = grain.DataLoader(data_source=source, sampler=sampler, worker_count=0)
  assert sorted(e['name'] for e in loader) == sorted(_names(source))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'dataset': 'food1O1'},
      "unknown dataset 'food1O1'; there are spots, food101, cifar10, image_",
    ),
    (
      {'classes': ['cheese_cake', 'pizza']},
      "unknown class 'cheese_cake', 'pizza'; .* has cheesecake, cheese_plate, "
      'apple_pie',
    ),
    (
      {'classes': ['apple_pie', 'cheesecake', 'apple_pie']},
      '--classes names apple_pie more than once',
    ),
    ({'train': 'train[:0]'}, r'--train_split: split .* is empty; .*train: 19'),
    (
      {'train': 'train[:3%]', 'validation': 'train[2%:]'},
      re.escape('--train_split=train[:3%] and --validation_split=train[2%:] ')
      + 'overlap in 1 examples',
    ),
    (
      {'validation': 'test'},
      '--validation_split=test and --test_split=validation overlap in 11',
    ),
    (
      {'dataset': 'image_folder'},
      'the dataset image_folder needs --image_folder_dir',
    ),
    ({'dataset': 'spots', 'spots_size': 4}, 'size must be at least 24; got 4'),
  ],
)
def test_errors(food101, change, message):
  with pytest.raises(ValueError, match=message):
    sources.open_splits(**{**food101, **change})


def test_unknown_class_of_other_datasets(tmp_path):
  with pytest.raises(ValueError, match="unknown class 'disk'; spots has disc,"):
    sources.open_source(
      'spots', 'train', data_dir=tmp_path, spots_train=6, classes=['disk']
    )


@pytest.mark.skipif(not _REAL.is_dir(), reason=f'no images in {_REAL}')
def test_real_images(tmp_path):
  opened = sources.open_splits('food101', food101_dir=_REAL, data_dir=tmp_path)
  assert [len(s) for s in opened] == [4050, 450, 1500]
  # Each class is in each split, in proportion within five standard deviations.
  counts = np.bincount(opened.validation.labels)
  assert np.all(np.abs(counts - 75) < 5 * np.sqrt(75))
  train, test = set(_names(opened.train)), set(_names(opened.test))
  assert len(train) == 4050 and not train & test
