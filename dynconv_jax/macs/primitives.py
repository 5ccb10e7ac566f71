"""The work of each JAX primitive, computed from its shapes.

To support a primitive, add it to one of the sets or add a function to `_WORK`;
users register their own with `macs.register`. Primitives that contain other
computations (jit, scan, ...) are handled in walk.py.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dynconv_jax.macs import formulas, jax_linalg


def _names(text: str) -> frozenset[str]:
  return frozenset(text.split())


# Pass on their first operand: a weight is still a weight afterwards, and the
# output of a convolution still the output of that convolution.
LAYOUT = _names("""
  
  broadcast_in_dim convert_element_type copy copy_p expand_dims
  layout_constraint name optimization_barrier pin preduced pvary
  reduce_precision reduced_vary_cast_p reshape reshard rev sharding_constraint
  squeeze stop_gradient transpose unpin vary_unreduced_cast_p
  with_memory_space_constraint
  
""")

# Create, move or select data, draw random bits, or communicate: no arithmetic.
_FREE = LAYOUT | _names("""
  
  after_all all_gather all_gather_invariant all_gather_reduced all_to_all
  axis_index bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_todense
  bcoo_transpose bcsr_extract bcsr_fromdense bcsr_todense
  bitcast_convert_type broadcast_to check clz complex concatenate conj
  coo_fromdense coo_todense create_token csr_fromdense csr_todense dce_sink
  debug_callback debug_print device_put dim_as_value dimension_size
  dynamic_slice dynamic_update_slice empty empty2 freeze from_edtype gather
  get imag inspect_sharding iota iota_2x32_shape lu_pivots_to_permutation
  multiple_of new_ref pad pbroadcast philox2x32 philox4x32 platform_index
  pmax pmin population_count ppermute precv psend psum psum_invariant
  ragged_all_to_all random_bits random_clone random_fold_in random_gamma
  random_seed random_split random_unwrap random_wrap real reduce_scatter
  rng_bit_generator rng_uniform scatter select_n shape_assertion shift_left
  shift_right_arithmetic shift_right_logical slice split stack swap
  threefry2x32 threefry4x32 tie tile to_edtype todense unreachable
  unreduced_psum unreduced_reduce_scatter unstack xla_metadata_value
  zeros_like
  
""")

# One operation per element of the output.
_ELEMENTWISE = _names("""
  
  abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
  bessel_i1e cbrt ceil clamp cos cosh digamma div eq eq_to erf erf_inv erfc
  exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow
  is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi ne
  neg nextafter not or polygamma pow reciprocal regularized_incomplete_beta
  rem round rsqrt sign sin sinh sqrt square sub tan tanh xor zeta
  
""")

# One operation per element that is reduced away.
_REDUCTIONS = _names("""
  
  argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod
  reduce_sum reduce_xor
  
""")

_CUMULATIVE = _names("""
  
  cumlogsumexp cummax cummin cumprod cumsum
  
""")

_WINDOWS = _names("""
  
  reduce_window reduce_window_max reduce_window_min reduce_window_sum
  select_and_gather_add
  
""")

_SCATTERS = _names("""
  
  scatter-add scatter-max scatter-min scatter-mul scatter-sub
  
""")


# Real operations per complex operation; 2 for all others, one for each part.
_COMPLEX_STEPS = {'mul': 6, 'square': 6, 'div': 11, 'abs': 4}

# {name of a primitive, jitted function or kernel: formula}
_REGISTERED: dict[str, Callable[..., formulas.Work]] = {}


def register_jax(name: str) -> Callable:
  """Returns a decorator that registers a function as an operation's formula.

  The function takes an object with `inputs` and `outputs` (lists of objects
  with a shape and a dtype) and `params` (by name).

  Args:
    name: name of a primitive, a Pallas kernel, a callback, or a function that
      is jitted or has custom derivatives.
  """

  def decorator(formula: Callable[..., formulas.Work]) -> Callable:
    _REGISTERED[name] = formula
    return formula

  return decorator


def registered(eqn: Any) -> formulas.Work | None:
  """Returns the work of an equation by a user's formula; None without one."""
  if not _REGISTERED:
    return None
  params = eqn.params
  called = getattr(params.get('call_jaxpr'), 'jaxpr', None)
  callback = getattr(params.get('callback'), 'callback_func', None)
  names = (
    eqn.primitive.name,
    params.get('name'),
    getattr(getattr(called, 'debug_info', None), 'func_name', None),
    getattr(callback, '__name__', None),
  )
  for name in names:
    if isinstance(name, str) and name in _REGISTERED:
      operation = types.SimpleNamespace(
        inputs=[v.aval for v in eqn.invars],
        outputs=[v.aval for v in eqn.outvars],
        params=params,
      )
      work = _REGISTERED[name](operation)
      if not isinstance(work, formulas.Work):
        raise TypeError(
          f'the formula registered for {name!r} must return a macs.Work; got'
          f' {type(work).__name__}'
        )
      return work
  return None


def work_of(eqn: Any) -> formulas.Work | None:
  """Returns the work of an equation; None if its primitive is unknown.

  Arithmetic without floating-point numbers, e.g. on indices, does not count.
  """
  name = eqn.primitive.name
  # A collective may be split in two: psum_start and psum_done.
  if (
    name in _FREE or name.removesuffix('_start').removesuffix('_done') in _FREE
  ):
    return formulas.elementwise(0)
  work = _real_work_of(eqn, name)
  is_done = work is None or name == 'fft'
  if not is_done and any(is_complex(v.aval) for v in eqn.invars):
    return formulas.of_complex(work, _COMPLEX_STEPS.get(name, 2))
  return work


def _real_work_of(eqn, name) -> formulas.Work | None:
  if name in _WORK:
    return _WORK[name](eqn)
  known = (_ELEMENTWISE, _REDUCTIONS, _CUMULATIVE, _WINDOWS, _SCATTERS)
  if not any(name in names for names in known):
    return None
  if not any(_is_floating(v.aval) for v in (*eqn.invars, *eqn.outvars)):
    return formulas.elementwise(0)
  operand, output = eqn.invars[0].aval, eqn.outvars[0].aval
  if name in _ELEMENTWISE:
    return formulas.elementwise(output.size)
  if name in _REDUCTIONS:
    # A reduction with several operands, such as argmax, counts once for each.
    return formulas.reduction(operand.size, output.size) * len(eqn.outvars)
  if name in _CUMULATIVE:
    length = operand.shape[eqn.params['axis']]
    return formulas.reduction(operand.size, operand.size // max(length, 1))
  if name in _WINDOWS:
    window = math.prod(eqn.params['window_dimensions'])
    return formulas.pool(operand.size, output.size, window)
  return formulas.elementwise(eqn.invars[2].aval.size)


def out_features(eqn: Any, weights: int = 1) -> int:
  """Returns how many biases the output of a product can take.

  Args:
    eqn: a convolution or matrix product.
    weights: index of the operand with the weights, 0 or 1.
  """
  if eqn.primitive.name == 'conv_general_dilated':
    spec = eqn.params['dimension_numbers'].rhs_spec
    return eqn.invars[1].aval.shape[spec[0]]
  if eqn.primitive.name == 'dot_general':
    contract, batch = eqn.params['dimension_numbers']
    used = {*contract[weights], *batch[weights]}
    shape = eqn.invars[weights].aval.shape
    return math.prod(n for i, n in enumerate(shape) if i not in used)
  return 0


def is_complex(aval: Any) -> bool:
  """Returns whether an abstract value is complex."""
  return jax.dtypes.issubdtype(getattr(aval, 'dtype', bool), np.complexfloating)


def _convolution(eqn) -> formulas.Work:
  lhs, rhs = (v.aval for v in eqn.invars)
  params = eqn.params
  numbers = params['dimension_numbers']
  return formulas.convolution(
    batch=lhs.shape[numbers.lhs_spec[0]],
    in_features=lhs.shape[numbers.lhs_spec[1]],
    out_features=rhs.shape[numbers.rhs_spec[0]],
    input_size=[lhs.shape[i] for i in numbers.lhs_spec[2:]],
    kernel_size=[rhs.shape[i] for i in numbers.rhs_spec[2:]],
    strides=params['window_strides'],
    padding=params['padding'],
    input_dilation=params['lhs_dilation'],
    kernel_dilation=params['rhs_dilation'],
    feature_groups=params['feature_group_count'],
    batch_groups=params['batch_group_count'],
  )


def _dot(eqn) -> formulas.Work:
  return _matmul(eqn, eqn.params['dimension_numbers'])


def _ragged_dot(eqn) -> formulas.Work:
  """Multiplies each row by the matrix of its own group only."""
  numbers = eqn.params['ragged_dot_dimension_numbers']
  return _matmul(
    eqn, numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
  )


def _matmul(eqn, dimension_numbers, groups=()) -> formulas.Work:
  lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
  (contract, rhs_contract), (batch, rhs_batch) = dimension_numbers
  used = {*rhs_contract, *rhs_batch, *groups}
  return formulas.matmul(
    math.prod(n for i, n in enumerate(lhs) if i not in (*contract, *batch)),
    math.prod(lhs[i] for i in contract),
    math.prod(n for i, n in enumerate(rhs) if i not in used),
    batch=math.prod(lhs[i] for i in batch),
  )


def _select_and_scatter(eqn) -> formulas.Work:
  """Gradient of max pooling: finds the maximum of each window, adds to it."""
  source = eqn.invars[0].aval.size
  window = math.prod(eqn.params['window_dimensions'])
  return formulas.pool(eqn.invars[1].aval.size, source, window, mean=True)


def _sort(eqn) -> formulas.Work:
  operand = eqn.invars[0].aval
  axis = eqn.params.get('dimension', eqn.params.get('axis', -1))
  return formulas.sort(operand.size, operand.shape[axis])


def _fft(eqn) -> formulas.Work:
  lengths = eqn.params['fft_lengths']
  largest = max(eqn.invars[0].aval.size, eqn.outvars[0].aval.size)
  real = not all(is_complex(v.aval) for v in (eqn.invars[0], eqn.outvars[0]))
  return formulas.fft(largest // 2 if real else largest, lengths)


def _scaled_matmul(eqn) -> formulas.Work:
  """[batch, m, k] times [batch, n, k], scaled by blocks of k."""
  batch, rows, inner = eqn.invars[0].aval.shape
  return formulas.matmul(rows, inner, eqn.invars[1].aval.shape[1], batch=batch)


def _fused_attention(products: int):
  """Returns the formula for cuDNN's attention, given its number of products."""

  def formula(eqn) -> formulas.Work:
    query, key = (v.aval.shape for v in eqn.invars[:2])
    # [batch, time, heads, size] or [batch, heads, time, size].
    time, heads = (2, 1) if eqn.params.get('layout') else (1, 2)
    work = formulas.attention(
      query[0] * query[heads], query[time], key[time], query[-1], query[-1]
    )
    factor = products / 2
    return dataclasses.replace(
      work,
      macs=round(work.macs * factor),
      inside_macs=round(work.macs * factor),
    )

  return formula


def _sum_duplicates(eqn) -> formulas.Work:
  return formulas.elementwise(eqn.invars[0].aval.size)


def _accumulate(eqn) -> formulas.Work:
  """Adds to a mutable array."""
  return formulas.elementwise(eqn.invars[1].aval.size)


def _is_floating(aval) -> bool:
  return jax.dtypes.issubdtype(getattr(aval, 'dtype', bool), np.inexact)


_WORK = {
  'conv_general_dilated': _convolution,
  'dot_general': _dot,
  'ragged_dot_general': _ragged_dot,
  'scaled_dot': _dot,
  **dict.fromkeys(('scaled_matmul', 'scaled_matmul_wrapper'), _scaled_matmul),
  # Backward: recomputed scores, and two gradients for each product.
  **{
    f'dot_product_attention_{fp8}{way}{wrapper}': _fused_attention(products)
    for fp8 in ('', 'fp8_')
    for way, products in (('fwd', 2), ('bwd', 5))
    for wrapper in ('', '_wrapper')
  },
  'select_and_scatter_add': _select_and_scatter,
  **dict.fromkeys(('sort', 'top_k', 'approx_top_k'), _sort),
  'fft': _fft,
  'addupdate': _accumulate,
  **jax_linalg.WORK,
  'bcoo_sum_duplicates': _sum_duplicates,
}
