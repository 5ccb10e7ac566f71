"""Public JAX models from Keras, Haiku and Equimo, and their known MACs."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

os.environ['KERAS_BACKEND'] = 'jax'  # Must be set before importing Keras.

_KERAS = """
  VGG16 VGG19 ResNet50 ResNet101 ResNet50V2 ResNet152V2 DenseNet121
  DenseNet201 InceptionV3 InceptionResNetV2 Xception MobileNet MobileNetV2
  MobileNetV3Small NASNetMobile EfficientNetB0 EfficientNetB4
  EfficientNetV2S ConvNeXtTiny
"""

# Torchvision's figures for the same networks.
_HAIKU = {
  'ResNet18': 1.814,
}

_EQUIMO = {
  'vit_tiny_patch16_224': None,
  'vit_base_patch16_224': 17.564,
  'convnext_t': 4.456,
}


def models() -> dict[str, Callable[[], tuple[Callable, tuple, float | None]]]:
  """Returns {name: function that returns (function, args, known billions)}."""
  found = {f'keras {name}': _keras(name) for name in _KERAS.split()}
  found |= {f'haiku {x}': _haiku(x, macs) for x, macs in _HAIKU.items()}
  return found | {f'equimo {x}': _equimo(x, y) for x, y in _EQUIMO.items()}


def _image(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _keras(name: str):
  def make():
    import keras

    options = {'input_shape': (224, 224, 3)} if 'NetV3' in name else {}
    model = getattr(keras.applications, name)(weights=None, **options)

    def call(weights, others, x):
      return model.stateless_call(weights, others, x, training=False)[0]

    weights, others = (
      [_image(*x.shape) for x in variables]
      for variables in (
        model.trainable_variables,
        model.non_trainable_variables,
      )
    )
    image = _image(1, *model.input_shape[1:])
    return call, (weights, others, image), _by_layer(model) / 1e9

  return make


def _by_layer(model: Any) -> int:
  """Returns the sum over Keras layers of output positions times weights."""
  macs = 0
  for layer in model.layers:
    # The output positions: its shape without batch and features.
    positions = math.prod(layer.output.shape[1:-1]) if layer.weights else 0
    for name in ('kernel', 'depthwise_kernel', 'pointwise_kernel'):
      kernel = getattr(layer, name, None)
      # In some layers this is another name of `depthwise_kernel`.
      if kernel is not None and not (
        name == 'depthwise_kernel' and getattr(layer, 'kernel', None) is kernel
      ):
        macs += positions * math.prod(kernel.shape)
    if hasattr(layer, 'layers'):
      macs += _by_layer(layer)
  return macs


def _haiku(name: str, macs: float):
  def make():
    import haiku as hk

    def network(x, is_training=False):
      return getattr(hk.nets, name)(1000)(x, is_training)

    network = hk.transform_with_state(network)
    image, key = _image(1, 224, 224, 3), jax.random.key(0)
    weights, state = jax.eval_shape(
      functools.partial(network.init, is_training=True), key, image
    )

    def call(weights, state, x):
      return network.apply(weights, state, None, x)[0]

    return call, (weights, state, image), macs

  return make


def _equimo(name: str, macs: float | None):
  def make():
    import equinox as eqx
    from equimo import models as equimo

    model = eqx.filter_eval_shape(
      lambda key: getattr(equimo, name)(key=key), jax.random.key(0)
    )

    def call(model, x):
      return model(x, key=jax.random.key(0), inference=True)

    return call, (model, _image(3, 224, 224)), macs

  return make
