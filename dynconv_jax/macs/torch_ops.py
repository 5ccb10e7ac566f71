"""The work of PyTorch's operations, by their names in ATen."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dynconv_jax.macs import formulas, recurrent, torch_ptflops


def is_known(func: torch._ops.OpOverload) -> bool:
  """Returns whether the operation has a formula of its own."""
  name = _name(func)
  if func.namespace != 'aten':
    return False
  if name in ('conv1d', 'conv2d', 'conv3d'):
    return func._overloadname == 'padding'
  return name in _FORMULAS or name in _ACTIVATIONS


def work(
  func: torch._ops.OpOverload,
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  output: Any,
  module: nn.Module,
) -> formulas.Work | None:
  """Returns what an operation does; None if that is not known.

  Args:
    func: the operation.
    args: its arguments.
    kwargs: its arguments by name.
    output: its result.
    module: the module that called it.
  """
  name = _name(func)
  if is_known(func):
    a = _bind(func, args, kwargs)
    elements = math.prod(first_shape(output))
    a.output = output[0] if isinstance(output, (tuple, list)) else output
    if name in _FORMULAS:
      done = _FORMULAS[name](a)
    else:
      done = formulas.activation(a.output.numel(), _ACTIVATIONS[name])
    return torch_ptflops.charged(done, name, module, elements)
  inputs = [
    leaf
    for leaf in pytree.tree_leaves((args, kwargs))
    if isinstance(leaf, torch.Tensor)
  ]
  if func.namespace != 'aten':
    return None
  leaves = [*inputs, *pytree.tree_leaves(output)]
  if (
    func.is_view
    or not inputs
    or name in _FREE
    # Arithmetic on indices and masks alone is none.
    or not any(isinstance(x, torch.Tensor) and _is_floating(x) for x in leaves)
  ):
    return formulas.elementwise(0)
  elements = math.prod(first_shape(output))
  if name in _SCANS:
    length = inputs[0].shape[args[1]] if inputs[0].dim() else 1
    return formulas.reduction(elements, elements // max(length, 1))
  if name in _SCATTERS:
    return formulas.elementwise(inputs[-1].numel())
  if torch.Tag.pointwise in func.tags:
    done = formulas.elementwise(elements * _STEPS.get(name, 1))
    return torch_ptflops.charged(done, name, module, elements)
  if torch.Tag.reduction in func.tags:
    return formulas.reduction(
      inputs[0].numel(), elements
    ) + formulas.elementwise(elements if name == 'mean' else 0)
  return None


def _is_floating(tensor: torch.Tensor) -> bool:
  return tensor.is_floating_point() or tensor.is_complex()


def recurrent_output(func, args, kwargs) -> tuple[torch.Tensor, ...] | None:
  """Returns what recurrent layers give, whose steps would be run one by one."""
  if _name(func) not in ('lstm', 'gru', 'rnn_tanh', 'rnn_relu'):
    return None
  a = _bind(func, args, kwargs)
  inputs = a.data if hasattr(a, 'data') else a.input
  states = [a.hx] if isinstance(a.hx, torch.Tensor) else a.hx
  features = states[0].shape[-1] * (1 + a.bidirectional)
  shapes = [(*inputs.shape[:-1], features), *(state.shape for state in states)]
  return tuple(inputs.new_empty(shape) for shape in shapes)


def first_shape(output: Any) -> tuple[int, ...]:
  """Returns the shape of the first tensor of a result, () if there is none."""
  for leaf in pytree.tree_leaves(output):
    if isinstance(leaf, torch.Tensor):
      return tuple(leaf.shape)
  return ()


def _name(func: torch._ops.OpOverload) -> str:
  """Returns the operation's name; in place or not is the same."""
  return func._schema.name.partition('::')[2].removesuffix('_')


def _bind(func, args, kwargs) -> types.SimpleNamespace:
  """Returns the arguments by the names that the operation's schema has."""
  schema = func._schema.arguments
  values = {argument.name: argument.default_value for argument in schema}
  names = [argument.name for argument in schema]
  values.update(zip(names, args, strict=False))
  return types.SimpleNamespace(**(values | kwargs))


def _per_dimension(value: Any, dimensions: int) -> list[int]:
  """Returns one int for each dimension of an int or a list of one or more."""
  values = [value] if isinstance(value, int) else list(value)
  return values * dimensions if len(values) == 1 else values


def _convolution(a) -> formulas.Work:
  kernel_size = a.weight.shape[2:]
  dimensions = len(kernel_size)
  *batch, in_features = a.input.shape[:-dimensions]
  dilation = _per_dimension(a.dilation, dimensions)
  transposed = getattr(a, 'transposed', False)
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
  arguments = {
    'batch': math.prod(batch),
    'in_features': in_features,
    'input_size': a.input.shape[-dimensions:],
    'kernel_size': kernel_size,
    'strides': _per_dimension(a.stride, dimensions),
    'padding': padding,
    'kernel_dilation': dilation,
    'feature_groups': a.groups,
    'bias': a.bias is not None,
  }
  if transposed:
    return formulas.transposed_convolution(
      out_features=a.weight.shape[1] * a.groups,
      output_padding=_per_dimension(a.output_padding, dimensions),
      **arguments,
    )
  return formulas.convolution(out_features=a.weight.shape[0], **arguments)


def _matmul(left: str, bias: str | None = None):
  """Returns the formula of a product with an inner product an output."""

  def formula(a) -> formulas.Work:
    inner = getattr(a, left).shape[-1]
    added = bias is not None and getattr(a, bias) is not None
    return formulas.matmul(a.output.numel(), inner, 1, bias=added)

  return formula


def _addbmm(a) -> formulas.Work:
  batch, _, inner = a.batch1.shape
  return formulas.matmul(a.output.numel(), batch * inner, 1, bias=True)


def _grouped_matmul(a) -> formulas.Work:
  # Groups of columns of a 2-D left and rows of a 2-D right side: each output
  # sees its own group only, and together they see all of the inner dimension.
  outputs, inner = a.output.numel(), a.self.shape[-1]
  if a.self.dim() == a.mat2.dim() == 2:
    outputs //= a.output.shape[0]
  return formulas.matmul(outputs, inner, 1, bias=a.bias is not None)


def _bilinear(a) -> formulas.Work:
  features, first, second = a.weight.shape
  rows = a.output.numel() // features
  return formulas.matmul(rows, first, features * second) + formulas.matmul(
    rows * features, second, 1, bias=a.bias is not None
  )


def _attention(a) -> formulas.Work:
  *batch, queries, key_size = a.query.shape
  keys = a.key.shape[-2]
  done = formulas.attention(
    math.prod(batch), queries, keys, key_size, a.value.shape[-1]
  )
  if a.attn_mask is not None:
    done += formulas.elementwise(math.prod(batch) * queries * keys)
  return done


def _recurrent(cell: recurrent.Cell):
  """Returns the formula of recurrent layers, or of one step of their cell."""

  def formula(a) -> formulas.Work:
    if hasattr(a, 'w_ih'):
      inputs, group, bias = a.input, 2, a.b_ih is not None
      weights = [a.w_ih, a.w_hh]
    else:
      inputs = a.data if hasattr(a, 'data') else a.input
      weights, bias = a.params, a.has_biases
      group = len(weights) // (a.num_layers * (1 + a.bidirectional))
    rows = inputs.numel() // inputs.shape[-1]
    return sum(
      (
        recurrent.layer(
          cell,
          rows,
          inputs=weights[start].shape[1],
          hidden=weights[start].shape[0] // cell.gates,
          # An odd weight is an LSTM's projection of what it feeds back.
          projection=weights[start + 1].shape[1] if group % 2 else None,
          bias=bias,
        )
        for start in range(0, len(weights), group)
      ),
      formulas.elementwise(0),
    )

  return formula


def _batch_norm(a) -> formulas.Work:
  features = a.input.shape[1]
  given = a.running_mean is not None and not a.training
  return formulas.norm(
    a.input.numel(),
    features,
    affine=a.weight is not None,
    statistics_groups=0 if given else features,
  )


def _own_norm(a) -> formulas.Work:
  """A norm by groups, layers or instances: by statistics of its input."""
  if hasattr(a, 'num_groups'):
    groups = a.input.shape[0] * a.num_groups
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
  """Returns the formula of a pooling over windows of one size."""

  def formula(a) -> formulas.Work:
    window = math.prod(_per_dimension(a.kernel_size, dimensions))
    return formulas.pool(a.self.numel(), a.output.numel(), window, mean=mean)

  return formula


def _adaptive_pool(dimensions: int, mean: bool):
  """Returns the formula of a pooling to a given size."""

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
  # The real side of a transform has its whole length.
  whole = a.output if inputs.is_complex() else inputs
  return formulas.fft(largest, [whole.shape[dim] for dim in a.dim])


def _upsample(taps: int):
  """Returns the formula of an interpolation of `taps` inputs an output."""

  def formula(a) -> formulas.Work:
    outputs = a.output.numel()
    done = formulas.elementwise(outputs * (2 * taps - 1 if taps > 1 else 0))
    return dataclasses.replace(done, ptflops=outputs)

  return formula


_FORMULAS = {
  'convolution': _convolution,
  'conv1d': _convolution,
  'conv2d': _convolution,
  'conv3d': _convolution,
  'linear': _matmul('input', 'bias'),
  'mm': _matmul('self'),
  'bmm': _matmul('self'),
  'mv': _matmul('self'),
  'dot': _matmul('self'),
  'vdot': _matmul('self'),
  'addmm': _matmul('mat1', 'self'),
  'addmv': _matmul('mat', 'self'),
  'baddbmm': _matmul('batch1', 'self'),
  'addbmm': _addbmm,
  '_int_mm': _matmul('self'),
  '_scaled_mm': _matmul('self', 'bias'),
  '_weight_int8pack_mm': _matmul('self'),
  '_grouped_mm': _grouped_matmul,
  'bilinear': _bilinear,
  'scaled_dot_product_attention': _attention,
  **dict.fromkeys(('lstm', 'lstm_cell'), _recurrent(recurrent.LSTM)),
  **dict.fromkeys(('gru', 'gru_cell'), _recurrent(recurrent.GRU)),
  **{
    f'rnn_{kind}{suffix}': _recurrent(recurrent.RNN)
    for kind in ('tanh', 'relu')
    for suffix in ('', '_cell')
  },
  'batch_norm': _batch_norm,
  'instance_norm': _own_norm,
  'group_norm': _own_norm,
  'layer_norm': _own_norm,
  'softmax': _softmax,
  '_softmax': _softmax,
  'log_softmax': _softmax,
  '_log_softmax': _softmax,
  **dict.fromkeys(('sort', 'topk', 'kthvalue', 'median', 'mode'), _sort),
  **dict.fromkeys(('_fft_r2c', '_fft_c2r', '_fft_c2c'), _fft),
  **{
    f'{kind}_pool{dimensions}d{suffix}': _pool(dimensions, kind == 'avg')
    for dimensions in (1, 2, 3)
    for kind in ('avg', 'max')
    for suffix in ('', '_with_indices')
  },
  **{
    f'adaptive_{kind}_pool{dimensions}d': _adaptive_pool(
      dimensions, kind == 'avg'
    )
    for dimensions in (1, 2, 3)
    for kind in ('avg', 'max')
  },
  **{
    f'upsample_{kind}': _upsample(taps)
    for kind, taps in {
      'nearest1d': 1,
      'nearest2d': 1,
      'nearest3d': 1,
      'linear1d': 2,
      'bilinear2d': 4,
      'trilinear3d': 8,
      'bicubic2d': 16,
    }.items()
  },
}

# Steps of an activation for each element.
_ACTIVATIONS = {
  'relu': 1,
  'hardtanh': 2,
  'relu6': 2,
  'sigmoid': 1,
  'tanh': 1,
  'silu': 2,
  'gelu': 5,
  'elu': 3,
  'celu': 4,
  'selu': 4,
  'leaky_relu': 2,
  'prelu': 2,
  'hardswish': 4,
  'hardsigmoid': 3,
  'softplus': 2,
  'mish': 4,
  'log_sigmoid': 3,
  'threshold': 1,
  'glu': 2,
}

# Operations on each element of more than one step, or of none.
_STEPS = {
  'addcmul': 2,
  'addcdiv': 2,
  'lerp': 3,
  'clamp': 2,
  'clone': 0,
  'where': 0,
  'masked_fill': 0,
}

_SCANS = ('cumsum', 'cumprod', 'cummax', 'cummin', 'logcumsumexp')
_SCATTERS = ('scatter_add', 'scatter_reduce', 'index_add', 'index_reduce')

# Operations that only make, move or choose.
_FREE_NAMES = """
  _assert_async _assert_tensor_metadata _linalg_check_errors
  _local_scalar_dense _pack_padded_sequence _pin_memory _reshape_copy _to_copy
  _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_view alias_copy
  as_strided as_strided_copy as_strided_scatter bernoulli block_diag bucketize
  cat channel_shuffle complex constant_pad_nd copy detach diag_embed
  diagonal_copy diagonal_scatter embedding empty_like expand_copy fill flip
  full_like gather im2col index index_copy index_fill index_put index_select
  is_same_size isin lift lift_fresh lift_fresh_copy masked_scatter
  masked_select multinomial narrow_copy native_dropout new_empty
  new_empty_strided new_full new_ones new_zeros nonzero nonzero_static normal
  one_hot ones_like permute_copy pixel_shuffle pixel_unshuffle polar rand_like
  randint_like randn_like random reflection_pad1d reflection_pad2d
  reflection_pad3d repeat repeat_interleave replication_pad1d
  replication_pad2d replication_pad3d resize roll rot90 scatter searchsorted
  select_copy select_scatter set slice_copy slice_scatter split_copy
  split_with_sizes_copy squeeze stack t take transpose tril triu unbind_copy
  unfold_copy uniform unsafe_split unsafe_split_with_sizes unsqueeze view_copy
  zero zeros_like
"""
_FREE = frozenset(_FREE_NAMES.split())
