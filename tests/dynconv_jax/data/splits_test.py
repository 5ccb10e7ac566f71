import re

import pytest
from absl.testing import parameterized

from dynconv_jax.data import splits

_SIZES = {'train': 10, 'validation': 4}
_ALIASES = {'test': 'validation'}


class ResolveSplitTest(parameterized.TestCase):
  @parameterized.parameters(
    ('train', [('train', 0, 10)]),
    ('train[:90%]', [('train', 0, 9)]),
    ('train[90%:]', [('train', 9, 10)]),
    ('train[-3:]', [('train', 7, 10)]),
    ('train[2:5]', [('train', 2, 5)]),
    ('train[:25%]', [('train', 0, 2)]),
    ('validation', [('validation', 0, 4)]),
    ('test[50%:]', [('validation', 2, 4)]),
    ('train[:2]+train[5:]', [('train', 0, 2), ('train', 5, 10)]),
    ('train[5:]+test', [('train', 5, 10), ('validation', 0, 4)]),
    ('train[3:3]+test', [('validation', 0, 4)]),
    ('all', [('train', 0, 10), ('validation', 0, 4)]),
  )
  def test_slices(self, expression, expected):
    found = splits.resolve_split(expression, _SIZES, _ALIASES)
    self.assertSequenceEqual(found, expected)

  @parameterized.parameters(*range(1, 30))
  def test_percents_share_and_omit_nothing(self, size):
    for percent in (1, 10, 33, 50, 90):
      ends = []
      for expression in (f'train[:{percent}%]', f'train[{percent}%:]'):
        try:
          ends.append(splits.resolve_split(expression, {'train': size}))
        except ValueError:
          ends.append(())
      covered = sorted(
        i for part in ends for _, a, b in part for i in range(a, b)
      )
      self.assertEqual(covered, list(range(size)))

  @parameterized.parameters(
    ('trian', "split 'trian': Unknown split 'trian'"),
    ('train[5:5]', "split 'train[5:5]' is empty; the dataset has train: 10"),
    ('train[7:3]', "split 'train[7:3]' is empty"),
    ('train[:99]', "split 'train[:99]': Requested slice"),
    ('train[:', "split 'train[:': Error parsing split"),
    ('train[0shard]', 'slices by shard are not supported'),
    ('all[:50%]', "split 'all[:50%]'"),
    ('train[:6]+train[4:]', "names 2 examples of 'train' twice"),
    ('validation+test', "names 4 examples of 'validation' twice"),
    ('tests', 'validation (also called test): 4 examples'),
  )
  def test_errors(self, expression, message):
    with pytest.raises(ValueError, match=re.escape(message)):
      splits.resolve_split(expression, _SIZES, _ALIASES)


class CheckSplitsTest(parameterized.TestCase):
  def test_none(self):
    found = splits.check_splits(
      {'train': 'train', 'validation': '', 'test': 'None'}, _SIZES
    )
    self.assertEqual(
      found,
      {'train': (('train', 0, 10),), 'validation': None, 'test': None},
    )

  @parameterized.parameters(
    ('train', 'train[90%:]', 'test', 'train', 'validation', 1),
    ('train[:90%]', 'train[50%:]', 'test', 'train', 'validation', 4),
    ('train[:90%]', 'validation[:3]', 'test', 'validation', 'test', 3),
    ('train+test[:1]', 'none', 'test', 'train', 'test', 1),
  )
  def test_overlap(self, train, validation, test, first, second, number):
    expressions = {'train': train, 'validation': validation, 'test': test}
    message = (
      f'{first}_split={expressions[first]} and '
      f'{second}_split={expressions[second]} overlap in {number} examples; '
      'the dataset has train: 10 examples'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
      splits.check_splits(expressions, _SIZES, _ALIASES)

  def test_names_the_flag(self):
    with pytest.raises(ValueError, match='validation_split: .* is empty'):
      splits.check_splits({'validation': 'train[99%:]'}, _SIZES)
