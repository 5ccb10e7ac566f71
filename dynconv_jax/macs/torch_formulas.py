"""The work of PyTorch's operations, computed from their arguments.

Each function takes an object with the arguments of an operation, named as in
its schema, and its first result as `output`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from dynconv_jax.macs import formulas, torch_recurrent


def input_of(a) -> torch.Tensor:
  return a.input if hasattr(a, 'input') else a.self


def _per_dimension(value: Any, dimensions: int) -> list[int]:
  """Expands an int or a list to one int per dimension."""
  values = [value] if isinstance(value, int) else list(value)
  return values * dimensions if len(values) == 1 else values


def convolution(a) -> formulas.Work:
  kernel_size = a.weight.shape[2:]
  dimensions = len(kernel_size)
  inputs = input_of(a)
  *batch, in_features = inputs.shape[:-dimensions]
  dilation = _per_dimension(getattr(a, 'dilation', 1), dimensions)
  if a.padding == 'same':
    reaches = [
      step * (taps - 1)
      for step, taps in zip(dilation, kernel_size, strict=True)
    ]
    padding = [(reach // 2, reach - reach // 2) for reach in reaches]
  elif a.padding == 'valid':
    padding = [(0, 0)] * dimensions
  else:
    padding = [(p, p) for p in _per_dimension(a.padding, dimensions)]
  groups = getattr(a, 'groups', 1)
  arguments = {
    'batch': math.prod(batch),
    'in_features': in_features,
    'input_size': inputs.shape[-dimensions:],
    'kernel_size': kernel_size,
    'strides': _per_dimension(a.stride, dimensions),
    'padding': padding,
    'kernel_dilation': dilation,
    'feature_groups': groups,
    'bias': getattr(a, 'bias', None) is not None,
  }
  if getattr(a, 'transposed', False):
    return formulas.transposed_convolution(
      out_features=a.weight.shape[1] * groups,
      output_padding=_per_dimension(a.output_padding, dimensions),
      **arguments,
    )
  return formulas.convolution(out_features=a.weight.shape[0], **arguments)


def _transposed_convolution(a) -> formulas.Work:
  a.transposed = True
  return convolution(a)


def _time_first_convolution(a) -> formulas.Work:
  (length, batch, _), (taps, in_features, features) = (
    a.self.shape,
    a.weight.shape,
  )
  return formulas.convolution(
    batch=batch,
    in_features=in_features,
    out_features=features,
    input_size=[length],
    kernel_size=[taps],
    padding=[(a.pad, a.pad)],
    bias=True,
  )


def _deformable_convolution(a) -> formulas.Work:
  """Taps read between pixels; which of them read padding is unknown."""
  outputs = a.output.numel()
  macs = outputs * math.prod(a.weight.shape[1:])
  return formulas.Work(
    'conv',
    macs,
    macs,
    bias=outputs,
    positions=outputs // a.weight.shape[0],
    outputs=outputs,
  )


# Names of the right operand of a product.
_RIGHT = ('mat2', 'batch2', 'vec', 'other')


def matmul(left: str, bias: str | None = None):
  """Returns the formula of a product with one inner product per output."""

  def formula(a) -> formulas.Work:
    operand = getattr(a, left)
    other = next(
      (getattr(a, name) for name in _RIGHT if hasattr(a, name)), operand
    )
    if {operand.layout, other.layout} != {torch.strided}:
      return _sparse_matmul(operand, other)
    outputs = a.output.numel()
    columns = a.output.shape[-1] if operand.dim() > 1 < a.output.dim() else 1
    return formulas.matmul(
      outputs // max(columns, 1),
      operand.shape[-1],
      columns,
      bias=bias is not None and getattr(a, bias) is not None,
      positions=outputs // max(columns, 1) if operand.dim() == 2 else 0,
    )

  return formula


def _linear(a) -> formulas.Work:
  features = math.prod(a.weight.shape[:-1])  # 1 for a vector
  rows = a.output.numel() // max(features, 1)
  return formulas.matmul(
    rows,
    a.input.shape[-1],
    features,
    bias=getattr(a, 'bias', None) is not None,
    positions=rows,
  )


def _addbmm(a) -> formulas.Work:
  batch, rows, inner = a.batch1.shape
  return formulas.matmul(rows, batch * inner, a.batch2.shape[-1], bias=True)


def _outer(a) -> formulas.Work:
  return formulas.matmul(a.output.numel(), 1, 1, bias=True)


def _grouped_matmul(a) -> formulas.Work:
  # Groups of columns (left) and rows (right) of two 2-D operands: each output
  # uses its own group only; together they cover the whole inner dimension.
  outputs, inner = a.output.numel(), a.self.shape[-1]
  if a.self.dim() == a.mat2.dim() == 2:
    outputs //= a.output.shape[0]
  return formulas.matmul(outputs, inner, 1, bias=a.bias is not None)


def grouped_matmul_output(a) -> torch.Tensor:
  """Returns an empty result; PyTorch's shape function only takes bfloat16."""
  rows, columns = a.self.shape[-2], a.mat2.shape[-1]
  if a.self.dim() == a.mat2.dim() == 2:
    shape = (a.offs.shape[0], rows, columns)
  elif a.self.dim() == 3 == a.mat2.dim():
    shape = (a.self.shape[0], rows, columns)
  else:
    shape = (rows, columns)
  return a.self.new_empty(shape, dtype=a.out_dtype)


def _sparse_matmul(left: torch.Tensor, right: torch.Tensor) -> formulas.Work:
  """Counts the products of stored elements only."""
  pairs = _stored(left, 1) * _stored(right, 0)
  return formulas.matmul(int(pairs.sum()), 1, 1)


def _stored(matrix: torch.Tensor, dim: int) -> torch.Tensor:
  """Returns the number of stored elements per column (dim 1) or row (0)."""
  size = matrix.shape[dim]
  if matrix.layout == torch.strided:
    return torch.full((size,), matrix.numel() // max(size, 1))
  indices = matrix.to_sparse_coo().coalesce().indices()[dim].cpu()
  return torch.bincount(indices, minlength=size)


def _sampled_matmul(a) -> formulas.Work:
  return formulas.matmul(a.self._nnz(), a.mat1.shape[-1], 1, bias=True)


def _bilinear(a) -> formulas.Work:
  features, first, second = a.weight.shape
  rows = a.output.numel() // features
  return formulas.matmul(rows, first, features * second) + formulas.matmul(
    rows * features, second, 1, bias=a.bias is not None
  )


def _trilinear(a) -> formulas.Work:
  """A product of two operands, then of the result and the third."""

  def shape(operand, inserted):
    sizes = iter(operand.shape)
    rank = operand.dim() + len(inserted)
    return [1 if i in inserted else next(sizes) for i in range(rank)]

  pair = torch.broadcast_shapes(shape(a.i1, a.expand1), shape(a.i2, a.expand2))
  summed = {*a.sumdim} & {*a.expand3}  # not in the third
  between = [1 if i in summed else size for i, size in enumerate(pair)]
  every = torch.broadcast_shapes(between, shape(a.i3, a.expand3))
  inner, outputs = math.prod(between), a.output.numel()
  return formulas.matmul(
    inner, math.prod(pair) // max(inner, 1), 1
  ) + formulas.matmul(outputs, math.prod(every) // max(outputs, 1), 1)


def _affine_grid(a) -> formulas.Work:
  """A product of each position and the matrix of its image."""
  batch, rows, inner = a.theta.shape
  positions = a.output.numel() // max(batch * rows, 1)
  return formulas.matmul(positions, inner, rows, batch=batch)


def attention(a) -> formulas.Work:
  # Batch dimensions are broadcast and heads repeated; the output has them all.
  *batch, queries, value_size = a.output.shape
  batch, keys = math.prod(batch), a.key.shape[-2]
  done = formulas.attention(batch, queries, keys, a.query.shape[-1], value_size)
  if getattr(a, 'attn_mask', getattr(a, 'attn_bias', None)) is not None:
    done += formulas.elementwise(batch * queries * keys)
  return done


def distances(a) -> formulas.Work:
  """Norms of the differences between all pairs of rows."""
  features = (a.x1 if hasattr(a, 'x1') else a.self).shape[-1]
  outputs = a.output.numel()
  if getattr(a, 'p', 2) != 2:
    return formulas.elementwise(outputs * 3 * features)
  # A difference, and a multiply-accumulate for its square.
  return formulas.matmul(outputs, features, 1) + formulas.elementwise(
    outputs * (features + 1)
  )


def _batch_norm(a) -> formulas.Work:
  features = a.input.shape[1]
  given = getattr(a, 'running_mean', None) is not None
  given = given and not getattr(a, 'training', False)
  return formulas.norm(
    a.input.numel(),
    features,
    affine=a.weight is not None,
    statistics_groups=0 if given else features,
  )


def _own_norm(a) -> formulas.Work:
  """A group, layer or instance norm, with statistics of its input."""
  if hasattr(a, 'num_groups'):
    groups = a.input.shape[0] * a.num_groups
  elif hasattr(a, 'group'):
    groups = a.input.shape[0] * a.group
  elif hasattr(a, 'normalized_shape'):
    groups = a.input.numel() // math.prod(a.normalized_shape)
  else:
    groups = a.input.shape[0] * a.input.shape[1]
  return formulas.norm(
    a.input.numel(),
    groups,
    affine=a.weight is not None,
    statistics_groups=groups if getattr(a, 'use_input_stats', True) else 0,
  )


def _pool(dimensions: int, mean: bool):
  """Returns the formula of pooling with a fixed window."""

  def formula(a) -> formulas.Work:
    window = math.prod(_per_dimension(a.kernel_size, dimensions))
    return formulas.pool(a.self.numel(), a.output.numel(), window, mean=mean)

  return formula


def _adaptive_pool(dimensions: int, mean: bool):
  """Returns the formula of pooling to a given output size."""

  def formula(a) -> formulas.Work:
    sizes = zip(
      a.self.shape[-dimensions:], a.output.shape[-dimensions:], strict=True
    )
    window = math.prod(-(-size // out) for size, out in sizes)
    return formulas.pool(a.self.numel(), a.output.numel(), window, mean=mean)

  return formula


def _softmax(a) -> formulas.Work:
  elements = a.output.numel()
  size = a.output.shape[a.dim] if a.output.dim() else 1
  return formulas.softmax(elements, elements // size if size else 0)


def _sort(a) -> formulas.Work:
  length = a.self.shape[a.dim] if a.self.dim() else 1
  return formulas.sort(a.self.numel(), length)


def _fft(a) -> formulas.Work:
  inputs = a.self
  largest = max(inputs.numel(), a.output.numel())
  if not (inputs.is_complex() and a.output.is_complex()):
    largest //= 2
  # The real side of a transform has its full length.
  whole = a.output if inputs.is_complex() else inputs
  return formulas.fft(largest, [whole.shape[dim] for dim in a.dim])


def _upsample(taps: int):
  """Returns the formula of interpolation from `taps` inputs per output."""

  def formula(a) -> formulas.Work:
    outputs = a.output.numel()
    done = formulas.elementwise(outputs * (2 * taps - 1 if taps > 1 else 0))
    return dataclasses.replace(done, ptflops=outputs)

  return formula


def _grid_sample(dimensions: int):
  """Returns the formula of interpolated sampling: the weighted sum."""

  def formula(a) -> formulas.Work:
    # Linear, nearest, cubic.
    taps = (2**dimensions, 1, 4**dimensions)[a.interpolation_mode]
    return formulas.elementwise(a.output.numel() * (2 * taps - 1))

  return formula


def _names(names: str, formula: Any) -> dict[str, Any]:
  return dict.fromkeys(names.split(), formula)


# Number of inputs that an interpolated output depends on.
UPSAMPLE_TAPS = {
  'nearest1d': 1,
  'nearest2d': 1,
  'nearest3d': 1,
  'linear1d': 2,
  'bilinear2d': 4,
  'trilinear3d': 8,
  'bicubic2d': 16,
}

FORMULAS = {
  **_names(
    'convolution _convolution convolution_overrideable conv1d conv2d conv3d'
    ' mkldnn_convolution cudnn_convolution cudnn_convolution_relu'
    ' miopen_convolution miopen_depthwise_convolution _slow_conv2d_forward'
    ' _conv_depthwise2d conv_depthwise3d slow_conv3d_forward'
    ' slow_conv_dilated2d slow_conv_dilated3d _nnpack_spatial_convolution',
    convolution,
  ),
  **_names(
    'conv_transpose1d conv_transpose2d conv_transpose3d'
    ' cudnn_convolution_transpose miopen_convolution_transpose'
    ' slow_conv_transpose2d slow_conv_transpose3d',
    _transposed_convolution,
  ),
  'conv_tbc': _time_first_convolution,
  'torchvision::deform_conv2d': _deformable_convolution,
  'linear': _linear,
  **_names(
    'mm bmm mv dot vdot _int_mm mkldnn_linear _weight_int8pack_mm'
    ' _weight_int4pack_mm _weight_int4pack_mm_for_cpu'
    ' _weight_int4pack_mm_with_scales_and_zeros _sparse_sparse_matmul',
    matmul('self'),
  ),
  **_names('_scaled_mm _scaled_mm_v2', matmul('self', 'bias')),
  **_names('addmm _addmm_activation _sparse_addmm', matmul('mat1', 'self')),
  'addmv': matmul('mat', 'self'),
  'baddbmm': matmul('batch1', 'self'),
  'addbmm': _addbmm,
  'addr': _outer,
  **_names(
    '_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2', _grouped_matmul
  ),
  'sparse_sampled_addmm': _sampled_matmul,
  'bilinear': _bilinear,
  '_trilinear': _trilinear,
  'affine_grid_generator': _affine_grid,
  **_names(
    'scaled_dot_product_attention _scaled_dot_product_flash_attention'
    ' _scaled_dot_product_flash_attention_for_cpu'
    ' _scaled_dot_product_efficient_attention'
    ' _scaled_dot_product_cudnn_attention'
    ' _scaled_dot_product_fused_attention_overrideable',
    attention,
  ),
  **_names('_cdist_forward _euclidean_dist _pdist_forward', distances),
  **torch_recurrent.FORMULAS,
  **_names(
    'batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm'
    ' _native_batch_norm_legit_no_training _batch_norm_no_update'
    ' miopen_batch_norm',
    _batch_norm,
  ),
  **_names(
    'instance_norm group_norm layer_norm native_group_norm native_layer_norm',
    _own_norm,
  ),
  **_names('softmax _softmax log_softmax _log_softmax _safe_softmax', _softmax),
  **_names('sort topk kthvalue median mode', _sort),
  **_names('_fft_r2c _fft_c2r _fft_c2c', _fft),
  **{
    f'{kind}_pool{dimensions}d{suffix}': _pool(dimensions, kind == 'avg')
    for dimensions in (1, 2, 3)
    for kind in ('avg', 'max')
    for suffix in ('', '_with_indices')
  },
  **{
    f'{prefix}adaptive_{kind}_pool{dimensions}d': _adaptive_pool(
      dimensions, kind == 'avg'
    )
    for dimensions in (1, 2, 3)
    for kind in ('avg', 'max')
    for prefix in ('', '_')
  },
  **{f'upsample_{kind}': _upsample(n) for kind, n in UPSAMPLE_TAPS.items()},
  'grid_sampler_2d': _grid_sample(2),
  'grid_sampler_3d': _grid_sample(3),
}
