"""Public PyTorch models with random weights, and their known MACs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_TORCHVISION = """
  alexnet vgg16 googlenet inception_v3 resnet50 resnext50_32x4d
  wide_resnet50_2 densenet121 squeezenet1_0 mobilenet_v2 mobilenet_v3_large
  mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s
  regnet_y_400mf convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t
"""

# {boxes: (options, names)}. In general, the number of boxes depends on the
# weights; torchvision used trained weights and an image of noise. With these
# options it does not.
_DETECTION = {
  'one stage': (
    {},
    """
    retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 fcos_resnet50_fpn
    ssd300_vgg16 ssdlite320_mobilenet_v3_large
    """,
  ),
  'no proposals': (
    {'rpn_score_thresh': 1.0},
    """
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn
    """,
  ),
  '1,000 proposals, no detections': (
    {'rpn_nms_thresh': 1.0, 'box_score_thresh': 1.0},
    """
    fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 maskrcnn_resnet50_fpn
    keypointrcnn_resnet50_fpn
    """,
  ),
  '1,000 proposals, 100 detections': (
    {'rpn_nms_thresh': 1.0, 'box_nms_thresh': 1.0},
    'maskrcnn_resnet50_fpn_v2',
  ),
}

_TIMM = """
  resnetv2_50 tf_efficientnet_lite0 mixer_b16_224 resmlp_12_224
  deit_tiny_patch16_224 xcit_nano_12_p16_224 edgenext_small coatnet_0_rw_224
  dm_nfnet_f0 pvt_v2_b0 levit_128s poolformer_s12 gmlp_s16_224
  mobilevit_xs eva02_tiny_patch14_224 hrnet_w18_small repvgg_a0
  beit_base_patch16_224
"""

_SMALL = {'hidden_size': 256, 'intermediate_size': 512, 'num_hidden_layers': 2}
_EXPERTS = _SMALL | {'moe_intermediate_size': 128}

_TRANSFORMERS = {
  'Bert': {},
  'DistilBert': {},
  'GPT2': {},
  'T5': {},
  'Whisper': {},
  'Llama': _SMALL,
  'Mixtral': _SMALL,
  'Olmoe': _SMALL | {'num_experts': 16},
  'Qwen2Moe': _EXPERTS | {'shared_expert_intermediate_size': 512},
  'Qwen3Moe': _EXPERTS | {'num_experts': 16},
  'GptOss': _SMALL
  | {'num_local_experts': 8, 'head_dim': 32}
  | {'num_attention_heads': 8, 'num_key_value_heads': 4},
  'DeepseekV3': _EXPERTS | {'n_routed_experts': 8, 'n_group': 1},
  'SwitchTransformers': {},
}

_TOKENS = 128


def models() -> dict[str, tuple[Callable[[], nn.Module], Any]]:
  """Returns {name: (function that creates the model, its inputs)}.

  Inputs are one positional argument, or a dict of keyword arguments.
  """
  import timm
  import torchvision
  import transformers

  found = {}
  for name in _TORCHVISION.split():
    make = getattr(torchvision.models, name)
    (size,) = _weights(name).transforms().crop_size
    options = (
      {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}
    )
    found[f'torchvision {name}'] = (
      lambda make=make, options=options: make(**options),
      torch.zeros(1, 3, size, size),
    )
  for name in _TIMM.split():
    found[f'timm {name}'] = (
      lambda name=name: timm.create_model(name, pretrained=False),
      torch.zeros(1, 3, 224, 224),
    )
  tokens = torch.ones(1, _TOKENS, dtype=torch.int64)
  for name in _TRANSFORMERS:
    inputs = {'input_ids': tokens}
    if name in ('T5', 'SwitchTransformers'):
      inputs = inputs | {'decoder_input_ids': tokens}
    if name == 'Whisper':
      inputs = {
        'input_features': torch.zeros(1, 80, 3000),
        'decoder_input_ids': tokens,
      }
    found[f'transformers {name}'] = (
      lambda name=name: getattr(transformers, f'{name}Model')(_config(name)),
      inputs,
    )
  return found


def detection() -> dict[str, tuple[Callable[[], nn.Module], Any, str]]:
  """Returns {name: (function that creates the model, inputs, boxes)}."""
  import torchvision

  found = {}
  for boxes, (options, names) in _DETECTION.items():
    for name in names.split():
      make = functools.partial(
        getattr(torchvision.models.detection, name),
        weights_backbone=None,
        **options,
      )
      found[f'torchvision {name}'] = make, [(3, 800, 800)], boxes
  return found


def known(name: str) -> float | None:
  """Returns a model's MACs in billions, if published or in closed form."""
  library, _, model = name.partition(' ')
  if library == 'torchvision':
    return _weights(model).meta['_ops']
  closed = _closed_form(model) if library == 'transformers' else None
  return None if closed is None else closed / 1e9


def _weights(name: str):
  """Returns torchvision's first weights enum of a model (not downloaded)."""
  import torchvision

  return next(iter(torchvision.models.get_model_weights(name)))


def _config(name: str):
  import transformers

  return getattr(transformers, f'{name}Config')(**_TRANSFORMERS[name])


def _closed_form(name: str) -> int | None:
  """Returns the MACs of some transformers, computed from their sizes.

  A layer has projections, two attention products over all pairs of tokens, and
  a perceptron, or a router and the experts that each token uses.
  """
  n = _TOKENS
  if name in ('Bert', 'DistilBert', 'GPT2'):
    size, depth = 768, 6 if name == 'DistilBert' else 12
    macs = depth * (n * (4 + 2 * 4) * size**2 + 2 * n**2 * size)
    return macs + (size**2 if name == 'Bert' else 0)
  if name in ('T5', 'Whisper', 'DeepseekV3', 'SwitchTransformers'):
    return None
  config = _config(name)

  def of(*names):
    return next((x for y in names if (x := getattr(config, y, None))), 0)

  size, heads = config.hidden_size, config.num_attention_heads
  head = of('head_dim') or size // heads
  projections = 2 * (heads + config.num_key_value_heads) * head * size
  inner = 3 * size * of('moe_intermediate_size', 'intermediate_size')
  experts = of('num_local_experts', 'num_experts')
  if experts:
    inner = config.num_experts_per_tok * inner + experts * size
  if shared := of('shared_expert_intermediate_size'):
    inner += 3 * size * shared + size
  layer = n * (projections + inner) + 2 * n**2 * heads * head
  return config.num_hidden_layers * layer
