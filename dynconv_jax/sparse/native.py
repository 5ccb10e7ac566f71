"""Blocks at active positions by kernels that are compiled on this machine.

XLA has static shapes and copies the rows that it gathers. The kernels in
kernels/ count at run time and read rows where they are. A C++ compiler
compiles them at first use; without one, XLA's forms are used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import subprocess
import tempfile
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from absl import logging
from flax import nnx

from dynconv_jax.methods.dynconv import MaskUnit, Squeeze
from dynconv_jax.models.resnet import ResNet
from dynconv_jax.sparse.fold import FoldedBlock, FoldedNetwork, Layer

Folded = TypeVar('Folded', FoldedNetwork, FoldedBlock, Layer)

_SOURCES = pathlib.Path(__file__).with_name('kernels')
_FLAGS = ('-std=c++17', '-O3', '-march=native', '-fPIC', '-shared', '-w')
# Positions of the images that a block computes at a time: about those whose
# rows fit into a shared cache.
_GROUP_POSITIONS = 3136


def usable(dtype: jnp.dtype) -> bool:
  """Returns whether the kernels compute in a dtype on JAX's default backend.

  Args:
    dtype: of the features.
  """
  return (
    jax.default_backend() == 'cpu'
    and dtype == jnp.float32
    and _register() is not None
  )


def pack(network: Folded) -> Folded:
  """Returns a network or block with packed weights, `Layer.panels`.

  Args:
    network: in float32.
  """

  def packed(layer):
    squares = layer.size == 3 and layer.strides == 1
    return layer.replace(
      panels=_panels(layer.matrix, layer.bias),
      squares=_squares(layer.kernel, layer.bias) if squares else None,
    )

  return jax.tree.map(packed, network, is_leaf=_is_layer)


def drop_kernels(network: Folded) -> Folded:
  """Returns a packed network or block without what the kernels do not read.

  Args:
    network: packed; XLA cannot compute it any more.
  """
  return jax.tree.map(
    lambda layer: layer.replace(
      kernel=None, bias=None, packed_shape=layer.shape
    ),
    network,
    is_leaf=_is_layer,
  )


def with_native_gates(model: ResNet) -> ResNet:
  """Returns a copy of a network whose mask units compute by the kernels.

  Args:
    model: in evaluation.
  """
  model = nnx.clone(model)
  for block in model.blocks:
    if isinstance(block.masker, MaskUnit):
      block.masker.maskconv = NativeSqueeze(block.masker.maskconv)
  return model


def run_native(
  block: FoldedBlock,
  x: jax.Array,
  hard: jax.Array | None = None,
  dilated: jax.Array | None = None,
) -> jax.Array:
  """Returns a block's output, the branch computed at active positions only.

  Args:
    block: the folded block, packed.
    x: float32[N, H, W, in_features], rectified.
    hard: float32[N, h, w] of {0, 1}, where the branch is executed; None:
      everywhere.
    dilated: float32[N, ...] of {0, 1}, where its first convolution is; None:
      everywhere.

  Returns:
    float32[N, h, w, features].
  """
  if hard is None:
    hard = jnp.ones(block.output_shape(x.shape), jnp.float32)
  if dilated is None:
    dilated = jnp.ones(block.first.output_shape(x.shape), jnp.float32)
  n, middle, end = len(x), dilated.shape[1:], hard.shape[1:]
  group = min(n, max(1, _GROUP_POSITIONS // (end[0] * end[1])))
  features = (block.third or block.second).features
  inner = block.second.features if block.third is not None else 0
  none = jnp.zeros((0, 1, _register().width), jnp.float32)
  layers = (block.first, block.second, block.third, block.projection)
  shapes = (
    (n, *end, features),
    (group * middle[0] * middle[1], block.first.features),
    (group * end[0] * end[1], inner),
  )
  out, _, _ = jax.ffi.ffi_call(
    _register().targets['block'],
    [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
    # What is inactive stays where the shortcut is the identity.
    input_output_aliases={0: 0} if block.projection is None else {},
  )(
    x,
    hard,
    dilated,
    *(none if layer is None else layer.panels for layer in layers),
    *(none if layer.squares is None else layer.squares for layer in layers[:2]),
    first_size=np.int64(block.first.size),
    first_strides=np.int64(block.first.strides),
    second_strides=np.int64(block.second.strides),
    group=np.int64(group),
  )
  return out


def convolve(x: jax.Array, layer: Layer, *, relu: bool) -> jax.Array:
  """Returns float32[N, h, w, features]: a convolution.

  Args:
    x: float32[N, H, W, in_features].
    layer: packed.
    relu: whether a ReLU follows.
  """
  pad = layer.size // 2
  shape = (*layer.output_shape(x.shape), layer.features)
  return jax.ffi.ffi_call(
    _register().targets['convolution'], jax.ShapeDtypeStruct(shape, jnp.float32)
  )(
    jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))),
    layer.panels,
    size=np.int64(layer.size),
    strides=np.int64(layer.strides),
    relu=relu,
  )


def max_pool(x: jax.Array) -> jax.Array:
  """Returns what `layers.max_pool` does: 3x3 windows, stride 2, padding 1.

  Args:
    x: float32[N, H, W, C].
  """
  n, height, width, features = x.shape
  shape = (n, -(-height // 2), -(-width // 2), features)
  return jax.ffi.ffi_call(
    _register().targets['max_pool'], jax.ShapeDtypeStruct(shape, jnp.float32)
  )(x)


class NativeSqueeze(nnx.Module):
  """Computes what a mask unit's `Squeeze` does.

  Args:
    squeeze: gives the weights.
  """

  def __init__(self, squeeze: Squeeze):
    self.size, self.strides, matrix, bias = squeeze_columns(squeeze)
    self.weights = nnx.Param(jnp.asarray(np.ascontiguousarray(matrix.T)))
    self.bias = nnx.Param(jnp.full(1, bias, jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32[N, h, w]: logits of a float32[N, H, W, C] input."""
    n, height, width, _ = x.shape
    shapes = (
      (n, -(-height // self.strides), -(-width // self.strides)),
      (self.size**2 + 1, n * height * width),
    )
    logits, _ = jax.ffi.ffi_call(
      _register().targets['mask_logits'],
      [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
    )(
      x,
      self.weights[...],
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
    squeeze: gives the weights.

  Returns:
    Extent and strides of its convolution; float32[C, size**2 + 1], a column a
    tap, and that whose products are averaged over the map; the bias.
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


def _is_layer(node):
  return isinstance(node, Layer)


def _panels(matrix, bias):
  """float32[panels, 1 + rows, width] of [rows, columns]: see product.h."""
  width = _register().width
  matrix = np.vstack([np.asarray(bias), np.asarray(matrix)])
  matrix = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % width)))
  panels = matrix.reshape(len(matrix), -1, width).transpose(1, 0, 2)
  return jnp.asarray(np.ascontiguousarray(panels))


def _squares(kernel, bias):
  """float32[panels, 16, 1 + depth, width]: see kernels/squares.h.

  The kernel [3, 3, depth, columns] is transformed in float64 and rounded once.
  The second row and column of A are ones: there the bias reaches each output.
  """
  g = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
  taps = np.einsum('ai,bj,ijdc->abdc', g, g, np.asarray(kernel, np.float64))
  biases = np.zeros((4, 4, taps.shape[-1]))
  biases[1, 1] = bias
  taps = taps.reshape(16, *taps.shape[2:]).astype(np.float32)
  biases = biases.reshape(16, -1).astype(np.float32)
  panels = [_panels(*pair) for pair in zip(taps, biases, strict=True)]
  return jnp.stack(panels, axis=1)


class _Library(NamedTuple):
  """Kernels that are compiled and registered.

  Attributes:
    targets: the name of each at the foreign function interface.
    width: columns of a panel of packed weights: a matter of the processor.
  """

  targets: dict[str, str]
  width: int


@functools.cache
def _register(flags: tuple[str, ...] = ()) -> _Library | None:
  """Compiles and registers the kernels; returns None where that fails."""
  try:
    path = build(flags)
    library = ctypes.CDLL(str(path))
  except (OSError, subprocess.SubprocessError) as error:
    logging.warning(
      'sparse blocks are left to XLA, which is slower: the kernels were not '
      'compiled. %s',
      getattr(error, 'stderr', None) or error,
    )
    return None
  targets = {}
  for name in ('block', 'convolution', 'max_pool', 'mask_logits'):
    # Compiled programs are cached by name: each build has names of its own.
    targets[name] = f'dynconv_{name}_{path.stem}'
    handler = jax.ffi.pycapsule(getattr(library, f'dynconv_{name}'))
    jax.ffi.register_ffi_target(targets[name], handler, platform='cpu')
  width = ctypes.c_int.in_dll(library, 'dynconv_width').value
  return _Library(targets, width)


def build(flags: tuple[str, ...] = ()) -> pathlib.Path:
  """Compiles the kernels, unless it was done before; returns the library.

  The compiler is that of the environment variable CXX, or c++. Libraries are
  kept in ~/.cache/dynconv_jax/kernels.

  Args:
    flags: of the compiler, after the usual ones.

  Raises:
    OSError: there is no compiler, or the library cannot be written.
    subprocess.CalledProcessError: the compiler's error.
  """
  compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
  command = [*compiler, *_FLAGS, *flags, f'-I{jax.ffi.include_dir()}']
  version = subprocess.run(
    [*compiler, '--version'], capture_output=True, text=True, check=True
  ).stdout
  # The headers are jaxlib's, which may be upgraded in place.
  parts = (
    *(path.read_text() for path in sorted(_SOURCES.iterdir())),
    str(command),
    version,
    jaxlib.__version__,
    _processor(),
  )
  digest = hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]
  folder = pathlib.Path('~/.cache/dynconv_jax/kernels').expanduser()
  path = folder / f'{digest}.so'
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      library = pathlib.Path(temporary) / path.name
      subprocess.run(
        [*command, str(_SOURCES / 'blocks.cc'), '-o', str(library)],
        capture_output=True,
        text=True,
        check=True,
      )
      library.replace(path)  # Atomic: others may be doing the same.
  return path


def _processor() -> str:
  """What -march=native depends on: a home may be shared by machines."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.platform() + platform.processor()
  kept = ('model name', 'flags', 'Features', 'CPU part')
  return '\n'.join(sorted({x for x in lines if x.startswith(kept)}))
