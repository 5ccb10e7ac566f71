"""A custom backbone: depthwise 5x5 blocks on patches of the image.

python -m experiments.train --model=examples.backbone:patch_net \
  --flagfile=experiments/flags/spots_dynconv.flags --workdir=workdir/patch_net

Every method, the MAC counter, sparse execution, and ponder maps work with it.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.methods.gate import GateSite
from dynconv_jax.models.gated import GatedBlock, Gating


class PatchNet(nnx.Module):
  """A stem with stride 2, gated blocks in two stages, and a linear head.

  Args:
    num_classes: number of classes.
    gate: function that returns the gate of a site, or None for no gate.
    dtype: compute dtype.
    width_multiplier: multiplier of the number of channels.
    depth: number of blocks per stage.
    rngs: random streams; uses `params`.
  """

  # Sparse networks fold this convolution and batch norm into one.
  foldable = (('stem', 'norm'),)

  def __init__(
    self, *, num_classes, gate, dtype, width_multiplier, depth, rngs
  ):
    width = int(32 * width_multiplier)
    self.dtype = dtype
    self.stem = conv(3, width, 3, strides=2, dtype=dtype, rngs=rngs)
    self.norm = BatchNorm(width, activation='relu', rngs=rngs)
    self.stages = nnx.List([])
    features, index = width, 0
    for stage in range(2):
      blocks = nnx.List([])
      for i in range(depth):
        out, strides = width * 2**stage, 2 if stage and not i else 1
        site = GateSite(
          name=f'stages.{stage}.{i}',
          index=index,
          stage=stage,
          stage_index=i,
          in_features=features,
          strides=strides,
          identity=features == out and strides == 1,
        )
        # Describes what the block computes. Sparse execution, MAC counting, and
        # export use this description.
        branch = Branch(
          (
            Conv('expand', 'bn1', features, 2 * out, activation='relu'),
            Conv('depth', 'bn2', 2 * out, 2 * out, 5, strides, 2 * out, 'relu'),
            Conv('project', 'bn3', 2 * out, out),
          ),
          activation='relu',
          shortcut='identity' if site.identity else 'projection',
          input_activated=True,
        )
        blocks.append(
          GatedBlock(
            branch,
            name=site.name,
            stage=stage,
            gate=gate(site),
            dtype=dtype,
            rngs=rngs,
          )
        )
        features, index = out, index + 1
      self.stages.append(blocks)
    self.head = nnx.Linear(features, num_classes, rngs=rngs)

  def __call__(self, images, **kwargs):
    """Returns logits float32[N, num_classes] and the execution masks."""
    gating = Gating(**kwargs)
    x = self.norm(self.stem(images.astype(self.dtype)))
    for blocks in self.stages:
      for block in blocks:
        x = block(x, gating)
      x = gating.end_stage(x)
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return self.head(x), gating.finish()


def patch_net(
  *, num_classes, gate, dtype, rngs, width_multiplier=1.0, depth=3
) -> PatchNet:
  """Returns the network. Its option `depth` becomes a flag."""
  return PatchNet(
    num_classes=num_classes,
    gate=gate,
    dtype=dtype,
    width_multiplier=width_multiplier,
    depth=depth,
    rngs=rngs,
  )
