"""Tests of formulas against loops that do the work, position by position."""

import itertools
import pathlib
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dynconv_jax.macs import formulas


@st.composite
def convolutions(draw, dilated_input: bool):
  """Draws the arguments of a convolution whose output is not empty."""
  rank = draw(st.integers(1, 2))

  def sizes(low, high):
    return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

  groups = draw(st.sampled_from([1, 2, 3]))
  batch_groups = draw(st.sampled_from([1, 2])) if groups == 1 else 1
  arguments = {
    'batch': batch_groups * draw(st.integers(1, 2)),
    'in_features': groups * draw(st.integers(1, 2)),
    'out_features': groups * batch_groups * draw(st.integers(1, 2)),
    'input_size': sizes(1, 7),
    'kernel_size': sizes(1, 4),
    'strides': sizes(1, 3),
    'padding': list(zip(sizes(-1, 3), sizes(-1, 3), strict=True)),
    'input_dilation': sizes(1, 3) if dilated_input else [1] * rank,
    'kernel_dilation': sizes(1, 3),
    'feature_groups': groups,
    'batch_groups': batch_groups,
  }
  hypothesis.assume(min(output_size(arguments)) >= 1)
  return arguments


def output_size(arguments) -> list[int]:
  return [
    (d * (n - 1) + 1 + sum(p) - e * (k - 1) - 1) // s + 1
    for n, k, s, p, d, e in zip(
      arguments['input_size'],
      arguments['kernel_size'],
      arguments['strides'],
      arguments['padding'],
      arguments['input_dilation'],
      arguments['kernel_dilation'],
      strict=True,
    )
  ]


def macs_by_loop(arguments, padding_value: int) -> int:
  """Slides a window of ones over the padded input and sums what it reads.

  Input elements are 1, zeros in between 0, and padding as given. Each sum is
  the number of products that count as work, for one pair of features.
  """
  a = arguments
  spread = np.zeros(
    [
      d * (n - 1) + 1
      for n, d in zip(a['input_size'], a['input_dilation'], strict=True)
    ]
  )
  spread[tuple(slice(None, None, d) for d in a['input_dilation'])] = 1
  padded = np.pad(
    spread,
    [[max(p, 0) for p in pair] for pair in a['padding']],
    constant_values=padding_value,
  )
  crops = [[max(-p, 0) for p in pair] for pair in a['padding']]
  padded = padded[
    tuple(
      slice(low, n - high)
      for n, (low, high) in zip(padded.shape, crops, strict=True)
    )
  ]
  pairs = 0
  for position in itertools.product(*map(range, output_size(a))):
    for tap in itertools.product(*map(range, a['kernel_size'])):
      index = tuple(
        o * s + t * e
        for o, s, t, e in zip(
          position, a['strides'], tap, a['kernel_dilation'], strict=True
        )
      )
      pairs += int(padded[index])
  features = a['in_features'] // a['feature_groups'] * a['out_features']
  return pairs * features * (a['batch'] // a['batch_groups'])


@hypothesis.settings(derandomize=True, deadline=None, max_examples=80)
@hypothesis.given(convolutions(dilated_input=False))
def test_macs_are_those_of_a_loop_over_output_positions(arguments):
  work = formulas.convolution(**arguments)
  assert work.macs == macs_by_loop(arguments, padding_value=1)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=80)
@hypothesis.given(convolutions(dilated_input=True))
def test_inside_macs_leave_out_what_reads_no_input(arguments):
  work = formulas.convolution(**arguments)
  assert work.inside_macs == macs_by_loop(arguments, padding_value=0)


@pytest.mark.parametrize(
  'padding,output_padding', [((0, 0), 0), ((0, 1), 0), ((1, 1), 1)]
)
def test_transposed_convolution_scatters_each_input(padding, output_padding):
  """Each of 4 inputs adds 3 taps to the output; some fall off its ends."""
  work = formulas.transposed_convolution(
    batch=2,
    in_features=4,
    out_features=6,
    input_size=(4,),
    kernel_size=(3,),
    strides=(2,),
    padding=[padding],
    output_padding=[output_padding],
    feature_groups=2,
    bias=True,
  )
  assert work.macs == 2 * 4 * 3 * (4 // 2) * 6
  first, last = padding[0], 2 * 3 + 3 - padding[1] + output_padding
  kept = sum(first <= 2 * i + tap < last for i in range(4) for tap in range(3))
  assert work.inside_macs == 2 * kept * (4 // 2) * 6
  assert work.positions == 2 * (last - first)
  assert work.bias == work.positions * 6


def test_gradients_of_a_transposed_convolution_cost_what_it_costs():
  """JAX writes the kernel's gradient with the outputs as the taps."""
  forward = formulas.transposed_convolution(
    batch=1,
    in_features=1,
    out_features=1,
    input_size=(5,),
    kernel_size=(3,),
    strides=(2,),
    padding=[(0, 0)],
    output_padding=[0],
  )
  kernel_gradient = formulas.convolution(
    batch=1,
    in_features=1,
    out_features=1,
    input_size=(5,),
    kernel_size=(11,),
    padding=[(2, 2)],
    input_dilation=(2,),
  )
  assert kernel_gradient.positions == 3
  assert forward.macs == kernel_gradient.macs == 15


def test_matmul_and_attention_by_hand():
  assert formulas.matmul(2, 3, 5, batch=7).macs == 7 * 2 * 3 * 5
  assert formulas.matmul(2, 3, 5, bias=True).bias == 10
  attention = formulas.attention(2, 3, 4, 5, 6)
  assert attention.kind == 'matmul'
  assert attention.macs == 2 * 3 * 4 * 5 + 2 * 3 * 4 * 6
  # Scale, then maximum, difference, exponential, sum and quotient.
  assert attention.operations == 24 + (24 - 6) + 24 + 24 + (24 - 6) + 24


@pytest.mark.parametrize('affine', [True, False])
def test_norm_does_the_operations_of_its_definition(affine):
  """Three or two steps per element; statistics as mean and mean of squares."""
  elements, groups = 12, 4
  scale_and_shift = elements + groups if affine else 0
  # Difference and product per element; epsilon and root per group.
  given = 2 * elements + 2 * groups + scale_and_shift
  statistics = elements + 2 * (elements - groups) + 2 * groups + 2 * groups
  work = formulas.norm(elements, groups, affine=affine)
  assert work.operations == given
  work = formulas.norm(
    elements, groups, affine=affine, statistics_groups=groups
  )
  assert work.operations == given + statistics


def test_other_work_by_hand():
  assert formulas.pool(64, 16, 4).operations == 48
  assert formulas.pool(64, 16, 4, mean=True).operations == 64
  assert formulas.reduction(12, 3).operations == 9
  assert formulas.sort(16, 8).operations == 48
  assert formulas.fft(16, [8]).operations == 5 * 16 * 3
  assert formulas.softmax(12, 3).operations == 54
  assert formulas.activation(12, 4).operations == 48


def test_work_adds_and_multiplies():
  conv = formulas.Work('conv', 10, 8, 2, 1, 3, 4)
  other = formulas.Work('norm', operations=5, ptflops=6)
  assert other + conv == formulas.Work('conv', 10, 8, 2, 6, 9, 4)
  assert conv * 3 == formulas.Work('conv', 30, 24, 6, 3, 9, 12)
  with pytest.raises(ValueError, match="kind must be one of .* got 'convo'"):
    formulas.Work('convo')


def test_imports_nothing_but_the_standard_library():
  program = (
    'import runpy, sys\n'
    'before = set(sys.modules)\n'
    f'runpy.run_path({str(pathlib.Path(formulas.__file__))!r})\n'
    "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
    'print(sorted(new - sys.stdlib_module_names))\n'
  )
  run = subprocess.run(
    [sys.executable, '-I', '-c', program],
    check=True,
    capture_output=True,
    text=True,
  )
  assert run.stdout.strip() == '[]'
