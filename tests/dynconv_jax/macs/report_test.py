"""Reports built by hand: sums, masks, tables and their errors."""

import csv
import io
import json
import re

import numpy as np
import pytest

from dynconv_jax.macs import conventions, formulas, report
from dynconv_jax.masks import ExecutionMask, MaskedLayer

# A batch of two, maps of 2x3; (name, MACs a position, biases a position).
_LAYERS = (
  ('conv1', 5, 0),
  ('layer1.0.conv1', 7, 0),
  ('layer1.0.conv2', 11, 1),
  ('layer1.0.masker', 13, 1),
)


def example(convention='conv', padding=True) -> report.Report:
  builder = report.ReportBuilder(convention, padding)
  for name, macs, biases in _LAYERS:
    work = formulas.Work(
      'conv', 12 * macs, 12 * macs - 12, 12 * biases, positions=12
    )
    builder.add(name, work, output_shape=(2, 2, 3, 1), parameters=macs)
  builder.add('layer1.0', formulas.elementwise(24), output_shape=(24,))
  builder.add('fc', formulas.matmul(2, 4, 3, bias=True), output_shape=(2, 3))
  return builder.build()


def mask(hard, dilated, layers=None) -> ExecutionMask:
  layers = layers or (
    MaskedLayer('layer1.0.conv1', 7, True),
    MaskedLayer('layer1.0.conv2', 12, False),
  )
  return ExecutionMask(
    (np.float32(hard), np.float32(dilated)), 'layer1.0', layers
  )


@pytest.mark.parametrize(
  'convention,padding,total',
  [
    ('conv', True, 12 * (5 + 7 + 12 + 14)),
    ('conv', False, 12 * (4 + 6 + 11 + 13)),
    ('conv+linear', True, 12 * (5 + 7 + 11 + 13) + 24),
    ('ptflops', True, 12 * (5 + 7 + 12 + 14) + 24 + 6),
    ('flops', True, 2 * 12 * (5 + 7 + 11 + 13) + 24 + 24 + 48 + 6),
  ],
)
def test_layers_sum_to_the_total(convention, padding, total):
  counted = example(convention, padding)
  assert counted.total == total
  assert sum(layer.macs for layer in counted.by_layer.values()) == total


def test_work_of_one_name_is_one_layer():
  builder = report.ReportBuilder('flops')
  builder.add('a', formulas.elementwise(3), output_shape=(3,))
  builder.add(
    'a',
    formulas.Work('conv', 5, 5, positions=2),
    output_shape=(2, 1),
    parameters=4,
  )
  builder.add('a', formulas.Work('conv', 5, 5, positions=2), output_shape=(9,))
  (layer,) = builder.build().by_layer.values()
  assert layer == report.LayerMacs('a', 'conv', (2, 1), 4, 23, 4)


@pytest.mark.parametrize('convention', ['conv', 'conv+linear', 'flops'])
@pytest.mark.parametrize('images', [1, 3])
def test_masks_of_ones_give_the_dense_count(convention, images):
  counted = example(convention)
  ones = np.ones((images, 2, 3))
  executed = counted.executed([mask(ones, ones)])
  assert executed.dtype == np.float64
  np.testing.assert_array_equal(executed, [counted.total / 2] * images)


def test_masked_layers_cost_their_active_positions():
  hard = [[[0, 1, 0], [1, 0, 0]], np.zeros((2, 3))]
  dilated = [[[1, 1, 1], [1, 1, 0]], np.zeros((2, 3))]
  always = 6 * (5 + 14)
  np.testing.assert_array_equal(
    example().executed([mask(hard, dilated)]),
    [always + 5 * 7 + 2 * 12, always],
  )
  np.testing.assert_array_equal(
    example('conv+linear').executed([mask(hard, dilated)]),
    [6 * (5 + 13) + 12 + 5 * 7 + 2 * 11, 6 * (5 + 13) + 12],
  )


@pytest.mark.parametrize(
  'masks,message',
  [
    ([], 'at least one mask'),
    (
      [mask(np.ones((1, 2, 3)), np.ones((1, 2, 3)), (MaskedLayer('x', 1, 0),))],
      r"layers that the report does not have: \['x'\]; it has \['conv1'",
    ),
    (
      [mask(np.ones((1, 2, 3)), np.ones((1, 2, 3)))] * 2,
      r"masked more than once: \['layer1.0.conv1', 'layer1.0.conv2'\]",
    ),
    (
      [mask(np.ones((1, 5, 1)), np.ones((1, 2, 3)))],
      r'layer1.0.conv2 has 12 output positions, not a multiple of the \(5, 1\)',
    ),
    (
      [mask(np.ones((1, 2, 3)), np.ones((1, 4, 3)))],
      r"different batch sizes: \{'layer1.0.conv1': 1, 'layer1.0.conv2': 2\}",
    ),
  ],
)
def test_masks_that_do_not_fit_are_refused(masks, message):
  with pytest.raises(ValueError, match=message):
    example().executed(masks)


def test_masks_need_the_positions_of_a_convolution():
  fc = mask(np.ones((1, 1, 1)), np.ones((1, 1, 1)), (MaskedLayer('fc', 1, 0),))
  with pytest.raises(ValueError, match='fc has 0 output positions'):
    example('flops').executed([fc])


def test_groups_sum_to_the_same_total():
  counted = example('flops')
  grouped = counted.grouped(1)
  assert list(grouped.by_layer) == ['conv1', 'layer1', 'fc']
  assert grouped.total == counted.total
  assert grouped.by_layer['layer1'].parameters == 7 + 11 + 13
  assert grouped.by_layer['layer1'].output_shape == (2, 2, 3, 1)
  assert list(counted.grouped(9).by_layer) == list(counted.by_layer)
  with pytest.raises(ValueError, match='depth must be at least 1; got 0'):
    counted.grouped(0)


def test_rows_are_sorted():
  counted = example()
  names = [row['name'] for row in counted.rows('macs')]
  assert names[0] == 'layer1.0.masker' and names[-1] == 'conv1'
  names = [row['name'] for row in counted.rows('name')]
  assert names == sorted(names)
  assert [row['parameters'] for row in counted.rows('parameters')][0] == 13
  with pytest.raises(ValueError, match="sort must be .*; got 'size'"):
    counted.rows('size')


def test_tables_say_what_the_report_says():
  counted = example()
  lines = counted.to_table().splitlines()
  assert lines[0].split() == [
    *('name', 'kind', 'output', 'shape', 'parameters', 'MACs', 'share')
  ]
  assert lines[2].split() == ['conv1', 'conv', '2x2x3x1', '5', '60', '13.2%']
  assert lines[-1].split() == ['total', '36', '456', '100.0%']
  assert 'FLOPs' in example('flops').to_table()

  rows = list(csv.DictReader(io.StringIO(counted.to_csv())))
  assert sum(int(row['macs']) for row in rows) == counted.total
  assert rows[0]['output_shape'] == '2x2x3x1'

  document = json.loads(counted.to_json())
  assert document['total'] == counted.total
  assert document['by_layer']['conv1']['macs'] == 60
  assert list(document['by_layer']) == list(counted.by_layer)


def test_what_is_left_out_is_named_once():
  builder = report.ReportBuilder('conv')
  with pytest.warns(report.UncountedWarning) as warned:
    builder.leave_out('lu', 'layer1', 'it is not known')
    builder.leave_out('lu', 'layer2')
    builder.leave_out('qr', '')
  assert [str(w.message) for w in warned] == [
    'lu in layer1 is not counted: it is not known',
    'qr in the network is not counted',
  ]
  counted = builder.build()
  assert counted.uncounted == (('lu', 'layer1'), ('lu', 'layer2'), ('qr', ''))
  assert counted.to_table().endswith('not counted: qr in the network')
  assert json.loads(counted.to_json())['uncounted'][0] == ['lu', 'layer1']


def test_distribution_of_images():
  executed = np.arange(101.0)
  found = report.distribution(executed, percentiles=(10, 50), bins=4)
  assert found.mean == 50
  assert found.percentiles == {10: 10, 50: 50}
  np.testing.assert_array_equal(found.histogram, [25, 25, 25, 26])
  np.testing.assert_array_equal(found.bin_edges, [0, 25, 50, 75, 100])
  with pytest.raises(ValueError, match=re.escape('got shape (2, 3)')):
    report.distribution(np.ones((2, 3)))


def test_conventions_are_found_by_name():
  for name, convention in conventions.CONVENTIONS.items():
    assert conventions.get_convention(name) is convention
    assert conventions.get_convention(convention) is convention
    assert convention.formula and convention.unit in ('MACs', 'FLOPs')
  with pytest.raises(
    ValueError,
    match=r"convention must be one of \['conv', 'conv\+linear', 'flops',"
    r" 'ptflops'\]; got 'gflops'",
  ):
    conventions.get_convention('gflops')
