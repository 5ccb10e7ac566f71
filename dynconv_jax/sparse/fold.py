"""Residual networks in evaluation with batch norm folded into convolutions."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.layers import BatchNorm
from dynconv_jax.models.blocks import Block
from dynconv_jax.models.resnet import ResNet


@flax.struct.dataclass
class Layer:
  """A convolution with a bias, padded by k // 2.

  Attributes:
    kernel: float[k, k, in_features, features], in the compute dtype; None where
      only what is packed is kept.
    bias: float32[features]; None likewise.
    strides: of the convolution.
    panels: kernel and bias as `native.py` reads them, or None.
    squares: the same of a 3x3 for outputs of 2x2 at a time, or None.
    packed_shape: (k, k, in_features, features) of a kernel that is not kept.
    features_first: whether the kernel is [features, k, k, in_features], as
      `cudnn.py` lays it out.
    block: the layer reads squares of as many positions a side, as channels.
  """

  kernel: jax.Array | None
  bias: jax.Array | None
  strides: int = flax.struct.field(pytree_node=False)
  panels: jax.Array | None = None
  squares: jax.Array | None = None
  packed_shape: tuple[int, ...] | None = flax.struct.field(
    pytree_node=False, default=None
  )
  features_first: bool = flax.struct.field(pytree_node=False, default=False)
  block: int = flax.struct.field(pytree_node=False, default=1)

  @property
  def shape(self) -> tuple[int, ...]:
    """(k, k, in_features, features)."""
    if self.kernel is None:
      return self.packed_shape
    shape = self.kernel.shape
    return (*shape[1:], shape[0]) if self.features_first else shape

  @property
  def size(self) -> int:
    """k, the extent of the kernel."""
    return self.shape[0]

  @property
  def features(self) -> int:
    """Channels of the output."""
    return self.shape[-1]

  @property
  def matrix(self) -> jax.Array:
    """The kernel as float[k * k * in_features, features]."""
    return self.kernel.reshape(-1, self.kernel.shape[-1])

  def output_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns (N, h, w) of the output for an input of (N, H, W, ...)."""
    stride = self.strides * self.block
    return (shape[0], *(-(-n // stride) for n in shape[1:3]))


@flax.struct.dataclass
class FoldedBlock:
  """`relu(shortcut(x) + mask * branch(x))` as plain convolutions.

  Attributes:
    first: the convolution on the dilated mask, with a ReLU after it.
    second: the 3x3 convolution on the mask.
    third: the 1x1 convolution on the mask, None in a basic block; where there
      is one a ReLU is between.
    projection: of the shortcut, or None: the identity.
  """

  first: Layer
  second: Layer
  third: Layer | None
  projection: Layer | None

  def output_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns (N, h, w) of the output for an input of (N, H, W, ...)."""
    return self.second.output_shape(self.first.output_shape(shape))


@flax.struct.dataclass
class FoldedNetwork:
  """The folded convolutions of a network.

  Attributes:
    stem: the first convolution.
    blocks: the residual blocks in network order.
    head: the classifier in float32, a 1x1 convolution of the averages.
  """

  stem: Layer
  blocks: tuple[FoldedBlock, ...]
  head: Layer


def fold_conv(conv: nnx.Conv, norm: nnx.BatchNorm, dtype) -> Layer:
  """Returns a convolution without bias and its batch norm as one layer.

  The product is formed in float64 and rounded once.

  Args:
    conv: without bias.
    norm: in evaluation: its running statistics count.
    dtype: of the folded kernel.
  """
  scale, bias, mean, var = (
    np.asarray(v[...], np.float64)
    for v in (norm.scale, norm.bias, norm.mean, norm.var)
  )
  scale = scale / np.sqrt(var + norm.epsilon)
  strides = conv.strides
  return Layer(
    kernel=jnp.asarray(np.asarray(conv.kernel[...], np.float64) * scale, dtype),
    bias=jnp.asarray(bias - mean * scale, jnp.float32),
    strides=strides if isinstance(strides, int) else strides[0],
  )


def fold_block(block: Block, dtype) -> FoldedBlock:
  """Returns the convolutions of a residual block.

  Args:
    block: basic or bottleneck.
    dtype: of the folded kernels.
  """
  convs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
  if hasattr(block, 'conv3'):
    convs.append((block.conv3, block.bn3))
  layers = [fold_conv(conv, norm, dtype) for conv, norm in convs]
  projection = None
  if block.downsample is not None:
    projection = fold_conv(*block.downsample, dtype)
  return FoldedBlock(
    first=layers[0],
    second=layers[1],
    third=layers[2] if len(layers) == 3 else None,
    projection=projection,
  )


def fold_network(model: ResNet, dtype=None) -> FoldedNetwork:
  """Returns the convolutions of a network.

  Args:
    model: in evaluation.
    dtype: of the folded kernels; None: the model's.
  """
  dtype = dtype or model.dtype
  return FoldedNetwork(
    stem=fold_conv(model.conv1, model.bn1, dtype),
    blocks=tuple(fold_block(block, dtype) for block in model.blocks),
    head=Layer(model.fc.kernel[...][None, None], model.fc.bias[...], 1),
  )


def check_evaluation(model: ResNet) -> None:
  """Raises ValueError unless a model is the evaluation view.

  Args:
    model: whose batch norms are about to be folded.
  """
  norms = [node for _, node in nnx.iter_graph(model)]
  gates = [block.masker for block in model.blocks if block.masker is not None]
  if any(
    isinstance(node, BatchNorm) and not node.use_running_average
    for node in norms
  ) or not all(gate.deterministic for gate in gates):
    raise ValueError(
      'folding batch norm needs the evaluation view of the model: '
      'nnx.view(model, deterministic=True, use_running_average=True)'
    )
