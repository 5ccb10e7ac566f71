"""Tests of branch descriptions against position-by-position evaluation."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.masks import execution_mask
from dynconv_jax.models.blocks import BasicBlock, Bottleneck


def conv(k=1, s=1, padding='symmetric', groups=1, name='c'):
  return Conv(name, 'n', 2, 2, k, s, groups, padding=padding)


BRANCHES = {
  'basic': (conv(3), conv(3)),
  'basic_strided': (conv(3, 2), conv(3)),
  'bottleneck': (conv(), conv(3, 2), conv()),
  'inverted': (conv(), conv(5, 2, 'same', 2), conv()),
  'late_stride': (conv(), conv(), conv(3), conv(1, 2)),
  'three': (conv(3), conv(5), conv(3, 2), conv()),
  'pointwise': (conv(), conv()),
}


def reads(c, size):
  """bool[h, w, H, W]: which input positions each output position reads."""
  table = np.zeros((*map(c.output_size, size), *size), bool)
  (top, _), (left, _) = map(c.pads, size)
  for i, j in np.ndindex(*table.shape[:2]):
    for a, b in np.ndindex(c.kernel_size, c.kernel_size):
      y, x = i * c.strides - top + a, j * c.strides - left + b
      if 0 <= y < size[0] and 0 <= x < size[1]:
        table[i, j, y, x] = True
  return table


@pytest.mark.parametrize('size', [(9, 7), (8, 6), (1, 3)])
@pytest.mark.parametrize('name', BRANCHES)
def test_each_convolution_runs_where_a_later_one_reads_it(name, size):
  """Walks backwards by brute force over single positions."""
  branch = Branch(BRANCHES[name], shortcut='none')
  sizes = [size, *branch.sizes(size)]
  rng = np.random.default_rng(0)
  hard = rng.random((2, *sizes[-1])) < 0.2
  mask = execution_mask(branch, jnp.asarray(hard, jnp.float32), size, name='b')
  needed = hard
  for i in reversed(range(len(branch.convs))):
    got = mask.maps[branch.levels[i]]
    np.testing.assert_array_equal(got, needed, err_msg=branch.convs[i].name)
    table = reads(branch.convs[i], sizes[i])
    needed = np.einsum('nhw,hwyx->nyx', needed, table) > 0
  np.testing.assert_array_equal(mask.hard, mask.maps[0])
  np.testing.assert_array_equal(mask.dilated, mask.maps[branch.levels[0]])
  counts = [np.asarray(m).sum((1, 2)) for m in mask.maps]
  expected = sum(
    c.kernel_size**2 * 2 * 2 / c.groups * counts[level]
    for c, level in zip(branch.convs, branch.levels, strict=True)
  )
  np.testing.assert_array_equal(mask.executed_macs(), expected)
  assert mask.dense_macs() == branch.executed_macs(
    tuple(h * w for h, w in branch.level_sizes(size))
  )


@pytest.mark.parametrize('size', range(1, 12))
@pytest.mark.parametrize('k,s', [(1, 1), (1, 2), (3, 1), (3, 2), (5, 3)])
def test_padding_gives_the_size(k, s, size):
  for padding in ('symmetric', 'same'):
    c = conv(k, s, padding)
    low, high = c.pads(size)
    out = (size + low + high - k) // s + 1
    assert out == c.output_size(size)
    if padding == 'same':  # TensorFlow's padding: the odd pixel comes last.
      assert 0 <= high - low <= 1
      assert low + high == max((out - 1) * s + k - size, 0)


def test_the_blocks_of_resnets():
  for kind, levels in ((BasicBlock, (1, 0)), (Bottleneck, (1, 0, 0))):
    branch = Branch(kind.describe(8, 4, 2), shortcut='projection')
    assert branch.levels == levels
    assert branch.strides == 2
    assert branch.features == 4 * kind.expansion
    assert branch.projection.macs_per_position == 8 * branch.features
  assert Branch(BRANCHES['three'], shortcut='none').levels == (2, 1, 0, 0)


def test_what_stays_is_what_an_activation_leaves():
  branch = Branch((conv(3),))
  assert not branch.stays
  assert dataclasses.replace(branch, input_activated=True).stays
  assert dataclasses.replace(branch, activation=None).stays
  silu = dataclasses.replace(branch, activation='silu', input_activated=True)
  assert not silu.stays  # silu(silu(x)) is not silu(x).


@pytest.mark.parametrize(
  'change,message',
  [
    ({'kernel_size': 2}, 'kernel_size of c must be odd; got 2'),
    ({'strides': 0}, 'strides of c must be at least 1; got 0'),
    ({'groups': 3}, 'groups of c must divide its 2 and 2 channels; got 3'),
    ({'activation': 'swish'}, 'activation of c must be None or one of relu'),
    ({'padding': 'valid'}, 'padding of c must be one of symmetric, same'),
  ],
)
def test_a_convolution_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dataclasses.replace(conv(), **change)


@pytest.mark.parametrize(
  'arguments,message',
  [
    ({'convs': ()}, 'at least one convolution'),
    ({'activation': 'swish'}, 'activation must be None or one of relu'),
    ({'shortcut': 'sum'}, 'shortcut must be one of identity, projection, none'),
    ({'convs': (conv(3, 2),)}, 'identity shortcut needs strides of 1'),
    (
      {'convs': (conv(), dataclasses.replace(conv(), in_features=4))},
      'c reads 4 channels, but c writes 2',
    ),
  ],
)
def test_a_branch_that_cannot_be(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    Branch(**{'convs': (conv(),)} | arguments)
