"""Gates on tokens: a small vision transformer that skips tokens.

python -m examples.vit [--steps=400] [--budget=0.5]

Each transformer block decides per image and token whether to run. The cost of
its linear layers is proportional to the number of active tokens, that of
attention to its square. Prints the accuracy on drawn images and the MACs.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from dynconv_jax.data.augment import normalize
from dynconv_jax.data.spots import CLASS_NAMES, Options, draw
from dynconv_jax.losses import executed_fractions, sparsity_loss
from dynconv_jax.macs import count_macs
from dynconv_jax.masks import ExecutionMask, MaskedLayer
from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.methods.gumbel import binary_gumbel
from dynconv_jax.models.gated import Gating


class TokenGate(Gate):
  """Decides per image and token with a linear layer.

  Args:
    features: number of channels of a token.
    rngs: random streams; uses `params`.
  """

  def __init__(self, features: int, *, rngs: nnx.Rngs):
    super().__init__()
    self.score = nnx.Linear(
      features, 1, bias_init=nnx.initializers.constant(1.0), rngs=rngs
    )

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    logits = self.score(x)[..., 0]
    if self.deterministic:
      return Decision((logits >= 0).astype(jnp.float32)), carry
    hard = binary_gumbel(logits, self.key(rngs), temperature, gumbel_noise)
    return Decision(hard), carry


class TokenBlock(nnx.Module):
  """Attention among active tokens and an MLP. Other tokens do not change.

  Args:
    features: number of channels of a token.
    heads: number of attention heads.
    tokens: number of tokens.
    name: path of the block in the model.
    rngs: random streams; uses `params`.
  """

  def __init__(self, features, heads, tokens, *, name, rngs):
    self.name, self.heads = name, heads
    self.norm1 = nnx.LayerNorm(features, rngs=rngs)
    self.qkv = nnx.Linear(features, 3 * features, rngs=rngs)
    self.out = nnx.Linear(features, features, rngs=rngs)
    self.norm2 = nnx.LayerNorm(features, rngs=rngs)
    self.up = nnx.Linear(features, 2 * features, rngs=rngs)
    self.down = nnx.Linear(2 * features, features, rngs=rngs)
    self.gate = TokenGate(features, rngs=rngs)
    linear = {
      'qkv': self.qkv,
      'out': self.out,
      'up': self.up,
      'down': self.down,
    }
    self.layers = (
      *(
        MaskedLayer(f'{name}.{key}', layer.kernel.size)
        for key, layer in linear.items()
      ),
      # Products of queries and keys, and of weights and values.
      MaskedLayer(f'{name}', 2 * features, kind='pairs'),
    )

  def attend(self, x, mask):
    """Returns float[N, tokens, features], attending to active tokens."""
    n, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, -1)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    logits = jnp.einsum('nqhd,nkhd->nhqk', q, k) / q.shape[-1] ** 0.5
    # Multiplying by the mask passes a gradient to the gate.
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    weights = weights * mask[:, None, None, :]
    weights = weights / (jnp.sum(weights, -1, keepdims=True) + 1e-6)
    y = jnp.einsum('nhqk,nkhd->nqhd', weights, v)
    return self.out(y.reshape(n, tokens, -1))

  def __call__(self, x, gating: Gating):
    """Returns the tokens, float[N, tokens, features]."""
    shape = x.shape[:2]
    mask = gating.given(self.name, shape)
    if mask is None:
      mask = gating.ask(self.gate, x, shape).hard
    gating.add(ExecutionMask((mask,), self.name, self.layers))
    keep = mask[..., None]
    x = x + keep * self.attend(self.norm1(x), mask)
    return x + keep * self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
  """A small ViT (Dosovitskiy et al., ICLR 2021) with mean pooling of tokens.

  Args:
    num_classes: number of classes.
    size: side of the images in pixels.
    patch: side of a token in pixels.
    features: number of channels of a token.
    depth: number of blocks.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self,
    num_classes: int,
    size: int = 32,
    patch: int = 4,
    features: int = 64,
    depth: int = 4,
    *,
    rngs: nnx.Rngs,
  ):
    tokens = (size // patch) ** 2
    self.embed = nnx.Conv(3, features, (patch, patch), strides=patch, rngs=rngs)
    init = 0.02 * jax.random.normal(rngs.params(), (tokens, features))
    self.positions = nnx.Param(init)
    self.blocks = nnx.List(
      [
        TokenBlock(features, 4, tokens, name=f'blocks.{i}', rngs=rngs)
        for i in range(depth)
      ]
    )
    self.norm = nnx.LayerNorm(features, rngs=rngs)
    self.head = nnx.Linear(features, num_classes, rngs=rngs)

  def __call__(
    self, images, *, rngs=None, temperature=1.0, gumbel_noise=True, masks=None
  ):
    """Returns logits float32[N, classes] and the execution masks."""
    gating = Gating(
      rngs=rngs,
      temperature=temperature,
      gumbel_noise=gumbel_noise,
      masks=masks,
    )
    x = self.embed(images)
    x = x.reshape(len(x), -1, x.shape[-1]) + self.positions[...]
    for block in self.blocks:
      x = block(x, gating)
    return self.head(jnp.mean(self.norm(x), axis=1)), gating.finish()


def load(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32[N, 32, 32, 3] images and int[N] labels."""
  drawn = [draw(Options(), split, i) for i in range(count)]
  images = np.stack([image for image, _, _ in drawn])
  return np.asarray(normalize(images)), np.array([x for _, _, x in drawn])


def train(
  model: ViT, images: np.ndarray, labels: np.ndarray, steps: int, budget: float
) -> None:
  """Trains in place with cross-entropy and DynConv's sparsity loss."""
  graphdef, params = nnx.split(model)
  params = nnx.as_pure(params)
  tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

  @jax.jit
  def step(params, opt_state, images, labels, i):
    def loss_fn(params):
      key = jax.random.fold_in(jax.random.key(0), i)
      logits, masks = nnx.merge(graphdef, params)(
        images, rngs=nnx.Rngs(gumbel=key), gumbel_noise=i < steps / 2
      )
      loss = jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      )
      loss += 10 * sparsity_loss(masks, budget=budget, progress=i / steps)
      return loss, executed_fractions(masks)[0]

    grads, fraction = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, fraction

  opt_state, rng = tx.init(params), np.random.default_rng(0)
  for i in range(steps):
    chosen = rng.integers(len(images), size=64)
    params, opt_state, fraction = step(
      params, opt_state, images[chosen], labels[chosen], i
    )
    if i % 50 == 0:
      print(f'step {i}: executed {float(fraction):.3f}')
  nnx.update(model, params)


def evaluate(model: ViT, images: np.ndarray, labels: np.ndarray) -> dict:
  """Returns accuracy and MACs."""
  view = nnx.view(model, deterministic=True)
  logits, masks = jax.jit(lambda x: view(x))(images)
  report = count_macs(view, images[:1], convention='conv+linear')
  return {
    'accuracy': float(np.mean(np.argmax(logits, -1) == labels)),
    'dense_mmacs': report.total / 1e6,
    'executed_mmacs': float(np.mean(report.executed(masks))) / 1e6,
    'tokens': {m.name: float(m.density().mean()) for m in masks},
  }


def main(argv: list[str]) -> None:
  """Trains and evaluates the network, and prints JSON."""
  del argv
  model = ViT(len(CLASS_NAMES), rngs=nnx.Rngs(0))
  train(model, *load('train', 3000), _STEPS.value, _BUDGET.value)
  print(json.dumps(evaluate(model, *load('test', 500))))


if __name__ == '__main__':
  # Defined here because tests import this file.
  _STEPS = flags.DEFINE_integer('steps', 400, 'Training steps.')
  _BUDGET = flags.DEFINE_float('budget', 0.5, 'Target executed fraction.')
  app.run(main)
