import numpy as np
import pytest

from dynconv_jax.plotting import style
from dynconv_jax.plotting.gains import plot_gains


def _row(share, difference, low, high, label='DynConv'):
  names = ('share', 'difference', 'low', 'high', 'label')
  values = map(str, (share, difference, low, high, label))
  return dict(zip(names, values, strict=True))


def test_curves_have_their_intervals_and_zero(tmp_path):
  rows = [
    _row(1, -1.5, -3, 0.5),
    _row(0.05, 3, 1, 4),
    _row(0.2, 1, 0, 2, 'SkipNet'),
  ]
  figure = plot_gains(rows, tmp_path / 'gains', against='narrow')
  (ax,) = figure.axes
  assert ax.get_xscale() == 'log'
  assert list(ax.lines[0].get_ydata()) == [0, 0]
  for container, points, ends in (
    (ax.containers[0], [[0.05, 3], [1, -1.5]], [[1, 4], [-3, 0.5]]),
    (ax.containers[1], [[0.2, 1]], [[0, 2]]),
  ):
    line, _, (bars,) = container.lines
    np.testing.assert_allclose(line.get_xydata(), points)
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], ends)
  labels = [text.get_text() for text in ax.get_legend().get_texts()]
  assert labels == ['DynConv', 'SkipNet']
  figure.canvas.draw()
  ticks = [text.get_text() for text in ax.get_xticklabels()]
  assert ticks == ['5', '7', '10', '15', '20', '30', '50', '70', '100']
  assert ax.get_title('left') == 'against narrow'
  assert {p.name for p in tmp_path.iterdir()} == {'gains.png', 'gains.svg'}


def test_without_labels_there_is_no_legend(tmp_path, monkeypatch):
  monkeypatch.setattr(style, 'save_figure', lambda *unused: None)
  row = _row(0.3, 1, 0, 2)
  del row['label']
  assert plot_gains([row], tmp_path / 'a').axes[0].get_legend() is None


def test_points_are_labelled_with_their_gmacs(tmp_path, monkeypatch):
  monkeypatch.setattr(style, 'save_figure', lambda *unused: None)
  rows = [
    _row(0.3, 1, 0, 2) | {'gmacs': '0.1234', 'gmacs_against': '0.2'},
    _row(0.4, 1, 0, 2) | {'gmacs': '', 'gmacs_against': '0.2'},
  ]
  figure = plot_gains(rows, tmp_path / 'a')
  assert [text.get_text() for text in figure.axes[0].texts] == ['0.123']
  assert figure.get_supxlabel().endswith('numbers: GMACs; baseline: 0.200')
  rows[1]['gmacs_against'] = '0.3'
  note = plot_gains(rows, tmp_path / 'a').get_supxlabel()
  assert note.endswith('numbers: GMACs')


@pytest.mark.parametrize(
  'rows, message',
  [
    ([], 'no gains to plot'),
    ([{'share': 1, 'low': 0}], 'missing: difference, high; given: share, low'),
    ([_row(0, 1, 0, 2)], r'row 1: share must be in \(0, 1\]; got 0'),
    ([_row(0.1, 1, 0, 2), _row(5, 1, 0, 2)], 'row 2: share .*; got 5'),
    ([_row(0.1, 3, 0, 2)], 'difference 3 must be within its interval, 0 to 2'),
    ([_row(0.1, 1, 0, 'inf')], 'must be within its interval, 0 to inf'),
    ([_row(0.1, 'x', 0, 2)], "row 1: could not convert .* 'x'"),
    ([_row(0.1, 1, 0, 2) | {'gmacs': 'x'}], "row 1: could not convert .* 'x'"),
    ([_row(0.1, 1, 0, 2)] * 2, 'row 2: its label already .* the share 0.1'),
  ],
)
def test_bad_gains(rows, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    plot_gains(rows, tmp_path / 'gains')
  assert not any(tmp_path.iterdir())
