"""Tests that the three front ends count a network identically.

Each network is written three times: in JAX, in PyTorch and as ONNX nodes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax import lax

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
onnx = pytest.importorskip('onnx', reason='onnx is not installed')

from onnx import TensorProto, helper  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import compare_counters  # noqa: E402
from dynconv_jax import create_model  # noqa: E402
from dynconv_jax.macs import count_macs  # noqa: E402
from dynconv_jax.macs.onnx import count_macs as count_onnx_macs  # noqa: E402
from dynconv_jax.macs.torch import count_macs as count_torch_macs  # noqa: E402


class Graph:
  """An ONNX graph that is written node by node, with zero weights."""

  def __init__(self, *shape):
    self.nodes, self.weights, self.last = [], [], 'x'
    self.shape = shape

  def weight(self, name, *shape):
    # The data of a weight is not read, so none is written.
    self.weights.append(
      TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
    )
    return name

  def add(self, operator, *inputs, name='', after=None, **attributes):
    output = f'{len(self.nodes)}'
    first = self.last if after is None else after
    self.nodes.append(
      helper.make_node(operator, [first, *inputs], [output], name, **attributes)
    )
    self.last = output
    return output

  def conv(self, name, *weight, bias=False, transposed=False, **attributes):
    inputs = [self.weight(f'{name}.weight', *weight)]
    if bias:
      features = weight[0]
      if transposed:
        features = weight[1] * attributes.get('group', 1)
      inputs.append(self.weight(f'{name}.bias', features))
    operator = 'ConvTranspose' if transposed else 'Conv'
    return self.add(operator, *inputs, name=name, **attributes)

  def model(self):
    def value(name, shape=None):
      return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
      self.nodes,
      'graph',
      [value('x', self.shape)],
      [value(self.last)],
      self.weights,
    )
    return helper.make_model(
      graph, opset_imports=[helper.make_opsetid('', 22)], ir_version=10
    )


def onnx_resnet(blocks, expansion, *shape):
  """Returns a ResNet with batch norms that are not folded."""
  graph = Graph(*shape)

  def conv(name, features, inputs, kernel, stride, after=None):
    return graph.conv(
      name,
      features,
      inputs,
      kernel,
      kernel,
      strides=[stride] * 2,
      pads=[kernel // 2] * 4,
      after=after,
    )

  def norm(name, features):
    parameters = ('weight', 'bias', 'running_mean', 'running_var')
    names = [graph.weight(f'{name}.{p}', features) for p in parameters]
    return graph.add('BatchNormalization', *names, name=name)

  conv('conv1', 64, shape[1], 7, 2)
  norm('bn1', 64)
  graph.add('Relu', name='relu')
  graph.add(
    'MaxPool', kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, name='maxpool'
  )
  features = 64
  for stage, count in enumerate(blocks):
    for i in range(count):
      path = f'layer{stage + 1}.{i}'
      stride = 2 if stage and not i else 1
      planes = 64 * 2**stage
      out, start = planes * expansion, graph.last
      layers = (
        [(planes, 3, stride), (planes, 3, 1)]
        if expansion == 1
        else [(planes, 1, 1), (planes, 3, stride), (out, 1, 1)]
      )
      inputs = features
      for j, (outputs, kernel, step) in enumerate(layers, 1):
        conv(f'{path}.conv{j}', outputs, inputs, kernel, step)
        branch = norm(f'{path}.bn{j}', outputs)
        if j < len(layers):
          graph.add('Relu', name=f'{path}.relu{j}')
        inputs = outputs
      shortcut = start
      if stride > 1 or features != out:
        conv(f'{path}.downsample.0', out, features, 1, stride, after=start)
        shortcut = norm(f'{path}.downsample.1', out)
      graph.add('Add', shortcut, name=f'{path}.add', after=branch)
      graph.add('Relu', name=f'{path}.relu')
      features = out
  graph.add('GlobalAveragePool', name='avgpool')
  graph.add('Flatten')
  graph.add(
    'Gemm',
    graph.weight('fc.weight', 1000, features),
    graph.weight('fc.bias', 1000),
    transB=1,
  )
  return graph.model()


def layer_macs(report, names):
  return {name: report.by_layer[name].macs for name in names}


class ResNetTest(parameterized.TestCase):
  @parameterized.product(
    name=('resnet18', 'resnet50'),
    case=(
      ((224, 224), 'conv', True),
      ((175, 200), 'conv+linear', False),
    ),
  )
  def test_layers_agree(self, name, case):
    size, convention, padding = case
    options = {'convention': convention, 'padding': padding}
    with torch.device('meta'):
      module = getattr(compare_counters, name)()
    by_torch = count_torch_macs(module, (2, 3, *size), **options)
    blocks, expansion = {
      'resnet18': ((2, 2, 2, 2), 1),
      'resnet50': ((3, 4, 6, 3), 4),
    }[name]
    by_onnx = count_onnx_macs(
      onnx_resnet(blocks, expansion, 2, 3, *size), **options
    )
    model = nnx.eval_shape(
      lambda: nnx.view(
        create_model(name, method='dense', num_classes=1000, rngs=nnx.Rngs(0)),
        deterministic=True,
        use_running_average=True,
      )
    )
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    by_jax = count_macs(model, images, **options)

    expected = layer_macs(by_torch, by_torch.by_layer)
    self.assertLen(expected, len(by_onnx.by_layer))
    self.assertEqual(layer_macs(by_onnx, by_onnx.by_layer), expected)
    self.assertEqual(layer_macs(by_jax, by_jax.by_layer), expected)
    self.assertEqual(by_jax.parameters, by_torch.parameters)
    for name, layer in by_torch.by_layer.items():
      self.assertEqual(by_onnx.by_layer[name].parameters, layer.parameters)

  def test_ptflops(self):
    # The JAX front end does not support this convention.
    model = onnx_resnet((3, 4, 6, 3), 4, 1, 3, 224, 224)
    report = count_onnx_macs(model, convention='ptflops')
    self.assertEqual(report.total, 4_132_436_968)


def convolutions_in_jax(images):
  """The network of `convolutions_in_torch`, on images [N, H, W, C]."""

  def conv(x, features, kernel, bias=False, **options):
    groups = options.get('feature_group_count', 1)
    shape = (*kernel, x.shape[-1] // groups, features)
    x = lax.conv_general_dilated(
      x,
      np.zeros(shape, np.float32),
      options.pop('strides', (1,) * len(kernel)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      **options,
    )
    return x + np.zeros(features, np.float32) if bias else x

  x = conv(
    images, 8, (3, 3), bias=True, strides=(2, 1), padding=[(1, 1), (0, 0)]
  )
  x = conv(x, 12, (3, 3), padding=[(1, 1)] * 2, feature_group_count=4)
  x = conv(x, 12, (5, 3), padding=[(2, 2), (1, 1)], feature_group_count=12)
  x = conv(x, 6, (3, 3), padding=[(3, 3)] * 2, rhs_dilation=(3, 2))
  # Transposed: stride 2, padding 1, output padding 1 of a kernel of 3.
  x = conv(x, 8, (3, 3), bias=True, padding=[(1, 2)] * 2, lhs_dilation=(2, 2))
  # Transposed in two groups: stride (3, 2) of a kernel (2, 4).
  return conv(
    x,
    4,
    (2, 4),
    padding=[(1, 1), (3, 3)],
    lhs_dilation=(3, 2),
    feature_group_count=2,
  )


def convolutions_in_torch():
  return nn.Sequential(
    nn.Conv2d(3, 8, 3, (2, 1), (1, 0)),
    nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False),
    nn.Conv2d(12, 12, (5, 3), padding=(2, 1), groups=12, bias=False),
    nn.Conv2d(12, 6, 3, padding=3, dilation=(3, 2), bias=False),
    nn.ConvTranspose2d(6, 8, 3, 2, 1, 1),
    nn.ConvTranspose2d(8, 4, (2, 4), (3, 2), groups=2, bias=False),
  )


def convolutions_in_onnx(*shape):
  graph = Graph(*shape)
  graph.conv('0', 8, 3, 3, 3, bias=True, strides=[2, 1], pads=[1, 0] * 2)
  graph.conv('1', 12, 2, 3, 3, pads=[1] * 4, group=4)
  graph.conv('2', 12, 1, 5, 3, pads=[2, 1] * 2, group=12)
  graph.conv('3', 6, 12, 3, 3, pads=[3] * 4, dilations=[3, 2])
  graph.conv(
    '4',
    6,
    8,
    3,
    3,
    bias=True,
    transposed=True,
    strides=[2, 2],
    pads=[1] * 4,
    output_padding=[1, 1],
  )
  graph.conv('5', 8, 2, 2, 4, transposed=True, strides=[3, 2], group=2)
  return graph.model()


class ConvolutionsTest(parameterized.TestCase):
  @parameterized.product(
    size=((9, 11), (10, 8), (17, 23)),
    convention=('conv', 'conv+linear', 'flops'),
    padding=(True, False),
  )
  def test_layers_agree(self, size, convention, padding):
    options = {'convention': convention, 'padding': padding}
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    reports = [
      count_macs(convolutions_in_jax, images, **options),
      count_torch_macs(convolutions_in_torch(), (2, 3, *size), **options),
      count_onnx_macs(convolutions_in_onnx(2, 3, *size), **options),
    ]
    by_jax, by_torch, by_onnx = (
      [(layer.macs, layer.positions) for layer in report.by_layer.values()]
      for report in reports
    )
    self.assertEqual(by_jax, by_torch)
    self.assertEqual(by_jax, by_onnx)


def recurrent_in_jax(x, w_ih, w_hh, b_ih, b_hh):
  """A GRU over x, [T, N, I], with zero initial state."""

  def step(h, x):
    reset, update, new = jnp.split(x @ w_ih.T + b_ih, 3, -1)
    h_reset, h_update, h_new = jnp.split(h @ w_hh.T + b_hh, 3, -1)
    update = jax.nn.sigmoid(update + h_update)
    new = jnp.tanh(new + jax.nn.sigmoid(reset + h_reset) * h_new)
    h = (h - new) * update + new
    return h, h

  return lax.scan(step, jnp.zeros((x.shape[1], w_hh.shape[1])), x)


def recurrent_in_onnx(steps, batch, inputs, hidden):
  """Returns the same network as a Scan over a body of nodes."""
  body = Graph(batch, inputs)
  for name, value in (('ih', 'x'), ('hh', 'h')):
    body.add('Gemm', f'w_{name}', f'b_{name}', transB=1, after=value)
    parts = [f'{name}_{gate}' for gate in ('reset', 'update', 'new')]
    body.nodes.append(
      helper.make_node('Split', [body.last], parts, axis=1, num_outputs=3)
    )
  reset = body.add(
    'Sigmoid', after=body.add('Add', 'hh_reset', after='ih_reset')
  )
  update = body.add(
    'Sigmoid', after=body.add('Add', 'hh_update', after='ih_update')
  )
  gated = body.add('Mul', 'hh_new', after=reset)
  new = body.add('Tanh', after=body.add('Add', gated, after='ih_new'))
  kept = body.add('Mul', update, after=body.add('Sub', new, after='h'))
  output = body.add('Add', new, after=kept)
  seen = body.add('Identity', after=output)

  def value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

  inner = helper.make_graph(
    body.nodes,
    'step',
    [value('h', batch, hidden), value('x', batch, inputs)],
    [value(output, batch, hidden), value(seen, batch, hidden)],
  )
  graph = Graph(steps, batch, inputs)
  graph.weight('w_ih', 3 * hidden, inputs)
  graph.weight('w_hh', 3 * hidden, hidden)
  graph.weight('b_ih', 3 * hidden)
  graph.weight('b_hh', 3 * hidden)
  graph.weight('start', batch, hidden)
  graph.nodes.append(
    helper.make_node(
      'Scan', ['start', 'x'], ['end', 'all'], body=inner, num_scan_inputs=1
    )
  )
  graph.last = 'all'
  return graph.model()


class RecurrentTest(parameterized.TestCase):
  @parameterized.parameters('conv', 'conv+linear', 'flops')
  def test_totals_agree(self, convention):
    steps, batch, inputs, hidden = 7, 2, 5, 3
    module = nn.GRU(inputs, hidden)
    shapes = [(steps, batch, inputs), *(p.shape for p in module.parameters())]
    by_jax = count_macs(
      recurrent_in_jax,
      *(jax.ShapeDtypeStruct(tuple(s), jnp.float32) for s in shapes),
      convention=convention,
    )
    by_torch = count_torch_macs(module, shapes[0], convention=convention)
    by_onnx = count_onnx_macs(
      recurrent_in_onnx(steps, batch, inputs, hidden), convention=convention
    )
    self.assertEqual(by_jax.total, by_torch.total)
    self.assertEqual(by_onnx.total, by_torch.total)
    products = steps * batch * 3 * hidden * (inputs + hidden)
    if convention == 'conv+linear':
      self.assertEqual(by_torch.total, products)
    elif convention == 'conv':
      self.assertEqual(by_torch.total, 0)


def attention_in_jax(x, w_in, b_in, w_out, b_out, heads):
  n, length, size = x.shape
  qkv = (x @ w_in.T + b_in).reshape(n, length, 3, heads, size // heads)
  q, k, v = jnp.moveaxis(qkv, 2, 0)
  scores = jnp.einsum('nqhd,nkhd->nhqk', q, k) / (size // heads) ** 0.5
  mixed = jnp.einsum('nhqk,nkhd->nqhd', jax.nn.softmax(scores), v)
  return mixed.reshape(n, length, size) @ w_out.T + b_out


def attention_in_onnx(n, length, size, heads):
  graph = Graph(n, length, size)

  def split(name):
    graph.add('MatMul', graph.weight(f'{name}.w', size, size), after='x')
    graph.add('Add', graph.weight(f'{name}.b', size))
    shape = onnx.numpy_helper.from_array(
      np.array([n, length, heads, size // heads]), f'{name}.shape'
    )
    graph.weights.append(shape)
    graph.add('Reshape', f'{name}.shape')
    return graph.add('Transpose', perm=[0, 2, 1, 3])

  q, k, v = split('q'), split('k'), split('v')
  graph.add(
    'MatMul', graph.add('Transpose', perm=[0, 1, 3, 2], after=k), after=q
  )
  graph.add('Div', graph.weight('scale'))
  graph.add('Softmax')
  graph.add('MatMul', v)
  graph.add('Transpose', perm=[0, 2, 1, 3])
  graph.weights.append(
    onnx.numpy_helper.from_array(np.array([n, length, size]), 'shape')
  )
  graph.add('Reshape', 'shape')
  graph.add('MatMul', graph.weight('out.w', size, size))
  graph.add('Add', graph.weight('out.b', size))
  return graph.model()


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters('conv', 'conv+linear', 'flops')
  def test_totals_agree(self, convention):
    n, length, size, heads = 2, 5, 12, 3

    class SelfAttention(nn.Module):
      def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)

      def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    shapes = [(n, length, size), (3 * size, size), (3 * size,)]
    shapes += [(size, size), (size,)]
    by_jax = count_macs(
      lambda *args: attention_in_jax(*args, heads=heads),
      *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
      convention=convention,
    )
    by_torch = count_torch_macs(
      SelfAttention(), shapes[0], convention=convention
    )
    by_onnx = count_onnx_macs(
      attention_in_onnx(n, length, size, heads), convention=convention
    )
    self.assertEqual(by_onnx.total, by_torch.total)
    # jax.nn.softmax also compares the maximum of each row with -inf.
    rows = n * heads * length if convention == 'flops' else 0
    self.assertEqual(by_jax.total, by_torch.total + rows)
    products = n * (4 * length * size * size + 2 * length * length * size)
    if convention == 'conv+linear':
      self.assertEqual(by_torch.total, products)


if __name__ == '__main__':
  absltest.main()
