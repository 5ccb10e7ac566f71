# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Put gates into your own network
#
# This tutorial builds a small residual network, adds DynConv's gates, trains
# it, counts what it executes, shows where it looks, and runs it sparsely. It
# takes a minute or two on a CPU. The page is an executed script: download it,
# or open it as a notebook with
# [jupytext](https://jupytext.readthedocs.io).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from dynconv_jax.data import spots
from dynconv_jax.data.augment import denormalize, normalize
from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.losses import executed_fractions, sparsity_loss
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.mask_unit import MaskUnit
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.models.gated import Gating
from dynconv_jax.plotting import ponder_cost_map
from dynconv_jax.sparse import sparsify

# %% [markdown]
# ## The network
#
# Three things make a network gated:
#
# 1. Its residual blocks are `GatedBlock`s, here `BasicBlock`s. Each takes a
#    `gate`; `None` leaves a block dense.
# 2. `__call__` creates one `Gating`, passes it to every block, and returns
#    `gating.finish()`, one execution mask per gated block.
# 3. `foldable` names the other pairs of convolution and batch norm, for sparse
#    execution.
#
# A `MaskUnit` decides per position. Any other `Gate` works as well, including
# your own.

# %%
SHAPES = [(24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1)]


class Net(nnx.Module):
  foldable = (('stem', 'norm'),)

  def __init__(self, num_classes, *, rngs):
    self.stem = conv(3, 24, 3, strides=2, rngs=rngs)
    self.norm = BatchNorm(24, activation='relu', rngs=rngs)
    self.blocks = nnx.List(
      [
        BasicBlock(
          in_features,
          features,
          strides,
          name=f'blocks.{i}',
          gate=MaskUnit(in_features, strides=strides, rngs=rngs),
          input_activated=True,  # Each block reads the output of a ReLU.
          rngs=rngs,
        )
        for i, (in_features, features, strides) in enumerate(SHAPES)
      ]
    )
    self.head = nnx.Linear(48, num_classes, rngs=rngs)

  def __call__(self, images, **kwargs):
    gating = Gating(**kwargs)
    x = self.norm(self.stem(images))
    for block in self.blocks:
      x = block(x, gating)
    return self.head(jnp.mean(x, axis=(1, 2))), gating.finish()


model = Net(len(spots.CLASS_NAMES), rngs=nnx.Rngs(0))
for block in model.blocks:
  block.masker.open(2.0)  # Masks start open and close during training.

# %% [markdown]
# ## The data
#
# Drawn images: a textured background with clutter, and one small object that
# alone decides the class. Its true mask is known, so we can check that the
# network looks at the right place.


# %%
def load(split, count):
  drawn = [spots.draw(spots.Options(), split, i) for i in range(count)]
  images, objects, labels = map(np.stack, zip(*drawn, strict=True))
  return np.asarray(normalize(images)), objects, labels


images, _, labels = load('train', 1500)
test_images, test_objects, test_labels = load('test', 200)

# %% [markdown]
# ## Training
#
# Gates sample with Gumbel noise, so a training call needs `rngs` with a stream
# `gumbel`. The loss is cross-entropy plus DynConv's sparsity loss, whose target
# falls from 1 to the budget in the first half. The last third has no noise, so
# that training makes the same decisions as evaluation.

# %%
STEPS, BATCH, BUDGET = 450, 64, 0.4
optimizer = nnx.Optimizer(
  model, optax.adam(optax.cosine_decay_schedule(3e-3, STEPS)), wrt=nnx.Param
)


@nnx.jit
def train_step(model, optimizer, key, images, labels, progress):
  def loss_fn(model):
    logits, masks = model(
      images, rngs=nnx.Rngs(gumbel=key), gumbel_noise=progress < 2 / 3
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    target = 1 - (1 - BUDGET) * jnp.minimum(1.0, 2 * progress)
    sparsity = sparsity_loss(masks, budget=target, progress=progress)
    return jnp.mean(loss) + 10 * sparsity, executed_fractions(masks)[0]

  (loss, fraction), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
  optimizer.update(model, grads)
  return loss, fraction


key, order = jax.random.key(0), np.random.default_rng(0)
for i in range(STEPS):
  chosen = order.integers(len(images), size=BATCH)
  loss, fraction = train_step(
    model,
    optimizer,
    jax.random.fold_in(key, i),
    images[chosen],
    labels[chosen],
    i / STEPS,
  )
  if i % 75 == 74:
    print(f'step {i + 1}: loss {loss:.3f}, executed fraction {fraction:.3f}')

# %% [markdown]
# ## What it executes
#
# `nnx.view` switches the network to evaluation: no noise, running statistics.
# `count_macs` counts the dense MACs layer by layer, and
# `report.executed(masks)` returns the MACs that each image needs.

# %%
view = nnx.view(model, deterministic=True, use_running_average=True)
logits, masks = jax.jit(lambda x: view(x))(test_images)
accuracy = float(np.mean(np.argmax(logits, -1) == test_labels))
report = count_macs(view, test_images[:1], convention='conv')
executed = float(np.mean(report.executed(masks)))
print(f'accuracy {accuracy:.3f}')
print(f'{executed / 1e6:.2f} of {report.total / 1e6:.2f} million MACs')
for mask in masks:
  print(f'{mask.name}: density {mask.density().mean():.3f}')

# %% [markdown]
# ## Where it looks
#
# The ponder map sums the masks of all blocks at each pixel.

# %%
cost = np.asarray(ponder_cost_map(masks, test_images.shape[1:3]))
figure, axes = plt.subplots(2, 6, figsize=(9, 3))
for i in range(6):
  axes[0, i].imshow(denormalize(test_images[i]))
  axes[1, i].imshow(cost[i], cmap='inferno', vmin=0)
for ax in axes.flat:
  ax.set_axis_off()
on_object = float(cost[test_objects].mean() / cost.mean())
print(f'object pixels get {on_object:.1f} times the average computation')

# %% [markdown]
# ## Sparse execution
#
# `sparsify` copies the network and replaces its blocks with ones that run at
# active positions only. The logits are the same up to rounding. On maps as
# small as these it is not faster: [when it
# pays](../sparse_execution.md#when-it-pays).

# %%
sparse = sparsify(view)
sparse_logits, _ = jax.jit(lambda x: sparse(x))(test_images)
scale = float(np.max(np.abs(logits)))
np.testing.assert_allclose(sparse_logits, logits, rtol=0, atol=1e-5 * scale)

# %% [markdown]
# ## What next
#
# - For a block of another shape, describe its convolutions with a `Branch`, as
#   `examples/backbone.py` does. Masks, MAC counts, and sparse execution are
#   derived from it.
# - For other tasks, see `examples/unet.py`, which segments, and
#   `examples/vit.py`, which drops tokens.
# - For the command line, write a factory that takes `num_classes`, `gate`,
#   `dtype`, `width_multiplier`, and `rngs`. It trains with every method:
#   `--model=package.module:factory`.
