"""The work of an exported JAX function, from its StableHLO.

`jax.export` does not keep the jaxpr, so the operations of the StableHLO module
are passed to the same formulas.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import mlir as extended
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy, stablehlo
from jax.interpreters import mlir

from dynconv_jax.macs import formulas, linalg, loops


def _names(text: str) -> frozenset[str]:
  return frozenset(text.split())


_FREE = _names(
  """
  after_all all_gather all_reduce all_slice all_to_all bitcast_convert
  broadcast_in_dim collective_permute complex composite concatenate constant
  convert count_leading_zeros create_token dynamic_slice dynamic_update_slice
  gather get_tuple_element imag iota optimization_barrier pad partition_id
  popcnt real reduce_scatter replica_id reshape return reverse rng_bit_generator
  select shift_left shift_right_arithmetic shift_right_logical slice transpose
  tuple
  """
)

_ELEMENTWISE = _names(
  """
  abs add and atan2 cbrt ceil clamp compare cosine divide exponential
  exponential_minus_one floor is_finite log log_plus_one logistic maximum
  minimum multiply negate not or power reduce_precision remainder
  round_nearest_afz round_nearest_even rsqrt sign sine sqrt subtract tan tanh
  xor
  """
)

# Real operations per complex operation; 2 for all others.
_COMPLEX_STEPS = {'multiply': 6, 'divide': 11, 'abs': 4}

_ARITHMETIC = {'add': 'add', 'subtract': 'sub', 'multiply': 'mul'}

# Scope names that JAX adds, not users.
_CONTROL = re.compile(
  r'|while|body|cond|closed_call|call_exported|checkpoint'
  r'|rematted_computation|branch_\d+_fun|.*\(.*'
)


class Operation(NamedTuple):
  """An operation of an exported function.

  Attributes:
    name: 'dot_general'.
    scope: the named scopes around it, joined by dots.
    work: its work; None if unknown.
    shape: shape of its result.
    reason: why its work is unknown.
  """

  name: str
  scope: str
  work: formulas.Work | None
  shape: tuple[int, ...] = ()
  reason: str = ''


def operations(
  exported: Any,
  inputs: Sequence[jax.ShapeDtypeStruct],
  price: Callable[[list[Operation]], int],
  trips: Callable[[str, int | None], int | None],
  branch: Callable[[str, int], str | int],
) -> list[Operation]:
  """Returns the operations of an exported function.

  Loops are multiplied out and branches selected.

  Args:
    exported: a `jax.export.Exported`.
    inputs: what it is called with; they set its symbolic sizes.
    price: returns the count of operations, to compare branches.
    trips: takes a loop's scope and the trip count that the program fixes, or
      None; returns the trip count, or None to leave the loop out.
    branch: takes a conditional's scope and its number of branches; returns
      'max', 'min' or an index. StableHLO has no branch names: any other string
      means 'max'.
  """
  try:
    text = _module(exported, inputs)
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    reason = f'its symbolic sizes cannot be set: {error}'
    return [Operation('call_exported', '', None, reason=reason)]
  with mlir.make_ir_context():
    module = ir.Module.parse(text)
    symbols = {
      op.attributes['sym_name'].value: op
      for op in module.body.operations
      if 'sym_name' in op.attributes
    }
    walk = _Walk(symbols, price, trips, branch)
    entry = symbols['main'].regions[0].blocks[0]
    walk.block(entry, [None] * len(entry.arguments))
    return walk.found


def _module(exported, inputs) -> str | bytes:
  """Returns the module of an exported function, without symbolic sizes."""
  sizes = [size for aval in exported.in_avals for size in aval.shape]
  if all(isinstance(size, int) for size in sizes):
    return exported.mlir_module()
  args, kwargs = jax.tree.unflatten(exported.in_tree, inputs)
  traced = jax.jit(exported.call).trace(*args, **kwargs)
  lowered = traced.lower(lowering_platforms=exported.platforms)
  text = lowered.as_text(debug_info=True)
  return extended.refine_polymorphic_shapes(text.encode())


class _Walk:
  """Collects the operations of a block and its nested blocks."""

  def __init__(self, symbols, price, trips, branch):
    self.found: list[Operation] = []
    self._symbols = symbols
    self._price = price
    self._trips = trips
    self._branch = branch
    # Integers known so far, by value.
    self._known: dict[Any, Any] = {}

  def block(self, block, arguments) -> list[Any]:
    """Walks a block; returns what is known about its outputs."""
    for value, known in zip(block.arguments, arguments, strict=True):
      self._known[value] = known
    outputs = []
    for op in block.operations:
      inputs = [self._known.get(value) for value in op.operands]
      name = op.operation.name
      if name in ('stablehlo.return', 'func.return', 'sdy.return'):
        return inputs
      outputs = self._operation(op, name, inputs)
      for value, known in zip(op.results, outputs, strict=False):
        self._known[value] = known
    return outputs

  def _operation(self, op, name, inputs) -> list[Any]:
    if name == 'func.call':
      called = self._symbols[op.attributes['callee'].value]
      return self.block(called.regions[0].blocks[0], inputs)
    dialect, _, name = name.partition('.')
    if name == 'while':
      return self._while(op, inputs)
    if name in ('case', 'if'):
      return self._case(op)
    if name == 'composite':
      called = self._symbols[op.attributes['decomposition'].value]
      return self.block(called.regions[0].blocks[0], inputs)
    if name == 'constant':
      return [_whole_constant(op)]
    if name in ('convert', 'reshape', 'reshard', 'sharding_constraint'):
      return inputs
    if name == 'manual_computation':
      with self._apart() as found:
        outputs = self.block(op.regions[0].blocks[0], inputs)
      self.found += _repeated(found, self._devices(op))
      return outputs
    if name in ('add', 'subtract', 'multiply', 'compare') and _is_whole(op):
      if name == 'compare':
        direction = str(op.attributes['comparison_direction'])
        arithmetic = direction.split()[-1].strip('>').lower()
      else:
        arithmetic = _ARITHMETIC[name]
      return [loops.arithmetic(arithmetic, *inputs)]
    scope = _scope(op.location)
    if name == 'custom_call':
      target = op.attributes['call_target_name'].value
      if target not in ('Sharding', 'SPMDFullToShardShape'):
        reason = f'the work of {target} is not known'
        self.found.append(Operation('custom_call', scope, None, reason=reason))
      return []
    work = _work(op, name, dialect)
    if work is None:
      reason = 'its work is not known'
      self.found.append(Operation(name, scope, None, reason=reason))
    elif work != formulas.elementwise(0):
      shape = tuple(op.results[0].type.shape)
      self.found.append(Operation(name, scope, work, shape))
    return []

  def _while(self, op, start) -> list[Any]:
    carry = [
      loops.Count(object()) if _is_scalar_integer(value.type) else None
      for value in op.operands
    ]
    test, body = (region.blocks[0] for region in op.regions)
    with self._apart() as tested:
      (condition,) = self.block(test, carry)
    with self._apart() as done:
      stop = self.block(body, carry)
    fixed = loops.fixed_trips(condition, start, carry, stop)
    scope = _scope(op.location)
    times = self._trips(scope, fixed)
    if times is not None:
      self.found += _repeated(done, times) + _repeated(tested, times + 1)
    elif self._price(done + tested) or any(o.work is None for o in done):
      reason = 'its trip count is not in the program; see trip_counts'
      self.found.append(Operation('while', scope, None, reason=reason))
    return []

  def _case(self, op) -> list[Any]:
    branches = []
    # The first region of `if` is the true branch; `cond` lists false first.
    regions = list(op.regions)
    if op.operation.name == 'stablehlo.if':
      regions.reverse()
    for region in regions:
      with self._apart() as found:
        self.block(region.blocks[0], [])
      branches.append(found)
    branch = self._branch(_scope(op.location), len(branches))
    if isinstance(branch, int):
      self.found += branches[branch]
      return []
    choose = min if branch == 'min' else max
    self.found += choose(branches, key=self._price)
    return []

  def _devices(self, op) -> int:
    """Returns the number of devices that run a manual computation."""
    given, returned = (
      sdy.TensorShardingPerValueAttr(op.attributes[name]).shardings
      for name in ('in_shardings', 'out_shardings')
    )
    mesh = sdy.TensorShardingAttr([*given, *returned][0]).mesh_or_ref
    if isinstance(mesh, ir.FlatSymbolRefAttr):
      mesh = self._symbols[mesh.value].attributes['mesh']
    axes = map(sdy.MeshAxisAttr, sdy.MeshAttr(mesh).axes)
    manual = set(sdy.ManualAxesAttr(op.attributes['manual_axes']))
    return math.prod(axis.size for axis in axes if axis.name in manual)

  @contextlib.contextmanager
  def _apart(self) -> Iterator[list[Operation]]:
    outer, self.found = self.found, []
    try:
      yield self.found
    finally:
      self.found = outer


def _repeated(operations: list[Operation], times: int) -> list[Operation]:
  return [
    op if op.work is None else op._replace(work=op.work * times)
    for op in operations
    if times
  ]


def _work(op, name: str, dialect: str) -> formulas.Work | None:
  """Returns the work of an operation; None if unknown."""
  if name in _FREE:
    return formulas.elementwise(0)
  types = [value.type for value in (*op.operands, *op.results)]
  # Tokens are not arrays.
  arrays = [t for t in types if isinstance(t, ir.RankedTensorType)]
  work = _real_work(op, name, dialect, arrays)
  is_done = work is None or name == 'fft'
  if not is_done and 'complex' in str(op.operands[0].type):
    return formulas.of_complex(work, _COMPLEX_STEPS.get(name, 2))
  return work


def _real_work(op, name, dialect, arrays) -> formulas.Work | None:
  if name in _PRODUCTS:
    return _PRODUCTS[name](op)
  if not any(map(_is_floating, arrays)):
    return formulas.elementwise(0)
  if not arrays:
    return None
  operand, result = arrays[0], op.results[0].type
  if name in _ELEMENTWISE or (dialect == 'chlo' and name != 'top_k'):
    return formulas.elementwise(_size(result))
  if name == 'reduce':
    number = len(op.results)
    return formulas.reduction(_size(operand), _size(result)) * number
  if name == 'reduce_window':
    window = math.prod(op.attributes['window_dimensions'])
    return formulas.pool(_size(operand), _size(result), window)
  if name == 'select_and_scatter':
    window = math.prod(op.attributes['window_dimensions'])
    source = _size(op.operands[1].type)
    return formulas.pool(_size(operand), source, window, mean=True)
  if name == 'scatter':
    # A scatter whose body has no arithmetic only moves data.
    adds = len(list(op.regions[0].blocks[0].operations)) > 1
    updates = _size(op.operands[len(op.operands) - len(op.results)].type)
    return formulas.elementwise(updates if adds else 0)
  if name in ('sort', 'top_k'):
    axis = op.attributes['dimension'].value if name == 'sort' else -1
    return formulas.sort(_size(operand), operand.shape[axis])
  if name == 'fft':
    sizes = [_size(t) for t in (operand, result)]
    is_real = 'complex' not in str(operand) or 'complex' not in str(result)
    elements = max(sizes) // (2 if is_real else 1)
    return formulas.fft(elements, list(op.attributes['fft_length']))
  if name == 'cholesky':
    *batch, size, _ = operand.shape
    return linalg.cholesky(size) * math.prod(batch)
  if name == 'triangular_solve':
    *batch, rows, columns = op.operands[1].type.shape
    if not op.attributes['left_side'].value:
      rows, columns = columns, rows
    return linalg.triangular_solve(rows, columns) * math.prod(batch)
  return None


def _convolution(op) -> formulas.Work:
  lhs, rhs = (list(value.type.shape) for value in op.operands)
  numbers = stablehlo.ConvDimensionNumbers(op.attributes['dimension_numbers'])
  rank = len(numbers.input_spatial_dimensions)

  def per_dimension(name):
    if name not in op.attributes:
      return None
    return list(op.attributes[name])

  pads = list(op.attributes['padding']) if 'padding' in op.attributes else []
  pads = [int(pad) for pad in pads]
  return formulas.convolution(
    batch=lhs[numbers.input_batch_dimension],
    in_features=lhs[numbers.input_feature_dimension],
    out_features=rhs[numbers.kernel_output_feature_dimension],
    input_size=[lhs[i] for i in numbers.input_spatial_dimensions],
    kernel_size=[rhs[i] for i in numbers.kernel_spatial_dimensions],
    strides=per_dimension('window_strides'),
    padding=[tuple(pads[2 * i : 2 * i + 2]) for i in range(rank)]
    if pads
    else None,
    input_dilation=per_dimension('lhs_dilation'),
    kernel_dilation=per_dimension('rhs_dilation'),
    feature_groups=op.attributes['feature_group_count'].value,
    batch_groups=op.attributes['batch_group_count'].value,
  )


def _dot_general(op) -> formulas.Work:
  numbers = stablehlo.DotDimensionNumbers(
    op.attributes['dot_dimension_numbers']
  )
  lhs, rhs = (list(value.type.shape) for value in op.operands)
  contract = list(numbers.lhs_contracting_dimensions)
  batch = list(numbers.lhs_batching_dimensions)
  used = {*numbers.rhs_contracting_dimensions, *numbers.rhs_batching_dimensions}
  return formulas.matmul(
    math.prod(n for i, n in enumerate(lhs) if i not in (*contract, *batch)),
    math.prod(lhs[i] for i in contract),
    math.prod(n for i, n in enumerate(rhs) if i not in used),
    batch=math.prod(lhs[i] for i in batch),
  )


_PRODUCTS = {'convolution': _convolution, 'dot_general': _dot_general}


def _size(array) -> int:
  return math.prod(array.shape)


def _is_floating(array) -> bool:
  return not isinstance(array.element_type, ir.IntegerType)


def _is_scalar_integer(array) -> bool:
  return (
    isinstance(array, ir.RankedTensorType)
    and not array.shape
    and not _is_floating(array)
  )


def _is_whole(op) -> bool:
  """Returns whether all operands are scalar integers."""
  return all(_is_scalar_integer(value.type) for value in op.operands)


def _whole_constant(op) -> int | None:
  if not _is_scalar_integer(op.results[0].type):
    return None
  return int(op.attributes['value'].get_splat_value().value)


def _scope(location) -> str:
  """Returns the named scopes of a location, without the operation."""
  scopes = _path(location).split('/')[:-1]
  return '.'.join(s for s in scopes if not _CONTROL.fullmatch(s))


def _path(location) -> str:
  if isinstance(location, ir.CallSiteLoc):
    return f'{_path(location.caller)}/{_path(location.callee)}'
  return location.name_str if isinstance(location, ir.NameLoc) else ''
