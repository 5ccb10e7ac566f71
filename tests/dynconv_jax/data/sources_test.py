import pathlib
import pickle
import re
import shutil
import sys

import grain
import numpy as np
import pytest

from dynconv_jax.data import decode, food101, sources, spots
from dynconv_jax.data.source import Common, Dataset, DataSource

_REAL = pathlib.Path(__file__).parents[4] / 'shared' / 'data' / 'food-101'


@pytest.fixture
def open_splits(food101_dir, tmp_path):
  """Opens splits of the small folder in Food-101's layout."""

  def open_splits(classes=(), skip_corrupt=False, **splits):
    return sources.open_splits(
      food101.SOURCE,
      food101.Options(str(food101_dir)),
      Common(tmp_path / 'data', classes, skip_corrupt),
      **splits,
    )

  return open_splits


@pytest.fixture
def open_source(food101_dir, tmp_path):
  def open_source(split, data_dir=tmp_path / 'data', **common):
    return sources.open_source(
      'food101',
      split,
      food101.Options(str(food101_dir)),
      Common(data_dir, **common),
    )

  return open_source


def _names(examples):
  return [examples[i]['name'] for i in range(len(examples))]


def test_examples_are_the_files(open_splits, food101_dir):
  opened = open_splits()
  names = []
  for split in opened:
    for i in range(len(split)):
      example = split[i]
      path = food101_dir / 'images' / f'{example["name"]}.jpg'
      assert example['image'] == path.read_bytes()
      assert split.class_names[example['label']] == path.parent.name
      assert split.labels[i] == example['label']
      names.append(example['name'])
    assert split.labels.dtype == np.int32
  assert len(set(names)) == len(names) == 30
  assert [len(s) for s in opened] == [17, 2, 11]


def test_order_is_fixed_and_mixed(open_source, tmp_path):
  first = open_source('train')
  second = open_source('train', data_dir=tmp_path / 'other')
  assert _names(first) == _names(second)
  # Not sorted by class: the class changes more often than twice.
  assert np.count_nonzero(np.diff(first.labels)) > 5
  assert _names(open_source('train[25%:75%]')) == _names(first)[5:14]


def test_test_is_another_name_of_validation(open_source):
  assert _names(open_source('test[:5]')) == _names(
    open_source('validation[:5]')
  )
  both = open_source('test[:2]+train[-2:]+test[4:]')
  train, test = _names(open_source('train')), _names(open_source('test'))
  assert _names(both) == test[:2] + train[-2:] + test[4:]
  assert both.labels.tolist() == [both[i]['label'] for i in range(len(both))]


def test_classes_are_numbered_in_the_order_given(open_source):
  split = open_source('train', classes=('cheese_plate', 'apple_pie'))
  assert split.class_names == ('cheese_plate', 'apple_pie')
  everything = _names(open_source('train'))
  expected = [n for n in everything if not n.startswith('cheesecake')]
  assert _names(split) == expected
  for i, name in enumerate(expected):
    assert split.labels[i] == int(name.startswith('apple_pie'))
    assert split[i]['label'] == split.labels[i]


def test_other_classes_do_not_move_the_splits(open_splits, food101_dir):
  kept = ('apple_pie', 'cheese_plate')
  subset = open_splits(classes=kept)
  shutil.rmtree(food101_dir / 'images' / 'cheesecake')
  for a, b in zip(subset, open_splits(classes=kept), strict=True):
    assert _names(a) == _names(b)


@pytest.mark.parametrize('nothing', ['', 'none', 'None'])
def test_no_validation_split(open_splits, open_source, nothing):
  opened = open_splits(train='train', validation=nothing)
  assert opened.validation is None
  assert len(opened.train) == 19
  assert open_source(nothing) is None


def test_spots(tmp_path):
  options = spots.Options(24, 20, 6, 5)
  opened = sources.open_splits('spots', options, Common(tmp_path))
  assert [len(s) for s in opened] == [18, 2, 6]
  for split in opened:
    assert split.class_names == spots.CLASS_NAMES
    for i in range(len(split)):
      example = split[i]
      name, index = example['name'].split('/')
      image, mask, label = spots.draw(options, name, int(index))
      assert example['label'] == label
      assert example['image'] == decode.to_png(image)
      assert example['object_mask'] == decode.to_png(mask)
  options = spots.Options(24, 20, 6, 6)
  other = sources.open_splits('spots', options, Common(tmp_path))
  assert other.test[0]['image'] != opened.test[0]['image']


def test_zero_byte_files_with_skip_corrupt(open_source, food101_dir):
  (food101_dir / 'images/apple_pie/1002.jpg').write_bytes(b'')
  with pytest.raises(ValueError, match='zero-byte files: apple_pie/1002.jpg'):
    open_source('train')
  split = open_source('train', skip_corrupt=True)
  empty = [e['name'] for e in split if not e['image']]
  assert (len(split), empty) == (19, ['apple_pie/1002'])
  # Accepting it once does not hide it later.
  with pytest.raises(ValueError, match='zero-byte'):
    open_source('train')


def test_behaves_as_a_sequence(open_source):
  split = open_source('train[:7]')
  assert split[-1] == split[6]
  assert split[np.int64(2)] == split[2]
  for index in (7, -8):
    with pytest.raises(IndexError):
      split[index]
  copy = pickle.loads(pickle.dumps(split))
  assert [copy[i] for i in range(7)] == [split[i] for i in range(7)]
  assert repr(copy) == repr(split)
  assert repr(split) == (
    'ImageSource(food101:train[0:7], 7 examples, 3 classes)'
  )


def test_grain_reads_it(open_source):
  split = open_source('train')
  shuffled = grain.MapDataset.source(split).shuffle(seed=0)
  assert sorted(e['name'] for e in shuffled) == sorted(_names(split))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'classes': ('cheese_cake', 'pizza')},
      "unknown class 'cheese_cake', 'pizza'; .* has cheesecake, cheese_plate, "
      'apple_pie',
    ),
    (
      {'classes': ('apple_pie', 'cheesecake', 'apple_pie')},
      'classes names apple_pie more than once',
    ),
    ({'classes': ('', '')}, "classes has an empty name; got ','"),
    ({'classes': ('apple_pie',)}, "food101 has one class, 'apple_pie'; a clas"),
    ({'train': 'train[:0]'}, r'train_split: split .* is empty; .*train: 19'),
    (
      {'train': 'train[:3%]', 'validation': 'train[2%:]'},
      re.escape('train_split=train[:3%] and validation_split=train[2%:] ')
      + 'overlap in 1 examples',
    ),
    (
      {'validation': 'test'},
      'validation_split=test and test_split=validation overlap in 11',
    ),
  ],
)
def test_errors(open_splits, change, message):
  with pytest.raises(ValueError, match=message):
    open_splits(**change)


def test_every_source_is_found_by_its_name():
  flags = []
  for name in sources.DATASETS:
    found = sources.load_source(name)
    assert found.name == name
    fields = found.options.__dataclass_fields__.values()
    assert all(f.name.startswith(name.removesuffix('_folder')) for f in fields)
    flags += [f.name for f in fields if f.metadata['help']]
  assert sorted(flags) == [
    'cifar10_dir',
    'food101_dir',
    'image_folder_dir',
    'imagenet2012_dir',
    'spots_seed',
    'spots_size',
    'spots_test',
    'spots_train',
  ]


_OWN = """
import dataclasses
from dynconv_jax.data import decode, source
import numpy as np

@dataclasses.dataclass(frozen=True)
class Options:
  shades_number: int = source.option(10, 'Images a class.')

def open_shades(options, common):
  examples = [
    {
      'image': decode.to_png(np.full((4, 4, 3), i, np.uint8)),
      'label': i % 2,
      'name': f'shade{i}',
    }
    for i in range(2 * options.shades_number)
  ]
  return source.Dataset(('even', 'odd'), {'train': examples})

SHADES = source.DataSource('shades', Options, open_shades)
"""


def test_a_source_from_outside(tmp_path, monkeypatch):
  (tmp_path / 'its_data.py').write_text(_OWN)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'its_data', raising=False)
  found = sources.load_source('its_data:SHADES')
  given = type('Config', (), {'shades_number': 20})
  assert found.read_options(given) == found.options(20)
  assert found.read_options(object()) == found.options(10)
  opened = sources.open_splits(found, None, Common(tmp_path, ('odd', 'even')))
  assert [s and len(s) for s in opened] == [18, 2, None]
  assert opened.train[3]['name'] == 'shade3'
  assert (decode.decode_image(opened.train[3]['image']) == 3).all()
  assert opened.train.labels.tolist() == 9 * [1, 0]


def test_unknown_source():
  with pytest.raises(ValueError) as raised:
    sources.load_source('food1O1')
  assert str(raised.value) == (
    "unknown dataset 'food1O1'; allowed: spots, food101, cifar10, "
    'imagenet2012, image_folder, or your own as package.module:NAME'
  )
  with pytest.raises(ValueError, match='dataset=dynconv_jax.data.spots:draw '):
    sources.load_source('dynconv_jax.data.spots:draw')


def _example(**change):
  return {'image': b'x', 'label': 0, 'name': 'a'} | change


@pytest.mark.parametrize(
  ('examples', 'message'),
  [
    ([{'image': b'x', 'label': 0}], 'must have image .*; name missing'),
    ([_example(image='x')], 'must have .*; got image of type str'),
    ([_example(label=2)], 'labels must be 0 to 1; got 2 to 2'),
    ([_example(label='cat')], r'labels must be 1 integers; got <U3\[1\]'),
  ],
)
def test_examples_that_break_the_interface(tmp_path, examples, message):
  own = DataSource(
    'own', object, lambda *_: Dataset(('a', 'b'), {'train': examples})
  )
  with pytest.raises(ValueError, match=f"^split 'train' of own: .*{message}"):
    sources.open_source(own, 'train', None, Common(tmp_path))


@pytest.mark.skipif(not _REAL.is_dir(), reason=f'no images in {_REAL}')
def test_real_images(tmp_path):
  opened = sources.open_splits(
    'food101', food101.Options(str(_REAL)), Common(tmp_path)
  )
  assert [len(s) for s in opened] == [4050, 450, 1500]
  # Each class appears in each split, in proportion within five standard
  # deviations.
  counts = np.bincount(opened.validation.labels)
  assert np.all(np.abs(counts - 75) < 5 * np.sqrt(75))
  train, test = set(_names(opened.train)), set(_names(opened.test))
  assert len(train) == 4050 and not train & test
