"""Tests of the PyTorch networks in the benchmarks, against the JAX networks."""

import numpy as np
import pytest
from flax import nnx

from dynconv_jax import create_model
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.sparse.sparsify import trace_blocks

torch = pytest.importorskip('torch', reason='pip install -e .[torch]')
pytest.importorskip('onnxruntime', reason='pip install -e .[test]')

from onnx_export import randomize, run  # noqa: E402

from benchmarks.torch_networks import Network, create  # noqa: E402


@pytest.mark.parametrize(
  'name, width, size',
  [
    ('cifar_resnet8', 1, 18),
    pytest.param('resnet50', 0.25, 65, marks=pytest.mark.slow),
    pytest.param('efficientnet_lite0', 0.5, 75, marks=pytest.mark.slow),
    pytest.param('mobilenet_v2', 0.5, 64, marks=pytest.mark.slow),
  ],
)
def test_folded_and_by_positions_equal_jax(name, width, size):
  model = randomize(
    create_model(name, num_classes=6, width_multiplier=width, rngs=nnx.Rngs(0))
  )
  folded = Network(model).load(model).fold()
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, size, size + 6, 3)).astype(np.float32)
  x = torch.from_numpy(images).permute(0, 3, 1, 2)
  expected, _ = run(model, images)
  with torch.inference_mode():
    _assert_close(folded(x), expected)
  branches = {block.name: block.branch for block in gated_blocks(model)}
  given = {
    trace.name: rng.random(
      (2, *branches[trace.name].sizes(trace.shape[1:3])[-1])
    )
    < 0.3
    for trace in trace_blocks(model, images.shape)
  }
  expected, masks = model(images, masks=given)
  maps = {
    m.name: [torch.from_numpy(np.array(level) > 0) for level in m.maps]
    for m in masks
  }
  with torch.inference_mode():
    masked = folded(x, maps)
    _assert_close(masked, expected)
    assert (masked - folded(x)).abs().max() > 1e-2 * masked.abs().max()


def _assert_close(got, expected):
  scale = np.abs(expected).max()
  assert np.ptp(expected) > 1e-2 * scale
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * scale)


def test_parameters_are_those_of_torchvision():
  # torchvision's ResNet-50 has 25,557,032 parameters, MobileNetV2 3,504,872.
  for name, number in (('resnet50', 25_557_032), ('mobilenet_v2', 3_504_872)):
    model = create(name, 1000)
    assert sum(p.numel() for p in model.parameters()) == number
  names = create('resnet18', 3).state_dict()
  assert 'layer2.0.downsample.1.running_var' in names


def test_channels_are_multiplied():
  model = create('cifar_resnet8', 3, width_multiplier=0.5)
  assert model.conv1.out_channels == 8 and model.fc.in_features == 32


def test_another_structure_is_refused():
  with pytest.raises(ValueError, match='Linear has no stem in `foldable`'):
    Network(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
