"""Gates in a U-Net: image segmentation with dynamic convolutions.

python -m examples.unet [--steps=300] [--budget=0.3] [--output=DIR]

The task is to find the pixels of the object in a drawn image. The encoder and
the decoder consist of gated blocks, which decide per position whether to run.
Prints the intersection over union, the MACs, and the difference between sparse
and masked dense execution. Writes ponder maps to --output.
"""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from dynconv_jax.data.augment import denormalize, normalize
from dynconv_jax.data.spots import Options, draw
from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.losses import executed_fractions, sparsity_loss
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.mask_unit import MaskUnit
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.models.gated import Gating
from dynconv_jax.plotting.ponder import plot_ponder_grid, ponder_cost_map
from dynconv_jax.sparse import SparseExecutor


class UNet(nnx.Module):
  """A small U-Net (Ronneberger et al., MICCAI 2015) of gated residual blocks.

  Args:
    width: number of channels at full resolution.
    rngs: random streams; uses `params`.
  """

  foldable = (('conv1', 'bn1'),)

  def __init__(self, width: int = 16, *, rngs: nnx.Rngs):
    def block(name, in_features, features, strides=1):
      return BasicBlock(
        in_features,
        features,
        strides,
        name=name,
        gate=MaskUnit(in_features, strides=strides, rngs=rngs),
        input_activated=True,
        rngs=rngs,
      )

    self.conv1 = conv(3, width, 3, rngs=rngs)
    self.bn1 = BatchNorm(width, activation='relu', rngs=rngs)
    self.encode1 = block('encode1', width, width)
    self.encode2 = block('encode2', width, 2 * width, 2)
    self.encode3 = block('encode3', 2 * width, 4 * width, 2)
    self.decode2 = block('decode2', 6 * width, 2 * width)
    self.decode1 = block('decode1', 3 * width, width)
    self.head = nnx.Conv(width, 1, (1, 1), rngs=rngs)

  def __call__(
    self, images, *, rngs=None, temperature=1.0, gumbel_noise=True, masks=None
  ):
    """Returns logits float32[N, H, W] and the execution masks."""
    gating = Gating(
      rngs=rngs,
      temperature=temperature,
      gumbel_noise=gumbel_noise,
      masks=masks,
    )
    full = self.encode1(self.bn1(self.conv1(images)), gating)
    half = self.encode2(full, gating)
    x = self.encode3(half, gating)
    x = self.decode2(jnp.concatenate([_upsample(x), half], -1), gating)
    x = self.decode1(jnp.concatenate([_upsample(x), full], -1), gating)
    return self.head(x)[..., 0], gating.finish()


def _upsample(x):
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def load(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32[N, 32, 32, 3] images and bool[N, 32, 32] objects."""
  drawn = [draw(Options(), split, i) for i in range(count)]
  images = np.stack([image for image, _, _ in drawn])
  return np.asarray(normalize(images)), np.stack([m for _, m, _ in drawn])


def train(
  model: UNet,
  images: np.ndarray,
  objects: np.ndarray,
  steps: int,
  budget: float,
) -> None:
  """Trains in place with cross-entropy and DynConv's sparsity loss."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  params, rest = nnx.as_pure((params, rest))
  tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

  @jax.jit
  def step(params, rest, opt_state, images, objects, i):
    def loss_fn(params):
      network = nnx.merge(graphdef, params, rest)
      key = jax.random.fold_in(jax.random.key(0), i)
      logits, masks = network(
        images,
        rngs=nnx.Rngs(gumbel=key),
        # In the second half, decisions are those of evaluation.
        gumbel_noise=i < steps / 2,
      )
      loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, objects))
      # At progress 0, the loss holds each block to the budget, not only their
      # sum.
      loss += 10 * sparsity_loss(masks, budget=budget, progress=0.0)
      rest_now = nnx.as_pure(nnx.split(network, nnx.Param, ...)[2])
      return loss, (rest_now, executed_fractions(masks)[0])

    grads, (rest, fraction) = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), rest, opt_state, fraction

  opt_state, rng = tx.init(params), np.random.default_rng(0)
  for i in range(steps):
    chosen = rng.integers(len(images), size=32)
    params, rest, opt_state, fraction = step(
      params, rest, opt_state, images[chosen], objects[chosen], i
    )
    if i % 50 == 0:
      print(f'step {i}: executed {float(fraction):.3f}')
  nnx.update(model, params, rest)


def evaluate(model: UNet, images: np.ndarray, objects: np.ndarray) -> dict:
  """Returns the IoU, MACs, and the difference between sparse and dense."""
  view = nnx.view(model, deterministic=True, use_running_average=True)
  logits, masks = jax.jit(lambda x: view(x))(images)
  found = np.asarray(logits) > 0
  iou = (found & objects).sum() / (found | objects).sum()
  report = count_macs(view, images[:1], convention='conv')
  sparse, stats = SparseExecutor(view, images.shape)(images, return_masks=True)
  return {
    'iou': float(iou),
    'dense_mmacs': report.total / 1e6,
    'executed_mmacs': float(np.mean(report.executed(masks))) / 1e6,
    'block_density': {
      mask.name: float(mask.density().mean()) for mask in stats.masks
    },
    'sparse_difference': float(
      jnp.max(jnp.abs(sparse - logits)) / jnp.max(jnp.abs(logits))
    ),
  }


def main(argv: list[str]) -> None:
  """Trains and evaluates the network, prints JSON, and draws ponder maps."""
  del argv
  model = UNet(rngs=nnx.Rngs(0))
  train(model, *load('train', 1500), _STEPS.value, _BUDGET.value)
  images, objects = load('test', 200)
  print(json.dumps(evaluate(model, images, objects)))
  if _OUTPUT.value:
    view = nnx.view(model, deterministic=True, use_running_average=True)
    _, masks = view(images[:6])
    plot_ponder_grid(
      denormalize(images[:6]),
      ponder_cost_map(masks, images.shape[1:3]),
      count_macs(view, images[:1], convention='conv').executed(masks) / 1e9,
      [f'image {i}' for i in range(6)],
      pathlib.Path(_OUTPUT.value).expanduser() / 'ponder_maps.png',
    )


if __name__ == '__main__':
  # Defined here because tests import this file.
  _STEPS = flags.DEFINE_integer('steps', 300, 'Training steps.')
  _BUDGET = flags.DEFINE_float('budget', 0.3, 'Target executed fraction.')
  _OUTPUT = flags.DEFINE_string('output', None, 'Folder for the ponder maps.')
  app.run(main)
