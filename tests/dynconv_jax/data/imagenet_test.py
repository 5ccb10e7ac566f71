"""Tests of ImageNet's class names."""

from dynconv_jax.data.imagenet import class_names


def test_names():
  names = class_names()
  assert len(names) == len(set(names)) == 1000
  # Widely known indices.
  known = {
    0: 'tench',
    207: 'golden retriever',
    281: 'tabby',
    409: 'analog clock',
  }
  known |= {933: 'cheeseburger', 963: 'pizza', 999: 'toilet tissue'}
  assert {number: names[number] for number in known} == known
  assert all(name == name.strip() and name for name in names)
