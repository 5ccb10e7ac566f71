"""EfficientNet-Lite: EfficientNets with ReLU6, without squeeze-excitation."""

from __future__ import annotations

from dynconv_jax.models.gated import DropPath
from dynconv_jax.models.mobilenet import Architecture, MobileNet, Stage


class EfficientNetLite(Architecture):
  """An architecture whose published weights come from TensorFlow."""

  def __call__(
    self,
    *,
    num_classes,
    gate,
    dtype,
    rngs,
    width_multiplier: float = 1.0,
    gated_blocks: str = 'identity',
    padding: str = 'same',
    drop_path: DropPath = 0.2,
  ) -> MobileNet:
    """Returns a freshly initialized network; see `MobileNet`."""
    return super().__call__(
      num_classes=num_classes,
      gate=gate,
      dtype=dtype,
      rngs=rngs,
      width_multiplier=width_multiplier,
      gated_blocks=gated_blocks,
      padding=padding,
      drop_path=drop_path,
    )


# Stages: Tan and Le, ICML 2019, table 1. Scaling and Lite changes: the authors'
# code, efficientnet_lite_builder.py in tensorflow/tpu.
_STAGES = (
  Stage(1, 16, 1, 1, 3),
  Stage(6, 24, 2, 2, 3),
  Stage(6, 40, 2, 2, 5),
  Stage(6, 80, 3, 2, 3),
  Stage(6, 112, 3, 1, 5),
  Stage(6, 192, 4, 2, 5),
  Stage(6, 320, 1, 1, 3),
)
# Width, depth, image size, dropout.
_VARIANTS = {
  'efficientnet_lite0': (1.0, 1.0, 224, 0.2),
  'efficientnet_lite1': (1.0, 1.1, 240, 0.2),
  'efficientnet_lite2': (1.1, 1.2, 260, 0.3),
  'efficientnet_lite3': (1.2, 1.4, 280, 0.3),
  'efficientnet_lite4': (1.4, 1.8, 300, 0.3),
}
ARCHITECTURES = {
  name: EfficientNetLite(_STAGES, width, depth, True, image_size, dropout)
  for name, (width, depth, image_size, dropout) in _VARIANTS.items()
}
TITLES = {
  name: name.replace('efficientnet_lite', 'EfficientNet-Lite')
  for name in ('efficientnet_lite', *ARCHITECTURES)
}
