"""Networks of published weights, with no training."""

from __future__ import annotations

from flax import nnx

from dynconv_jax import interop
from dynconv_jax.data import imagenet
from dynconv_jax.data.decode import RESIZE_RATIO
from dynconv_jax.models import registry
from dynconv_jax.training.config import MethodConfig, ModelConfig, make_part
from dynconv_jax.training.workdir import Network, Run, build_model


def load_published(source: str, model: str | None = None) -> Run:
  """Returns a dense network of published weights, as if it were a run's.

  Args:
    source: see `interop.find_pretrained`.
    model: name of the network; None: that which the source is known for.

  Raises:
    FileNotFoundError: there are no such weights, or a package is missing.
    ValueError: the source is of no known form, or its network is not known;
      or the weights are of another one.
  """
  interop.check_pretrained(source)
  model = model or interop.source_model(source)
  if model is None:
    raise ValueError(
      f'{source} does not say which network it is for: set model, such as '
      'model=resnet50'
    )
  factory = registry.load_factory(model)
  values = {'model': model, 'method': 'dense'}
  values['image_size'] = getattr(factory, 'image_size', 224)
  values |= interop.source_options(source)  # Those of other networks pass.
  interop.check_source(source, model, None)
  network = Network(
    make_part(ModelConfig, values), make_part(MethodConfig, values)
  )
  state_dict = interop.read_state_dict(interop.find_pretrained(source))
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
