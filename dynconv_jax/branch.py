"""Descriptions of the branches of gated blocks.

A branch is a chain of convolutions. Execution masks, losses, the MAC report,
sparse backends, and ONNX export all read its description. This module imports
only the standard library.
"""

from __future__ import annotations

import dataclasses
import functools

ACTIVATIONS = ('relu', 'relu6', 'silu', 'gelu')
# Activations with f(f(x)) = f(x).
IDEMPOTENT = ('relu', 'relu6', None)
SHORTCUTS = ('identity', 'projection', 'none')
PADDINGS = ('symmetric', 'same')


@dataclasses.dataclass(frozen=True)
class Conv:
  """One convolution of a branch, without bias, and the batch norm after it.

  Attributes:
    name: the block's attribute of the convolution, such as 'conv1'.
    norm: the block's attribute of the batch norm, such as 'bn1'.
    in_features: channels of the input.
    features: channels of the output.
    kernel_size: side of the kernel, odd.
    strides: stride of the convolution, along both axes.
    groups: number of channel groups; equals `in_features` if the convolution is
      depthwise.
    activation: activation after the batch norm, one of ACTIVATIONS or None.
    padding: 'symmetric' for kernel_size // 2 on each side, as in PyTorch; or
      'same', as in TensorFlow, which may be asymmetric for strides above 1.
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
    """Whether each output position reads only the same input position."""
    return self.kernel_size == self.strides == 1

  def output_size(self, size: int) -> int:
    """Returns the extent of the output for an input of extent `size`."""
    return -(-size // self.strides)

  def pads(self, size: int) -> tuple[int, int]:
    """Returns the padding (low, high) along an axis.

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
  """The convolutions of a residual branch, the shortcut, and the activation.

  `activation(shortcut(x) + mask * branch(x))` is the block's output.

  Attributes:
    convs: the convolutions, in order of execution.
    activation: activation after the addition, one of ACTIVATIONS or None.
    shortcut: 'identity'; 'projection' for a strided 1x1 convolution and a batch
      norm; or 'none' for no addition.
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
          f'{before.name} writes {before.features}'
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
        'an identity shortcut needs strides of 1 and as many input as output '
        f'channels; got strides {self.strides}, {self.in_features} and '
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
    """The mask level that each convolution runs on, in order of execution.

    The last convolution runs on level 0, the block's mask. A convolution that
    is not pointwise also reads other positions, so the convolution before it
    runs on the next level; see `reads`.
    """
    level, levels = 0, []
    for conv in reversed(self.convs):
      levels.append(level)
      level += not conv.is_pointwise
    return tuple(reversed(levels))

  @functools.cached_property
  def reads(self) -> tuple[Conv, ...]:
    """The convolution between level i + 1 and level i, for each i.

    Level i + 1 contains the positions that the convolution reads to compute its
    output at level i: the kernel dilates the mask, and the stride inserts zeros
    between positions. The block's input has no level.
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
