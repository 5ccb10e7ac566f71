import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from dynconv_jax.plotting import style

_SVG = '{http://www.w3.org/2000/svg}'


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


def test_neutral_colors_of_svg_files_follow_the_readers_theme(tmp_path):
  _, path = style.save_figure(_figure(), tmp_path / 'a')
  root = ElementTree.parse(path).getroot()  # Well-formed.
  (rules, _) = (e.text for e in root.iter(f'{_SVG}style'))
  assert rules.startswith('@media (prefers-color-scheme: dark) {')
  given = [e.get('style') for e in root.iter() if e.get('style')]
  used = {c for text in given for c in re.findall(r'#[0-9a-f]{6}', text)}
  neutral = {c for c in used if c[1:3] == c[3:5] == c[5:7]}
  assert {style.WHITE, style.GREY, style.LIGHT_GREY, style.INK} <= neutral
  for color in neutral:
    rule = f'[style*="fill: {color}"] {{fill: {style.DARK[color]} !important}}'
    assert rule in rules


def test_colors_have_contrast_in_both_themes():
  dark = style.DARK
  for name, color in style.PALETTE.items():
    for background in (style.WHITE, dark[style.WHITE]):
      shown = dark.get(color, color) if background != style.WHITE else color
      assert _contrast(shown, background) > 2, (name, background)
  for color in (style.INK, style.GREY):  # Text: WCAG's 4.5.
    assert _contrast(color, style.WHITE) >= 4.5
    assert _contrast(style.DARK[color], style.DARK[style.WHITE]) >= 4.5


def _contrast(a, b):
  """The contrast ratio of WCAG 2."""
  values = []
  for color in (a, b):
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(
      rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4
    )
    values.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
  return max(values) / min(values)
