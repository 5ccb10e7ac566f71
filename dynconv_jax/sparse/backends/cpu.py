"""CPU backend: runs blocks at active positions with custom C++ kernels.

XLA needs static shapes and copies the rows that it gathers. The kernels in
kernels/ count active positions at run time and read rows in place. A C++
compiler compiles them on first use; without one, XLA is used instead.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax import native
from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import MaxPool
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.methods.mask_unit import Squeeze, average_pool
from dynconv_jax.sparse.backend import Backend
from dynconv_jax.sparse.fold import FoldedConv

_SOURCE = pathlib.Path(__file__).parent / 'kernels' / 'blocks.cc'
# Positions per group of images that a block computes at a time. Their rows fit
# approximately into a shared cache.
_GROUP_POSITIONS = 3136


# Minimum size of an expanded map, in bytes, to run an inverted residual in
# bands.
_LARGE_MAP = 1 << 20
# Columns of the products of mask units: a multiple of this, the longest vector.
_COLUMNS = 16
# Minimum number of weights for which a linear layer uses the kernels.
_LARGE = 1 << 16


class CpuBackend(Backend):
  """Custom kernels, compiled for this machine on first use."""

  name = 'cpu'
  # On a full mask, the kernels take about 0.6 of XLA's time.
  calibrated = False

  def supports_platform(self, dtype, platform):
    return (
      platform == 'cpu' and dtype == jnp.float32 and _register() is not None
    )

  def supports(self, branch, dtype, platform):
    return (
      self.supports_platform(dtype, platform)
      and all(map(_computes, branch.convs))
      and branch.convs[-1].activation is None
      and branch.activation in _ACTIVATIONS
      and (
        branch.shortcut != 'identity'
        # A single convolution would overwrite the input while reading it.
        or (branch.stays and len(branch.convs) > 1)
      )
    )

  def pack(self, block):
    return PackedBlock(
      panels=tuple(map(_pack, block.convs)),
      projection=block.projection and _pack(block.projection),
      winograd=tuple(map(_pack_winograd, block.convs)),
      branch=block.branch,
    )

  def run(self, packed, x, mask):
    return run_block(packed, x, mask)

  def convolution(self, conv):
    c = conv.conv
    if c.groups == 1 and c.activation in _ACTIVATIONS:
      return CpuConv(conv)
    return None

  def replacement(self, module):
    if type(module) is MaxPool:
      return CpuMaxPool()
    if type(module) is Squeeze:
      return CpuSqueeze(module)
    if (
      type(module) is nnx.Linear
      and module.kernel.size >= _LARGE
      and module.dtype in (None, jnp.float32)
      and module.dot_general is jax.lax.dot_general
    ):
      return CpuLinear(module)
    return None


# Numbers of activations and shortcuts in kernels/blocks.cc.
_ACTIVATIONS = {None: 0, 'relu': 1, 'relu6': 2}
_SHORTCUTS = {'identity': 0, 'projection': 1, 'none': 2}


def _is_depthwise(conv: Conv) -> bool:
  return 1 < conv.groups == conv.in_features == conv.features


def runs_in_bands(branch: Branch, size: tuple[int, int]) -> bool:
  """Returns whether a block runs in bands, because its inner map is too large.

  Args:
    branch: branch of the block.
    size: (height, width) of the block's input.
  """
  *expand, depthwise, project = branch.convs
  height, width = size
  return (
    _is_depthwise(depthwise)
    and len(expand) <= 1
    and all(c.is_pointwise and c.groups == 1 for c in (*expand, project))
    and branch.activation is None
    and branch.shortcut != 'projection'
    and 4 * height * width * depthwise.in_features >= _LARGE_MAP
  )


def _computes(conv: Conv) -> bool:
  """Returns whether the kernels support a convolution of a branch."""
  return conv.activation in _ACTIVATIONS and (
    conv.groups == 1 or _is_depthwise(conv)
  )


@flax.struct.dataclass
class PackedBlock:
  """The weights of a block in the layout of the kernels.

  Attributes:
    panels: packed weights of each convolution, see kernels/product.h.
    projection: packed weights of the shortcut's projection, or None.
    winograd: weights of each convolution for Winograd tiles, see
      kernels/winograd.h; an empty array if the convolution does not use them.
    branch: description of the block's branch.
  """

  panels: tuple[jax.Array, ...]
  projection: jax.Array | None
  winograd: tuple[jax.Array, ...]
  branch: Branch = flax.struct.field(pytree_node=False)


def run_block(
  block: PackedBlock, x: jax.Array, mask: ExecutionMask | None = None
) -> jax.Array:
  """Returns a block's output, with the branch computed at active positions.

  Args:
    block: the packed block.
    x: float32[N, H, W, in_features].
    mask: where to execute the branch; None for everywhere.

  Returns:
    float32[N, h, w, features].
  """
  branch, n, size = block.branch, len(x), x.shape[1:3]
  convs, sizes = branch.convs, branch.level_sizes(size)
  if mask is None:
    maps = [jnp.ones((n, *size), jnp.float32) for size in sizes]
  else:
    maps = list(mask.maps)
  areas = [h * w for h, w in sizes]
  bands = len(convs) > 1 and runs_in_bands(branch, size)
  in_place = branch.shortcut == 'identity' and not bands
  group = n if bands else min(n, max(1, _GROUP_POSITIONS // areas[0]))
  shapes = [(n, *sizes[0], branch.features)]
  shapes += [
    (0 if bands else group * areas[level], conv.features)
    for conv, level in zip(convs[:-1], branch.levels, strict=False)
  ]
  none = jnp.zeros((0, 1, _register().width), jnp.float32)
  inputs = list(zip(convs, (size, *branch.sizes(size)), strict=False))
  activations = (*(c.activation for c in convs), branch.activation)

  def integers(values):
    return np.array(list(values), np.int64)

  out, *_ = jax.ffi.ffi_call(
    _register().targets['block'],
    [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
    # With an identity shortcut, inactive positions keep their values.
    input_output_aliases={0: 0} if in_place else {},
  )(
    x,
    *maps,
    *block.panels,
    none if block.projection is None else block.projection,
    *block.winograd,
    sizes=integers(c.kernel_size for c in convs),
    strides=integers(c.strides for c in convs),
    tops=integers(c.pads(height)[0] for c, (height, _) in inputs),
    lefts=integers(c.pads(width)[0] for c, (_, width) in inputs),
    levels=integers(branch.levels),
    depthwise=integers(map(_is_depthwise, convs)),
    activations=integers(_ACTIVATIONS[a] for a in activations),
    shortcut=np.int64(_SHORTCUTS[branch.shortcut]),
    bands=np.bool_(bands),
    group=np.int64(group),
  )
  return out


class CpuConv(nnx.Module):
  """A convolution outside gated blocks, with its activation.

  Args:
    conv: the folded convolution.
  """

  def __init__(self, conv: FoldedConv):
    self.conv = conv.conv
    self.panels = nnx.Param(_pack(conv))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32[N, h, w, features] for float[N, H, W, in_features]."""
    return convolve(x.astype(jnp.float32), self.panels[...], self.conv)


class CpuLinear(nnx.Module):
  """A linear layer.

  Args:
    linear: the layer to replace.
  """

  def __init__(self, linear: nnx.Linear):
    kernel = np.asarray(linear.kernel[...], np.float32)
    bias = np.zeros(kernel.shape[1], np.float32)
    if linear.bias is not None:
      bias = np.asarray(linear.bias[...], np.float32)
    self.conv = Conv('linear', '', *kernel.shape)
    self.panels = nnx.Param(_panels(kernel, bias))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32[..., features] for float[..., in_features]."""
    rows = x.astype(jnp.float32).reshape(-1, 1, 1, x.shape[-1])
    y = convolve(rows, self.panels[...], self.conv)
    return y.reshape(*x.shape[:-1], self.conv.features)


class CpuMaxPool(nnx.Module):
  """Replacement of `layers.MaxPool`."""

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, C] for float[N, H, W, C]."""
    return max_pool(x.astype(jnp.float32)).astype(x.dtype)


def convolve(x: jax.Array, panels: jax.Array, conv: Conv) -> jax.Array:
  """Returns an activated convolution, float32[N, h, w, features].

  Args:
    x: float32[N, H, W, in_features].
    panels: packed weights.
    conv: description of the convolution.
  """
  size = x.shape[1:3]
  shape = (len(x), *map(conv.output_size, size), conv.features)
  return jax.ffi.ffi_call(
    _register().targets['convolution'], jax.ShapeDtypeStruct(shape, jnp.float32)
  )(
    jnp.pad(x, ((0, 0), *map(conv.pads, size), (0, 0))),
    panels,
    size=np.int64(conv.kernel_size),
    strides=np.int64(conv.strides),
    activation=np.int64(_ACTIVATIONS[conv.activation]),
  )


def max_pool(x: jax.Array) -> jax.Array:
  """Returns the 3x3 max pooling at stride 2 and padding 1.

  Args:
    x: float32[N, H, W, C].
  """
  n, height, width, features = x.shape
  shape = (n, -(-height // 2), -(-width // 2), features)
  return jax.ffi.ffi_call(
    _register().targets['max_pool'], jax.ShapeDtypeStruct(shape, jnp.float32)
  )(x)


class CpuSqueeze(nnx.Module):
  """Replacement of a mask unit's `Squeeze`.

  Args:
    squeeze: the module to replace.
  """

  def __init__(self, squeeze: Squeeze):
    self.pool = squeeze.pool
    self.size, self.strides, matrix, bias = squeeze_columns(squeeze)
    self.panels = nnx.Param(_panels(matrix, np.zeros(matrix.shape[1])))
    self.bias = nnx.Param(jnp.full(1, bias, jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32[N, h, w] logits for a float32[N, H, W, C] input."""
    x = average_pool(x, self.pool)
    n, height, width, _ = x.shape
    shapes = (
      (n, -(-height // self.strides), -(-width // self.strides)),
      # Whole vectors of columns, one for each tap and one for the average.
      (n * height * width, -(-(self.size**2 + 1) // _COLUMNS) * _COLUMNS),
    )
    logits, _ = jax.ffi.ffi_call(
      _register().targets['mask_logits'],
      [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
    )(
      x,
      self.panels[...],
      self.bias[...],
      size=np.int64(self.size),
      strides=np.int64(self.strides),
    )
    return logits


def squeeze_columns(
  squeeze: Squeeze,
) -> tuple[int, int, np.ndarray, float]:
  """Returns a mask unit's linear maps as one matrix.

  Args:
    squeeze: the module that contains the weights.

  Returns:
    size: kernel size of the convolution.
    strides: strides of the convolution.
    matrix: float32[C, size**2 + 1], one column per tap, and a last column whose
      products are averaged over the map.
    bias: sum of both biases.
  """
  conv, fc = squeeze.conv, squeeze.fc
  kernel = np.asarray(conv.kernel[...])
  strides = conv.strides
  return (
    kernel.shape[0],
    strides if isinstance(strides, int) else strides[0],
    np.hstack([kernel[..., 0].reshape(-1, kernel.shape[2]).T, fc.kernel[...]]),
    float(conv.bias[0]) + float(fc.bias[0]),
  )


def _pack(conv: FoldedConv) -> jax.Array:
  """Returns packed weights: panels, or rows of channels if depthwise."""
  if _is_depthwise(conv.conv):
    return jnp.concatenate([conv.bias[None], conv.matrix])
  return _panels(conv.matrix, conv.bias)


def _pack_winograd(conv: FoldedConv) -> jax.Array:
  """Returns weights for Winograd tiles F(2x2, 3x3), or an empty array."""
  c = conv.conv
  if (c.kernel_size, c.strides, c.groups) == (3, 1, 1):
    return _winograd(conv.kernel, conv.bias)
  return jnp.zeros((0, 1, 1, _register().width), jnp.float32)


def _panels(matrix, bias):
  """Packs [rows, columns] as [panels, 1 + rows, width]; see product.h."""
  width = _register().width
  matrix = np.vstack([np.asarray(bias), np.asarray(matrix)]).astype(np.float32)
  matrix = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % width)))
  panels = matrix.reshape(len(matrix), -1, width).transpose(1, 0, 2)
  return jnp.asarray(np.ascontiguousarray(panels))


def _winograd(kernel, bias):
  """Returns float32[panels, 16, 1 + depth, width]; see kernels/winograd.h.

  Transforms a kernel [3, 3, depth, columns] in float64 and rounds once. The
  bias is added to element (1, 1) of the transformed tile, because the output
  transform A adds that element to every output.
  """
  g = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
  taps = np.einsum('ai,bj,ijdc->abdc', g, g, np.asarray(kernel, np.float64))
  biases = np.zeros((4, 4, taps.shape[-1]))
  biases[1, 1] = bias
  taps = taps.reshape(16, *taps.shape[2:]).astype(np.float32)
  biases = biases.reshape(16, -1).astype(np.float32)
  panels = [_panels(*pair) for pair in zip(taps, biases, strict=True)]
  return jnp.stack(panels, axis=1)


class _Kernels(NamedTuple):
  """The compiled and registered kernels.

  Attributes:
    targets: kernel name -> name of its foreign function interface target.
    width: columns of a panel of packed weights; depends on the processor.
  """

  targets: dict[str, str]
  width: int


@functools.cache
def _register(flags: tuple[str, ...] = ()) -> _Kernels | None:
  """Compiles and registers the kernels; returns None if that fails."""
  names = ('block', 'convolution', 'max_pool', 'mask_logits')
  library = native.register(_SOURCE, names, flags)
  if library is None:
    return None
  width = ctypes.c_int.in_dll(library.handle, 'dynconv_width').value
  return _Kernels(library.targets, width)
