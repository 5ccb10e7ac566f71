"""Tests of gated blocks as ONNX nodes, against the blocks' forward pass."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.forced import force_gates
from dynconv_jax.branch import Branch, Conv
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.models.gated import GatedBlock, Gating

pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
pytest.importorskip('onnxruntime', reason='pip install dynconv_jax[onnx]')

from onnx_export import (  # noqa: E402
  SIZE,
  assert_exported,
  count_nodes,
  forced,
  make_images,
  randomize,
)

from dynconv_jax.macs.onnx import count_macs as count_onnx_macs  # noqa: E402
from dynconv_jax.sparse.onnx import export_onnx  # noqa: E402


class Halves(Gate):
  """Executes where the mean of the features is above that of the image."""

  def __init__(self, strides=1):
    super().__init__()
    self.strides = strides

  def __call__(self, x, carry=None, **kwargs):
    x = jnp.mean(x.astype(jnp.float32), axis=-1)[
      :, :: self.strides, :: self.strides
    ]
    hard = x > jnp.mean(x, axis=(1, 2), keepdims=True)
    return Decision(hard.astype(jnp.float32)), carry


class Network(nnx.Module):
  """Any blocks, one after another."""

  def __init__(self, blocks, dtype=jnp.float32):
    self.blocks, self.dtype = nnx.List(blocks), dtype

  def __call__(self, images, masks=None):
    gating = Gating(masks=masks)
    x = images.astype(self.dtype)
    for block in self.blocks:
      x = block(x, gating)
    return x.astype(jnp.float32), gating.finish()


def network(*branches, dtype=jnp.float32):
  rngs = nnx.Rngs(0)
  blocks = [
    GatedBlock(
      branch,
      name=f'block{i}',
      gate=Halves(branch.strides),
      dtype=dtype,
      rngs=rngs,
    )
    for i, branch in enumerate(branches)
  ]
  return randomize(Network(blocks, dtype))


def inverted(kernel_size, strides, activation, padding, shortcut):
  """Returns a branch as in mobile networks."""
  wide = 12
  return Branch(
    (
      Conv('expand', 'bn1', 3, wide, activation=activation),
      Conv(
        'depthwise',
        'bn2',
        wide,
        wide,
        kernel_size,
        strides,
        wide,
        activation,
        padding,
      ),
      Conv('project', 'bn3', wide, 3),
    ),
    activation=None,
    shortcut=shortcut,
  )


BRANCHES = {
  'depthwise 5x5': inverted(5, 1, 'relu6', 'symmetric', 'identity'),
  'depthwise 5x5 strided same': inverted(5, 2, 'silu', 'same', 'none'),
  'depthwise 3x3 strided': inverted(3, 2, 'relu6', 'symmetric', 'projection'),
  'depthwise first': Branch(
    (
      Conv('conv1', 'bn1', 3, 6, 3, 2, 3, 'silu', 'same'),
      Conv('conv2', 'bn2', 6, 3, 3, 1, 1, 'gelu'),
    ),
    activation='silu',
    shortcut='projection',
  ),
  'groups': Branch(
    (
      Conv('conv1', 'bn1', 3, 8, 1, 1, 1, 'gelu'),
      Conv('conv2', 'bn2', 8, 12, 3, 1, 4, 'relu'),
      Conv('conv3', 'bn3', 12, 3, 1, 1, 3),
    ),
    activation='gelu',
  ),
  'strides of three and one': Branch(
    (
      Conv('conv1', 'bn1', 3, 6, 5, 3, 1, 'relu', 'same'),
      Conv('conv2', 'bn2', 6, 6, 3, 2, 1, 'relu', 'same'),
      Conv('conv3', 'bn3', 6, 5, 3, 1, 1),
    ),
    shortcut='none',
  ),
  'strided 1x1 in the midst': Branch(
    (
      Conv('conv1', 'bn1', 3, 6, 3, 1, 1, 'relu'),
      Conv('conv2', 'bn2', 6, 5, 1, 2, 1, 'relu'),
      Conv('conv3', 'bn3', 5, 4, 3, 1, 1),
    ),
    shortcut='projection',
  ),
  'strided 1x1': Branch(
    (
      Conv('conv1', 'bn1', 3, 6, 1, 2, 1, 'relu'),
      Conv('conv2', 'bn2', 6, 4, 3, 1, 1),
    ),
    shortcut='projection',
  ),
}


@pytest.mark.parametrize('size', [(21, 27), (20, 16)])
@pytest.mark.parametrize('name', BRANCHES)
def test_any_branch_that_can_be_described(name, size):
  model = network(BRANCHES[name])
  densities = assert_exported(model, make_images(3, size))
  assert 0.2 < densities.mean() < 0.8
  for kind in ('none', 'one'):
    images = make_images(2, size)
    hard = list(forced(model(images)[1], kind))
    assert_exported(
      force_gates(model, {'block0': hard[0]}),
      images,
      forms=('sparse',),
      expected=model(images, masks=hard),
      batch_size=2,
    )


class SiluBlock(BasicBlock):
  """Claims to be a basic block, but is not."""

  def run_branch(self, x):
    return self.bn2(self.conv2(nnx.silu(self.conv1(x))))


class InvertedGateBlock(BasicBlock):
  """Its gate reads the negative features."""

  def decide(self, x, gating):
    return super().decide(-x, gating)


class SqueezeExcite(BasicBlock):
  """Weights the channels of the branch, which no description can express."""

  describable = False

  def __init__(self, in_features, planes, *args, rngs, **kwargs):
    super().__init__(in_features, planes, *args, rngs=rngs, **kwargs)
    self.squeeze = nnx.Conv(planes, 2, (1, 1), rngs=rngs)
    self.excite = nnx.Conv(2, planes, (1, 1), rngs=rngs)

  def run_branch(self, x):
    x = super().run_branch(x)
    weights = jnp.mean(x, axis=(1, 2), keepdims=True)
    return x * nnx.sigmoid(self.excite(nnx.silu(self.squeeze(weights))))


def test_own_blocks():
  rngs, images = nnx.Rngs(0), make_images()

  def make(kind, i, strides=1, features=3):
    return kind(
      3, features, strides, name=f'b{i}', gate=Halves(strides), rngs=rngs
    )

  model = randomize(
    Network([make(SqueezeExcite, 0), make(BasicBlock, 1, 2, 5)])
  )
  densities = assert_exported(model, images)
  assert densities.min() > 0.2 and densities.max() < 0.8
  assert (
    count_nodes(export_onnx(model, SIZE), 'NonZero') == 2
  )  # b1's two levels.
  for kind in (SiluBlock, InvertedGateBlock):
    message = f'b0 .{kind.__name__}.*describable = False'
    with pytest.raises(ValueError, match=message):
      export_onnx(randomize(Network([make(kind, 0)])), SIZE)


@pytest.mark.parametrize('name', BRANCHES)
def test_macs_of_a_masked_branch_are_those_of_the_model(name):
  model = network(BRANCHES[name])
  count = functools.partial(count_macs, convention='conv+linear')
  expected = count(model, jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32))
  exported = export_onnx(model, SIZE, form='dense')
  counted = count_onnx_macs(
    exported, dimensions={'N': 1}, convention='conv+linear'
  )
  assert counted.total == expected.total > 0
