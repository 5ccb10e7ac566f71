"""What each kind of operation costs, from its shape alone.

Every front end (JAX, PyTorch, ONNX) describes its operations to these
functions and nowhere computes a cost of its own, so that one network has one
count. A function returns the `Work` of an operation: what a convention needs
to price it. The formulas are written out in docs/macs.md; those of linear
algebra are in `linalg.py`.
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
  """What one operation, or several of the same layer, does.

  Attributes:
    kind: one of KINDS.
    macs: multiply-accumulates, those on input padding included.
    inside_macs: multiply-accumulates that read an element of the input; at
      most `macs`.
    bias: additions of a bias to the outputs of a convolution or matmul.
    operations: arithmetic on elements that is neither of these, one each.
    ptflops: what ptflops 0.7.5 charges for the module beyond `macs + bias`:
      its norms, activations and pooling.
    positions: output positions over the batch that an execution mask can
      select from: N * h * w of a convolution, N * tokens of a linear layer; 0
      where there are none or they are not known.
    outputs: elements of the output of a convolution or matmul.
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
    """Returns the sum; the kind is the one that comes first in KINDS."""
    kind = min(self.kind, other.kind, key=KINDS.index)
    return Work(
      kind, *(a + b for a, b in zip(self.counts, other.counts, strict=True))
    )

  def __mul__(self, times: int) -> Work:
    """Returns the work of doing this `times` times over."""
    return Work(self.kind, *(count * times for count in self.counts))

  @property
  def counts(self) -> tuple[int, ...]:
    """All but the kind; `dataclasses.astuple` copies each."""
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
  """Returns the work of a convolution of any number of spatial dimensions.

  Args:
    batch: images in the input.
    in_features: channels of the input, over all groups.
    out_features: channels of the output, over all groups.
    input_size: spatial shape of the input.
    kernel_size: spatial shape of the kernel, before dilation.
    strides: step of the window in each dimension; 1 by default.
    padding: (low, high) in each dimension; negative values crop; 0 by default.
    input_dilation: factor by which zeros spread the input, which is the stride
      of a transposed convolution; 1 by default.
    kernel_dilation: spacing of the kernel's taps; 1 by default.
    feature_groups: groups of channels; `in_features` for a depthwise one.
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
  """Returns the work of a transposed convolution as PyTorch and ONNX put it.

  Each input element meets each tap once, cropped or not, and no more than each
  output once. Where the stride is 1, no zeros spread the input, and the
  convolution that it equals would read padding instead.

  Args are those of `convolution`, but `strides` spreads the input, `padding`
  is what (low, high) crops from the output, and `output_padding` is added at
  its high end.
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

  A linear layer has its batch and positions in `rows`; `bias` adds one to
  each output.
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
  """Returns the real work of `work` that is done on complex numbers.

  A complex multiply-accumulate is four real ones: four multiplications and
  four additions. An addition is two. `fft` counts real operations already.

  Args:
    work: as of real numbers.
    steps: real operations for each of `work.operations`.
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
  """Returns the work of softmax(Q K^T / scale) V over `batch` times heads."""
  scores = matmul(queries, key_size, keys, batch=batch)
  values = matmul(queries, keys, value_size, batch=batch)
  size = batch * queries * keys
  return scores + elementwise(size) + softmax(size, batch * queries) + values


def softmax(elements: int, rows: int) -> Work:
  """Returns the work of a softmax over each of `rows`: 5 an element - 2 a row.

  Maximum, difference, exponential, sum and quotient.
  """
  return Work(
    'activation', operations=5 * elements - 2 * rows, ptflops=elements
  )


def activation(elements: int, operations: int = 1) -> Work:
  """Returns the work of an activation of `operations` steps an element."""
  return Work('activation', operations=operations * elements, ptflops=elements)


def norm(
  elements: int,
  features: int,
  *,
  affine: bool = True,
  statistics_groups: int = 0,
) -> Work:
  """Returns the work of a normalization.

  (x - mean) * (scale * rsqrt(variance + epsilon)) + bias: 3 an element and 3
  a feature; without scale and bias 2 and 2.

  Args:
    elements: size of the input.
    features: statistics that the input is normalized by: channels of a batch
      norm with running statistics, groups times batch of a group norm.
    affine: whether scale and bias are applied.
    statistics_groups: means computed from the input itself, 0 when they are
      given: 3 an element (sum, square, sum of squares) and 2 a group (its two
      divisions, square and difference, less the two first summands).
  """
  operations = (3 if affine else 2) * (elements + features)
  if statistics_groups:
    operations += 3 * elements + 2 * statistics_groups
  return Work(
    'norm', operations=operations, ptflops=(2 if affine else 1) * elements
  )


def pool(inputs: int, outputs: int, window: int, *, mean: bool = False) -> Work:
  """Returns the work of pooling: window - 1 an output, and one for a mean.

  Args:
    inputs: size of the input, which is what ptflops charges.
    outputs: size of the output.
    window: elements in a window, padding included.
    mean: whether the sum is divided.
  """
  return Work('pool', operations=outputs * (window - 1 + mean), ptflops=inputs)


def reduction(inputs: int, outputs: int) -> Work:
  """Returns the work of reducing: one for each element that disappears."""
  return Work('reduction', operations=max(inputs - outputs, 0))


def elementwise(elements: int) -> Work:
  """Returns the work of one operation on each of `elements` outputs."""
  return Work('elementwise', operations=elements)


def sort(elements: int, length: int) -> Work:
  """Returns the work of sorting runs of `length`: log2(length) an element."""
  steps = math.ceil(math.log2(length)) if length > 1 else 0
  return Work('reduction', operations=elements * steps)


def fft(elements: int, lengths: Sequence[int]) -> Work:
  """Returns the work of Fourier transforms: 5 log2(length) an element.

  Args:
    elements: complex elements transformed; half of them for real data.
    lengths: extent of each dimension that is transformed.
  """
  size = math.prod(lengths)
  steps = 5 * math.log2(size) if size > 1 else 0
  return Work('reduction', operations=round(elements * steps))


@dataclasses.dataclass(frozen=True)
class _Dimension:
  """One spatial dimension of a convolution; they are independent."""

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
    """Returns the (output, tap) pairs that are work, padding included.

    Zeros that spread an input are never work: there each input element meets
    each tap once, whether its product is cropped or not, and no more than
    each output once.
    """
    if self.input_dilation == 1:
      return self.output_size * self.taps
    step = self.stride // math.gcd(self.stride, self.kernel_dilation)
    return self.input_size * min(-(-self.taps // step), self.output_size)

  def inside_pairs(self) -> int:
    """Returns the (output, tap) pairs that read an element of the input.

    Output o reads element (o * stride + tap * kernel_dilation - low) /
    input_dilation, where that is a whole number in [0, input_size).
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
