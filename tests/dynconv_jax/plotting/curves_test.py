import numpy as np
import pytest

from dynconv_jax.plotting import style
from dynconv_jax.plotting.curves import plot_block_density, plot_learning_curves


@pytest.fixture
def unwritten(monkeypatch):
  """Skips writing the files, which takes most of the time."""
  monkeypatch.setattr(style, 'save_figure', lambda *unused: None)


def _metrics():
  rows = []
  for epoch, loss, accuracy, executed in (
    (1, 1.5, 0.3, 0.9),
    (2, 1.1, 0.6, 0.6),
    (3, 0.9, 0.5, 0.52),
  ):
    common = {'step': 10 * epoch, 'epoch': epoch, 'executed_fraction': executed}
    rows.append(
      {
        **common,
        'split': 'train',
        'loss': loss,
        'cross_entropy': loss - 0.1,
        'distillation': 0.0,
        'gating': 0.01,
        'accuracy': accuracy + 0.1,
        'budget': 0.5,
        'learning_rate': 0.1,
      }
    )
    rows.append(
      {
        **common,
        'split': 'validation',
        'loss': loss + 0.2,
        'accuracy': accuracy,
        'block_density': [0.2, 0.4],
      }
    )
  return rows


def _line(ax, label):
  (line,) = [line for line in ax.lines if line.get_label() == label]
  return line.get_xydata().tolist()


def _legend(ax):
  return [text.get_text() for text in ax.get_legend().get_texts()]


def _texts(ax):
  return [text.get_text() for text in ax.texts]


def test_curves_hold_the_metrics(tmp_path):
  figure = plot_learning_curves(_metrics(), tmp_path / 'curves.png')
  training, validation, accuracy, executed = figure.axes
  assert _line(training, 'total') == [[1, 1.5], [2, 1.1], [3, 0.9]]
  np.testing.assert_allclose(
    _line(training, 'cross-entropy'), [[1, 1.4], [2, 1.0], [3, 0.8]]
  )
  np.testing.assert_allclose(
    _line(validation, 'validation'), [[1, 1.7], [2, 1.3], [3, 1.1]]
  )
  assert _line(accuracy, 'validation') == [[1, 0.3], [2, 0.6], [3, 0.5]]
  assert _line(executed, 'train') == [[1, 0.9], [2, 0.6], [3, 0.52]]
  assert _line(executed, 'budget') == [[1, 0.5], [2, 0.5], [3, 0.5]]
  assert 'budget 50 %' in _texts(executed)
  assert _line(accuracy, 'best: 60.0 % in epoch 2') == [[2, 0.6]]
  assert training.get_xlabel() == 'epoch'
  assert [_legend(ax) for ax in figure.axes] == [
    ['total', 'cross-entropy', 'gating, unweighted'],
    ['validation'],
    ['train', 'validation', 'best: 60.0 % in epoch 2'],
    ['train', 'validation', 'budget'],
  ]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    'curves.png',
    'curves.svg',
  ]


@pytest.mark.usefixtures('unwritten')
def test_a_dense_run_has_no_executed_fraction(tmp_path):
  rows = _metrics()
  for row in rows:
    del row['executed_fraction']
    row.pop('budget', None)
    if 'gating' in row:  # All terms but one are 0, so that one is the loss.
      row |= {'gating': 0.0, 'cross_entropy': row['loss']}
  figure = plot_learning_curves(rows, tmp_path / 'curves')
  assert [_legend(ax) for ax in figure.axes] == [
    ['train'],
    ['validation'],
    ['train', 'validation', 'best: 60.0 % in epoch 2'],
  ]


@pytest.mark.usefixtures('unwritten')
def test_rows_may_lack_keys_and_order(tmp_path):
  rows = [
    {'step': 20, 'split': 'train', 'loss': 1.0, 'accuracy': None},
    {'step': 10, 'split': 'train', 'loss': 2.0},
    {'step': 20, 'split': 'validation', 'learning_rate': 0.1},
  ]
  figure = plot_learning_curves(rows, tmp_path / 'curves')
  (ax,) = figure.axes
  assert ax.get_xlabel() == 'step'
  assert [line.get_label() for line in ax.lines] == ['train']
  assert _line(ax, 'train') == [[10, 2.0], [20, 1.0]]


@pytest.mark.usefixtures('unwritten')
def test_of_a_step_logged_twice_the_later_row_counts(tmp_path):
  rows = [
    {'epoch': 1, 'split': 'train', 'loss': 2.0},
    {'epoch': 2, 'split': 'train', 'loss': 7.0},
    {'epoch': 2, 'split': 'train', 'loss': 1.0},
  ]
  figure = plot_learning_curves(rows, tmp_path / 'curves')
  assert _line(figure.axes[0], 'train') == [[1, 2.0], [2, 1.0]]


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([], 'no metrics to plot'),
    ([{'epoch': 1, 'wall': 3.0}], r"got the keys \['epoch', 'wall'\]"),
    ([{'split': 'train', 'loss': 1.0}], r"got the keys \['loss', 'split'\]"),
  ],
)
def test_metrics_that_cannot_be_drawn(tmp_path, rows, message):
  with pytest.raises(ValueError, match=message):
    plot_learning_curves(rows, tmp_path / 'curves')
  assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures('unwritten')
@pytest.mark.parametrize(('last', 'side'), [(0.52, 'top'), (0.4, 'bottom')])
def test_the_budget_is_named_off_the_curves(tmp_path, last, side):
  rows = _metrics()
  rows[-1]['executed_fraction'] = last
  figure = plot_learning_curves(rows, tmp_path / 'curves')
  (text,) = figure.axes[3].texts
  assert text.get_verticalalignment() == side


def _bars(ax):
  return [bar.get_height() for bar in ax.patches]


def test_bars_are_the_densities(tmp_path):
  names = ['layer1.0', 'layer1.1', 'layer2.0']
  figure = plot_block_density(
    names, [0.9, 0.5, 0.1], tmp_path / 'd', 0.4, stages=(0, 0, 1)
  )
  (ax,) = figure.axes
  np.testing.assert_allclose(_bars(ax), [0.9, 0.5, 0.1])
  assert [t.get_text() for t in ax.get_xticklabels()] == ['0', '1', '0']
  assert _texts(ax) == ['layer1', 'layer2', 'budget 40 %']
  (budget,) = ax.lines
  assert set(budget.get_ydata()) == {0.4}
  # A stage begins after a gap.
  x = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
  assert x[2] - x[1] > x[1] - x[0]


@pytest.mark.usefixtures('unwritten')
def test_whiskers_span_the_images(tmp_path):
  densities = np.random.default_rng(0).uniform(size=(2, 40))
  figure = plot_block_density(['a.0', 'a.1'], densities, tmp_path / 'd')
  (ax,) = figure.axes
  np.testing.assert_allclose(_bars(ax), densities.mean(axis=1))
  (whiskers,) = ax.collections
  for segment, values in zip(whiskers.get_segments(), densities, strict=True):
    low, high = np.quantile(values, [0.05, 0.95])
    np.testing.assert_allclose(segment[:, 1], [low, high])
  assert '40 images' in figure.get_supxlabel()


@pytest.mark.usefixtures('unwritten')
def test_names_need_no_stage(tmp_path):
  figure = plot_block_density(['stem', 'head'], [0.2, 0.3], tmp_path / 'd')
  labels = figure.axes[0].get_xticklabels()
  assert [label.get_text() for label in labels] == ['stem', 'head']


@pytest.mark.parametrize(
  ('names', 'densities', 'budget', 'message'),
  [
    ([], [], None, r'at least one block; got shape \(0,\)'),
    (['a'], [0.1, 0.2], None, 'got 1 names, 2 densities, and 1 stages'),
    (['a'], [1.2], None, r'densities must be in \[0, 1\]; got \[1.2\]'),
    (['a'], [np.nan], None, r'densities must be in \[0, 1\]; got \[nan\]'),
    (['a'], [0.5], 1.5, r'budget must be in \[0, 1\]; got 1.5'),
  ],
)
def test_bad_densities(tmp_path, names, densities, budget, message):
  with pytest.raises(ValueError, match=message):
    plot_block_density(names, densities, tmp_path / 'd', budget)
  assert not any(tmp_path.iterdir())
