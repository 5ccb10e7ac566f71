"""The cost of each kind of operation, computed from its shapes.

All front ends (JAX, PyTorch, ONNX) describe their operations to these functions
and compute no costs themselves, so a network has the same count in every
framework. Each function returns the `Work` of an operation, which contains
everything that a convention needs. docs/macs.md lists the formulas; those for
linear algebra are in `linalg.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

KINDS = (
  'conv',
  'matmul',
  'norm',
  'pool',
  'activation',
  'reduction',
  'elementwise',
)


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of one operation, or of several operations of one layer.

  Attributes:
    kind: one of KINDS.
    macs: multiply-accumulates, including those on input padding.
    inside_macs: multiply-accumulates that read an element of the input; at
      most `macs`.
    bias: bias additions to the outputs of a convolution or matmul.
    operations: all other arithmetic operations on elements.
    ptflops: what ptflops 0.7.5 counts for the module beyond `macs + bias`:
      its norms, activations and pooling.
    positions: output positions over the batch that an execution mask can
      select: N * h * w for a convolution, N * tokens for a linear layer; 0 if
      there are none or they are unknown.
    outputs: elements in the output of a convolution or matmul.
  """

  kind: str
  macs: int = 0
  inside_macs: int = 0
  bias: int = 0
  operations: int = 0
  ptflops: int = 0
  positions: int = 0
  outputs: int = 0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'kind must be one of {KINDS}; got {self.kind!r}')

  def __add__(self, other: Work) -> Work:
    """Returns the sum. Its kind is the one listed first in KINDS."""
    kind = min(self.kind, other.kind, key=KINDS.index)
    return Work(
      kind, *(a + b for a, b in zip(self.counts, other.counts, strict=True))
    )

  def __mul__(self, times: int) -> Work:
    """Returns the work of `times` executions."""
    return Work(self.kind, *(count * times for count in self.counts))

  @property
  def counts(self) -> tuple[int, ...]:
    """All fields except the kind (`dataclasses.astuple` makes copies)."""
    return tuple(vars(self).values())[1:]


def convolution(
  *,
  batch: int,
  in_features: int,
  out_features: int,
  input_size: Sequence[int],
  kernel_size: Sequence[int],
  strides: Sequence[int] | None = None,
  padding: Sequence[tuple[int, int]] | None = None,
  input_dilation: Sequence[int] | None = None,
  kernel_dilation: Sequence[int] | None = None,
  feature_groups: int = 1,
  batch_groups: int = 1,
  bias: bool = False,
) -> Work:
  """Returns the work of a convolution with any number of spatial dimensions.

  Args:
    batch: images in the input.
    in_features: channels of the input, over all groups.
    out_features: channels of the output, over all groups.
    input_size: spatial shape of the input.
    kernel_size: spatial shape of the kernel, before dilation.
    strides: step of the window in each dimension; 1 by default.
    padding: (low, high) in each dimension; negative values crop; 0 by default.
    input_dilation: spacing of the input elements, with zeros in between; the
      stride of a transposed convolution; 1 by default.
    kernel_dilation: spacing of the kernel's taps; 1 by default.
    feature_groups: groups of channels; `in_features` for a depthwise
      convolution.
    batch_groups: groups of the batch, as in gradients of grouped kernels.
    bias: whether a bias is added to each output.
  """
  ones = (1,) * len(input_size)
  strides = strides or ones
  padding = padding or ((0, 0),) * len(input_size)
  dims = [
    _Dimension(*sizes)
    for sizes in zip(
      input_size,
      kernel_size,
      strides,
      padding,
      input_dilation or ones,
      kernel_dilation or ones,
      strict=True,
    )
  ]
  positions = batch // batch_groups * math.prod(d.output_size for d in dims)
  per_pair = batch // batch_groups * (in_features // feature_groups)
  per_pair *= out_features
  return Work(
    'conv',
    macs=per_pair * math.prod(d.pairs() for d in dims),
    inside_macs=per_pair * math.prod(d.inside_pairs() for d in dims),
    bias=positions * out_features if bias else 0,
    positions=positions,
    outputs=positions * out_features,
  )


def transposed_convolution(
  *,
  batch: int,
  in_features: int,
  out_features: int,
  input_size: Sequence[int],
  kernel_size: Sequence[int],
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  output_padding: Sequence[int],
  kernel_dilation: Sequence[int] | None = None,
  feature_groups: int = 1,
  bias: bool = False,
) -> Work:
  """Returns the work of a transposed convolution in PyTorch's and ONNX's terms.

  Each input element is multiplied by each tap once, even if the product is
  cropped, but at most once per output. With stride 1 there are no zeros between
  input elements, and the equivalent convolution would read padding instead.

  Args are those of `convolution`, except that `strides` is the input dilation,
  `padding` is cropped from the output (low, high), and `output_padding` is
  added to its high end.
  """
  kernel_dilation = kernel_dilation or (1,) * len(input_size)
  padding = [
    (dilation * (taps - 1) - low, dilation * (taps - 1) - high + extra)
    for dilation, taps, (low, high), extra in zip(
      kernel_dilation, kernel_size, padding, output_padding, strict=True
    )
  ]
  work = convolution(
    batch=batch,
    in_features=in_features,
    out_features=out_features,
    input_size=input_size,
    kernel_size=kernel_size,
    padding=padding,
    input_dilation=strides,
    kernel_dilation=kernel_dilation,
    feature_groups=feature_groups,
    bias=bias,
  )
  dims = [
    _Dimension(size, taps, 1, padded, stride, dilation)
    for size, taps, padded, stride, dilation in zip(
      input_size, kernel_size, padding, strides, kernel_dilation, strict=True
    )
  ]
  pairs = math.prod(d.input_size * min(d.taps, d.output_size) for d in dims)
  macs = batch * (in_features // feature_groups) * out_features * pairs
  return dataclasses.replace(work, macs=macs)


def matmul(
  rows: int,
  inner: int,
  columns: int,
  *,
  batch: int = 1,
  bias: bool = False,
  positions: int = 0,
) -> Work:
  """Returns the work of [batch, rows, inner] times [batch, inner, columns].

  For a linear layer, `rows` includes the batch and all positions. `bias` adds
  one addition per output.
  """
  outputs = batch * rows * columns
  macs = outputs * inner
  return Work(
    'matmul',
    macs,
    macs,
    bias=outputs if bias else 0,
    positions=positions,
    outputs=outputs,
  )


def of_complex(work: Work, steps: int = 2) -> Work:
  """Returns the real-valued work of `work` done on complex numbers.

  A complex multiply-accumulate is four real ones (four multiplications and four
  additions). A complex addition is two real ones. `fft` already counts real
  operations.

  Args:
    work: the work as if on real numbers.
    steps: real operations per complex operation in `work.operations`.
  """
  return dataclasses.replace(
    work,
    macs=4 * work.macs,
    inside_macs=4 * work.inside_macs,
    bias=2 * work.bias,
    operations=steps * work.operations,
  )


def attention(
  batch: int, queries: int, keys: int, key_size: int, value_size: int
) -> Work:
  """Returns the work of softmax(Q K^T / scale) V; `batch` includes heads."""
  scores = matmul(queries, key_size, keys, batch=batch)
  values = matmul(queries, keys, value_size, batch=batch)
  size = batch * queries * keys
  return scores + elementwise(size) + softmax(size, batch * queries) + values


def softmax(elements: int, rows: int) -> Work:
  """Returns the work of a softmax: 5 per element minus 2 per row.

  The steps are maximum, difference, exponential, sum and quotient.
  """
  return Work(
    'activation', operations=5 * elements - 2 * rows, ptflops=elements
  )


def activation(elements: int, operations: int = 1) -> Work:
  """Returns the work of an activation with `operations` steps per element."""
  return Work('activation', operations=operations * elements, ptflops=elements)


def norm(
  elements: int,
  features: int,
  *,
  affine: bool = True,
  statistics_groups: int = 0,
) -> Work:
  """Returns the work of a normalization.

  (x - mean) * (scale * rsqrt(variance + epsilon)) + bias: 3 per element and 3
  per feature; 2 and 2 without scale and bias.

  Args:
    elements: size of the input.
    features: number of means and variances: channels for a batch norm with
      running statistics, groups times batch for a group norm.
    affine: whether scale and bias are applied.
    statistics_groups: number of means computed from the input, 0 if they are
      given. Adds 3 per element (sum, square, sum of squares) and 2 per group
      (two divisions, a square and a difference, minus the first summand of each
      of the two sums).
  """
  operations = (3 if affine else 2) * (elements + features)
  if statistics_groups:
    operations += 3 * elements + 2 * statistics_groups
  return Work(
    'norm', operations=operations, ptflops=(2 if affine else 1) * elements
  )


def pool(inputs: int, outputs: int, window: int, *, mean: bool = False) -> Work:
  """Returns the work of pooling: window - 1 per output, plus 1 for a mean.

  Args:
    inputs: size of the input, which is what ptflops counts.
    outputs: size of the output.
    window: elements in a window, including padding.
    mean: whether the sum is divided by the window size.
  """
  return Work('pool', operations=outputs * (window - 1 + mean), ptflops=inputs)


def reduction(inputs: int, outputs: int) -> Work:
  """Returns the work of a reduction: one per element that is reduced away."""
  return Work('reduction', operations=max(inputs - outputs, 0))


def elementwise(elements: int) -> Work:
  """Returns the work of one operation on each of `elements` elements."""
  return Work('elementwise', operations=elements)


def sort(elements: int, length: int) -> Work:
  """Returns the work of sorting rows of `length`: log2(length) per element."""
  steps = math.ceil(math.log2(length)) if length > 1 else 0
  return Work('reduction', operations=elements * steps)


def fft(elements: int, lengths: Sequence[int]) -> Work:
  """Returns the work of Fourier transforms: 5 log2(length) per element.

  Args:
    elements: number of complex elements; half the number of real ones.
    lengths: size of each transformed dimension.
  """
  size = math.prod(lengths)
  steps = 5 * math.log2(size) if size > 1 else 0
  return Work('reduction', operations=round(elements * steps))


@dataclasses.dataclass(frozen=True)
class _Dimension:
  """One spatial dimension of a convolution; dimensions are independent."""

  input_size: int
  taps: int
  stride: int
  padding: tuple[int, int]
  input_dilation: int
  kernel_dilation: int

  @property
  def output_size(self) -> int:
    padded = sum(self.padding)
    if self.input_size:
      padded += self.input_dilation * (self.input_size - 1) + 1
    window = self.kernel_dilation * (self.taps - 1) + 1
    return max((padded - window) // self.stride + 1, 0)

  def pairs(self) -> int:
    """Returns the number of (output, tap) pairs, including those on padding.

    The zeros of a dilated input are never work: each input element is
    multiplied by each tap once, even if the product is cropped, but at most
    once per output.
    """
    if self.input_dilation == 1:
      return self.output_size * self.taps
    step = self.stride // math.gcd(self.stride, self.kernel_dilation)
    return self.input_size * min(-(-self.taps // step), self.output_size)

  def inside_pairs(self) -> int:
    """Returns the number of (output, tap) pairs that read an input element.

    Output o reads element (o * stride + tap * kernel_dilation - low) /
    input_dilation if that is an integer in [0, input_size).
    """
    divisor = math.gcd(self.stride, self.input_dilation)
    period = self.input_dilation // divisor
    inverse = pow(self.stride // divisor, -1, period)
    last = (self.input_size - 1) * self.input_dilation
    pairs = 0
    for tap in range(self.taps):
      offset = tap * self.kernel_dilation - self.padding[0]
      if offset % divisor:
        continue
      first = max(-(offset // self.stride), 0)
      stop = min((last - offset) // self.stride + 1, self.output_size)
      residue = -offset // divisor * inverse % period
      first += (residue - first) % period
      pairs += len(range(first, stop, period))
    return pairs
