"""Tests of the program that prints the lower bound for GPU time."""

import json

import pytest

from benchmarks.roofline import count_kernels


@pytest.mark.slow
def test_floors_are_sums_over_kernels_at_the_given_rates(program):
  printed = program(
    'benchmarks.gpu_floor',
    '--batch_size=2',
    '--image_size=96',
    '--density=0.3,1',
    '--bandwidth=2',
    '--rate=100',
  )
  rows = json.loads(printed.splitlines()[-1])
  assert [row['density'] for row in rows] == [None, 0.3, 1.0]
  for row in rows:
    kernels = count_kernels(2, 96, row['density'])
    assert row['gmacs'] * 1e9 == pytest.approx(sum(k.macs for k in kernels))
    assert row['floor_ms'] / 1e3 == pytest.approx(
      sum(
        max(2 * kernel.moved / 2e12, 2 * kernel.macs / 100e12)
        for kernel in kernels
      )
    )


def test_a_density_outside_its_range_is_refused(program):
  with pytest.raises(ValueError, match=r'in \(0, 1\]'):
    program('benchmarks.gpu_floor', '--density=0,1')
