"""Evaluates a network with the objects' true masks (an oracle).

python -m benchmarks.oracle --workdir=workdir/RUN --split=test \\
  [--train_workdir=workdir/RUN_oracle]

Needs data with object masks: scenes or spots. A position is active if its cell
touches the object. Prints a Markdown table of the unchanged run, the oracle on
blocks with an identity shortcut, and the oracle on all blocks. The network was
not trained with these masks. Their MACs, including dilation, are a lower bound
for masks that cover the object.

--train_workdir repeats the training of the run with the true masks in all
blocks that run at all, and adds the result to the table.
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
from dynconv_jax.training import evaluation, inputs, loop, workdir
from dynconv_jax.training.config import DataConfig

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run to evaluate.', required=True
)
_TRAIN_WORKDIR = flags.DEFINE_string(
  'train_workdir', None, 'Folder of a run trained with the true masks.'
)
_SPLIT = flags.DEFINE_string('split', 'validation', 'Split to evaluate on.')
_PLACES = config_flags.define_places()


def touched(objects: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Returns bool[N, h, w], true for cells that touch the object.

  Args:
    objects: bool[N, H, W], true in objects.
    size: (h, w) of the result, at most (H, W).
  """

  def cells(length, number):  # bool[number, length], the pixels of each cell.
    first = np.arange(number) * length // number
    last = -(-(np.arange(number) + 1) * length // number)
    pixel = np.arange(length)
    return (first[:, None] <= pixel) & (pixel < last[:, None])

  rows, columns = map(cells, objects.shape[1:], size)
  return jnp.einsum('hH,nHW,wW->nhw', *(rows, objects, columns)) > 0


def make_oracle(model: nnx.Module, blocks: Sequence[str]):
  """Returns a jitted function (images, objects) -> (logits, masks).

  `objects` is bool[N, H, W].

  Args:
    model: an evaluation view; where its gates close, they stay closed.
    blocks: names of the blocks that use the true masks; others run everywhere.
  """
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, batch):
    images, objects = batch
    network = nnx.merge(graphdef, state)
    sizes = _sizes(network, images)
    # Blocks that the run itself skips, such as dropped ones, stay skipped.
    own = {mask.name: mask.hard for mask in network(images)[1]}
    masks = {
      name: touched(objects, sizes[name]) * own.get(name, 1) for name in blocks
    }
    return network(images, masks=masks)

  return functools.partial(run, state)


def true_masks(model: nnx.Module, image_size: int):
  """Returns a function from a batch to the true masks of the blocks that run.

  The batch has 'object_mask', bool[N, H, W].

  Args:
    model: an evaluation view of a network without gates. Dropped blocks get no
      mask.
    image_size: side of the network's input, in pixels.

  Raises:
    ValueError: the network has gates.
  """
  image = jnp.zeros((1, image_size, image_size, 3))
  own = model(image)[1]
  if any(mask.hard.any() for mask in own):
    raise ValueError('train_workdir needs a run without gates of its own')
  sizes = _sizes(model, image)
  for mask in own:
    del sizes[mask.name]

  def masks(batch):
    return {
      name: touched(batch['object_mask'], size) for name, size in sizes.items()
    }

  return masks


def _sizes(network: nnx.Module, images: jax.Array) -> dict[str, tuple]:
  """Returns the size (h, w) of each block's mask."""
  everywhere = {
    block.name: jnp.ones((len(images), 1, 1)) for block in gated_blocks(network)
  }
  shapes = jax.eval_shape(lambda x: network(x, masks=everywhere), images)[1]
  return {mask.name: mask.hard.shape[1:] for mask in shapes}


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
      'the oracle needs object masks: set scene_size and object_size, or '
      f'dataset=spots; {folder} has neither'
    )
  blocks = gated_blocks(run.model)
  identity = [b.name for b in blocks if b.branch.shortcut == 'identity']
  every = [b.name for b in blocks]
  cases = [
    ('none (unchanged run)', run.model, []),
    ('identity', run.model, identity),
    ('all', run.model, every),
  ]
  if _TRAIN_WORKDIR.value:
    if not data.scenes():
      raise ValueError('train_workdir needs scene_size and object_size')
    masks = true_masks(run.model, run.image_size)
    trained = pathlib.Path(_TRAIN_WORKDIR.value).expanduser().absolute()
    config = workdir.read_config(folder)
    config = config.replace(**given, validation_split='')
    loop.train(config, trained, masks=masks)
    model = workdir.load_run(trained, best=False).model
    cases.append(('all, trained with them', model, every))
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
    '| blocks with true masks | accuracy | difference in points (paired 95 % '
    'interval) | GMACs | density |\n|---|---|---|---|---|'
  )
  correct = None
  for label, model, names in cases:
    result = evaluation.evaluate(make_oracle(model, names), pairs, report)
    difference = ''
    if correct is None:
      correct = result.correct
    else:
      estimate = paired_bootstrap([result.correct], [correct])
      difference = (
        f'{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to '
        f'{100 * estimate.high:+.1f})'
      )
    density = f'{result.densities.mean():.3f}' if names else ''
    print(
      f'| {label} | {result.correct.mean():.3f} | {difference} | '
      f'{result.macs.mean() / 1e9:.3f} | {density} |'
    )


if __name__ == '__main__':
  program.run(main)
