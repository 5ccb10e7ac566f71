import numpy as np
import pytest

from dynconv_jax.methods.method import METHODS
from dynconv_jax.plotting import style
from dynconv_jax.plotting.tradeoff import (
  plot_accuracy_against_macs,
  plot_results,
)


@pytest.fixture
def unwritten(monkeypatch):
  """Skips writing the files, which takes most of the time."""
  monkeypatch.setattr(style, 'save_figure', lambda *unused: None)


def _row(method, budget, seed, accuracy, gmacs, model='resnet18', **more):
  return {
    'model': model,
    'method': method,
    'budget': budget,
    'seed': seed,
    'accuracy': accuracy,
    'accuracy_low': accuracy - 0.02,
    'accuracy_high': accuracy + 0.01,
    'gmacs_mean': gmacs,
    'latency_sparse_ms': 10 * gmacs,
    **more,
  }


_ROWS = [
  _row('dynconv', 0.7, 0, 0.66, 0.110),
  _row('dynconv', 0.5, 0, 0.62, 0.081),
  _row('dynconv', 0.5, 1, 0.64, 0.083),
  _row('dense', '', 0, 0.699, 0.148),
]


def _curve(container):
  """Returns the points and the ends of the error bars of a curve."""
  line, _, (bars,) = container.lines
  return line.get_xydata(), [s[:, 1] for s in bars.get_segments()]


def test_curves_and_error_bars(tmp_path):
  figure = plot_accuracy_against_macs(_ROWS, tmp_path / 'fig.png')
  (ax,) = figure.axes
  dynconv, dense = ax.containers
  points, bars = _curve(dynconv)
  np.testing.assert_allclose(points, [[0.082, 0.63], [0.110, 0.66]])
  deviation = np.std([0.62, 0.64], ddof=1)
  np.testing.assert_allclose(
    bars, [[0.63 - deviation, 0.63 + deviation], [0.64, 0.67]]
  )
  points, bars = _curve(dense)
  np.testing.assert_allclose(points, [[0.148, 0.699]])
  np.testing.assert_allclose(bars, [[0.679, 0.709]])
  labels = [text.get_text() for text in ax.get_legend().get_texts()]
  assert labels == ['DynConv', 'dense']
  assert ax.get_title('left') == 'ResNet-18'
  assert [t.get_text() for t in ax.texts if t.get_text()] == ['0.5', '0.7']
  note = figure.get_supxlabel()
  assert 'standard deviation over 2 seeds' in note
  assert '95 % binomial interval of a single run' in note
  assert ax.get_xlabel() == 'GMACs per image (mean)'
  assert ax.get_ylabel() == 'accuracy (%)'
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'fig.png',
    'fig.svg',
  ]


@pytest.mark.usefixtures('unwritten')
def test_any_numeric_column_is_an_axis(tmp_path):
  figure = plot_accuracy_against_macs(
    _ROWS, tmp_path / 'fig', 'latency_sparse_ms', chance=1 / 6
  )
  (ax,) = figure.axes
  points, _ = _curve(ax.containers[0])
  np.testing.assert_allclose(points[:, 0], [0.82, 1.10])
  assert ax.get_xlabel() == 'latency sparse (ms)'
  assert 'chance 16.7 %' in [text.get_text() for text in ax.texts]
  low, high = ax.get_ylim()
  assert low < 1 / 6 < high


@pytest.mark.usefixtures('unwritten')
def test_dense_models_are_labelled_with_their_depth(tmp_path):
  rows = [
    _row('dense', '', 0, 0.73, 3.6, 'resnet34'),
    _row('dense', '', 0, 0.76, 3.8, 'resnet50'),
    _row('mine', '', 0, 0.7, 3.0, 'vit', series='x'),
  ]
  figure = plot_accuracy_against_macs(rows, tmp_path / 'fig')
  (ax,) = figure.axes
  assert [t.get_text() for t in ax.texts if t.get_text()] == ['34', '50']
  labels = [text.get_text() for text in ax.get_legend().get_texts()]
  assert labels == ['dense ResNet', 'mine vit']
  assert 'depth of a dense network' in figure.get_supxlabel()


@pytest.mark.usefixtures('unwritten')
def test_curves_of_one_method_look_different(tmp_path):
  rows = [
    _row('dynconv', 0.5, 0, 0.6, 0.1, recipe='plain'),
    _row('dynconv', 0.5, 0, 0.7, 0.1, recipe='distilled'),
  ]
  figure = plot_accuracy_against_macs(rows, tmp_path / 'f', series='recipe')
  first, second = (c.lines[0] for c in figure.axes[0].containers)
  assert first.get_color() == second.get_color()
  assert first.get_linestyle() != second.get_linestyle()


@pytest.mark.usefixtures('unwritten')
def test_numbers_without_an_interval_have_no_bars(tmp_path):
  row = _row('dynconv', 0.5, 0, 0.6, 0.1)
  del row['accuracy_low'], row['accuracy_high']
  figure = plot_accuracy_against_macs([row], tmp_path / 'fig')
  assert not figure.axes[0].containers[0].has_yerr
  assert figure.get_supxlabel() == 'numbers: computational budget'


def test_errors_come_before_any_file(tmp_path):
  with pytest.raises(ValueError, match=r'chance must be in \[0, 1\]; got 16.7'):
    plot_accuracy_against_macs(_ROWS, tmp_path / 'fig', chance=16.7)
  with pytest.raises(ValueError, match="got 'macs'"):
    plot_accuracy_against_macs(_ROWS, tmp_path / 'fig', 'macs')
  assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures('unwritten')
def test_every_method_looks_different(tmp_path):
  rows = [_row(method, '', 0, 0.6, 0.1) for method in METHODS]
  ax = plot_accuracy_against_macs(rows, tmp_path / 'fig').axes[0]
  lines = [container.lines[0] for container in ax.containers]
  for looks in (lambda line: line.get_color(), lambda line: line.get_marker()):
    assert len(set(map(looks, lines))) == len(METHODS)
  (legend,) = ax.figure.legends
  labels = [text.get_text() for text in legend.get_texts()]
  assert labels == [
    *('dense', 'blocks dropped', 'DynConv', 'ConvNet-AIG', 'SkipNet'),
    *('SACT', 'ACT'),
  ]


@pytest.mark.parametrize('words', (0, 8, 40))
@pytest.mark.usefixtures('unwritten')
def test_a_long_legend_covers_no_curve_and_is_not_cut_off(tmp_path, words):
  recipes = [f'{name}{words * " recipe"}' for name in range(6)]
  rows = [
    _row('dynconv', 0.5, seed, 0.6 + 0.1 * seed, 0.1, recipe=name)
    for name in recipes
    for seed in range(2)
  ]
  figure = plot_accuracy_against_macs(rows, tmp_path / 'f', series='recipe')
  (ax,), (legend,) = figure.axes, figure.legends
  figure.draw_without_rendering()
  extent = legend.get_window_extent()
  assert not extent.overlaps(ax.get_window_extent())
  assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
  assert extent.y1 <= figure.bbox.y1
  assert ax.get_window_extent().height > 150
  assert [t.get_text().replace('\n', ' ') for t in legend.get_texts()] == [
    f'DynConv, {recipe}' for recipe in recipes
  ]


@pytest.mark.usefixtures('unwritten')
@pytest.mark.parametrize(
  ('model', 'name'),
  [
    ('efficientnet_lite4', 'EfficientNet-Lite4'),
    ('mobilenet_v2', 'MobileNetV2'),
    ('cifar_resnet32', 'CIFAR ResNet-32'),
    ('mine.models:Net', 'mine.models:Net'),
  ],
)
def test_the_title_is_the_model(tmp_path, model, name):
  row = _row('dynconv', 0.5, 0, 0.6, 0.1, model)
  figure = plot_accuracy_against_macs([row], tmp_path / 'f')
  assert figure.axes[0].get_title('left') == name


@pytest.mark.usefixtures('unwritten')
def test_points_say_what_was_varied(tmp_path):
  rows = [
    _row('dense', '', 0, 0.6, 0.04, width_multiplier=0.5),
    _row('dense', '', 0, 0.7, 0.15, width_multiplier=1),
    _row('dynconv', 0.5, 0, 0.6, 0.04, width_multiplier=0.5),
    _row('skipnet', '', 0, 0.65, 0.1, width_multiplier=1, skip_weight=1.5),
    _row('act', '', 0, 0.6, 0.1, image_size=64, ponder_weight=0.01),
    _row('act', '', 0, 0.62, 0.12, image_size=80, ponder_weight=0.01),
  ]
  figure = plot_accuracy_against_macs(rows, tmp_path / 'fig')
  (ax,) = figure.axes
  assert [text.get_text() for text in ax.get_legend().get_texts()] == [
    'dense, by width',
    'DynConv \N{MULTIPLICATION SIGN}0.5',
    'SkipNet',
    'ACT',
  ]
  assert [text.get_text() for text in ax.texts] == [
    '\N{MULTIPLICATION SIGN}0.5',
    '\N{MULTIPLICATION SIGN}1',
    '0.5',
    '1.5',
    '0.01, 64 px',
    '0.01, 80 px',
  ]
  note = figure.get_supxlabel()
  for what in ('width of a dense', 'weight of the', 'side of the input'):
    assert what in note


@pytest.mark.usefixtures('unwritten')
def test_labels_of_close_points_do_not_overlap(tmp_path):
  rows = [
    _row('dynconv', budget, 0, 0.62 + at, 0.081 + at / 100)
    for budget, at in ((0.2, 0), (0.25, 0.001), (0.3, 0.002))
  ]
  rows.append(_row('dense', '', 0, 0.699, 0.148))
  figure = plot_accuracy_against_macs(rows, tmp_path / 'fig.png')
  figure.draw_without_rendering()
  boxes = [text.get_window_extent() for text in figure.axes[0].texts]
  assert len(boxes) == 3
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_figures_of_a_table(tmp_path):
  written = plot_results(_ROWS, tmp_path)
  assert [[p.name for p in paths] for paths in written] == [
    ['accuracy_against_macs.png', 'accuracy_against_macs.svg']
  ]
  rows = [
    {
      **row,
      'recipe': '',
      'latency_ms': 3,
      'latency_batch_size': 8,
      'latency_machine': 'cpu',
    }
    for row in _ROWS
  ]
  # Distinguished by the recipe; otherwise the rows would be one run.
  rows.append({**rows[0], 'recipe': 'distilled'})
  written = plot_results(rows, tmp_path)
  assert sorted(tmp_path.iterdir()) == sorted(p for ps in written for p in ps)
  svg = (tmp_path / 'accuracy_against_latency.svg').read_text()
  assert len(written) == 2
  assert 'batch of 8, cpu' in svg
  assert 'DynConv, distilled' in svg
