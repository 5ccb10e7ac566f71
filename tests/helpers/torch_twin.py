"""ResNets in PyTorch with torchvision's structure and the authors' gates.

Written from torchvision's published structure, independently of dynconv_jax.
Modules have the names of the public checkpoints. Import only if PyTorch is
installed.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# More threads spend more time waiting than computing.
torch.set_num_threads(1)

# Blocks per stage, width of the stem, whether bottlenecks, whether ImageNet's
# stem: He et al., CVPR 2016, table 1 and section 4.2.
STRUCTURES = {
  'resnet18': ((2, 2, 2, 2), 64, False, True),
  'resnet34': ((3, 4, 6, 3), 64, False, True),
  'resnet50': ((3, 4, 6, 3), 64, True, True),
  'resnet101': ((3, 4, 23, 3), 64, True, True),
  'resnet152': ((3, 8, 36, 3), 64, True, True),
  'cifar_resnet8': ((1, 1, 1), 16, False, False),
  'cifar_resnet14': ((2, 2, 2), 16, False, False),
  'cifar_resnet20': ((3, 3, 3), 16, False, False),
  'cifar_resnet26': ((4, 4, 4), 16, False, False),
  'cifar_resnet32': ((5, 5, 5), 16, False, False),
  'cifar_resnet44': ((7, 7, 7), 16, False, False),
  'cifar_resnet56': ((9, 9, 9), 16, False, False),
  'cifar_resnet110': ((18, 18, 18), 16, False, False),
}


def _decide(logits, temperature):
  """Hard at 0, straight-through in training."""
  hard = (logits >= 0).to(logits.dtype)
  soft = torch.sigmoid(logits / temperature)
  return (hard - soft).detach() + soft


class TorchMaskUnit(nn.Module):
  """The logits of the `MaskUnit` of DynConv's authors."""

  def __init__(self, features, stride):
    super().__init__()
    self.maskconv = nn.Module()
    self.maskconv.conv = nn.Conv2d(features, 1, 3, stride, 1)
    self.maskconv.fc = nn.Linear(features, 1)

  def forward(self, x):
    squeezed = self.maskconv.fc(x.mean((2, 3)))
    return self.maskconv.conv(x) + squeezed[:, :, None, None]


class TorchBlock(nn.Module):
  """torchvision's block; `costs` contains its (executed, dense) MACs.

  ConvNet-AIG's gate consists of modules of the block itself, and its projection
  has a different name.
  """

  def __init__(self, inputs, planes, stride, bottleneck, gate, temperature):
    super().__init__()
    outputs = 4 * planes if bottleneck else planes
    shapes = [(inputs, planes, 3, stride), (planes, planes, 3, 1)]
    if bottleneck:
      shapes = [
        (inputs, planes, 1, 1),
        (planes, planes, 3, stride),
        (planes, outputs, 1, 1),
      ]
    self.number, self.stride = len(shapes), stride if bottleneck else 1
    for i, (a, b, k, s) in enumerate(shapes, start=1):
      setattr(self, f'conv{i}', nn.Conv2d(a, b, k, s, k // 2, bias=False))
      setattr(self, f'bn{i}', nn.BatchNorm2d(b))
    projection = nn.Identity()
    if stride != 1 or inputs != outputs:
      projection = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False),
        nn.BatchNorm2d(outputs),
      )
    self.gate, self.temperature = gate, temperature
    self.project = 'shortcut' if gate == 'convnet_aig' else 'downsample'
    setattr(self, self.project, projection)
    if gate == 'dynconv':
      self.masker = TorchMaskUnit(inputs, stride)
    if gate == 'convnet_aig':
      self.fc1 = nn.Conv2d(inputs, 16, 1)
      self.fc1bn = nn.BatchNorm2d(16)
      self.fc2 = nn.Conv2d(16, 2, 1)

  def decide(self, x, size):
    """Returns where the branch is executed, at the size of its output."""
    if self.gate == 'dense':
      return torch.ones(len(x), 1, *size, dtype=x.dtype)
    if self.gate == 'dynconv':
      logits = self.masker(x)
    else:
      hidden = F.relu(self.fc1bn(self.fc1(x.mean((2, 3), keepdim=True))))
      skip, execute = self.fc2(hidden).split(1, dim=1)
      logits = execute - skip
    # Too close to the threshold, rounding decides.
    self.margin = float(logits.detach().abs().min())
    return _decide(logits, self.temperature).expand(-1, -1, *size)

  def forward(self, x):
    y, sizes = x, []
    for i in range(1, self.number + 1):
      y = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(y))
      sizes.append(y.shape)
      y = F.relu(y) if i < self.number else y
    mask = self.decide(x, y.shape[2:])
    stuffed = torch.zeros(len(x), 1, *sizes[0][2:], dtype=x.dtype)
    stuffed[:, :, :: self.stride, :: self.stride] = mask.detach()
    dilated = F.max_pool2d(stuffed, 3, 1, 1)
    executed, dense = 0, 0
    for i, size in enumerate(sizes, start=1):
      kernel = getattr(self, f'conv{i}').weight.numel()
      executed = executed + kernel * (dilated if i == 1 else mask).sum()
      dense += kernel * size[0] * size[2] * size[3]
    self.costs, self.mask, self.dilated = (executed, dense), mask, dilated
    return F.relu(getattr(self, self.project)(x) + mask * y)


class TorchResNet(nn.Module):
  """torchvision's ResNet; `gates` is one for all blocks, or one per block."""

  def __init__(
    self,
    depths,
    width,
    classes,
    bottleneck,
    imagenet,
    gates='dynconv',
    temperature=1.0,
  ):
    super().__init__()
    self.imagenet = imagenet
    kernel, stride = (7, 2) if imagenet else (3, 1)
    self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    gates = [gates] * sum(depths) if isinstance(gates, str) else gates
    inputs, self.blocks = width, []
    for stage, depth in enumerate(depths):
      planes, blocks = width * 2**stage, []
      for i in range(depth):
        s, gate = 2 if stage and not i else 1, gates[len(self.blocks) + i]
        blocks.append(
          TorchBlock(inputs, planes, s, bottleneck, gate, temperature)
        )
        inputs = 4 * planes if bottleneck else planes
      setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))
      self.blocks += blocks
    self.head = 'linear' if 'convnet_aig' in gates else 'fc'
    setattr(self, self.head, nn.Linear(inputs, classes))

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
    for block in self.blocks:
      x = block(x)
    return getattr(self, self.head)(x.mean((2, 3)))

  def margin(self):
    """Returns the least distance of the last decisions to their thresholds."""
    return min((b.margin for b in self.blocks if b.gate != 'dense'), default=1)


def create_twin(name, gates, classes=5, width_multiplier=1.0, seed=0):
  """Returns a network in evaluation mode, with batch statistics of noise."""
  torch.manual_seed(seed)
  depths, width, bottleneck, imagenet = STRUCTURES[name]
  twin = TorchResNet(
    depths, int(width * width_multiplier), classes, bottleneck, imagenet, gates
  )
  norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
  for norm in norms:
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.3)
    norm.momentum = None  # the mean over the batches
  with torch.no_grad():
    for _ in range(2):
      twin(random_images(name, 8, seed + 1))
  return twin.eval()


def random_images(name, number, seed, size=None):
  """Returns a small batch of noise, float32[N, 3, H, W] with odd width."""
  size = size or (64 if STRUCTURES[name][3] else 8)
  images = np.random.default_rng(seed).normal(size=(number, 3, size, size - 1))
  # Images differ as a whole, so that per-image gates do, too.
  images *= np.linspace(0.5, 2.0, number)[:, None, None, None]
  return torch.from_numpy(images.astype(np.float32))
