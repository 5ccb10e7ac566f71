"""The work of PyTorch's operations, by name.

A known operation has a formula (`torch_formulas.py` and similar files), is an
activation, is free, or is tagged as pointwise or as a reduction. All others are
unknown.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dynconv_jax.macs import (
  formulas,
  torch_backward,
  torch_einsum,
  torch_formulas,
  torch_linalg,
  torch_ptflops,
  torch_quantized,
)

# {operation: user's formula}
_REGISTERED: dict[str, Callable[..., formulas.Work]] = {}


class FormulaError(TypeError):
  """A user's formula did not return `Work`."""


def register_torch(name: str) -> Callable:
  """Returns a decorator that registers a function as an operation's formula.

  The function takes an object that describes one execution of the operation,
  with `inputs` and `outputs` (lists of tensors, which may have no data) and
  `params` (its other arguments, named as in its schema). The formula applies to
  all overloads, and the operation is not decomposed.

  Args:
    name: 'namespace::operation'.
  """
  if not re.fullmatch(r'\w+::\w+', name):
    raise ValueError(f"name must be 'namespace::operation'; got {name!r}")

  def decorator(formula: Callable[..., formulas.Work]) -> Callable:
    _REGISTERED[_short(name)] = formula
    return formula

  return decorator


def is_known(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
  """Returns whether the operation has its own formula.

  Args:
    func: the operation.
    args: its arguments.
  """
  name = _name(func)
  if name in _REGISTERED:
    return True
  if name in _CONVOLUTIONS_IN_PARTS:
    # Complex convolutions would be decomposed into three real ones.
    return func._overloadname == 'padding' or args[0].is_complex()
  return name in _FORMULAS or name in _ACTIVATIONS


def work(
  func: torch._ops.OpOverload,
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  output: Any,
  module: nn.Module,
) -> formulas.Work | None:
  """Returns the work of an operation; None if unknown.

  Args:
    func: the operation.
    args: its positional arguments.
    kwargs: its keyword arguments.
    output: its result.
    module: the module that called it.
  """
  name = _name(func)
  inputs = [
    leaf
    for leaf in pytree.tree_leaves((args, kwargs))
    if isinstance(leaf, torch.Tensor)
  ]
  outputs = [
    x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)
  ]
  if name in _REGISTERED:
    return _registered(name, inputs, outputs, vars(_bind(func, args, kwargs)))
  tensors = [*inputs, *outputs]
  is_complex = any(x.is_complex() for x in inputs)
  elements = outputs[0].numel() if outputs else 0
  if is_known(func, args):
    a = _bind(func, args, kwargs)
    a.output = output[0] if isinstance(output, (tuple, list)) else output
    if name in _FORMULAS:
      done = _FORMULAS[name](a)
    else:
      done = formulas.activation(a.output.numel(), _ACTIVATIONS[name])
    if is_complex and name not in _REAL:
      done = formulas.of_complex(done)
    return torch_ptflops.charged(done, name, module, elements)
  if func.namespace not in ('aten', 'prims') and not _is_tagged(func):
    return None
  if (
    func.is_view
    or not inputs
    or name in _FREE
    # Arithmetic on indices and masks alone does not count.
    or not any(x.is_floating_point() or x.is_complex() for x in tensors)
  ):
    return formulas.elementwise(0)
  if name in _SCANS:
    length = inputs[0].shape[args[1]] if inputs[0].dim() else 1
    done = formulas.reduction(elements, elements // max(length, 1))
  elif name in _SCATTERS:
    done = formulas.elementwise(inputs[-1].numel())
  elif torch.Tag.pointwise in func.tags or name in _STEPS:
    done = formulas.elementwise(elements * _STEPS.get(name, 1))
  elif torch.Tag.reduction in func.tags or name in _REDUCTIONS:
    done = formulas.reduction(inputs[0].numel(), elements)
    done += formulas.elementwise(elements if name == 'mean' else 0)
  else:
    return None
  if is_complex:
    done = formulas.of_complex(done, _COMPLEX_STEPS.get(name, 2))
  return torch_ptflops.charged(done, name, module, elements)


def _registered(name, inputs, outputs, arguments) -> formulas.Work:
  """Returns the work of an operation by the user's formula."""
  params = {
    key: value
    for key, value in arguments.items()
    if not isinstance(value, torch.Tensor)
  }
  operation = types.SimpleNamespace(
    inputs=inputs, outputs=outputs, params=params
  )
  work = _REGISTERED[name](operation)
  if not isinstance(work, formulas.Work):
    raise FormulaError(
      f'the formula registered for {name!r} must return a macs.Work; got'
      f' {type(work).__name__}'
    )
  return work


def possible_work(func: torch._ops.OpOverload) -> formulas.Work:
  """Returns an example of the work of an unknown operation.

  The names of PyTorch's own operations identify convolutions and matrix
  products. Operations of other libraries may do any work.
  """
  name = func._schema.name.partition('::')[2]
  if func.namespace not in ('aten', 'prims', 'torchvision', 'quantized'):
    return formulas.Work('conv', 1, 1, operations=1, ptflops=1)
  if re.search(_CONVOLUTIONS, name):
    return formulas.Work('conv', 1, 1, operations=1)
  if re.search(_PRODUCTS, name):
    return formulas.Work('matmul', 1, 1, operations=1)
  return formulas.elementwise(1)


def shaped_output(func, args, kwargs) -> Any:
  """Returns an empty result of an operation that needs a shape function here.

  PyTorch's own shape function would run recurrent layers step by step. Returns
  None for all other operations.
  """
  name = _name(func)
  if name == '_grouped_mm':
    return torch_formulas.grouped_matmul_output(_bind(func, args, kwargs))
  if name not in ('lstm', 'gru', 'rnn_tanh', 'rnn_relu'):
    return None
  a = _bind(func, args, kwargs)
  inputs = a.data if hasattr(a, 'data') else a.input
  states = [a.hx] if isinstance(a.hx, torch.Tensor) else a.hx
  features = states[0].shape[-1] * (1 + a.bidirectional)
  shapes = [(*inputs.shape[:-1], features), *(state.shape for state in states)]
  return tuple(inputs.new_empty(shape) for shape in shapes)


def drawn_output(func, args, kwargs) -> torch.Tensor | None:
  """Returns normally distributed values in the output shape of a product.

  Returns None for all other operations.
  """
  if _name(func) not in _DRAWN or func._schema.is_mutable:
    return None
  shaped_args, shaped_kwargs = pytree.tree_map_only(
    torch.Tensor, lambda x: torch.empty_like(x, device='meta'), (args, kwargs)
  )
  output = func(*shaped_args, **shaped_kwargs)
  if not (output.is_floating_point() or output.is_complex()):
    return None
  size, device = output.numel(), first_tensor(args).device
  values = torch.randn(_PERIOD, dtype=output.dtype, device=device)
  return values.repeat(-(-size // _PERIOD))[:size].view(output.shape)


def first_tensor(output: Any) -> torch.Tensor | None:
  """Returns the first tensor of a result; None if there is none."""
  leaves = pytree.tree_leaves(output)
  return next((x for x in leaves if isinstance(x, torch.Tensor)), None)


def _name(func: torch._ops.OpOverload) -> str:
  return _short(func._schema.name)


def _short(name: str) -> str:
  """Returns a name without 'aten::' and without the suffix for in-place."""
  return name.removeprefix('aten::').removesuffix('_')


def _is_tagged(func: torch._ops.OpOverload) -> bool:
  return bool({torch.Tag.pointwise, torch.Tag.reduction} & set(func.tags))


def _bind(func, args, kwargs) -> types.SimpleNamespace:
  """Returns the arguments, named as in the operation's schema."""
  schema = func._schema.arguments
  values = {argument.name: argument.default_value for argument in schema}
  names = [argument.name for argument in schema]
  values.update(zip(names, args, strict=False))
  return types.SimpleNamespace(**(values | kwargs))


_FORMULAS: dict[str, Callable[[Any], formulas.Work]] = {
  **torch_formulas.FORMULAS,
  **torch_einsum.FORMULAS,
  **torch_linalg.FORMULAS,
  **torch_quantized.FORMULAS,
  **torch_backward.FORMULAS,
}

# Real operations per complex operation; 2 for all others, one for each part.
_COMPLEX_STEPS = {'mul': 6, 'square': 6, 'div': 11, 'abs': 4}

# Formulas that count real operations, even for complex numbers.
_REAL = ('_fft_r2c', '_fft_c2r', '_fft_c2c')

# Steps per element of an activation.
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

# Element-wise operations with several steps, with none, or without a tag.
_STEPS = {
  'addcmul': 2,
  'addcdiv': 2,
  'lerp': 3,
  'linalg_cross': 3,
  'clamp': 2,
  'clone': 0,
  'where': 0,
  'masked_fill': 0,
  'mse_loss': 3,
  'huber_loss': 4,
  'smooth_l1_loss': 4,
  'binary_cross_entropy': 6,
  'binary_cross_entropy_with_logits': 6,
  'xlogy': 2,
  '_weight_norm_interface': 4,
  'quantize_per_tensor': 2,
  'quantize_per_channel': 2,
  'quantize_per_tensor_dynamic': 4,
  'dequantize': 2,
  **dict.fromkeys(
    (
      'abs',
      'rsub',
      'floor_divide',
      'copysign',
      'heaviside',
      'eq',
      'ge',
      'gt',
      'le',
      'lt',
      'ne',
    ),
    1,
  ),
}

_SCANS = ('cumsum', 'cumprod', 'cummax', 'cummin', 'logcumsumexp')
_SCATTERS = ('scatter_add', 'scatter_reduce', 'index_add', 'index_reduce')
_REDUCTIONS = ('trace', 'native_norm', 'nll_loss_forward', 'nll_loss2d_forward')

# Convolutions that are counted by the operations they decompose into, which
# have an explicit padding.
_CONVOLUTIONS_IN_PARTS = frozenset(
  f'conv{kind}{dimensions}d'
  for kind in ('', '_transpose')
  for dimensions in (1, 2, 3)
)

# The slowest operations, and the number of random values that replace their
# outputs: a prime, so that no dimension repeats them.
_DRAWN = ('convolution', 'linear', 'addmm', 'mm', 'baddbmm', 'bmm')
_PERIOD = 65537

# Patterns for the names of PyTorch's convolutions and its other products. They
# exclude gamma, hamming, weights and interpolations.
_CONVOLUTIONS = r'conv(?!ert)'
_PRODUCTS = (
  r'(?<!a)mm|mv|matmul|linalg|(?<!bi)(?<!tri)(?<!upsample_)linear|attention'
  r'|encoder|rnn|lstm|gru|dot|einsum|_trilinear|solve|cholesky|geqrf|ormqr|svd|eig(?!ht)'
)

# Operations that only create, move or select data.
_FREE_NAMES = """
  _assert_async _assert_tensor_metadata _coalesce _indices
  _linalg_check_errors _local_scalar_dense _pack_padded_sequence _pin_memory
  _reshape_copy _sparse_coo_tensor_with_dims_and_tensors _to_copy _to_dense
  _to_sparse _to_sparse_csr _unique2 _unsafe_index _unsafe_index_put
  _unsafe_masked_index _unsafe_view _values alias_copy arange as_strided
  as_strided_copy as_strided_scatter bernoulli block_diag bucketize cat
  channel_shuffle coalesce complex constant_pad_nd copy detach diag_embed
  diagonal_copy diagonal_scatter embedding empty_like expand_copy fill flip
  full_like gather histc im2col index index_copy index_fill index_put
  index_select is_same_size isin lift lift_fresh lift_fresh_copy
  masked_scatter masked_select multinomial narrow_copy native_dropout
  new_empty new_empty_strided new_full new_ones new_zeros nonzero
  nonzero_static normal one_hot ones_like permute_copy pixel_shuffle
  pixel_unshuffle polar rand_like randint_like randn_like random
  reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave
  replication_pad1d replication_pad2d replication_pad3d resize roll rot90
  scatter searchsorted select_backward select_copy select_scatter set
  slice_backward slice_copy slice_scatter sparse_mask split_copy
  split_with_sizes_copy squeeze stack t take transpose tril triu unbind_copy
  unfold_backward unfold_copy uniform unique_consecutive unique_dim
  unsafe_split unsafe_split_with_sizes unsqueeze view_copy zero zeros_like
"""
_FREE = frozenset(_FREE_NAMES.split())
