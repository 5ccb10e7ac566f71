"""Tests of the program that makes the tables of docs/macs_comparison.md."""

import functools
import os
import time

import pytest

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
pytest.importorskip('onnx', reason='onnx is not installed')
pytest.importorskip('onnxscript', reason='onnxscript is not installed')

from torch import nn  # noqa: E402

from benchmarks import counters  # noqa: E402
from dynconv_jax.macs.onnx import count_macs  # noqa: E402


def cells(name, behavior):
  if behavior == 'raises':
    raise ValueError(name)
  if behavior == 'dies':
    os._exit(1)
  if behavior == 'hangs':
    time.sleep(60)
  return [name, behavior]


@pytest.mark.parametrize(
  'behavior, limit_s, found',
  [
    ('counts', 60, ['net', 'counts']),
    ('raises', 60, ['fails']),
    ('dies', 60, ['dies']),
    ('hangs', 0.5, ['time limit']),
  ],
)
def test_a_cell_that_goes_wrong_says_how(behavior, limit_s, found):
  part = functools.partial(cells, behavior=behavior)
  assert counters.in_a_process(part, 'net', limit_s) == found


def test_a_table_goes_on_where_it_was_cut_off(tmp_path):
  path = tmp_path / 'page.md'
  path.write_text('Before.\n')
  order = ['a', 'b', 'c']
  first = counters.Table(['x', 'y'], order, path)
  first.add('c', ['3', '='])
  first.add('a', ['1', '='])
  path.write_text(f'{path.read_text()}\nAfter.\n')
  # A table with different columns is a different table.
  assert not counters.Table(['x'], order, path).rows()
  second = counters.Table(['x', 'y'], order, path)
  assert set(second.rows()) == {'a', 'c'}
  second.add('b', ['2', ''])
  assert path.read_text() == (
    'Before.\n| model | x | y |\n|---|---:|---:|\n'
    '| a | 1 | = |\n| b | 2 |  |\n| c | 3 | = |\n\nAfter.\n'
  )


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('weight_bytes', [2**16, 2**20])
def test_exports_are_counted_without_large_weights(tmp_path, weight_bytes):
  features = weight_bytes // 4 // 256
  module = nn.Sequential(nn.Linear(256, features), nn.ReLU()).eval()
  path = tmp_path / 'net.onnx'
  counters.export(module, torch.zeros(3, 256), os.fspath(path), False)
  assert os.listdir(tmp_path) == ['net.onnx']
  assert (path.stat().st_size > weight_bytes) == (weight_bytes < 2**19)
  assert count_macs(path).total == 3 * 256 * features
