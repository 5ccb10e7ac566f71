import subprocess
import sys

import matplotlib
import pytest

from dynconv_jax.plotting import style


@style.styled()
def _figure():
  figure = style.new_figure(2, 1)
  ax = figure.add_subplot()
  ax.plot([0, 1], [0, 1])
  ax.fill_between([0, 1], [0, 1], [1, 2])
  style.footnote(figure, 'a note')
  return figure


@pytest.mark.parametrize('name', ['a', 'a.png', 'a.svg', 'a.PNG'])
def test_paths_by_any_suffix(name):
  png, svg = style.figure_paths(f'folder/{name}')
  assert [png.name, svg.name] == ['a.png', 'a.svg']


def test_a_dot_in_the_name_is_no_suffix():
  png, _ = style.figure_paths('budget_0.5')
  assert png.name == 'budget_0.5.png'


def test_other_formats_are_refused():
  with pytest.raises(ValueError, match=r"as \.png and \.svg; got 'a\.pdf'"):
    style.figure_paths('a.pdf')


def test_files_are_the_same_each_time_and_undated(tmp_path):
  first = style.save_figure(_figure(), tmp_path / 'new' / 'first')
  second = style.save_figure(_figure(), tmp_path / 'second.png')
  for a, b in zip(first, second, strict=True):
    assert a.read_bytes() == b.read_bytes()
  assert first[0].read_bytes().startswith(b'\x89PNG')
  text = first[1].read_text()
  assert '<svg' in text
  assert '<dc:date>' not in text
  assert {p.name for p in (tmp_path / 'new').iterdir()} == {
    'first.png',
    'first.svg',
  }


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
  png, svg = style.save_figure(_figure(), tmp_path / 'a')
  before = png.read_bytes()
  figure = _figure()

  def fail(path, **unused):
    path.write_bytes(b'half')
    raise OSError('No space left on device')

  monkeypatch.setattr(figure, 'savefig', fail)
  with pytest.raises(OSError, match='No space left'):
    style.save_figure(figure, tmp_path / 'a')
  assert png.read_bytes() == before
  assert sorted(tmp_path.iterdir()) == [png, svg]


def test_settings_of_the_process_are_left_alone():
  before = dict(matplotlib.rcParams)
  _figure()
  assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
  code = (
    'import sys\n'
    'from dynconv_jax.plotting import curves, ponder, tradeoff\n'
    'sys.exit("matplotlib.pyplot" in sys.modules)'
  )
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
