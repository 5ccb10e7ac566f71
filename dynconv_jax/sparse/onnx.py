"""Networks as ONNX models that compute only where their masks are set.

ONNX has true dynamic shapes: the active positions are found by NonZero, their
rows gathered, and nothing is compiled for a capacity. Needs the package onnx.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

try:
  import onnx
except ModuleNotFoundError as error:
  raise ImportError(
    'dynconv_jax.sparse.onnx needs ONNX:'
    " pip install 'dynconv-jax[onnx]' installs it"
  ) from error

from dynconv_jax.methods.convnet_aig import LayerGate
from dynconv_jax.methods.dynconv import MaskUnit
from dynconv_jax.models.resnet import ResNet, check_choice
from dynconv_jax.sparse.fold import check_evaluation, fold_network
from dynconv_jax.sparse.onnx_graph import Graph, integers

FORMS = ('sparse', 'dense')


def export_onnx(
  model: ResNet,
  image_size: tuple[int, int],
  *,
  form: str = 'sparse',
  given_masks: bool = False,
) -> onnx.ModelProto:
  """Returns a network as an ONNX model, batch norm folded, in float32.

  Its input 'images' is float32[N, H, W, 3], normalised, of any N. Its outputs
  are 'logits', float32[N, num_classes], and for a gated network 'density',
  float32[N, blocks], the share of active positions of each block.

  Args:
    model: the evaluation view of a dense, DynConv or ConvNet-AIG network,
      nnx.view(model, deterministic=True, use_running_average=True).
    image_size: (H, W).
    form: of gated blocks: 'sparse', at active positions; 'dense', everywhere,
      and multiplied by the mask.
    given_masks: whether there is an input 'mask_I' for each block I, float32[N,
      1, h, w] of {0, 1}, to obey instead of the gates, which are computed all
      the same: they are a part of the cost.

  Raises:
    ValueError: the model has gates of another method, or is not in evaluation.
  """
  check_choice('form', form, FORMS)
  check_evaluation(model)
  gates = [b.masker for b in model.blocks if b.masker is not None]
  unknown = {type(g).__name__ for g in gates} - {'MaskUnit', 'LayerGate'}
  if unknown:
    raise ValueError(
      'only dense networks and those of dynconv and convnet_aig can be '
      f'exported; got gates of type {", ".join(sorted(unknown))}'
    )
  return _Exporter(model, image_size, form, given_masks).export()


class _Exporter:
  """Writes the network; features are rows, [N * H * W, C], or NCHW maps."""

  def __init__(self, model, image_size, form, given_masks):
    self.model, self.form, self.given_masks = model, form, given_masks
    self.graph = Graph()
    self.size, self.features = tuple(image_size), 3
    self.is_rows = False
    self.densities = []

  def export(self):
    g, model = self.graph, self.model
    network = fold_network(model, jnp.float32)
    images = g.input('images', ('N', *self.size, 3))
    g.scope = 'stem'
    x = self._conv(
      g('Transpose', images, perm=[0, 3, 1, 2]), network.stem, relu=True
    )
    self._resize(network.stem)
    if model.architecture.stem == 'imagenet':
      x = g(
        'MaxPool', x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
      )
      self.size = tuple(-(-n // 2) for n in self.size)
    for i, (block, folded) in enumerate(
      zip(model.blocks, network.blocks, strict=True)
    ):
      g.scope = block.name
      x = self._block(i, block, folded, x)
    g.scope = 'head'
    if self.is_rows:
      x = g('Reshape', x, integers(-1, np.prod(self.size), self.features))
      x = g('ReduceMean', x, integers(1), keepdims=0)
    else:
      x = g('Flatten', g('GlobalAveragePool', x))
    head = model.fc
    logits = g('Gemm', x, _array(head.kernel), _array(head.bias))
    outputs = {'logits': (logits, ('N', head.out_features))}
    if self.densities:
      density = g('Concat', *self.densities, axis=1)
      outputs['density'] = (density, ('N', len(self.densities)))
    return g.model(outputs)

  def _resize(self, layer):
    """Notes what a layer makes of the map."""
    self.size = layer.output_shape((1, *self.size))[1:]
    self.features = layer.features

  def _conv(self, x, layer, relu=False):
    """A convolution of an NCHW map."""
    k, s = layer.size, layer.strides
    y = self.graph(
      'Conv',
      x,
      np.asarray(layer.kernel).transpose(3, 2, 0, 1),
      np.asarray(layer.bias),
      kernel_shape=[k, k],
      strides=[s, s],
      pads=[k // 2] * 4,
    )
    return self.graph('Relu', y) if relu else y

  def _gemm(self, rows, layer, relu=False):
    y = self.graph(
      'Gemm', rows, np.asarray(layer.matrix), np.asarray(layer.bias)
    )
    return self.graph('Relu', y) if relu else y

  def _to_rows(self, x):
    if self.is_rows:
      return x
    self.is_rows = True
    x = self.graph('Transpose', x, perm=[0, 2, 3, 1])
    return self.graph('Reshape', x, integers(-1, self.features))

  def _map(self, x, *shape):
    """Rows as an NHWC map."""
    return self.graph('Reshape', x, integers(-1, *shape))

  def _block(self, index, block, folded, x):
    if block.masker is None:
      # A dense network stays in one layout, which runtimes optimise.
      x = self._dense_block(folded, x, None)
    elif self.form == 'dense':
      x = self._dense_block(folded, x, self._mask(index, block, x))
    else:
      x = self._to_rows(x)
      x = self._sparse_block(folded, x, self._mask(index, block, x))
    self._resize(folded.first)
    self._resize(folded.second)
    self.features = (folded.third or folded.second).features
    return x

  def _dense_block(self, folded, x, mask):
    g, branch = self.graph, x
    layers = [folded.first, folded.second]
    layers += [folded.third] if folded.third is not None else []
    for layer in layers:
      branch = self._conv(branch, layer, relu=layer is not layers[-1])
    if mask is not None:
      branch = g('Mul', branch, mask)
    if folded.projection is not None:
      x = self._conv(x, folded.projection)
    return g('Relu', g('Add', branch, x))

  def _sparse_block(self, folded, x, mask):
    """The branch at the active positions, added to the shortcut's rows."""
    g = self.graph
    (height, width), (h, w) = (
      self.size,
      folded.output_shape((1, *self.size))[1:],
    )
    first_strides = folded.first.strides
    middle = tuple(-(-n // first_strides) for n in self.size)
    dilated = self._dilate(mask, folded.second.strides, middle)
    active = self._positions(mask)
    needed = self._positions(dilated)
    if folded.first.size == 1:
      rows = g('Gather', x, needed, axis=0)
    else:
      table = self._map(x, height, width, self.features)
      table = g('Pad', table, integers(0, 1, 1, 0, 0, 1, 1, 0))
      table = g('Reshape', table, integers(-1, self.features))
      windows = self._windows(needed, middle, self.size, first_strides)
      rows = self._gather_windows(table, windows, self.features)
    y = self._gemm(rows, folded.first, relu=True)
    # Row 0 is zero: what a window reads outside of the dilated mask.
    planes = folded.first.features
    y = g('Concat', np.zeros((1, planes), np.float32), y, axis=0)
    windows = self._windows(active, (h, w), middle, folded.second.strides)
    windows = g('Gather', self._numbers(dilated, middle), windows, axis=0)
    rows = self._gather_windows(y, windows, planes)
    y = self._gemm(rows, folded.second, relu=folded.third is not None)
    if folded.third is not None:
      y = self._gemm(y, folded.third)
    shortcut = x
    if folded.projection is not None:
      shortcut = self._gemm(self._strided(x, folded), folded.projection)
    y = g('Add', y, g('Gather', shortcut, active, axis=0))
    at = g('Unsqueeze', active, integers(1))
    if folded.projection is None:  # The rest of x is rectified already.
      return g('ScatterND', x, at, g('Relu', y))
    return g('Relu', g('ScatterND', shortcut, at, y))

  def _strided(self, x, folded):
    """The rows that a strided 1x1 projection reads."""
    s = folded.projection.strides
    if s == 1:
      return x
    x = self._map(x, *self.size, self.features)
    x = self.graph(
      'Slice',
      x,
      integers(0, 0),
      integers(*self.size),
      integers(1, 2),
      integers(s, s),
    )
    return self.graph('Reshape', x, integers(-1, self.features))

  def _dilate(self, mask, strides, size):
    """See `mask.dilate`; cut to the size."""
    g, (h, w) = self.graph, size
    if strides > 1:  # Zeros between the positions, after each.
      mask = g('Unsqueeze', mask, integers(3, 5))
      pads = integers(0, 0, 0, 0, 0, 0, 0, 0, 0, strides - 1, 0, strides - 1)
      mask = g('Pad', mask, pads)
      out = (-(-n // strides) * strides for n in size)
      mask = g('Reshape', mask, integers(-1, 1, *out))
    mask = g('MaxPool', mask, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    if any(n % strides for n in size):
      mask = g('Slice', mask, integers(0, 0), integers(h, w), integers(2, 3))
    return mask

  def _positions(self, mask):
    """int64[K]: the flat active positions, in order."""
    g = self.graph
    flat = g('Reshape', mask, integers(-1))
    flat = g('Cast', flat, to=onnx.TensorProto.BOOL)
    return g('Squeeze', g('NonZero', flat), integers(0))

  def _numbers(self, mask, size):
    """int32[N * (H + 2) * (W + 2)]: numbers of the active positions, from 1.

    0 where the map, with a border of 1, is inactive.
    """
    g = self.graph
    flat = g('Reshape', mask, integers(-1))
    flat = g('Cast', flat, to=onnx.TensorProto.INT32)
    numbers = g('Mul', g('CumSum', flat, np.int32(0)), flat)
    numbers = g('Reshape', numbers, integers(-1, *size))
    numbers = g('Pad', numbers, integers(0, 1, 1, 0, 1, 1))
    return g('Reshape', numbers, integers(-1))

  def _windows(self, positions, size, input_size, strides):
    """int64[K, 9]: what 3x3 windows read, positions of the padded input.

    Args:
      positions: int64[K], flat positions of the output.
      size: (h, w) of the output.
      input_size: (H, W) of the input, without its border of 1.
      strides: of the windows.
    """
    g, (h, w), columns = self.graph, size, input_size[1] + 2
    corners = np.add.outer(np.arange(h) * columns, np.arange(w)) * strides
    offsets = np.add.outer(np.arange(3) * columns, np.arange(3))
    table = np.add.outer(corners.reshape(-1), offsets.reshape(-1))
    image = g('Div', positions, integers(h * w))
    position = g('Sub', positions, g('Mul', image, integers(h * w)))
    start = g('Mul', image, integers((input_size[0] + 2) * columns))
    return g(
      'Add',
      g('Gather', table.astype(np.int64), position, axis=0),
      g('Unsqueeze', start, integers(1)),
    )

  def _gather_windows(self, table, windows, features):
    rows = self.graph('Gather', table, windows, axis=0)
    return self.graph('Reshape', rows, integers(-1, 9 * features))

  def _mask(self, index, block, x):
    """float32[N, 1, h, w] of {0, 1}: where a block is executed."""
    g, gate = self.graph, block.masker
    logits = (
      self._mask_unit(gate, x)
      if isinstance(gate, MaskUnit)
      else self._layer_gate(gate, x)
    )
    size = [-(-n // block.strides) for n in self.size]
    mask = g('GreaterOrEqual', logits, np.float32(0))
    mask = g('Cast', mask, to=onnx.TensorProto.FLOAT)
    mask = self._resize_mask(mask, gate, size)
    if self.given_masks:
      given = g.input(f'mask_{index}', ('N', 1, *size))
      mask = g('Add', g('Mul', mask, np.float32(0)), given)
    density = g('ReduceMean', mask, integers(2, 3), keepdims=0)
    self.densities.append(density)
    return mask

  def _resize_mask(self, mask, gate, size):
    """Patches, or whole images, as positions."""
    g, side = self.graph, getattr(gate, 'granularity', 1)
    if isinstance(gate, LayerGate):
      return g('Expand', mask, integers(1, 1, *size))
    if side > 1:
      mask = g(
        'Resize',
        mask,
        '',
        np.array([1, 1, side, side], np.float32),
        mode='nearest',
        coordinate_transformation_mode='asymmetric',
        nearest_mode='floor',
      )
      mask = g('Slice', mask, integers(0, 0), integers(*size), integers(2, 3))
    return mask

  def _linear(self, x, matrix):
    """float32[N, F, H, W]: a linear map [C, F] of the channels."""
    g = self.graph
    if not self.is_rows:
      return g('Conv', x, matrix.T[:, :, None, None], kernel_shape=[1, 1])
    y = self._map(g('MatMul', x, matrix), *self.size, matrix.shape[1])
    return g('Transpose', y, perm=[0, 3, 1, 2])

  def _mask_unit(self, gate, x):
    """The logits of a mask unit, in patches where it has them.

    Both of its maps are linear: the products of all taps and those of the
    average come from one pass over the features, and are added up afterwards.
    """
    g, unit = self.graph, gate.maskconv
    kernel, k = _array(unit.conv.kernel), unit.conv.kernel_size[0]
    taps = kernel.transpose(2, 0, 1, 3).reshape(self.features, k * k)
    products = self._linear(x, np.hstack([taps, _array(unit.fc.kernel)]))
    strides = gate.strides
    if gate.granularity > 1:
      side = gate.granularity * gate.strides
      products = g(
        'AveragePool',
        products,
        kernel_shape=[side, side],
        strides=[side, side],
        ceil_mode=1,
      )
      strides = 1
    one_hot = np.zeros((1, k * k + 1, k * k), np.float32)
    one_hot[0, : k * k] = np.eye(k * k)
    logits = g(
      'Conv',
      products,
      one_hot.reshape(1, k * k + 1, k, k),
      _array(unit.conv.bias) + _array(unit.fc.bias),
      kernel_shape=[k, k],
      strides=[strides, strides],
      pads=[k // 2] * 4,
    )
    last = g(
      'Slice',
      products,
      integers(k * k),
      integers(k * k + 1),
      integers(1),
    )
    return g('Add', logits, g('GlobalAveragePool', last))

  def _layer_gate(self, gate, x):
    """The logits of 'execute' against 'skip', float32[N, 1, 1, 1]."""
    g, norm = self.graph, gate.fc1bn
    scale = _array(norm.scale) / np.sqrt(_array(norm.var) + norm.epsilon)
    bias = (_array(gate.fc1.bias) - _array(norm.mean)) * scale
    bias = (bias + _array(norm.bias)).astype(np.float32)
    kernel = (_array(gate.fc1.kernel)[0, 0] * scale).astype(np.float32)
    hidden = g('GlobalAveragePool', self._linear(x, kernel))
    hidden = g('Relu', g('Add', hidden, bias[:, None, None]))
    kernel, bias = _array(gate.fc2.kernel)[0, 0], _array(gate.fc2.bias)
    return g(
      'Conv',
      hidden,
      (kernel[:, 1] - kernel[:, 0])[None, :, None, None],
      bias[1:] - bias[:1],
      kernel_shape=[1, 1],
    )


def _array(parameter) -> np.ndarray:
  return np.asarray(parameter[...])
