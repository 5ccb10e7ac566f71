"""Evaluates a network whose masks are the objects' true places.

python -m benchmarks.oracle --workdir=workdir/RUN --split=test

Needs data that knows its objects: scenes, or drawn images. A position is
active where its cell touches the object. Prints a Markdown table: the run as it
is, the oracle on the blocks with an identity shortcut, and the oracle on all
blocks. Nothing is trained for these masks. Their MACs, dilation included, are a
floor for masks that cover the object.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from dynconv_jax.cli import config_flags, program
from dynconv_jax.macs import count_macs
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.statistics import paired_bootstrap
from dynconv_jax.training import evaluation, inputs, workdir
from dynconv_jax.training.config import DataConfig

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run to evaluate.', required=True
)
_SPLIT = flags.DEFINE_string('split', 'validation', 'Split to evaluate on.')
_PLACES = config_flags.define_places()


def touched(objects: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Returns bool[N, h, w]: cells that touch the object.

  Args:
    objects: bool[N, H, W].
    size: (h, w) of the result, at most (H, W).
  """

  def cells(length, number):  # bool[number, length]: which pixels are a cell's.
    first = np.arange(number) * length // number
    last = -(-(np.arange(number) + 1) * length // number)
    pixel = np.arange(length)
    return (first[:, None] <= pixel) & (pixel < last[:, None])

  rows, columns = map(cells, objects.shape[1:], size)
  return jnp.einsum('hH,nHW,wW->nhw', *(rows, objects, columns)) > 0


def make_oracle(model: nnx.Module, blocks: Sequence[str]):
  """Returns the jitted (images, bool[N, H, W] objects) -> (logits, masks).

  Args:
    model: an evaluation view; its own gates are not asked.
    blocks: names of the blocks that the masks hold for; all others run
      everywhere.
  """
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, batch):
    images, objects = batch
    network = nnx.merge(graphdef, state)
    everywhere = {
      block.name: jnp.ones((len(images), 1, 1))
      for block in gated_blocks(network)
    }
    shapes = jax.eval_shape(lambda x: network(x, masks=everywhere), images)[1]
    sizes = {mask.name: mask.hard.shape[1:] for mask in shapes}
    return network(
      images, masks={name: touched(objects, sizes[name]) for name in blocks}
    )

  return functools.partial(run, state)


def main(argv: Sequence[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  folder = pathlib.Path(_WORKDIR.value).expanduser().absolute()
  given = {name: flags.FLAGS[name].value for name in _PLACES}
  given = {name: value for name, value in given.items() if value is not None}
  data = workdir.read_part(folder, DataConfig, given)
  source = inputs.open_split(data, _SPLIT.value)
  run = workdir.load_run(folder, best=False)
  batches = inputs.eval_batches(
    data, source, image_size=run.image_size, batch_size=250
  )
  if 'object_mask' not in next(iter(batches)):
    raise ValueError(
      'the oracle needs data that knows its objects: set scene_size and '
      f'object_size, or dataset=spots; {folder} has neither'
    )
  blocks = gated_blocks(run.model)
  chosen = {
    'none (the run as it is)': [],
    'identity': [b.name for b in blocks if b.branch.shortcut == 'identity'],
    'all': [b.name for b in blocks],
  }
  size = run.image_size
  report = count_macs(
    run.model,
    jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
    convention='conv',
  )
  pairs = [
    {**batch, 'image': (batch['image'], batch['object_mask'])}
    for batch in batches
  ]
  print(
    '| blocks with the true masks | accuracy | difference in points (paired '
    '95 % interval) | GMACs | share of positions |\n|---|---|---|---|---|'
  )
  correct = None
  for label, names in chosen.items():
    found = evaluation.evaluate(make_oracle(run.model, names), pairs, report)
    difference = ''
    if correct is None:
      correct = found.correct
    else:
      result = paired_bootstrap([found.correct], [correct])
      difference = (
        f'{100 * result.value:+.1f} ({100 * result.low:+.1f} to '
        f'{100 * result.high:+.1f})'
      )
    share = f'{found.densities.mean():.3f}' if names else ''
    print(
      f'| {label} | {found.correct.mean():.3f} | {difference} | '
      f'{found.macs.mean() / 1e9:.3f} | {share} |'
    )


if __name__ == '__main__':
  program.run(main)
