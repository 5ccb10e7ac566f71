"""Dense convolutions in the form that XLA executes fastest on a GPU.

XLA fuses a convolution, its bias, the shortcut, and the ReLU into one cuDNN
call if they all have the features' dtype. It copies a kernel on each call
unless the output features are its first axis. Matrix products, the fastest form
on a CPU, would need separate passes for bias, shortcut, and ReLU.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from dynconv_jax.branch import Conv
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv

# cuDNN's tensor core kernels read channels in groups of eight.
_CHANNELS = 8
# Operations that XLA records into CUDA graphs: the defaults and cuDNN
# convolutions. A network becomes a single graph, launched once by the host.
COMPILER_OPTIONS = {
  'xla_gpu_enable_command_buffer': (
    'FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,CONVOLUTION'
  )
}


@flax.struct.dataclass
class CudnnConv(FoldedConv):
  """A folded convolution in cuDNN's layout.

  Attributes:
    kernel: float[features, k, k, in_features / groups].
    bias: float[features], in the dtype of the kernel.
    conv: description of the convolution.
    block: side of the squares of positions that are rearranged into channels; 1
      for no rearrangement.
  """

  block: int = flax.struct.field(pytree_node=False, default=1)


def lay_out(block: FoldedBlock) -> FoldedBlock:
  """Returns a block with its convolutions in cuDNN's layout.

  Args:
    block: the folded block.
  """
  projection = block.projection
  return block.replace(
    convs=tuple(lay_out_conv(conv) for conv in block.convs),
    projection=None if projection is None else lay_out_conv(projection),
  )


def lay_out_conv(layer: FoldedConv) -> CudnnConv:
  """Returns a convolution in cuDNN's layout.

  A 7x7 convolution of stride 2 becomes a 4x4 convolution of stride 1 on squares
  of 2x2 positions. Along each axis, tap k of 7, which reads position
  2 i + k - 3, becomes tap a at offset b in the square, with 2 a + b = k + 1.

  Args:
    layer: the folded convolution.
  """
  conv, kernel, block = layer.conv, layer.kernel, 1
  if reads_squares(conv):
    _, _, depth, features = kernel.shape
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = kernel.reshape(4, 2, 4, 2, depth, features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, -1, features)
    padding = -kernel.shape[2] % _CHANNELS
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, padding), (0, 0)))
    block = 2
  return CudnnConv(
    kernel=jnp.transpose(kernel, (3, 0, 1, 2)),
    bias=layer.bias.astype(kernel.dtype),
    conv=conv,
    block=block,
  )


def reads_squares(conv: Conv) -> bool:
  """Returns whether `lay_out_conv` makes a convolution read squares.

  Args:
    conv: description of the convolution.
  """
  return (
    (conv.kernel_size, conv.strides) == (7, 2)
    and conv.groups == 1
    and conv.padding == 'symmetric'
  )


def convolve(
  x: jax.Array, layer: CudnnConv, precision: str | None = None
) -> jax.Array:
  """Returns [N, h, w, features] in the dtype of x, before any activation.

  Args:
    x: float[N, H, W, in_features].
    layer: the convolution.
    precision: precision of float32 products, see `lax.conv_general_dilated`.
  """
  conv = layer.conv
  strides, pads = conv.strides, tuple(conv.pads(n) for n in x.shape[1:3])
  if layer.block > 1:
    k = layer.kernel.shape[1]
    strides, pads = 1, ((k // 2, (k - 1) // 2),) * 2
  y = lax.conv_general_dilated(
    rearrange(x, layer),
    layer.kernel,
    (strides, strides),
    pads,
    dimension_numbers=('NHWC', 'OHWI', 'NHWC'),
    feature_group_count=conv.groups,
    precision=precision,
  )
  return y + layer.bias.astype(x.dtype)


def rearrange(x: jax.Array, layer: CudnnConv) -> jax.Array:
  """Returns the input of a layer, with squares of positions as channels.

  Args:
    x: float[N, H, W, in_features].
    layer: a layer from `lay_out_conv`.
  """
  if layer.block == 1:
    return x
  n, height, width, depth = x.shape
  h, w = (-(-size // layer.block) for size in (height, width))
  ends = ((0, h * layer.block - height), (0, w * layer.block - width))
  x = jnp.pad(x, ((0, 0), *ends, (0, 0)))
  x = x.reshape(n, h, layer.block, w, layer.block, depth)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
  padding = layer.kernel.shape[3] - x.shape[-1]
  return jnp.pad(x, ((0, 0),) * 3 + ((0, padding),))
