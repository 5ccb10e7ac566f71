"""Tests that the wheel contains what a user needs, and nothing else."""

import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def _run(*command, cwd=None):
  done = subprocess.run(
    list(map(str, command)),
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
  )
  assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
def test_a_wheel_serves_from_a_folder_of_the_users(tmp_path):
  source = tmp_path / 'source'
  ignored = shutil.ignore_patterns('.*', '__pycache__', 'workdir', 'build')
  # A build leaves folders behind.
  shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
  address = 'https://example.org/owner/name'
  _run(
    sys.executable, ROOT / '.github/release_urls.py', address, 'v1', cwd=source
  )
  pip = (sys.executable, '-m', 'pip', '--quiet')
  _run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index',
       f'--wheel-dir={tmp_path}', source)  # fmt: skip
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as file:
    names = set(file.namelist())
    (metadata,) = (name for name in names if name.endswith('/METADATA'))
    metadata = file.read(metadata).decode()
  for path in ROOT.glob('experiments/flags/*.flags'):
    assert f'dynconv_jax/cli/flags/{path.name}' in names
  for name in ('py.typed', 'cli/help/train.txt', 'native/team.h'):
    assert f'dynconv_jax/{name}' in names
  assert f'Project-URL: Source, {address}\n' in metadata
  assert re.search(rf'!\[.*\]\({address}/raw/v1/results/.*\.png\)', metadata)
  links = re.findall(r'\]\(([^)]*)\)', metadata)
  assert len(links) > 20
  assert [link for link in links if not link.startswith('https://')] == []
  _run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv')
  python = tmp_path / 'venv/bin/python'
  _run(*pip, f'--python={python}', 'install', '--no-deps', '--no-index', wheel)
  # Dependencies are taken from this environment.
  (site,) = (tmp_path / 'venv').glob('lib/python*/site-packages')
  (site / 'outer.pth').write_text(sysconfig.get_path('purelib') + '\n')
  _run(python, ROOT / 'tests/smoke.py')
