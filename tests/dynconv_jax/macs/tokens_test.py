"""Tests of token masks, against networks that only see the remaining tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax import macs
from dynconv_jax.masks import ExecutionMask, MaskedLayer

count = functools.partial(macs.count_macs, convention='conv+linear')

_TOKENS, _SIZE = 12, 8


class Layer(nnx.Module):
  """A pre-norm transformer layer."""

  def __init__(self, fused, rngs):
    self.norm1 = nnx.LayerNorm(_SIZE, rngs=rngs)
    self.fused = fused
    if fused:
      self.qkv = nnx.Linear(_SIZE, 3 * _SIZE, rngs=rngs)
      self.out = nnx.Linear(_SIZE, _SIZE, rngs=rngs)
    else:
      self.attn = nnx.MultiHeadAttention(2, _SIZE, decode=False, rngs=rngs)
    self.norm2 = nnx.LayerNorm(_SIZE, rngs=rngs)
    self.fc1 = nnx.Linear(_SIZE, 4 * _SIZE, rngs=rngs)
    self.fc2 = nnx.Linear(4 * _SIZE, _SIZE, rngs=rngs)

  def __call__(self, x):
    y = self.norm1(x)
    if self.fused:
      heads = self.qkv(y).reshape(*y.shape[:2], 3, 2, _SIZE // 2)
      q, k, v = jnp.moveaxis(heads, 2, 0)
      scores = jnp.einsum('nqhd,nkhd->nhqk', q, k)
      y = jnp.einsum('nhqk,nkhd->nqhd', jax.nn.softmax(scores), v)
      y = self.out(y.reshape(x.shape))
    else:
      y = self.attn(y)
    x = x + y
    return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x))))


class Transformer(nnx.Module):
  def __init__(self, fused, rngs):
    self.layers = nnx.List([Layer(fused, rngs) for _ in range(2)])
    self.head = nnx.Linear(_SIZE, 3, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.head(jnp.mean(x, axis=1))


def masked(name, level=0, kind='positions') -> MaskedLayer:
  # The report determines the MACs; the value in the mask, 0, is not used.
  return MaskedLayer(name, 0, level, kind)


def mask_of(maps, layers) -> ExecutionMask:
  return ExecutionMask(maps, 'block', layers)


def masked_layers(index, fused):
  names = ('qkv', 'out') if fused else (f'attn.{n}' for n in _PROJECTIONS)
  around = f'layers.{index}'
  # The products of attention belong to the module that computes them.
  products = around if fused else f'{around}.attn'
  return (
    *(masked(f'{around}.{name}') for name in (*names, 'fc1', 'fc2')),
    masked(products, kind='pairs'),
  )


_PROJECTIONS = ('query', 'key', 'value', 'out')


def tokens(batch, number):
  return jax.ShapeDtypeStruct((batch, number, _SIZE), jnp.float32)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('batch', [1, 3])
def test_masked_tokens_cost_what_is_left(fused, batch):
  model = Transformer(fused, nnx.Rngs(0))
  counted = count(model, tokens(batch, _TOKENS))
  left = [_TOKENS, 5, 1, 0]
  keep = np.float32([np.arange(_TOKENS)[::-1] < n for n in left])
  masks = [mask_of((keep,), masked_layers(i, fused)) for i in range(2)]
  executed = counted.executed(masks)
  assert executed[0] == counted.total / batch
  for n, macs_of_image in zip(left, executed, strict=True):
    assert macs_of_image == count(model, tokens(1, n)).total
  # One layer prunes, and the other, of the same size, keeps all tokens.
  keep_all = mask_of((np.ones_like(keep),), masks[1].layers)
  np.testing.assert_array_equal(
    counted.executed([masks[0], keep_all]), (executed + executed[0]) / 2
  )


def test_positions_are_those_of_the_output():
  weights = jax.ShapeDtypeStruct((8, 5), jnp.float32)
  x = tokens(2, _TOKENS)

  def positions(f, *args):
    (layer,) = count(f, *args).by_layer.values()
    return layer.positions

  assert positions(lambda x, w: x @ w, x, weights) == 2 * _TOKENS
  assert positions(
    lambda x, w: jnp.einsum('io,nti->ont', w, x), x, weights
  ) == (2 * _TOKENS)
  stacked = jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)

  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

  assert positions(layers, x, stacked) == 4 * 2 * _TOKENS
  # A product of two activations has tokens on both sides.
  assert positions(lambda x: jnp.sin(x) @ jnp.cos(x).mT, x) == 0


def test_a_report_in_conv_says_what_prices_tokens():
  counted = macs.count_macs(
    Transformer(True, nnx.Rngs(0)), tokens(1, _TOKENS), convention='conv'
  )
  assert counted.total == 0
  mask = mask_of((np.ones((1, _TOKENS)),), masked_layers(0, True))
  with pytest.raises(ValueError, match=r"'conv\+linear' counts them"):
    counted.executed([mask])
