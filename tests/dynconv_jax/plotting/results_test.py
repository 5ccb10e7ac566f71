import statistics

import pytest

from dynconv_jax.plotting.results import accuracy_curves, read_results


def _row(accuracy, gmacs, method='dynconv', model='resnet18', **more):
  return {
    'model': model,
    'method': method,
    'accuracy': accuracy,
    'gmacs_mean': gmacs,
    **more,
  }


def _points(curve):
  return [(point.x, point.accuracy) for point in curve.points]


def test_reads_cells_as_text(tmp_path):
  path = tmp_path / 'results.csv'
  path.write_text(
    '\ufeffmodel, method,accuracy\nresnet18,"dyn,conv", 0.5\n\n', 'utf-8'
  )
  assert read_results(path) == [
    {'model': 'resnet18', 'method': 'dyn,conv', 'accuracy': '0.5'}
  ]


def test_a_missing_file(tmp_path):
  path = tmp_path / 'none.csv'
  with pytest.raises(FileNotFoundError, match=f"there is no file '{path}'"):
    read_results(path)
  with pytest.raises(IsADirectoryError, match=f'{tmp_path} is a folder; name'):
    read_results(tmp_path)


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'', 'is empty: it has no header'),
    (b'\n , \n', 'is empty: it has no header'),
    (b'model,method\n', 'has a header but no rows'),
    (b'model,model\na,b\n', 'has duplicate columns: model, model'),
    (b'model,method\na,b\na\n', 'row 2: 1 cells for 2 columns'),
    (b'model\n\xff\xfe\n', 'is not a CSV file'),
    (b'a' * 200_000, 'is not a CSV file'),
  ],
)
def test_bad_files(tmp_path, data, message):
  path = tmp_path / 'results.csv'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message):
    read_results(path)


def test_one_curve_a_model_and_method_in_order_of_x():
  rows = [
    _row('0.62', '0.081', budget='0.5'),
    _row('0.66', '0.110', budget='0.7'),
    _row('0.59', '0.058', budget='0.3'),
    _row('0.7', '0.2', budget='0.5', model='resnet34'),
    _row('0.6', '0.1', 'convnet_aig', budget='0.5'),
  ]
  curves = accuracy_curves(rows)
  assert [(c.method, c.model) for c in curves] == [
    ('dynconv', 'resnet18'),
    ('dynconv', 'resnet34'),
    ('convnet_aig', 'resnet18'),
  ]
  assert _points(curves[0]) == [(0.058, 0.59), (0.081, 0.62), (0.11, 0.66)]
  assert [p.budget for p in curves[0].points] == [0.3, 0.5, 0.7]


def test_dense_models_of_a_family_are_one_curve():
  rows = [
    _row(0.76, 3.8, 'dense', 'resnet50', budget=''),
    _row(0.73, 3.6, 'dense', 'resnet34', budget='1.0'),
    _row(0.92, 0.07, 'dense', 'cifar_resnet32', budget=''),
  ]
  family, alone = accuracy_curves(rows)
  assert family.model == 'resnet'
  assert _points(family) == [(3.6, 0.73), (3.8, 0.76)]
  assert alone.model == 'cifar_resnet32'


def test_seeds_are_averaged_with_their_standard_deviation():
  accuracies, gmacs = [0.60, 0.64, 0.65], [0.08, 0.09, 0.082]
  rows = [
    _row(a, g, budget=0.5, seed=s, accuracy_low=0.1, accuracy_high=0.9)
    for s, (a, g) in enumerate(zip(accuracies, gmacs, strict=True))
  ]
  ((point,),) = [curve.points for curve in accuracy_curves(rows)]
  assert point.seeds == 3
  assert point.x == pytest.approx(statistics.mean(gmacs))
  assert point.accuracy == pytest.approx(statistics.mean(accuracies))
  assert point.below == pytest.approx(statistics.stdev(accuracies))
  assert point.above == point.below


def test_a_single_run_has_its_own_interval():
  rows = [
    _row(0.6, 0.1, budget=0.5, accuracy_low=0.57, accuracy_high=0.62),
    _row(0.7, 0.2, budget=0.7, accuracy_low='', accuracy_high=''),
  ]
  first, second = accuracy_curves(rows)[0].points
  assert first.seeds == 1
  assert (first.below, first.above) == pytest.approx((0.03, 0.02))
  assert (second.below, second.above) == (0, 0)


def test_runs_without_a_budget_are_points_of_their_own():
  rows = [_row(0.73, 3.3, 'sact', seed=0), _row(0.75, 5.5, 'sact', seed=0)]
  assert _points(accuracy_curves(rows)[0]) == [(3.3, 0.73), (5.5, 0.75)]


def test_series_tell_curves_apart():
  rows = [
    _row(0.62, 0.081, budget=0.5, seed=0, recipe='plain'),
    _row(0.68, 0.084, budget=0.5, seed=0, recipe='distilled'),
  ]
  with pytest.raises(ValueError, match=r'rows 1, 2 have the same .*\(0\)'):
    accuracy_curves(rows)
  curves = accuracy_curves(rows, series='recipe')
  assert [curve.series for curve in curves] == ['plain', 'distilled']


def test_narrower_dense_networks_are_a_curve_of_their_own():
  rows = [
    _row(0.60, 0.04, 'dense', width_multiplier='0.5', seed=0),
    _row(0.64, 0.04, 'dense', width_multiplier='0.5', seed=1),
    _row(0.66, 0.15, 'dense', width_multiplier='1.0', seed=0),
    _row(0.70, 0.30, 'dense', 'resnet34', width_multiplier='1.0'),
    _row(0.61, 0.05, width_multiplier='0.5', budget=0.5),
    _row(0.65, 0.08, width_multiplier='1.0', budget=0.5),
  ]
  curves = {
    (c.method, c.model, c.width_multiplier): c for c in accuracy_curves(rows)
  }
  assert {key: len(c.points) for key, c in curves.items()} == {
    ('dense', 'resnet18', None): 2,
    ('dense', 'resnet', 1): 2,
    ('dynconv', 'resnet18', 0.5): 1,
    ('dynconv', 'resnet18', 1): 1,
  }
  narrow, whole = curves['dense', 'resnet18', None].points
  assert (narrow.width_multiplier, narrow.seeds) == (0.5, 2)
  assert narrow.accuracy == pytest.approx(0.62)
  assert whole in curves['dense', 'resnet', 1].points
  # With a single depth there is no curve by depth.
  (alone,) = accuracy_curves(rows[:3])
  assert (alone.model, alone.width_multiplier) == ('resnet18', None)


def test_seeds_of_methods_that_have_a_weight_for_a_budget():
  rows = [
    _row(a, g, method, budget='', skip_weight=skip, ponder_weight=p, seed=s)
    for method, skip, p, s, a, g in (
      ('skipnet', 0.1, '', 0, 0.6, 0.1),
      ('skipnet', 0.1, '', 1, 0.7, 0.2),
      ('skipnet', 0.2, '', 0, 0.5, 0.05),
      ('sact', '', 0.01, 0, 0.8, 0.3),
      ('sact', '', 0.02, 0, 0.7, 0.2),
    )
  ]
  skipnet, sact = accuracy_curves(rows)
  assert [(p.weight, p.seeds) for p in skipnet.points] == [(0.2, 1), (0.1, 2)]
  assert skipnet.points[1].accuracy == pytest.approx(0.65)
  assert [(p.weight, p.accuracy) for p in sact.points] == [
    (0.02, 0.7),
    (0.01, 0.8),
  ]


def test_a_list_of_blocks_is_shown_by_its_length():
  rows = [
    _row(a, g, 'drop', budget='', dropped_blocks=blocks, seed=seed)
    for a, g, blocks, seed in (
      *((0.6, 0.1, 'a.1,b.2,c.3', 0), (0.7, 0.2, 'a.1', 0)),
      *((0.8, 0.2, 'a.1', 1), (0.5, 0.3, 'b.2', 2)),
    )
  ]
  (curve,) = accuracy_curves(rows)
  found = [(p.x, p.weight, p.seeds) for p in curve.points]
  # Other blocks are another setting, not another seed.
  assert found == [(0.1, 3, 1), (0.2, 1, 2), (0.3, 1, 1)]
  # Without the knob in a sweep's grid, the blocks are not known.
  unknown = [_row(0.6, 0.1, 'drop', budget='', dropped_blocks='', seed=0)]
  assert accuracy_curves(unknown)[0].points[0].weight is None


def test_input_sizes_are_settings():
  rows = [
    _row(a, g, budget=0.5, seed=0, image_size=size)
    for size, a, g in ((64, 0.6, 0.1), (80, 0.7, 0.2))
  ]
  (curve,) = accuracy_curves(rows)
  assert [(p.image_size, p.accuracy) for p in curve.points] == [
    (64, 0.6),
    (80, 0.7),
  ]


def test_rows_without_x_are_left_out():
  rows = [_row(0.6, 0.1, ms='3.5', budget=0.5), _row(0.7, 0.2, 'dense', ms='')]
  (curve,) = accuracy_curves(rows, 'ms')
  assert _points(curve) == [(3.5, 0.6)]
  with pytest.raises(ValueError, match="no row has a value in the column 'ms'"):
    accuracy_curves([_row(0.7, 0.2, ms='')], 'ms')


@pytest.mark.parametrize(
  ('rows', 'options', 'message'),
  [
    ([], {}, 'no results to plot'),
    (
      [{'model': 'a', 'gmacs_mean': 1}],
      {},
      'missing: method, accuracy; given: model, gmacs_mean',
    ),
    (
      [_row(0.5, 1, seed=0, note='good')],
      {'x': 'gmac'},
      "numeric columns accuracy, gmacs_mean; got 'gmac'",
    ),
    ([_row(0.5, 1, seed=0)], {'x': 'seed'}, "gmacs_mean; got 'seed'"),
    (
      [_row(0.5, 1)],
      {'series': 'recipe'},
      "columns model, method, accuracy, gmacs_mean; got 'recipe'",
    ),
    (
      [_row(0.5, 1), _row('good', 1)],
      {},
      "row 2, column 'accuracy': 'good' is not a finite number",
    ),
    ([_row(0.5, 'nan')], {}, "row 1, column 'gmacs_mean': 'nan' is not"),
    ([_row(0.5, -1)], {}, 'row 1: gmacs_mean must be >= 0; got -1'),
    ([_row('', 1)], {}, "row 1, column 'accuracy': '' is not"),
    ([_row(0.5, 1, budget='half')], {}, "column 'budget': 'half' is not"),
    ([_row(69.9, 1)], {}, r'must be in \[0, 1\]; got 69.9'),
    (
      [_row(0.5, 1, accuracy_low=0.6, accuracy_high=0.7)],
      {},
      'row 1: accuracy 0.5 is outside its interval, 0.6 to 0.7',
    ),
  ],
)
def test_bad_rows(rows, options, message):
  with pytest.raises(ValueError, match=message):
    accuracy_curves(rows, **options)
