"""What the branch of a gated block computes, as data.

A branch is a chain of convolutions. Execution masks, losses, the MAC report,
sparse backends, and ONNX export all read this description. This module imports
only the standard library.
"""

from __future__ import annotations

import dataclasses
import functools

ACTIVATIONS = ('relu', 'relu6', 'silu', 'gelu')
# f(f(x)) = f(x): applying one of them again changes nothing.
IDEMPOTENT = ('relu', 'relu6', None)
SHORTCUTS = ('identity', 'projection', 'none')
PADDINGS = ('symmetric', 'same')


@dataclasses.dataclass(frozen=True)
class Conv:
  """One convolution of a branch, without bias, and the batch norm after it.

  Attributes:
    name: the attribute of the block that holds the convolution, 'conv1'.
    norm: the attribute that holds its batch norm, 'bn1'.
    in_features: channels of the input.
    features: channels of the output.
    kernel_size: side of the kernel, odd.
    strides: stride of the convolution, along both axes.
    groups: number of channel groups; `in_features` of them make the convolution
      depthwise.
    activation: one of ACTIVATIONS after the batch norm, or None.
    padding: 'symmetric', kernel_size // 2 on each side, as PyTorch pads; or
      'same', TensorFlow's, which is asymmetric for strides above 1.
  """

  name: str
  norm: str
  in_features: int
  features: int
  kernel_size: int = 1
  strides: int = 1
  groups: int = 1
  activation: str | None = None
  padding: str = 'symmetric'

  def __post_init__(self):
    if self.kernel_size % 2 == 0 or self.kernel_size < 1:
      raise ValueError(
        f'kernel_size of {self.name} must be odd; got {self.kernel_size}'
      )
    if self.strides < 1:
      raise ValueError(
        f'strides of {self.name} must be at least 1; got {self.strides}'
      )
    if self.in_features % self.groups or self.features % self.groups:
      raise ValueError(
        f'groups of {self.name} must divide its {self.in_features} and '
        f'{self.features} channels; got {self.groups}'
      )
    if self.activation is not None and self.activation not in ACTIVATIONS:
      raise ValueError(
        f'activation of {self.name} must be None or one of '
        f'{", ".join(ACTIVATIONS)}; got {self.activation!r}'
      )
    if self.padding not in PADDINGS:
      raise ValueError(
        f'padding of {self.name} must be one of {", ".join(PADDINGS)}; got '
        f'{self.padding!r}'
      )

  @property
  def kernel_shape(self) -> tuple[int, int, int, int]:
    """(k, k, in_features / groups, features)."""
    k = self.kernel_size
    return (k, k, self.in_features // self.groups, self.features)

  @property
  def macs_per_position(self) -> int:
    """Multiply-accumulates of one output position."""
    k, _, depth, features = self.kernel_shape
    return k * k * depth * features

  @property
  def is_pointwise(self) -> bool:
    """Whether an output position reads only the same position of the input."""
    return self.kernel_size == self.strides == 1

  def output_size(self, size: int) -> int:
    """Returns the extent of the output for an input of extent `size`."""
    return -(-size // self.strides)

  def pads(self, size: int) -> tuple[int, int]:
    """Returns the padding (low, high) of an extent.

    Args:
      size: extent of the input.
    """
    k = self.kernel_size
    if self.padding == 'symmetric':
      return k // 2, k // 2
    total = (self.output_size(size) - 1) * self.strides + k - size
    total = max(total, 0)
    return total // 2, total - total // 2


@dataclasses.dataclass(frozen=True)
class Branch:
  """The chain of convolutions of a residual branch, and what follows it.

  `activation(shortcut(x) + mask * branch(x))` is the block's output.

  Attributes:
    convs: the convolutions, in order of execution.
    activation: one of ACTIVATIONS after the addition, or None.
    shortcut: 'identity'; 'projection', a strided 1x1 convolution and a batch
      norm; or 'none', nothing is added.
    input_activated: whether the block's input has already been through this
      activation. With an identity shortcut, inactive positions then keep their
      values.
  """

  convs: tuple[Conv, ...]
  activation: str | None = 'relu'
  shortcut: str = 'identity'
  input_activated: bool = False

  def __post_init__(self):
    if not self.convs:
      raise ValueError('a branch needs at least one convolution; got none')
    for before, after in zip(self.convs, self.convs[1:], strict=False):
      if before.features != after.in_features:
        raise ValueError(
          f'{after.name} reads {after.in_features} channels, but '
          f'{before.name} has {before.features}'
        )
    if self.activation is not None and self.activation not in ACTIVATIONS:
      raise ValueError(
        f'activation must be None or one of {", ".join(ACTIVATIONS)}; got '
        f'{self.activation!r}'
      )
    if self.shortcut not in SHORTCUTS:
      raise ValueError(
        f'shortcut must be one of {", ".join(SHORTCUTS)}; got {self.shortcut!r}'
      )
    if self.shortcut == 'identity' and (
      self.strides != 1 or self.in_features != self.features
    ):
      raise ValueError(
        'an identity shortcut needs strides of 1 and equal channels in and '
        f'out; got strides {self.strides}, {self.in_features} and '
        f'{self.features} channels'
      )

  @property
  def in_features(self) -> int:
    """Channels of the input."""
    return self.convs[0].in_features

  @property
  def features(self) -> int:
    """Channels of the output."""
    return self.convs[-1].features

  @functools.cached_property
  def strides(self) -> int:
    """Stride of the whole branch."""
    product = 1
    for conv in self.convs:
      product *= conv.strides
    return product

  @property
  def projection(self) -> Conv | None:
    """The convolution of the shortcut, or None."""
    if self.shortcut != 'projection':
      return None
    return Conv(
      'downsample.0',
      'downsample.1',
      self.in_features,
      self.features,
      strides=self.strides,
    )

  @functools.cached_property
  def levels(self) -> tuple[int, ...]:
    """Which mask each convolution runs on, in order of execution.

    The last one runs on level 0, the block's mask. A convolution that is not
    pointwise reads its input at other positions, so the convolution before it
    runs on the next level; see `reads`.
    """
    level, levels = 0, []
    for conv in reversed(self.convs):
      levels.append(level)
      level += not conv.is_pointwise
    return tuple(reversed(levels))

  @functools.cached_property
  def reads(self) -> tuple[Conv, ...]:
    """The convolution that leads from level i to level i + 1, for each i.

    Level i + 1 is where it needs its input to compute outputs at level i: a
    kernel dilates the mask, and a stride puts zeros between its positions. The
    block's input has no level.
    """
    reads = [conv for conv in self.convs[1:] if not conv.is_pointwise]
    return tuple(reversed(reads))

  @property
  def stays(self) -> bool:
    """Whether inactive positions keep their values."""
    return self.shortcut == 'identity' and (
      self.activation is None
      or (self.input_activated and self.activation in IDEMPOTENT)
    )

  def sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) of each convolution's output.

    Args:
      size: (height, width) of the block's input.
    """
    sizes = []
    for conv in self.convs:
      size = (conv.output_size(size[0]), conv.output_size(size[1]))
      sizes.append(size)
    return tuple(sizes)

  def level_sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) of each level's mask, level 0 first.

    Args:
      size: (height, width) of the block's input.
    """
    by_level = dict(zip(self.levels, self.sizes(size), strict=True))
    return tuple(by_level[level] for level in range(len(by_level)))

  def executed_macs(self, positions: tuple[float, ...]) -> float:
    """Returns the MACs of the branch for given numbers of active positions.

    Args:
      positions: number of active positions of each level.
    """
    return sum(
      conv.macs_per_position * positions[level]
      for conv, level in zip(self.convs, self.levels, strict=True)
    )
