"""A dispatch mode that records the work of every operation of a forward pass.

It sees all operations, no matter whether a module, a function or an operator
calls them. Module hooks only provide names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dynconv_jax.macs import (
  conventions,
  formulas,
  report,
  torch_einsum,
  torch_ops,
)
from dynconv_jax.macs.builder import ReportBuilder

# Higher-order operators that run code outside PyTorch's operations.
_OPAQUE = (
  'aoti_call_delegate',
  'call_torchbind',
  'executorch_call_delegate',
  'inductor_compiled_code',
  'inline_asm_elementwise',
)

# Operations in these namespaces only record, check or communicate.
_FREE_NAMESPACES = (
  'prim',
  'profiler',
  'c10d',
  '_c10d_functional',
  '_c10d_functional_autograd',
)


class Record(NamedTuple):
  """The work of one operation."""

  layer: str
  work: formulas.Work
  shape: tuple[int, ...]
  itemsize: int


class Options(NamedTuple):
  """The options of a count; see `torch.count_macs`."""

  convention: conventions.Convention
  branch: str
  trip_counts: int | Mapping[str, int] | None
  backward: bool


class Counter(TorchDispatchMode):
  """Records the work of each operation under the module that is running.

  Attributes:
    failed_in: the path of the innermost module that raised an error.
  """

  supports_higher_order_operators = True

  def __init__(
    self, module: nn.Module, options: Options, real: bool, drawn: bool = False
  ):
    """Args:
    module: the network.
    options: how to count.
    real: whether tensors have data.
    drawn: whether to replace outputs of products by random numbers, if tensors
      have data.
    """
    super().__init__()
    self.failed_in = ''
    self._error: BaseException | None = None
    self._parameters = dict(module.named_parameters())
    self._options = options
    self._real = real
    self._drawn = drawn
    self._root = type(module).__name__
    self._names = {child: name for name, child in module.named_modules()}
    self._running: list[tuple[str, nn.Module]] = [('', module)]
    self._records: list[Record] = []
    self._uncounted: dict[report.Uncounted, str] = {}
    self._loops: dict[str, None] = {}
    # Nodes of the autograd graph that have a layer, and for each running
    # module the first sequence number that its nodes can have.
    self._owned: set[Any] = set()
    self._firsts = [0]
    self._differentiating = False

  @property
  def layer(self) -> str:
    """The path of the module that is running."""
    return self._running[-1][0]

  @contextlib.contextmanager
  def named(self) -> Iterator[None]:
    """Tracks which module is running."""
    handles = [
      module_hooks.register_module_forward_pre_hook(self._start),
      module_hooks.register_module_forward_hook(self._stop, always_call=True),
    ]
    try:
      yield
    finally:
      for handle in handles:
        handle.remove()

  def run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Runs a module and returns its output."""
    if isinstance(module, torch.fx.GraphModule) and any(
      'nn_module_stack' in node.meta for node in module.graph.nodes
    ):
      inputs = _leaves(module, args, kwargs)
      return _Exported(module, self).run(*inputs, enable_io_processing=False)
    return module(*args, **kwargs)

  @contextlib.contextmanager
  def in_layer(self, layer: str) -> Iterator[list[Any]]:
    """Names the enclosed work; the caller appends the layer's output."""
    outputs: list[Any] = []
    self._push(layer, self._running[-1][1])
    try:
      yield outputs
    finally:
      self._stop(None, (), outputs)

  def differentiate(
    self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
  ) -> None:
    """Computes the gradients of outputs with respect to inputs."""
    self._differentiating = True
    ones = [torch.ones_like(output) for output in outputs]
    torch.autograd.grad(outputs, inputs, ones, allow_unused=True)

  def _start(self, module, args):
    del args
    # A module created during a forward pass has no path: use the caller's.
    self._push(self._names.get(module, self.layer), module)

  def _push(self, layer: str, module: nn.Module) -> None:
    self._running.append((layer, module))
    self._firsts.append(torch._C._autograd._get_sequence_nr())

  def _stop(self, module, args, output):
    del module, args
    error = sys.exc_info()[1]
    if error is not self._error:
      self._error, self.failed_in = error, self.layer
    if self._options.backward:
      self._own_gradients(output)
    self._running.pop()
    self._firsts.pop()

  def _own_gradients(self, output: Any) -> None:
    """Assigns the gradient nodes of the running module to its layer.

    Its submodules have finished and own their nodes; nodes created before the
    module started have lower numbers.
    """
    first, running = self._firsts[-1], self._running[-1]
    leaves = pytree.tree_leaves(output)
    nodes = [x.grad_fn for x in leaves if isinstance(x, torch.Tensor)]
    seen = {None}
    while nodes:
      node = nodes.pop()
      if node in seen or node._sequence_nr() < first:
        continue
      seen.add(node)
      if node not in self._owned:
        self._owned.add(node)
        node.register_prehook(functools.partial(self._start_gradient, running))
        node.register_hook(self._stop_gradient)
      nodes += [parent for parent, _ in node.next_functions]

  def _start_gradient(self, running, gradients):
    del gradients
    if self._differentiating:
      # The sums between two nodes belong to the layer of the first one.
      self._running.pop()
    self._running.append(running)

  def _stop_gradient(self, gradients, outputs):
    del gradients, outputs
    # A forward pass that computes gradients goes on in its own layer.
    if not self._differentiating:
      self._running.pop()

  def __torch_dispatch__(self, func, types, args=(), kwargs=None):
    del types
    kwargs = kwargs or {}
    if not isinstance(func, torch._ops.OpOverload):
      return self.higher_order(func, args, kwargs, self)
    if func.namespace in _FREE_NAMESPACES:
      return func(*args, **kwargs)
    if not torch_ops.is_known(func, args):
      # Count composite operations by their parts.
      with self:
        output = func.decompose(*args, **kwargs)
      if output is not NotImplemented:
        return output
    output = None
    if not self._real:
      output = torch_ops.shaped_output(func, args, kwargs)
    elif self._drawn:
      output = torch_ops.drawn_output(func, args, kwargs)
    if output is None:
      output = func(*args, **kwargs)
    work = torch_ops.work(func, args, kwargs, output, self._running[-1][1])
    if work is not None:
      if self._differentiating:
        # Masks and activation memory do not apply to gradients.
        work = dataclasses.replace(work, positions=0, outputs=0)
      tensor = torch_ops.first_tensor(output)
      shape, itemsize = (), 0
      if tensor is not None:
        shape, itemsize = tuple(tensor.shape), tensor.element_size()
      self._records.append(Record(self.layer, work, shape, itemsize))
    elif self._options.convention(torch_ops.possible_work(func)):
      self._leave_out(
        func, 'its work is not known; see dynconv_jax.macs.register'
      )
    return output

  def _leave_out(self, operation: Any, reason: str) -> None:
    entry = report.Uncounted(str(operation), self.layer or self._root)
    self._uncounted.setdefault(entry, reason)

  def higher_order(self, func, args, kwargs, mode: Any) -> Any:
    """Counts a higher-order operator by the work of its functions.

    Args:
      func: the operator.
      args: its positional arguments.
      kwargs: its keyword arguments.
      mode: the mode to run its functions under.
    """
    name = func.name()
    if not self._real and name == 'cond':
      return self._cond(mode, *args)
    if not self._real and name == 'while_loop':
      return self._while(mode, *args)
    keys = torch._C.DispatchKey
    kernel = _BODIES.get(name)
    kernel = kernel or func.py_kernels.get(keys.CompositeExplicitAutograd)
    kernel = kernel or func.py_kernels.get(keys.CPU)
    if kernel is None or name in _OPAQUE:
      self._leave_out(name, 'the code that it runs is not visible')
      return func(*args, **kwargs)
    with mode:
      return kernel(*args, **kwargs)

  def _cond(self, mode, predicate, on_true, on_false, operands) -> Any:
    del predicate
    branches = [self._apart(mode, f, operands) for f in (on_true, on_false)]
    if self._options.branch in ('true', 'false'):
      output, records = branches[self._options.branch == 'false']
    else:
      choose = min if self._options.branch == 'min' else max
      output, records = choose(branches, key=lambda x: self._price(x[1]))
    self._records += records
    return output

  def _while(self, mode, condition, body, carried, extra) -> Any:
    layer = self.layer or self._root
    self._loops[layer] = None
    trips = self._options.trip_counts
    if isinstance(trips, Mapping):
      trips = trips.get(layer)
    _, test = self._apart(mode, condition, (*carried, *extra))
    output, step = self._apart(mode, body, (*carried, *extra))
    if trips is not None:
      self._records += [_times(record, trips + 1) for record in test]
      self._records += [_times(record, trips) for record in step]
    elif self._price(test) or self._price(step):
      self._leave_out(
        'while_loop',
        'its number of iterations is not known; pass trip_counts, or data and'
        ' run=True',
      )
    return output

  def _apart(
    self, mode: Any, function: Callable[..., Any], operands: Sequence[Any]
  ) -> tuple[Any, list[Record]]:
    """Returns a function's output and its records, without adding these."""
    before, self._records = self._records, []
    with mode:
      output = function(*operands)
    records, self._records = self._records, before
    return output, records

  def _price(self, records: Sequence[Record]) -> int:
    return sum(self._options.convention(record.work) for record in records)

  def report_to(self, builder: ReportBuilder) -> None:
    """Adds all records to the report, merged by layer and kind of work.

    Raises:
      ValueError: if `trip_counts` names a loop that does not exist.
    """
    trips = self._options.trip_counts
    names = trips.keys() if isinstance(trips, Mapping) else set()
    if not self._real and (unknown := sorted(names - self._loops.keys())):
      raise ValueError(
        f'trip_counts must name loops of the program; got {unknown}, and the'
        f' loops are in {list(self._loops)}'
      )
    sums: dict[tuple[str, str], Record] = {}
    for record in self._records:
      key = record.layer, record.work.kind
      first = sums.get(key)
      if first is not None:
        record = first._replace(work=first.work + record.work)
      elif not any(record.work.counts):
        continue
      sums[key] = record
    for record in sums.values():
      builder.add(
        record.layer or self._root,
        record.work,
        output_shape=record.shape,
        itemsize=record.itemsize,
      )
    sizes: dict[str, int] = {}
    for path, weight in self._parameters.items():
      path = path.rpartition('.')[0] or self._root
      sizes[path] = sizes.get(path, 0) + weight.numel()
    builder.set_parameters(
      sizes,
      sum(x.numel() * x.element_size() for x in self._parameters.values()),
    )
    for entry, reason in self._uncounted.items():
      builder.leave_out(*entry, reason)


class Differentiable(TorchFunctionMode):
  """Replaces operators whose gradients the dispatch mode would not see.

  PyTorch traces the gradients of operators on functions and recomputes values.
  For an einsum that contracts nothing, it multiplies element by element.
  """

  def __init__(self, counter: Counter):
    super().__init__()
    self._counter = counter

  def __torch_function__(self, func, types, args=(), kwargs=None):
    kwargs = kwargs or {}
    if isinstance(func, torch._ops.HigherOrderOperator):
      return self._counter.higher_order(func, args, kwargs, self)
    if func is torch.einsum:
      return torch_einsum.einsum(*args)
    return func(*args, **kwargs)


class _Exported(torch.fx.Interpreter):
  """Runs an exported graph; its nodes tell which modules they come from."""

  def __init__(self, module: torch.fx.GraphModule, counter: Counter):
    super().__init__(module)
    self.extra_traceback = False
    self._counter = counter

  def run_node(self, node: torch.fx.Node) -> Any:
    paths = [path for path, _ in node.meta.get('nn_module_stack', {}).values()]
    with self._counter.in_layer(paths[-1] if paths else '') as outputs:
      outputs.append(super().run_node(node))
      return outputs[0]


def _leaves(module: torch.fx.GraphModule, args: Any, kwargs: Any) -> list[Any]:
  """Returns the inputs of a graph, in the order in which it takes them."""
  call = inspect.signature(module.forward).bind(*args, **kwargs)
  call.apply_defaults()
  try:
    positional, _ = module._in_spec.children()
    count = positional.num_children
    named = dict(list(call.arguments.items())[count:])
    return module._in_spec.flatten_up_to((call.args[:count], named))
  except (AttributeError, ValueError):
    # Not exported, or the inputs have another structure.
    return module.graph.process_inputs(*call.args)


def _times(record: Record, times: int) -> Record:
  return record._replace(work=record.work * times)


def _scan(combine, init, xs, extra) -> tuple[Any, ...]:
  """Runs a scan over the first dimension, step by step."""
  carry, steps = tuple(init), []
  for slices in zip(*(x.unbind() for x in xs), strict=True):
    outputs = combine(*carry, *slices, *extra)
    carry = tuple(outputs[: len(carry)])
    steps.append(outputs[len(carry) :])
  return (*carry, *(torch.stack(ys) for ys in zip(*steps, strict=True)))


# Operators whose own kernels do not run under a mode.
_BODIES: dict[str, Callable[..., Any]] = {
  'cond': lambda predicate, on_true, on_false, operands: (
    on_true if predicate else on_false
  )(*operands),
  'invoke_quant': lambda body, *operands, **options: body(*operands),
  'invoke_quant_packed': lambda body, *operands, **options: body(*operands),
  'invoke_subgraph': lambda body, name, *operands: body(*operands),
  'scan': _scan,
  'strict_mode': lambda body, operands: body(*operands),
}
