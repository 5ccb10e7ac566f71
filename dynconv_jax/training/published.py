"""Loading networks from published weights, and publishing trained networks."""

from __future__ import annotations

import json
import os
import pathlib

from flax import nnx

from dynconv_jax import interop
from dynconv_jax.data import imagenet
from dynconv_jax.data.decode import RESIZE_RATIO, resize_ratio_of
from dynconv_jax.interop.zoo import FOLDER
from dynconv_jax.models import registry
from dynconv_jax.training.config import (
  MethodConfig,
  ModelConfig,
  make_part,
  operational_options,
  read_part,
)
from dynconv_jax.training.workdir import (
  Network,
  Run,
  build_model,
  read_config,
  read_texts,
)

# Options whose values are paths on the machine that trained the network.
_PLACES = ('init_from', 'distill_from')


def load_published(
  source: str, model: str | None = None, folder: str | os.PathLike = FOLDER
) -> Run:
  """Returns a network with published weights as a `Run`.

  The network is dense unless `save_published` wrote the file.

  Args:
    source: see `interop.find_pretrained`.
    model: name of the network. None: the network that the source is known for.
    folder: see `interop.find_pretrained`.

  Raises:
    FileNotFoundError: the weights do not exist, or a package is missing.
    ValueError: the form of the source or its network is unknown, or the weights
      do not fit the network.
  """
  interop.check_pretrained(source)
  model = model or interop.source_model(source)
  if model is None:
    raise ValueError(
      f'{source} does not say which network it is for: set model, such as '
      'model=resnet50'
    )
  interop.check_source(source, model, None)
  if 'method' in interop.source_flags(source):
    return _load_own(interop.find_pretrained(source, folder))
  factory = registry.load_factory(model)
  values = {'model': model, 'method': 'dense'}
  values['image_size'] = getattr(factory, 'image_size', 224)
  values |= interop.source_options(source)  # Unrelated options are ignored.
  network = Network(
    make_part(ModelConfig, values), make_part(MethodConfig, values)
  )
  state_dict = interop.read_state_dict(interop.find_pretrained(source, folder))
  classes = interop.num_classes(state_dict)
  loaded = build_model(network, classes, abstract=True)
  interop.load_torch_state_dict(loaded, state_dict)
  names = imagenet.class_names()
  if classes != len(names):
    names = tuple(f'class {i}' for i in range(classes))
  return Run(
    network,
    nnx.view(loaded, deterministic=True, use_running_average=True),
    names,
    0,
    RESIZE_RATIO,
    interop.source_normalization(source) or 'imagenet',
  )


def _load_own(path: pathlib.Path) -> Run:
  """Returns the network from a file written by `save_published`."""
  header = interop.read_metadata(path)
  texts = json.loads(header['flags'])
  names = tuple(json.loads(header['class_names']))
  network = Network(
    read_part(ModelConfig, texts), read_part(MethodConfig, texts)
  )
  model = build_model(network, len(names), abstract=True)
  interop.load_torch_state_dict(model, interop.read_state_dict(path))
  return Run(
    network,
    nnx.view(model, deterministic=True, use_running_average=True),
    names,
    int(header['step']),
    resize_ratio_of(texts['crop']),
    texts['normalization'],
  )


def save_published(
  path: str | os.PathLike, run: Run, workdir: str | os.PathLike
) -> dict[str, str]:
  """Writes the network of a workdir to one file, readable by PyTorch too.

  Weights have PyTorch's names. The header describes the network and its
  training, without the paths of this machine.

  Args:
    path: output file, ending in .safetensors.
    run: the network, from `load_run`.
    workdir: the run's folder.

  Returns:
    The flags in the header, as text by name.

  Raises:
    ValueError: the suffix is wrong, or the workdir's flags are damaged.
    OSError: the file cannot be written.
  """
  left_out = operational_options(
    read_config(pathlib.Path(workdir).expanduser())
  )
  # Texts as written, so that later versions produce the same file.
  flags = {
    name: os.path.basename(text) if name in _PLACES else text
    for name, text in read_texts(workdir).items()
    if name not in left_out
  }
  flags.setdefault('normalization', run.normalization)
  metadata = {
    'model': run.network.model.model,
    'method': run.network.method.method,
    'step': str(run.step),
    'class_names': json.dumps(run.class_names),
    'flags': json.dumps(flags),
  }
  interop.write_safetensors(
    path, interop.to_torch_state_dict(run.model), metadata
  )
  return flags
