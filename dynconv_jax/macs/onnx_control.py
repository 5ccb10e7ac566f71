"""ONNX's control flow operators: their work and their outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from dynconv_jax.macs import onnx_values
from dynconv_jax.macs.onnx_values import Value

# Maximum number of nodes to visit when running a loop step by step.
_MOST_NODES_OF_A_LOOP = 10000


def _if(counter, name, node, attributes, scope) -> list[Value]:
  """Counts the branch that is taken if known, or else the requested one."""
  condition = scope.values[node.input[0]]
  names = ('then_branch', 'else_branch')
  if condition.data is not None:
    taken = names[not condition.data.item()]
    records, outputs = counter.body(attributes[taken], scope, name)
    counter.records += records
    return outputs
  if counter.branch in ('then', 'else'):
    body = attributes[f'{counter.branch}_branch']
    records, outputs = counter.body(body, scope, name)
  else:
    branches = [counter.body(attributes[taken], scope, name) for taken in names]
    choose = min if counter.branch == 'min' else max
    records, outputs = choose(branches, key=lambda x: counter.cost(x[0]))
  counter.records += records
  return [value.variable() for value in outputs]


def _scan(counter, name, node, attributes, scope) -> list[Value]:
  """Counts the body times the length of the scanned sequences."""
  values = [scope.values[x] if x else None for x in node.input]
  scanned = attributes['num_scan_inputs']
  # Opset 8 has an input of lengths first, and a batch dimension before steps.
  old = counter.inference.version('') < 9
  state = values[1 if old else 0 : len(values) - scanned]
  sequences = values[len(values) - scanned :]
  axes = attributes.get('scan_input_axes') or [1 if old else 0] * scanned
  if any(value.shape is None for value in (*state, *sequences)):
    if counter.may_cost(node):
      counter.leave_out(node, name, 'its number of steps depends on values')
    cause = f'depend on {node.op_type} in {name}, whose steps are not known'
    return [Value(onnx.TypeProto(), cause=cause)] * len(node.output)
  lead = 1 if old else 0
  batch = state[0].shape[0] if old and state else 1
  steps = sequences[0].shape[axes[0]]
  once = [_resized(x, x.shape[lead:]).variable() for x in state]
  for x, axis in zip(sequences, axes, strict=True):
    axis %= len(x.shape)
    shape = (*x.shape[lead:axis], *x.shape[axis + 1 :])
    once.append(_resized(x, shape).variable())
  records, outputs = counter.body(attributes['body'], scope, name, once)
  counter.records += [record.times(steps * batch) for record in records]
  results = [value.variable() for value in state]
  axes = attributes.get('scan_output_axes') or [0] * len(outputs)
  stacked = outputs[len(state) :]
  for value, axis in zip(stacked, axes, strict=False):
    results.append(_stacked(value, steps, axis, (batch,) * lead))
  return results


def _loop(counter, name, node, attributes, scope) -> list[Value]:
  """Counts the body times the trip count, if that is known.

  A loop whose iterations differ, or that ends by a condition, is run step by
  step on what is known about its values.
  """
  counter.loops[name] = None
  body = attributes['body']
  given = [scope.values[x] if x else None for x in node.input]
  most, condition, *state = (*given, None, None)[: max(len(given), 2)]
  going = onnx_values.array(np.asarray(True))
  if condition is not None and condition.data is not None:
    going = onnx_values.array(condition.data)
  limit = None if most is None or most.data is None else int(most.data.item())
  before = dict(counter.uncounted)
  step = Value(onnx_values.tensor_type(onnx.TensorProto.INT64, ()))
  records, outputs = counter.body(
    body, scope, name, [step, going, *(x.variable() for x in state)]
  )
  all_known = len(counter.uncounted) == len(before)
  # A loop whose condition is always true runs all of its steps.
  goes_on = outputs[0].data is not None and bool(outputs[0].data.item())
  stable = all(
    a.shape == b.shape for a, b in zip(state, outputs[1:], strict=False)
  )
  steps = limit if goes_on else None
  if (limit is not None and limit < 1) or not going.data.item():
    records, steps, counter.uncounted = [], 0, before
  elif not (steps and stable and all_known):
    trips = counter.trip_counts
    trips = trips.get(name) if isinstance(trips, Mapping) else trips
    uncounted, run = counter.uncounted, None
    if limit is not None or (most is None and not goes_on):
      counter.uncounted = dict(before)
      run = _run_loop(counter, name, body, scope, limit, state)
    steps = steps or trips
    if run is None and steps is not None and not stable:
      counter.uncounted = dict(before)
      run = _run_loop(counter, name, body, scope, steps, state, ends=False)
    if run is not None:
      counter.records += run[0]
      return run[1]
    counter.uncounted = uncounted
    reason = 'its trip count is not in the model; see trip_counts'
    if steps is not None and not stable:
      steps, reason = None, 'the shapes of its values change at each step'
    if steps is None and counter.cost(records):
      counter.leave_out(node, name, reason)
  counter.records += [record.times(steps or 0) for record in records]
  cause = f'depend on the steps of Loop in {name}'
  results = [
    after.variable() if first.shape == after.shape else _unknown(after, cause)
    for first, after in zip(state, outputs[1:], strict=False)
  ]
  stacked = outputs[1 + len(state) :]
  return results + [_stacked(x, steps, 0, cause=cause) for x in stacked]


def _run_loop(counter, name, body, scope, limit, state, ends=True):
  """Runs a loop step by step; returns its records and outputs.

  Args:
    limit: the maximum number of steps; None for no limit.
    ends: whether the condition may end the loop earlier.

  Returns:
    None if the end depends on unknown values, or if there are too many steps.
  """
  done, stacks = [], []
  last = counter.visited + _MOST_NODES_OF_A_LOOP
  count, step = len(state), 0
  while limit is None or step < limit:
    now = [onnx_values.array(np.asarray(x)) for x in (step, True)]
    # Their data is known, but differs from step to step.
    inputs = [dataclasses.replace(x, constant=False) for x in (*now, *state)]
    records, outputs = counter.body(body, scope, name, inputs)
    going = outputs[0].data
    if counter.visited > last or (going is None and ends):
      return None
    done += records
    state = outputs[1 : 1 + count]
    stacks.append(outputs[1 + count :])
    step += 1
    if ends and not going.item():
      break
  results = list(state)
  for values in zip(*stacks, strict=True):
    same = len({value.shape for value in values}) == 1
    value = values[0] if same else _unknown(values[0])
    results.append(_stacked(value, step, 0))
  return done, results


def _resized(value: Value, shape: Sequence[int] | None) -> Value:
  kind = onnx_values.tensor_type(value.type.tensor_type.elem_type, shape)
  return dataclasses.replace(value, type=kind)


def _unknown(value: Value, cause: str = '') -> Value:
  """Returns a value of which only the type is known."""
  cause = value.cause or cause or 'depend on tensor values'
  if not value.type.HasField('tensor_type'):
    return dataclasses.replace(value.variable(), cause=cause)
  return dataclasses.replace(_resized(value, None).variable(), cause=cause)


def _stacked(value, steps, axis, lead=(), cause='') -> Value:
  """Returns the output that stacks a value over the steps of a loop."""
  if value.shape is None or steps is None:
    return _unknown(value, cause)
  axis %= len(value.shape) + 1
  shape = (*value.shape[:axis], steps, *value.shape[axis:])
  return _resized(value, (*lead, *shape)).variable()


# Each function takes the counter, the layer's name, the node, its attributes by
# name and the scope. It records the node's work and returns its outputs.
RUN = {'If': _if, 'Loop': _loop, 'Scan': _scan}
