"""Tests of reports built by hand: sums, masks, tables and their errors."""

import csv
import html.parser
import io
import json
import re

import numpy as np
import pytest

from dynconv_jax.macs import conventions, formulas, report, tables
from dynconv_jax.macs.builder import ReportBuilder
from dynconv_jax.masks import ExecutionMask, MaskedLayer

# A batch of two, maps of 2x3; (name, MACs per position, biases per position).
_LAYERS = (
  ('conv1', 5, 0),
  ('layer1.0.conv1', 7, 0),
  ('layer1.0.conv2', 11, 1),
  ('layer1.0.masker', 13, 1),
)


def example(convention='conv', padding=True) -> report.Report:
  builder = ReportBuilder(convention, padding)
  for name, macs, biases in _LAYERS:
    work = formulas.Work(
      'conv', 12 * macs, 12 * macs - 12, 12 * biases, positions=12
    )
    builder.add(name, work, output_shape=(2, 2, 3, 1), parameters=macs)
  builder.add('layer1.0', formulas.elementwise(24), output_shape=(24,))
  builder.add('fc', formulas.matmul(2, 4, 3, bias=True), output_shape=(2, 3))
  return builder.build()


def masked(name, level=0, kind='positions') -> MaskedLayer:
  # The report determines the MACs; the value in the mask, 0, is not used.
  return MaskedLayer(name, 0, level, kind)


def mask_of(maps, layers) -> ExecutionMask:
  return ExecutionMask(maps, 'block', layers)


def mask(hard, dilated, layers=None) -> ExecutionMask:
  layers = layers or (masked('layer1.0.conv1', 1), masked('layer1.0.conv2', 0))
  return mask_of((np.float32(hard), np.float32(dilated)), layers)


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
  builder = ReportBuilder('flops')
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
      [mask(np.ones((1, 2, 3)), np.ones((1, 2, 3)), (masked('x'),))],
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
      [mask(np.ones((2, 0)), np.ones((1, 2, 3)))],
      r'layer1.0.conv2 has no positions; its shape is \(2, 0\)',
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


# A token grid of two images with four tokens: a projection, the two products of
# attention over three heads, an output projection, and a head on one token.
def transformer(convention='conv+linear') -> report.Report:
  builder = ReportBuilder(convention)
  builder.add('embed', formulas.matmul(8, 5, 6, positions=8))
  builder.add('attn.qkv', formulas.matmul(8, 6, 18, positions=8))
  for inner, columns in ((2, 4), (4, 2)):
    product = formulas.matmul(4, inner, columns, batch=6, positions=24)
    builder.add('attn', product)
  builder.add('attn.out', formulas.matmul(8, 6, 6, positions=8))
  builder.add('head', formulas.matmul(2, 6, 3, positions=2))
  return builder.build()


_TOKENS = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0.0]])


def test_tokens_price_linear_layers_by_tokens_and_attention_by_pairs():
  layers = masked('attn.qkv'), masked('attn', kind='pairs'), masked('attn.out')
  counted = transformer()
  executed = counted.executed([mask_of((_TOKENS,), layers)])
  by_hand = [
    4 * 5 * 6 + n * 6 * 18 + 3 * (n * n * 2) * 2 + n * 6 * 6 + 6 * 3
    for n in (4, 2, 0)
  ]
  np.testing.assert_array_equal(executed, by_hand)
  assert executed[0] == counted.total / 2
  # A separate level: queries of two images, here half of the tokens.
  two = mask_of(
    (_TOKENS[:2], _TOKENS[:2][::-1]), (masked('attn.out', level=1),)
  )
  always = counted.total / 2 - 4 * 36
  np.testing.assert_array_equal(
    counted.executed([two]), [always + 2 * 36, always + 4 * 36]
  )


def test_products_of_attention_alone_need_the_batch():
  only = [mask_of((_TOKENS,), (masked('attn', kind='pairs'),))]
  counted = transformer()
  with pytest.raises(ValueError, match='do not tell how many images .* batch='):
    counted.executed(only)
  always = counted.total / 2 - 3 * 16 * 4
  np.testing.assert_array_equal(
    counted.executed(only, batch=2), [always + 12 * n * n for n in (4, 2, 0)]
  )
  with pytest.raises(
    ValueError, match='384 MACs for 5 images, not a multiple of .* squared'
  ):
    counted.executed(only, batch=5)
  with pytest.raises(ValueError, match='batch must be at least 1; got 0'):
    counted.executed(only, batch=0)


def test_a_layer_that_is_used_twice_needs_the_batch():
  builder = ReportBuilder('conv+linear')
  for _ in range(2):
    builder.add('shared', formulas.matmul(8, 5, 6, positions=8))
  counted = builder.build()
  executed = counted.executed(
    [mask_of((_TOKENS,), (masked('shared'),))], batch=2
  )
  np.testing.assert_array_equal(executed, [2 * 30 * n for n in (4, 2, 0)])


def test_masks_of_what_the_convention_leaves_out_say_so():
  with pytest.raises(
    ValueError, match=r"does not have: \['attn'\].*'conv\+lin"
  ):
    transformer('conv').executed([mask_of((_TOKENS,), (masked('attn'),))])


def test_masks_need_the_positions_of_a_convolution():
  fc = mask(np.ones((1, 1, 1)), np.ones((1, 1, 1)), (masked('fc'),))
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
  assert lines[7].split() == ['total', '36', '456', '100.0%']
  assert 'FLOPs' in example('flops').to_table()

  rows = list(csv.DictReader(io.StringIO(counted.to_csv())))
  assert sum(int(row['macs']) for row in rows) == counted.total
  assert rows[0]['output_shape'] == '2x2x3x1'

  document = json.loads(counted.to_json())
  assert document['total'] == counted.total
  assert document['by_layer']['conv1']['macs'] == 60
  assert list(document['by_layer']) == list(counted.by_layer)


@pytest.mark.parametrize(
  'number,text',
  [
    (0, '0'),
    (999, '999'),
    (1000, '1.000 k'),
    (12_345, '12.35 k'),
    (999_940, '999.9 k'),
    (999_960, '1.000 M'),
    (4_087_136_256, '4.087 G'),
    (10**21, '1000 E'),
  ],
)
def test_quantities_have_four_digits(number, text):
  assert tables.quantity(number) == text
  assert tables.quantity(number, 'B') == text + ('B' if ' ' in text else ' B')


def tree_of_modules() -> report.Report:
  builder = ReportBuilder('conv+linear')
  matmul = formulas.matmul(2, 4, 3)
  builder.add('a.b.c', matmul, output_shape=(2, 3), parameters=9, itemsize=2)
  builder.add('a.d', matmul, output_shape=(2, 3), parameters=9, itemsize=2)
  builder.add('a', matmul, output_shape=(2, 3), itemsize=2)
  builder.add('e', matmul, output_shape=(2, 3), itemsize=2)
  # d shares the weights of c. The norm and the table do no counted work.
  builder.set_parameters(
    {'a.b.c': 12, 'a.norm': 5, 'e.table.rows': 7_000}, 28_068
  )
  return builder.build()


def test_parameters_are_those_that_the_model_says():
  counted = tree_of_modules()
  assert counted.parameters == 12 + 5 + 7_000
  assert counted.by_layer['a.b.c'].parameters == 12
  assert counted.activations == 4 * 6 and counted.activation_bytes == 48
  line = counted.to_table().splitlines()[-5]
  assert line.split() == ['all', 'else', '7.005', 'k', '0', '0.0%']


def test_printing_a_report_shows_its_modules():
  counted = tree_of_modules()
  lines = str(counted).splitlines()
  assert [line.split()[0] for line in lines[2:9]] == [
    *('a', 'b', 'c', 'd', 'norm', 'e', 'table')
  ]
  assert [len(line) - len(line.lstrip()) for line in lines[2:9]] == [
    *(0, 2, 4, 2, 2, 0, 2)
  ]
  # A module sums everything inside it and its own work.
  assert lines[2].split() == ['a', 'matmul', '2x3', '17', '72', '75.0%']
  assert lines[3].split() == ['b', '12', '24', '25.0%']
  assert 'memory: parameters 7.017 k (28.07 kB), activations 24 (48 B)' in lines
  assert str(counted) == counted.to_tree() != counted.to_tree(1)
  assert [line.split()[0] for line in counted.to_tree(1).splitlines()[2:4]] == [
    *('a', 'e')
  ]
  assert repr(counted) == "Report('conv+linear': 96 MACs in 4 layers)"
  with pytest.raises(ValueError, match='depth must be at least 1; got 0'):
    counted.to_tree(0)


def test_large_trees_are_printed_to_the_depth_that_fits():
  builder = ReportBuilder('conv+linear')
  for i in range(40):
    builder.add(f'blocks.{i}.fc', formulas.matmul(2, 4, 3))
  text = str(builder.build())
  assert text.endswith('modules to depth 2 of 3; to_tree() shows all')
  assert ' 39 ' in text and 'fc' not in text


class _Cells(html.parser.HTMLParser):
  """Collects the text of a table's cells; every tag is closed."""

  def __init__(self):
    super().__init__()
    self.open, self.cells = [], []

  def handle_starttag(self, tag, attributes):
    if tag != 'br':
      self.open.append(tag)
    if tag == 'td':
      self.cells.append('')

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1] == 'td':
      self.cells[-1] += data


def test_notebooks_show_the_same_numbers():
  counted = tree_of_modules()
  parser = _Cells()
  parser.feed(counted._repr_html_())
  assert not parser.open
  assert parser.cells[:6] == ['a', 'matmul', '2x3', '17', '72', '75.0%']
  assert parser.cells[-6:] == ['total', '', '', '7.017 k', '96', '100.0%']
  builder = ReportBuilder('flops')
  builder.add('<b>', formulas.elementwise(3))
  assert '<b>' not in builder.build()._repr_html_()


def test_zero_says_which_convention_counts_what_it_leaves_out():
  counted = transformer('conv')
  assert counted.total == 0
  assert counted.unpriced == transformer().total
  note = (
    f"the convention 'conv' leaves out {tables.quantity(counted.unpriced)}"
    " MACs of matrix products; 'conv+linear' counts them"
  )
  assert note in str(counted) and note in counted.to_table()
  assert repr(counted) == (
    "Report('conv': 0 MACs in 0 layers; 'conv+linear' counts 1.812 k)"
  )
  assert 'leaves out' not in str(transformer())


def test_notes_are_shown_once():
  builder = ReportBuilder('conv')
  for _ in range(2):
    builder.note('It ran on real data.')
  assert builder.build().notes == ('It ran on real data.',)
  assert str(builder.build()).count('It ran on real data.') == 1


def test_what_is_left_out_is_named_once():
  builder = ReportBuilder('conv')
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
