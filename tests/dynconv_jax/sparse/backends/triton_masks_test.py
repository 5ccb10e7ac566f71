"""Tests of position lists and mask units, in Triton's interpreter."""

import dataclasses
import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from triton_cases import (
  BLOCKS,
  DTYPES,
  assert_near,
  check_list,
  make_block,
  make_input,
  make_mask_unit,
  make_masks,
  mask_of,
)

from dynconv_jax.masks import dilate
from dynconv_jax.methods.mask_unit import MaskUnit, Squeeze
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.sparse.backends import triton, triton_masks


def test_positions_of_many_tiles(interpreted):
  mask = np.random.default_rng(0).random((3, 29, 31)) < 0.3
  assert mask.size > 2 * triton_masks._LIST_BLOCK
  check_list(triton_masks.list_positions(jnp.asarray(mask, jnp.float32)), mask)


@pytest.mark.parametrize('shape', ((1, 1, 1), (3, 1, 6), (2, 17, 23)))
@pytest.mark.parametrize('strides', (1, 2))
def test_dilated_positions(interpreted, shape, strides):
  n, h, w = shape
  for mask in make_masks((n, -(-h // strides), -(-w // strides))).values():
    mask = jnp.asarray(mask)
    zero = jnp.zeros(1, jnp.int32)
    active = triton_masks.list_positions(mask)
    found = triton_masks.list_dilated(active, zero, shape, strides)
    check_list(found, dilate(mask, strides)[:, :h, :w])


@pytest.mark.parametrize(
  'size,kernel_size,strides,granularity,dtype',
  (
    *(
      ((5, 8), *unit, jnp.float32)
      for unit in itertools.product((1, 3), (1, 2), (1, 3))
    ),
    # Each pair of values occurs with each size and data type.
    ((1, 1), 1, 1, 3, jnp.bfloat16),
    ((1, 1), 3, 2, 3, jnp.bfloat16),
    ((1, 1), 3, 1, 1, jnp.float32),
    ((1, 1), 1, 2, 1, jnp.float32),
    ((5, 8), 3, 1, 3, jnp.bfloat16),
    ((5, 8), 3, 2, 1, jnp.bfloat16),
    ((34, 31), 1, 1, 3, jnp.float32),
    ((34, 31), 3, 2, 3, jnp.float32),
    ((34, 31), 3, 1, 1, jnp.bfloat16),
    ((34, 31), 1, 2, 1, jnp.bfloat16),
  ),
)
def test_mask_units(
  interpreted, size, kernel_size, strides, granularity, dtype
):
  """Checks logits and their nonnegative positions, or a given mask instead.

  Three units read a map; some of its positions change in between.
  """
  units = [
    make_mask_unit(20, kernel_size, s, g, seed)
    for seed, (s, g) in enumerate(((1, 1), (1, 16), (strides, granularity)))
  ]
  rng = np.random.default_rng(0)
  shape, squeezed = (3, *size), None
  x = jnp.asarray(rng.normal(size=(*shape, 20)), dtype)
  for index, unit in enumerate(units):
    expected = mask_logits(unit, x)
    columns = triton_masks.ColumnSqueeze(units, index)
    squeezed = columns.squeeze(x, squeezed)
    assert [zero.tolist() for zero in squeezed.zeros] == [[0], [0]]
    # A bottleneck's 3x3 has the unit's stride.
    read = squeezed, x.shape, expected.shape
    dilated = shape, unit.strides
    logits, found, needed = columns.list_positions(*read, None, *dilated)
    assert_near(logits, expected)
    check_list(found, logits >= 0)
    mask = (logits >= 0).astype(jnp.float32)
    check_list(needed, dilate(mask, unit.strides)[:, : size[0], : size[1]])
    given = jnp.asarray(rng.random(logits.shape) < 0.4, jnp.float32)
    again, found, needed = columns.list_positions(*read, given, *dilated)
    np.testing.assert_array_equal(again, logits)
    check_list(found, given)
    check_list(needed, dilate(given, unit.strides)[:, : size[0], : size[1]])
    changed = jnp.asarray(rng.random(shape) < 0.4)
    new = jnp.asarray(rng.normal(size=x.shape), dtype)
    x = jnp.where(changed[..., None], new, x)
    found = triton_masks.list_positions(changed.astype(jnp.float32))
    squeezed = triton_masks.Squeezed(squeezed.terms, found)


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_unit_that_is_told_nothing_multiplies_the_whole_map(
  interpreted, dtype
):
  units = [make_mask_unit(20, 3, 1, 1, seed) for seed in range(3)]
  x = np.random.default_rng(0).normal(size=(2, 5, 8, 20))
  x = jnp.asarray(x, dtype)
  columns = triton_masks.ColumnSqueeze(units, 1)
  squeezed = columns.squeeze(x, None)
  logits, _, _ = columns.list_positions(
    squeezed, x.shape, x.shape[:3], None, x.shape[:3], 1
  )
  assert_near(logits, mask_logits(units[1], x))


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_narrow_bottleneck_multiplies_what_it_writes(interpreted, dtype):
  """Checks products for the unit that reads its output, at active positions."""
  block = make_block(*BLOCKS['bottleneck'], 1, dtype=dtype)
  assert triton.fuses(block.branch, dtype)
  features = block.branch.features
  units = [make_mask_unit(features, 3, 1, 1, seed) for seed in range(3)]
  x = make_input((2, 5, 8, features), dtype)
  mask = mask_of(block, x, np.random.default_rng(0).random((2, 5, 8)) < 0.4)
  before = triton_masks.ColumnSqueeze(units, 0).squeeze(x, None)
  following = triton_masks.ColumnSqueeze(units, 1)
  lists = triton_masks.Lists(*map(triton_masks.list_positions, mask.maps))
  packed = triton.PackedBlock.pack(block)
  out, found = triton.run_block(packed, x, lists, before, following)
  assert found.changed is None
  assert [zero.tolist() for zero in found.zeros] == [[0], [0]]
  active = np.flatnonzero(mask.hard)
  rest = np.flatnonzero(np.asarray(mask.hard) == 0)
  first, terms = following.first, np.asarray(found.terms)
  whole = np.asarray(following.squeeze(out, None).terms)
  # The kernel multiplies values that are rounded to the dtype of the map.
  assert_near(terms[first:, active], whole[first:, active])
  old = np.asarray(before.terms)
  np.testing.assert_array_equal(terms[:, rest], old[:, rest])
  np.testing.assert_array_equal(terms[:first], old[:first])
  assert np.abs(terms[first:, active] - old[first:, active]).max() > 0.1


def mask_logits(unit, x):
  """Returns a mask unit's logits per position, averaging patches one by one."""
  n, height, width, _ = x.shape
  if unit.granularity == 1:
    return unit.maskconv(x)
  side = unit.granularity * unit.strides
  means = [
    [
      np.mean(
        np.asarray(x, np.float32)[:, top : top + side, left : left + side],
        (1, 2),
      )
      for left in range(0, width, side)
    ]
    for top in range(0, height, side)
  ]
  with mock.patch.object(unit.maskconv, 'pool', 1):
    logits = unit.maskconv(jnp.asarray(means).transpose(2, 0, 1, 3))
  for axis, length in ((1, height), (2, width)):
    logits = jnp.repeat(logits, unit.granularity, axis)
    logits = logits.take(jnp.arange(-(-length // unit.strides)), axis)
  return logits


class OwnUnit(MaskUnit):
  """A unit with a different decision rule."""

  def __call__(self, x, carry=None, **kwargs):
    decision, carry = super().__call__(x, carry, **kwargs)
    return decision._replace(hard=1 - decision.hard), carry


def make_chain(*gates, strides=()):
  """Returns basic blocks named by their position."""
  return [
    BasicBlock(
      4,
      4,
      strides=2 if index in strides else 1,
      name=str(index),
      gate=gate,
      input_activated=True,
      rngs=nnx.Rngs(0),
    )
    for index, gate in enumerate(gates)
  ]


def shared(*chains):
  """Returns the previous block and the first column of each mask unit."""
  triton_masks.share_squeezes(chains)
  gates = [block.masker for chain in chains for block in chain]
  return [
    (gate.maskconv.before, gate.maskconv.first)
    if triton_masks.decides(gate)
    else None
    for gate in gates
  ]


def unit():
  return make_mask_unit(4, 3, 1, 1)


def test_units_of_one_map_share_products():
  chain = make_chain(*(unit() for _ in range(8)))
  found = [(None, 0), *((str(i), 10 * (i + 1)) for i in range(5))]
  assert shared(chain) == [*found, (None, 0), ('6', 10)]
  # Each computes its own columns and those after it.
  columns = [block.masker.maskconv.columns for block in chain]
  assert columns == [60, 50, 40, 30, 20, 10, 20, 10]


def test_units_of_other_maps_do_not():
  chain = make_chain(*(unit() for _ in range(4)), strides=(1,))
  # The second block's input is the first one's; its output is another map.
  assert shared(chain) == [(None, 0), ('0', 10), (None, 0), ('2', 10)]
  one, two = make_chain(unit()), make_chain(unit())
  assert shared(one, two) == [(None, 0)] * 2


def test_gates_of_others_are_left_alone():
  own, exchanged = OwnUnit(4, strides=1, rngs=nnx.Rngs(0)), unit()
  exchanged.maskconv = nnx.Sequential(exchanged.maskconv)
  chain = make_chain(unit(), own, exchanged, None, unit(), unit())
  assert shared(chain) == [(None, 0), *[None] * 3, (None, 0), ('4', 10)]


def test_units_of_convolutions_other_than_3x3_are_left_alone():
  """The kernel that dilates masks knows 3x3 convolutions only."""
  chain = make_chain(unit(), unit(), unit())
  convs = chain[1].branch.convs
  wide = dataclasses.replace(convs[1], kernel_size=5)
  chain[1].branch = dataclasses.replace(chain[1].branch, convs=(convs[0], wide))
  assert shared(chain) == [(None, 0), None, (None, 0)]


def test_a_gate_that_decides_several_times_is_left_alone():
  both = unit()
  chain = make_chain(unit(), both, unit(), both)
  assert shared(chain) == [(None, 0), None, (None, 0), None]
  assert type(both.maskconv) is Squeeze
  (block,) = make_chain(unit())
  assert shared([block, block]) == [None, None]
