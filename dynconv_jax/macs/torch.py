"""Counts a PyTorch module from the operations that it dispatches.

The module runs once on fake tensors, which have a shape and no data, under a
dispatch mode that sees every operation, be it called by a module, a function
or an operator. That keeps Python control flow as it is and needs no graph,
where `torch.export` would have to trace one; module hooks only name what is
seen. Inference mode makes composite operations arrive whole, so that a linear
layer keeps its bias whatever the layout of its input.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dynconv_jax.macs import conventions, formulas, report

try:
  import torch
except ModuleNotFoundError as error:
  raise ImportError(
    'dynconv_jax.macs.torch needs PyTorch:'
    " pip install 'dynconv-jax[torch]' installs it"
  ) from error

from torch import nn
from torch._subclasses import fake_tensor
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dynconv_jax.macs import torch_ops


def count_macs(
  module: nn.Module,
  *args: Any,
  kwargs: Mapping[str, Any] | None = None,
  convention: str | conventions.Convention = 'conv',
  padding: bool = True,
  branch: str = 'max',
) -> report.Report:
  """Returns what a module costs in evaluation mode for inputs like `args`.

  Nothing is allocated or computed, and the module is left as it was. The
  layers are named by the path of the module that was running, what `module`
  does itself by its class.

  Args:
    module: on any device, 'meta' included.
    *args: what `module` is called with: tensors, nests of tensors and other
      values, or shapes, tuples of ints, which stand for a tensor of the
      module's dtype on its device.
    kwargs: arguments by name, likewise.
    convention: a name in `conventions.CONVENTIONS`.
    padding: whether positions of input padding count as work.
    branch: which branch of a `torch.cond` counts: 'max' or 'min' for the dearer
      or cheaper, 'true' or 'false'.

  Raises:
    TypeError: if `module` is not an nn.Module.
    ValueError: if the convention or branch is unknown, or the module does not
      run on these inputs, has parameters without a shape, or looks at values
      of tensors.
  """
  if not isinstance(module, nn.Module):
    raise TypeError(f'module must be a torch.nn.Module; got {type(module)}')
  # A compiled module is counted by what was compiled.
  module = getattr(module, '_orig_mod', module)
  if branch not in ('max', 'min', 'true', 'false'):
    raise ValueError(
      f"branch must be 'max', 'min', 'true' or 'false'; got {branch!r}"
    )
  builder = report.ReportBuilder(convention, padding)
  lazy = nn.parameter.UninitializedTensorMixin
  if any(isinstance(weight, lazy) for weight in module.parameters()):
    raise ValueError(
      f'{type(module).__name__} has parameters that have no shape yet: call it'
      ' once before counting'
    )
  counter = _Counter(module, conventions.get_convention(convention), branch)
  fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_left_as_it_was(module))
    stack.enter_context(torch.inference_mode())
    stack.enter_context(fake)
    _empty(module.eval(), fake)
    fake_args, fake_kwargs = _fake_inputs(module, fake, args, kwargs or {})
    stack.enter_context(counter.named())
    stack.enter_context(counter)
    try:
      module(*fake_args, **fake_kwargs)
    except (
      fake_tensor.DataDependentOutputException,
      fake_tensor.DynamicOutputShapeException,
    ) as error:
      raise ValueError(
        f'{type(module).__name__} looks at the values of its tensors in'
        f' {counter.failed_in or "its forward"} ({error.func}); a count sees'
        ' only their shapes'
      ) from error
    except Exception as error:
      shapes = [
        tuple(leaf.shape)
        for leaf in pytree.tree_leaves((fake_args, fake_kwargs))
        if isinstance(leaf, torch.Tensor)
      ]
      raise ValueError(
        f'{type(module).__name__} does not run on inputs of shapes {shapes}:'
        f' {type(error).__name__} in {counter.failed_in or "its forward"}:'
        f' {error}'
      ) from error
  counter.report_to(builder)
  for entry in counter.uncounted:
    builder.leave_out(*entry, 'its cost is not known')
  return builder.build()


class _Counter(TorchDispatchMode):
  """Records the work of each operation under the module that is running."""

  supports_higher_order_operators = True

  def __init__(
    self,
    module: nn.Module,
    convention: conventions.Convention,
    branch: str,
  ):
    super().__init__()
    self.uncounted: list[report.Uncounted] = []
    self.failed_in = ''
    self._error: BaseException | None = None
    self._sizes = {
      name: weight.numel() for name, weight in module.named_parameters()
    }
    self._convention = convention
    self._branch = branch
    self._root = type(module).__name__
    self._names = {child: name for name, child in module.named_modules()}
    self._running: list[tuple[str, nn.Module]] = [('', module)]
    # One entry an operation: layer, work, output shape.
    self._records: list[tuple[str, formulas.Work, tuple[int, ...]]] = []

  @property
  def layer(self) -> str:
    """The path of the module that is running."""
    return self._running[-1][0]

  @contextlib.contextmanager
  def named(self) -> Iterator[None]:
    """Follows which module is running."""
    handles = [
      module_hooks.register_module_forward_pre_hook(self._start),
      module_hooks.register_module_forward_hook(self._stop, always_call=True),
    ]
    try:
      yield
    finally:
      for handle in handles:
        handle.remove()

  def _start(self, module, args):
    del args
    # A module made in a forward pass has no path: its caller's is used.
    self._running.append((self._names.get(module, self.layer), module))

  def _stop(self, module, args, output):
    del module, args, output
    error = sys.exc_info()[1]
    if error is not self._error:
      self._error, self.failed_in = error, self.layer
    self._running.pop()

  def __torch_dispatch__(self, func, types, args=(), kwargs=None):
    del types
    kwargs = kwargs or {}
    if func is torch.ops.higher_order.cond:
      return self._cond(*args)
    if not isinstance(func, torch._ops.OpOverload):
      self._builder.leave_out(
        str(func), self.layer, 'its body is not looked at'
      )
      return func(*args, **kwargs)
    if func.namespace == 'prim':
      return func(*args, **kwargs)
    known = torch_ops.is_known(func)
    if not known:
      # Composite operations are counted by their parts.
      with self:
        output = func.decompose(*args, **kwargs)
      if output is not NotImplemented:
        return output
    output = torch_ops.recurrent_output(func, args, kwargs)
    if output is None:
      output = func(*args, **kwargs)
    work = torch_ops.work(func, args, kwargs, output, self._running[-1][1])
    if work is None:
      self._leave_out(func)
    elif any((work.macs, work.bias, work.operations, work.ptflops)):
      self._records.append((self.layer, work, torch_ops.first_shape(output)))
    return output

  def _leave_out(self, func) -> None:
    entry = report.Uncounted(str(func), self.layer or self._root)
    self.uncounted.append(entry)

  def _cond(self, predicate, on_true, on_false, operands):
    del predicate
    before, branches = self._records, []
    for branch in (on_true, on_false):
      self._records = []
      with self:
        output = branch(*operands)
      branches.append(self._records)
    if self._branch in ('true', 'false'):
      chosen = branches[self._branch == 'false']
    else:
      choose = min if self._branch == 'min' else max
      chosen = choose(branches, key=self._price)
    self._records = before + chosen
    return output

  def _price(self, records) -> int:
    return sum(self._convention(work) for _, work, _ in records)

  def report_to(self, builder: report.ReportBuilder) -> None:
    """Adds all that was recorded, work of one layer and kind as one."""
    totals: dict[str, dict[str, tuple[formulas.Work, tuple[int, ...]]]] = {}
    for name, work, shape in self._records:
      kinds = totals.setdefault(name, {})
      if work.kind in kinds:
        work = kinds[work.kind][0] + work
      kinds[work.kind] = work, shape

    # Weights that a layer uses without calling the module that holds them, as
    # attention does its output projection, are that layer's.
    parameters = dict.fromkeys(totals, 0)
    for path, size in self._sizes.items():
      while path:
        path = path.rpartition('.')[0]
        if path in totals:
          parameters[path] += size
          break

    for name, kinds in totals.items():
      # The heaviest kind has them: a convention may leave out the others.
      heaviest = min(kinds, key=formulas.KINDS.index)
      for kind, (work, shape) in kinds.items():
        builder.add(
          name or self._root,
          work,
          output_shape=shape,
          parameters=parameters[name] if kind == heaviest else 0,
        )


def _fake_inputs(module, fake, args, kwargs):
  """Returns the arguments with every tensor and shape as a fake tensor."""
  weights = [
    weight
    for weight in (*module.parameters(), *module.buffers())
    if weight.is_floating_point()
  ]
  dtype = weights[0].dtype if weights else torch.get_default_dtype()
  device = weights[0].device if weights else torch.device('cpu')

  def is_shape(value):
    return (
      isinstance(value, (tuple, list))
      and len(value) > 0
      and all(type(size) is int for size in value)
    )

  def to_fake(value):
    if is_shape(value):
      return torch.empty(tuple(value), dtype=dtype, device=device)
    if isinstance(value, torch.Tensor):
      return fake.from_tensor(value)
    return value

  return pytree.tree_map(to_fake, (args, dict(kwargs)), is_leaf=is_shape)


def _empty(module: nn.Module, fake: fake_tensor.FakeTensorMode) -> None:
  """Puts fake tensors in place of weights, so that no update reaches them."""
  for child in module.modules():
    if not isinstance(child, torch.jit.ScriptModule):
      for tensors in (child._parameters, child._buffers):
        for name, tensor in tensors.items():
          if tensor is not None:
            tensors[name] = fake.from_tensor(tensor)


@contextlib.contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
  """Undoes what a forward pass leaves behind: modes, caches, buffers.

  Also turns off attention's fused kernels, which hide what they compute.
  """
  saved = [
    (child, dict(child.__dict__), dict(child._buffers), dict(child._parameters))
    for child in module.modules()
    if not isinstance(child, torch.jit.ScriptModule)
  ]
  modes = {child: child.training for child in module.modules()}
  fused = torch.backends.mha.get_fastpath_enabled()
  torch.backends.mha.set_fastpath_enabled(False)
  # It logs the errors that it raises.
  silent, fake_tensor.log.disabled = fake_tensor.log.disabled, True
  try:
    yield
  finally:
    fake_tensor.log.disabled = silent
    torch.backends.mha.set_fastpath_enabled(fused)
    for child, training in modes.items():
      child.training = training
    for child, attributes, buffers, parameters in saved:
      for current, original in (
        (child.__dict__, attributes),
        (child._buffers, buffers),
        (child._parameters, parameters),
      ):
        current.clear()
        current.update(original)
