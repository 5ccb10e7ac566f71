"""Extracts and runs the commands and the code of documentation pages."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]

# Each program compiles for a few steps only.
_QUICK = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)
# Flags that make a command small; nothing else about it changes.
SMALLER = {
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


def blocks(page: str, language: str) -> list[str]:
  """Returns the code blocks of a page.

  Args:
    page: its path in the repository.
    language: of the blocks, such as 'bash'.
  """
  text = (ROOT / page).read_text()
  return re.findall(rf'```{language}[^\n]*\n(.*?)```', text, re.DOTALL)


def commands(page: str) -> list[str]:
  """Returns the commands in the bash blocks of a page, one per line."""
  lines = '\n'.join(blocks(page, 'bash')).replace('\\\n', '').splitlines()
  return [line.split('#')[0].strip() for line in lines if line.strip()]


def programs(page: str) -> list[str]:
  """Returns the commands of a page that run a program of this project."""
  return [line for line in commands(page) if line.startswith('python -m ')]


def run(
  command: str, folder: pathlib.Path, smaller: Sequence[str] | None = None
) -> str:
  """Returns the stdout of a program; raises an error if it fails.

  Args:
    command: one of `programs`.
    folder: where to run it; gets a copy of `experiments/`, for the flag files.
    smaller: flags to add; SMALLER if None.
  """
  if not (folder / 'experiments').exists():
    (folder / 'experiments').symlink_to(ROOT / 'experiments')
  _, _, program, *arguments = command.replace("'", '').split()
  if smaller is None:
    smaller = SMALLER.get(program.removeprefix('experiments.'), [])
  # The other run is the reader's own.
  if 'compare' in program and 'workdir/dense' in command:
    shutil.copytree(
      folder / 'workdir/spots', folder / 'workdir/dense', dirs_exist_ok=True
    )
  done = subprocess.run(
    [sys.executable, '-m', program, *arguments, *smaller],
    cwd=folder,
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {_QUICK}',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, f'{command}\n{done.stderr[-2000:]}'
  assert done.stdout.strip(), command
  return done.stdout
