"""Tries an installed wheel like a user, from a separate folder.

Run VENV/bin/python tests/smoke.py with a Python that has dynconv-jax[train]
installed. Exits with status 0 if everything works.
"""

import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile

_TRAIN = (
  *('train', '--flagfile=spots_dynconv', '--workdir=run', '--data_dir=data'),
  *('--spots_size=24', '--spots_train=64', '--spots_test=20'),
  *('--image_size=24', '--epochs=1', '--batch_size=16'),
)


def main() -> None:
  """Runs the checks; the first failure raises an error."""
  top = {
    file.parts[0]
    for file in importlib.metadata.files('dynconv-jax')
    if file.suffix == '.py'
  }
  assert top == {'dynconv_jax'}, top
  program = pathlib.Path(sys.executable).with_name('dynconv')
  with tempfile.TemporaryDirectory() as folder:
    # Files in a user's folder belong to the user.
    own = pathlib.Path(folder, 'experiments')
    own.mkdir()
    (own / '__init__.py').touch()
    (own / 'train.py').write_text("print('mine')\n")

    def run(*command):
      print('$', *command, flush=True)
      return subprocess.run(
        command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
      ).stdout

    assert 'export onnx' in run(program, '--help')
    assert '--sparsity_weight=' in run(program, 'train', '--help')
    counted = run(program, 'count', '--model=resnet18', '--convention=conv')
    # torchvision's ResNet-18 at 224 pixels, without its classifier.
    assert json.loads(counted.splitlines()[-1])['total'] == 1_813_561_344
    run(program, *_TRAIN)
    tested = run(program, 'evaluate', '--workdir=run', '--split=test')
    assert json.loads(tested.splitlines()[-1])['num_examples'] == 20
    assert run(sys.executable, '-m', 'experiments.train') == 'mine\n'


if __name__ == '__main__':
  main()
