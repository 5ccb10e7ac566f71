"""MobileNetV2 and EfficientNet-Lite in PyTorch, with published names.

Written from the published structures, independently of dynconv_jax. Import only
if PyTorch is installed.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# More threads spend more time waiting than computing.
torch.set_num_threads(1)

# Expansion, channels, blocks, stride, kernel: Sandler et al., CVPR 2018, table
# 2, and tensorflow/tpu, efficientnet_lite_builder.py.
MOBILENET_V2 = (
  *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3)),
  *((6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3)),
)
LITE = (
  *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
  *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)


def divisible(v):
  """torchvision's `_make_divisible`, with a divisor of 8."""
  new = max(8, int(v + 4) // 8 * 8)
  return new + 8 if new < 0.9 * v else new


def unit(inputs, outputs, k=1, s=1, groups=1, activated=True):
  layers = [
    nn.Conv2d(inputs, outputs, k, s, k // 2, groups=groups, bias=False),
    nn.BatchNorm2d(outputs),
  ]
  return nn.Sequential(*layers, *[nn.ReLU6()] * activated)


class InvertedResidual(nn.Module):
  """torchvision's."""

  def __init__(self, inputs, outputs, stride, t):
    super().__init__()
    hidden = inputs * t
    self.added = stride == 1 and inputs == outputs
    self.conv = nn.Sequential(
      *[unit(inputs, hidden)] * (t > 1),
      unit(hidden, hidden, 3, stride, hidden),
      *unit(hidden, outputs, activated=False),
    )

  def forward(self, x):
    return x + self.conv(x) if self.added else self.conv(x)


class TorchMobileNetV2(nn.Module):
  """torchvision's MobileNetV2."""

  def __init__(self, width=1.0, classes=1000):
    super().__init__()
    inputs = divisible(32 * width)
    features = [unit(3, inputs, 3, 2)]
    for t, channels, number, stride, _ in MOBILENET_V2:
      outputs = divisible(channels * width)
      for i in range(number):
        features.append(
          InvertedResidual(inputs, outputs, 1 if i else stride, t)
        )
        inputs = outputs
    head = divisible(1280 * max(1.0, width))
    self.features = nn.Sequential(*features, unit(inputs, head))
    self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, classes))

  def forward(self, x):
    return self.classifier(self.features(x).mean((2, 3)))


class SameConv2d(nn.Conv2d):
  """timm's `Conv2dSame`: TensorFlow's padding."""

  def forward(self, x):
    k, s = self.kernel_size[0], self.stride[0]
    pads = [max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:]]
    (top, left) = (p // 2 for p in pads)
    x = F.pad(x, (left, pads[1] - left, top, pads[0] - top))
    return F.conv2d(x, self.weight, None, s, 0, 1, self.groups)


class LiteBlock(nn.Module):
  """timm's `InvertedResidual`, or its `DepthwiseSeparableConv`."""

  def __init__(self, inputs, outputs, k, stride, t, conv, norm):
    super().__init__()
    hidden = inputs * t
    self.added = stride == 1 and inputs == outputs
    self.layers = [
      *[('conv_pw', conv(inputs, hidden, 1))] * (t > 1),
      ('conv_dw', conv(hidden, hidden, k, stride, hidden)),
      ('conv_pwl' if t > 1 else 'conv_pw', conv(hidden, outputs, 1)),
    ]
    for i, (name, layer) in enumerate(self.layers, start=1):
      setattr(self, name, layer)
      setattr(self, f'bn{i}', norm(layer.out_channels))

  def forward(self, x):
    y = x
    for i, (_, layer) in enumerate(self.layers, start=1):
      y = getattr(self, f'bn{i}')(layer(y))
      y = F.relu6(y) if i < len(self.layers) else y
    return x + y if self.added else y


class TorchLite(nn.Module):
  """timm's `tf_efficientnet_lite*`; `efficientnet_lite*` if not `same`."""

  def __init__(self, width=1.0, depth=1.0, same=True, classes=1000):
    super().__init__()

    def conv(inputs, outputs, k, s=1, groups=1):
      if same:
        return SameConv2d(inputs, outputs, k, s, groups=groups, bias=False)
      return nn.Conv2d(inputs, outputs, k, s, k // 2, groups=groups, bias=False)

    def norm(channels):
      return nn.BatchNorm2d(channels, eps=1e-3 if same else 1e-5)

    self.conv_stem, self.bn1 = conv(3, 32, 3, 2), norm(32)
    inputs, stages = 32, []
    for t, channels, number, stride, k in LITE:
      if channels not in (16, 320):
        number = math.ceil(number * depth)
      blocks, outputs = [], divisible(channels * width)
      for i in range(number):
        s = 1 if i else stride
        blocks.append(LiteBlock(inputs, outputs, k, s, t, conv, norm))
        inputs = outputs
      stages.append(nn.Sequential(*blocks))
    self.blocks = nn.Sequential(*stages)
    self.conv_head, self.bn2 = conv(inputs, 1280, 1), norm(1280)
    self.classifier = nn.Linear(1280, classes)

  def forward(self, x):
    x = self.blocks(F.relu6(self.bn1(self.conv_stem(x))))
    x = F.relu6(self.bn2(self.conv_head(x)))
    return self.classifier(x.mean((2, 3)))


def calibrated(twin, images, seed=0):
  """Returns a twin in evaluation mode, with batch statistics of the images."""
  torch.manual_seed(seed)
  for module in twin.modules():
    if isinstance(module, nn.BatchNorm2d):
      nn.init.uniform_(module.weight, 0.5, 1.5)
      nn.init.normal_(module.bias, std=0.3)
      module.momentum = None  # the mean over the batches
    if isinstance(module, nn.Conv2d):
      nn.init.kaiming_normal_(module.weight)
  with torch.no_grad():
    twin(images)
  return twin.eval()


def noise(*shape, seed=0):
  """Returns float32[N, 3, H, W] of noise."""
  x = np.random.default_rng(seed).normal(size=shape)
  return torch.from_numpy(x.astype(np.float32))
