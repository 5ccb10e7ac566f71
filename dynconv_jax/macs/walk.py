"""Walks a jaxpr and its nested jaxprs and collects their work."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from dynconv_jax.macs import formulas, loops, primitives, scopes
from dynconv_jax.macs.builder import ReportBuilder
from dynconv_jax.macs.entries import (
  Entry,
  Weight,
  constant,
  repeated,
  weight,
  weights_operand,
)

# Primitives that run the jaxpr in this parameter.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
  'call': 'call_jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'custom_vmap_call': 'call',
  'composite': 'jaxpr',
  'shard_map': 'jaxpr',
  'custom_partitioning': 'call',
  'cudnn_fusion': 'jaxpr',
  'linear_call': 'callee',
  'run_state': 'jaxpr',
}

_PRODUCTS = ('conv_general_dilated', 'dot_general', 'ragged_dot_general')


class Walk:
  """The work of a jaxpr's equations, in order; see `count_macs` for options."""

  def __init__(self, convention, padding, trip_counts, branch):
    self._convention = convention
    self._padding = padding
    self._trip_counts = trip_counts
    self._branch = branch
    self._branches_seen: set[str] = set()
    self._loops_seen: dict[str, None] = {}
    self._entries: list[Entry] = []

  def program(self, jaxpr: core.ClosedJaxpr) -> None:
    """Walks a whole program; its arguments may be weights.

    Raises:
      ValueError: if no cond of the program has the requested branch, or no
        loop has the name of a trip count.
    """
    weights = [weight(var, var.aval) for var in jaxpr.jaxpr.invars]
    self._sub(jaxpr, weights, ())
    self._check_branch_was_found()
    self._check_loops_were_found()

  def layers(self) -> set[str]:
    """Returns the names of the layers found so far."""
    return {entry.layer for entry in self._entries}

  def report_to(self, builder: ReportBuilder) -> None:
    """Adds everything collected to a report."""
    unnamed = {kind: itertools.count() for kind in ('conv', 'matmul')}
    counted: set[Any] = set()
    for entry in self._entries:
      if entry.work is None:
        builder.leave_out(entry.operation, entry.layer, entry.reason)
        continue
      if not self._convention(entry.work, self._padding):
        builder.add('', entry.work)
        continue
      name, kind = entry.layer, entry.work.kind
      if not name and kind in unnamed:
        name = f'{kind}_{next(unnamed[kind])}'
      fresh = {w.key: w for w in entry.weights if w.key not in counted}
      counted.update(fresh)
      builder.add(
        name or entry.operation,
        entry.work,
        output_shape=entry.shape,
        parameters=sum(w.parameters for w in fresh.values()),
        itemsize=entry.itemsize,
      )

  def _sub(self, jaxpr, inputs, stacks) -> list[Any]:
    """Walks a jaxpr, open or closed; returns what is known about its outputs.

    Known variables are a `Weight`, the `Entry` whose output they are, or an
    integer: an int, a `loops.Count`, or a `loops.Comparison`.
    """
    consts = [constant(x) for x in getattr(jaxpr, 'consts', ())]
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(var):
      if isinstance(var, core.Literal):
        return constant(var.val)
      return known.get(var)

    for eqn in jaxpr.eqns:
      around = (*stacks, scopes.name_stack(eqn))
      outputs = self._equation(eqn, [read(v) for v in eqn.invars], around)
      known.update(zip(eqn.outvars, outputs, strict=False))
    return [read(var) for var in jaxpr.outvars]

  def _equation(self, eqn, inputs, stacks) -> Sequence[Any]:
    name, params = eqn.primitive.name, eqn.params
    if (work := primitives.registered(eqn)) is not None:
      return self._add(eqn, work, inputs, stacks)
    if name in _CALLS:
      with self._times(_devices(params) if name == 'shard_map' else 1):
        return self._sub(params[_CALLS[name]], inputs, stacks)
    if name == 'cond':
      return self._cond(eqn, inputs[1:], stacks)
    if name == 'scan':
      return self._scan(params, inputs, stacks)
    if name == 'while':
      return self._while(params, inputs, stacks)
    if name == 'custom_linear_solve':
      return self._linear_solve(params, inputs, stacks)
    if name == 'call_exported':
      return self._exported(eqn, stacks)
    if name == 'pallas_call':
      return self._pallas(eqn, stacks)
    if name in primitives.LAYOUT:
      return inputs[:1]
    if (number := _whole_number(eqn, inputs)) is not None:
      return [number]
    if name in ('add', 'add_any') and (entry := self._biased(eqn, inputs)):
      return [entry]
    work = primitives.work_of(eqn)
    if work is None:
      self._leave_out(
        name, stacks, 'its work is not known; see dynconv_jax.macs.register'
      )
      return ()
    return self._add(eqn, work, inputs, stacks)

  def _add(self, eqn, work, inputs, stacks) -> Sequence[Any]:
    """Records an equation's work; returns what is known about its outputs."""
    if work == formulas.elementwise(0):
      return ()
    name = eqn.primitive.name
    output = eqn.outvars[0].aval if eqn.outvars else None
    is_backward = scopes.is_transposed(*stacks)
    if is_backward:
      # Masks and activation memory do not apply to gradients.
      work = dataclasses.replace(work, positions=0, outputs=0)
    entry = Entry(
      scopes.layer_name(*stacks),
      name,
      work,
      getattr(output, 'shape', ()),
      itemsize=getattr(getattr(output, 'dtype', None), 'itemsize', 0),
    )
    if name in _PRODUCTS:
      operand = weights_operand(eqn, inputs)
      entry.features = primitives.out_features(eqn, operand)
      # The backward pass has no weights of its own.
      if isinstance(weights := inputs[operand], Weight) and not is_backward:
        entry.weights = (weights,)
        if entry.features and not work.positions:
          positions = math.prod(entry.shape) // entry.features
          entry.work = dataclasses.replace(work, positions=positions)
    self._entries.append(entry)
    return [entry]

  def _biased(self, eqn, inputs) -> Entry | None:
    """Counts an addition as the bias of a product, if it is one.

    One operand must be the output of a convolution or matrix product without a
    bias so far, the other a broadcast array from outside with one element per
    output feature.
    """
    for product, bias in (inputs, inputs[::-1]):
      if (
        isinstance(product, Entry)
        and product.features
        and isinstance(bias, Weight)
        and bias.size == product.features
        and eqn.outvars[0].aval.size == math.prod(product.shape)
      ):
        added = formulas.Work(product.work.kind, bias=eqn.outvars[0].aval.size)
        if primitives.is_complex(eqn.outvars[0].aval):
          added = formulas.of_complex(added)
        product.work += added
        product.weights += (bias,)
        product.features = 0
        return product
    return None

  def _cond(self, eqn, inputs, stacks) -> Sequence[Any]:
    branches = eqn.params['branches']
    platforms = eqn.params.get('branches_platforms')
    if platforms and None in platforms:
      return self._sub(branches[platforms.index(None)], inputs, stacks)
    branch = self._chosen(scopes.layer_name(*stacks), len(branches))
    if isinstance(branch, int):
      return self._sub(branches[branch], inputs, stacks)
    names = [b.jaxpr.debug_info.func_name for b in branches]
    self._branches_seen.update(names)
    if self._branch in names:
      return self._sub(branches[names.index(self._branch)], inputs, stacks)

    # A branch may add a bias to a product outside of it.
    products = {known for known in inputs if isinstance(known, Entry)}
    before = [(product, vars(product).copy()) for product in products]
    walks = []
    for closed in branches:
      with self._apart() as entries:
        outputs = self._sub(closed, inputs, stacks)
      price = self._price([*entries, *products])
      after = [(product, vars(product).copy()) for product in products]
      walks.append((price, entries, after, outputs))
      _restore(before)
    choose = min if self._branch == 'min' else max
    _, chosen, after, outputs = choose(walks, key=lambda walk: walk[0])
    self._entries += chosen
    _restore(after)
    # A branch with unknown work has no known price. Report that work even if
    # another branch was chosen.
    for _, entries, *_ in walks:
      if entries is not chosen:
        self._entries += [entry for entry in entries if entry.work is None]
    # Which number it is depends on data if the branches return different ones.
    return [
      known
      if isinstance(known, Weight | Entry) or len(set(every)) == 1
      else None
      for known, *every in zip(
        outputs, *(walk[3] for walk in walks), strict=True
      )
    ]

  def _chosen(self, layer: str, branches: int) -> str | int:
    """Returns the requested branch of a cond with this many branches."""
    if isinstance(self._branch, int) and not 0 <= self._branch < branches:
      raise ValueError(
        f'branch must be in [0, {branches}) for the cond in'
        f' {layer or "the function"}; got {self._branch}'
      )
    return self._branch

  def _scan(self, params, inputs, stacks) -> Sequence[Any]:
    body, consts = params['jaxpr'], params['num_consts']
    inner = [
      # A slice of stacked weights is the weight of one layer of the stack.
      dataclasses.replace(known, size=var.aval.size)
      if isinstance(known, Weight)
      else known
      if i < consts and not isinstance(known, Entry)
      else None
      for i, (known, var) in enumerate(
        zip(inputs, _variables(body), strict=True)
      )
    ]
    with self._times(params['length']):
      self._sub(body, inner, stacks)
    return ()

  def _while(self, params, inputs, stacks) -> Sequence[Any]:
    inputs = [None if isinstance(known, Entry) else known for known in inputs]
    conds, bodies = params['cond_nconsts'], params['body_nconsts']
    start = inputs[conds + bodies :]
    # Compare the carried numbers before and after one iteration.
    carried = _variables(params['body_jaxpr'])[bodies:]
    carry = [
      known if isinstance(known, Weight) else _counter(var.aval)
      for known, var in zip(start, carried, strict=True)
    ]
    with self._apart() as body:
      stop = self._sub(
        params['body_jaxpr'], inputs[conds : conds + bodies] + carry, stacks
      )
    with self._apart() as test:
      (condition,) = self._sub(
        params['cond_jaxpr'], inputs[:conds] + carry, stacks
      )

    fixed = loops.fixed_trips(condition, start, carry, stop)
    trips = self._trips(scopes.layer_name(*stacks), fixed)
    if trips is not None:
      self._entries += repeated(body, trips) + repeated(test, trips + 1)
    elif self._price(body + test) or any(e.work is None for e in body + test):
      self._leave_out(
        'while', stacks, 'its trip count is not in the program; see trip_counts'
      )
    return ()

  def _trips(self, layer: str, fixed: int | None) -> int | None:
    """Returns a loop's trip count; `fixed` is the one set by the program."""
    self._loops_seen[layer] = None
    given = self._trip_counts
    if isinstance(given, Mapping):
      return given.get(layer, fixed)
    return given if fixed is None else fixed

  def _exported(self, eqn, stacks) -> Sequence[Any]:
    # Imported lazily: only exported functions need MLIR.
    from dynconv_jax.macs import stablehlo

    around = scopes.layer_name(*stacks)

    def layer(scope: str) -> str:
      return '.'.join(filter(None, [around, scope]))

    found = stablehlo.operations(
      eqn.params['exported'],
      [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars],
      price=self._price,
      trips=lambda scope, fixed: self._trips(layer(scope), fixed),
      branch=lambda scope, number: self._chosen(layer(scope), number),
    )
    self._entries += [
      Entry(layer(op.scope), op.name, op.work, op.shape, reason=op.reason)
      for op in found
    ]
    return ()

  def _linear_solve(self, params, inputs, stacks) -> Sequence[Any]:
    """Counts the given function that solves the system."""
    lengths = params['const_lengths']
    first = lengths.matvec + lengths.vecmat
    consts = inputs[first : first + lengths.solve]
    sides = inputs[sum(lengths) :]
    return self._sub(params['jaxprs'].solve, [*consts, *sides], stacks)

  def _pallas(self, eqn, stacks) -> Sequence[Any]:
    cost = eqn.params.get('cost_estimate')
    if cost is None:
      self._leave_out('pallas_call', stacks, 'the kernel has no cost_estimate')
    elif self._convention.name == 'conv':
      self._leave_out(
        'pallas_call', stacks, 'its cost_estimate does not name convolutions'
      )
    else:
      macs = cost.flops // 2
      work = formulas.Work(
        'matmul', macs, macs, operations=cost.flops % 2 + cost.transcendentals
      )
      shape = eqn.outvars[0].aval.shape if eqn.outvars else ()
      self._entries.append(
        Entry(scopes.layer_name(*stacks), 'pallas_call', work, shape)
      )
    return ()

  @contextlib.contextmanager
  def _apart(self) -> Iterator[list[Entry]]:
    """Collects what is found in the context in a separate list."""
    outer, self._entries = self._entries, []
    try:
      yield self._entries
    finally:
      self._entries = outer

  @contextlib.contextmanager
  def _times(self, times: int) -> Iterator[None]:
    """Multiplies what is found in the context."""
    with self._apart() as entries:
      yield
    self._entries += repeated(entries, times)

  def _leave_out(self, operation, stacks, reason) -> None:
    layer = scopes.layer_name(*stacks)
    self._entries.append(Entry(layer, operation, None, reason=reason))

  def _price(self, entries: Sequence[Entry]) -> int:
    return sum(
      self._convention(entry.work, self._padding)
      for entry in entries
      if entry.work is not None
    )

  def _check_loops_were_found(self) -> None:
    if not isinstance(self._trip_counts, Mapping):
      return
    if unknown := sorted(self._trip_counts.keys() - self._loops_seen.keys()):
      raise ValueError(
        f'trip_counts must name loops of the program; got {unknown}, and the'
        f' loops are in {list(self._loops_seen)}'
      )

  def _check_branch_was_found(self) -> None:
    asked = self._branch
    if (
      isinstance(asked, str)
      and asked not in ('max', 'min')
      and asked not in self._branches_seen
    ):
      raise ValueError(
        f"branch must be 'max', 'min', an index or the name of a branch; got"
        f' {asked!r}, and the branches are {sorted(self._branches_seen)}'
      )


def _restore(states: Sequence[tuple[Entry, Mapping[str, Any]]]) -> None:
  for entry, state in states:
    vars(entry).update(state)


def _counter(aval) -> loops.Count | None:
  whole = not aval.shape and jax.dtypes.issubdtype(aval.dtype, np.integer)
  return loops.Count(object()) if whole else None


def _whole_number(eqn, inputs: Sequence[Any]) -> Any:
  """Evaluates integer arithmetic as far as it is known; None if unknown."""
  if len(inputs) != 2 or not all(
    jax.dtypes.issubdtype(getattr(v.aval, 'dtype', bool), np.integer)
    for v in eqn.invars
  ):
    return None
  return loops.arithmetic(eqn.primitive.name, *inputs)


def _variables(jaxpr) -> Sequence[core.Var]:
  return getattr(jaxpr, 'jaxpr', jaxpr).invars


def _devices(params: Mapping[str, Any]) -> int:
  """Returns the number of devices that run the body of a shard_map."""
  sizes = dict(params['mesh'].shape)
  # Axes that an outer shard_map has split are counted there.
  axes = params.get('newly_manual_axes', params.get('manual_axes', sizes))
  return math.prod(sizes[axis] for axis in axes)
