"""Tests that the front ends count depthwise networks identically."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
onnx = pytest.importorskip('onnx', reason='onnx is not installed')

from onnx import TensorProto, helper  # noqa: E402
from torch_mobilenet import (  # noqa: E402
  LITE,
  MOBILENET_V2,
  TorchLite,
  TorchMobileNetV2,
  divisible,
)

from dynconv_jax.macs import count_macs  # noqa: E402
from dynconv_jax.macs.onnx import count_macs as count_onnx_macs  # noqa: E402
from dynconv_jax.macs.torch import count_macs as count_torch_macs  # noqa: E402
from dynconv_jax.models import efficientnet_lite, mobilenet  # noqa: E402

NETWORKS = {**mobilenet.ARCHITECTURES, **efficientnet_lite.ARCHITECTURES}
CASES = {
  'mobilenet_v2': (MOBILENET_V2, 1.0, 1.0, 224, TorchMobileNetV2),
  'efficientnet_lite0': (LITE, 1.0, 1.0, 224, TorchLite),
  # Odd maps; rounded widths.
  'efficientnet_lite2': (LITE, 1.1, 1.2, 260, lambda: TorchLite(1.1, 1.2)),
}


def onnx_graph(stages, width, depth, size):
  """The network node by node, with weights that contain no data."""
  nodes, weights, last = [], [], 'x'

  def add(operator, shape, **attributes):
    nonlocal last
    name = f'n{len(nodes)}'
    inputs = [last]
    if shape:
      weights.append(
        TensorProto(name=f'{name}.w', dims=shape, data_type=TensorProto.FLOAT)
      )
      inputs.append(f'{name}.w')
    nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
    last = name

  def conv(inputs, outputs, k=1, s=1, groups=1):
    shape = (outputs, inputs // groups, k, k)
    add('Conv', shape, strides=[s, s], auto_pad='SAME_UPPER', group=groups)

  conv(3, 32, 3, 2)
  inputs = 32
  for i, (t, channels, number, stride, k) in enumerate(stages):
    if i not in (0, len(stages) - 1):
      number = math.ceil(number * depth)
    outputs = divisible(channels * width)
    for j in range(number):
      if t > 1:
        conv(inputs, t * inputs)
      hidden = t * inputs
      conv(hidden, hidden, k, 1 if j else stride, hidden)
      conv(hidden, outputs)
      inputs = outputs
  conv(inputs, 1280)
  add('GlobalAveragePool', ())
  add('Flatten', ())
  add('Gemm', (1000, 1280), transB=1)

  def value(name, shape=None):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

  graph = helper.make_graph(
    nodes, 'graph', [value('x', (1, 3, size, size))], [value(last)], weights
  )
  return helper.make_model(
    graph, opset_imports=[helper.make_opsetid('', 22)], ir_version=10
  )


@pytest.mark.parametrize('name', CASES)
def test_three_front_ends(name):
  stages, width, depth, size, make_twin = CASES[name]
  model = nnx.eval_shape(
    lambda: NETWORKS[name](
      num_classes=1000,
      gate=lambda site: None,
      dtype=jnp.float32,
      rngs=nnx.Rngs(0),
    )
  )
  model = nnx.view(model, deterministic=True, use_running_average=True)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  kwargs = {'convention': 'conv+linear'}
  ours = count_macs(model, images, **kwargs)
  theirs = count_torch_macs(
    make_twin().eval(), torch.empty(1, 3, size, size), **kwargs
  )
  graph = onnx_graph(stages, width, depth, size)
  written = count_onnx_macs(graph, **kwargs)
  assert ours.total == theirs.total == written.total > 3e8
