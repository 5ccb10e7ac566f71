"""Counts a PyTorch module from the operations that it dispatches.

The module runs once on fake tensors, which have a shape but no data, under a
dispatch mode that sees every operation. Unlike tracing with `torch.export`,
this needs no graph and keeps Python control flow. In inference mode, composite
operations are not decomposed, so a linear layer keeps its bias for every input
layout.

A module that depends on the values of its tensors runs once on data instead.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dynconv_jax.macs import conventions, report
from dynconv_jax.macs.builder import ReportBuilder

try:
  import torch
except ModuleNotFoundError as error:
  raise ImportError(
    'dynconv_jax.macs.torch needs PyTorch:'
    " pip install 'dynconv-jax[torch]' installs it"
  ) from error

from torch import nn
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree

from dynconv_jax.macs import torch_counter, torch_ops

# If one of these is loaded, parts of the module may be compiled.
_COMPILING = {'torch._dynamo', 'torch.nn.attention.flex_attention'}

# Notes for counts that depend on data.
_RAN = 'counted by a run on {data}; the count may differ for other values'
_DRAWN = 'random data, including random outputs of products'


@dataclasses.dataclass(frozen=True)
class AsIs:
  """Marks an argument to pass unchanged, even if it looks like a shape."""

  value: Any


def count_macs(
  module: nn.Module,
  *args: Any,
  kwargs: Mapping[str, Any] | None = None,
  convention: str | conventions.Convention = 'conv+linear',
  padding: bool = True,
  branch: str = 'max',
  trip_counts: int | Mapping[str, int] | None = None,
  run: bool | str | None = None,
  backward: bool = False,
) -> report.Report:
  """Counts the multiply-accumulates of a module.

  The module is counted in evaluation mode and left unchanged. Layers are named
  by the path of the module that runs them; work of `module` itself is named by
  its class.

  Args:
    module: on any device, including 'meta', or a
      `torch.export.ExportedProgram`.
    *args: arguments of `module`: tensors, nested structures of tensors and
      other values, or shapes. A shape is a tuple or list of ints and stands for
      a tensor of the module's dtype on its device. `AsIs((2, 3))` passes the
      tuple itself.
    kwargs: keyword arguments of `module`, of the same types.
    convention: a name in `conventions.CONVENTIONS`.
    padding: whether to count multiply-accumulates on input padding.
    branch: which branch of a `torch.cond` to count: 'max' or 'min' for the more
      or less expensive one, 'true' or 'false'. A run on data counts the branch
      that it takes.
    trip_counts: number of iterations of each `while_loop` body: one number, or
      {layer name around the loop: number}. A loop without one that does work is
      left out, with a warning. A run on data counts the iterations that it
      takes.
    run: whether to run the module on data; False allocates and computes
      nothing. By default, the module runs on data only if it cannot run on
      shapes alone, for example because it depends on the values of its tensors;
      a note in the report then says so. Given shapes become normally
      distributed data, the same each time. 'drawn' runs on data but replaces
      the outputs of convolutions and products by random numbers. This is much
      faster and suits counts that do not depend on these values.
    backward: whether to count the gradients of the outputs with respect to the
      parameters and to inputs that require gradients. The module is then
      counted in its current mode, training or evaluation.

  Returns:
    A report of the work for the whole batch.

  Raises:
    TypeError: if `module` is not an nn.Module.
    ValueError: if an option is invalid, the module does not run on these
      inputs, or it has parameters without a shape.
  """
  if isinstance(module, torch.export.ExportedProgram):
    module = module.module()
  if not isinstance(module, nn.Module):
    raise TypeError(f'module must be a torch.nn.Module; got {type(module)}')
  # A compiled module is counted as the original one.
  module = getattr(module, '_orig_mod', module)
  options = torch_counter.Options(
    conventions.get_convention(convention), branch, trip_counts, backward
  )
  _check(module, options, run)
  builder = ReportBuilder(options.convention, padding)
  try:
    counter = _count(module, args, kwargs or {}, options, run or False)
  except _Failure as failure:
    if run is not None or _has_no_data(module):
      raise failure.error() from failure.cause
    try:
      counter = _count(module, args, kwargs or {}, options, True)
    except _Failure as failure:
      raise failure.error() from failure.cause
    run = True
  if run:
    given = any(
      isinstance(x, torch.Tensor) for x in pytree.tree_leaves((args, kwargs))
    )
    data = 'the data given' if given else 'random data'
    builder.note(_RAN.format(data=_DRAWN if run == 'drawn' else data))
  counter.report_to(builder)
  return builder.build()


def _check(
  module: nn.Module, options: torch_counter.Options, run: bool | str | None
) -> None:
  """Raises an error if an option or the module is invalid."""
  if options.branch not in ('max', 'min', 'true', 'false'):
    raise ValueError(
      f"branch must be 'max', 'min', 'true' or 'false'; got {options.branch!r}"
    )
  trips = options.trip_counts
  for count in trips.values() if isinstance(trips, Mapping) else [trips]:
    if count is not None and (type(count) is not int or count < 0):
      raise ValueError(f'trip_counts must be integers >= 0; got {count!r}')
  if options.backward and options.convention.name == 'ptflops':
    raise ValueError(
      "the convention 'ptflops' does not support the backward pass"
    )
  lazy = nn.parameter.UninitializedTensorMixin
  if any(isinstance(weight, lazy) for weight in module.parameters()):
    raise ValueError(
      f'{type(module).__name__} has parameters without a shape: call it once'
      ' before counting'
    )
  if run not in (None, True, False, 'drawn'):
    raise ValueError(f"run must be True, False, 'drawn' or None; got {run!r}")
  if run and _has_no_data(module):
    raise ValueError(
      f'run={run!r} needs weights with data; those of {type(module).__name__}'
      " are on the device 'meta'"
    )


def _has_no_data(module: nn.Module) -> bool:
  return any(tensor.is_meta for tensor in _tensors_of(module))


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
  return [*module.parameters(), *module.buffers()]


class _Failure(Exception):
  """An error raised while running the module."""

  def __init__(self, module, shapes, layer, cause):
    super().__init__(str(cause))
    self.cause = cause
    self._texts = type(module).__name__, shapes, layer or 'its forward'

  def error(self) -> ValueError:
    name, shapes, layer = self._texts
    if isinstance(
      self.cause,
      fake_tensor.DataDependentOutputException
      | fake_tensor.DynamicOutputShapeException,
    ):
      return ValueError(
        f'{name} depends on the values of its tensors in {layer}'
        f' ({self.cause.func}), so shapes are not enough: pass weights and'
        ' inputs with data, and run=True'
      )
    return ValueError(
      f'{name} does not run on inputs of shapes {shapes}:'
      f' {type(self.cause).__name__} in {layer}: {self.cause}'
    )


def _count(module, args, kwargs, options, run) -> torch_counter.Counter:
  """Returns the counter after one run, on fake tensors if `run` is False.

  Raises:
    _Failure: if the module does not run.
  """
  counter = torch_counter.Counter(module, options, bool(run), run == 'drawn')
  fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
  inputs = ()
  with contextlib.ExitStack() as stack:
    stack.enter_context(_left_as_it_was(module))
    if _COMPILING & sys.modules.keys():
      # Compiled functions are counted as the original ones.
      stack.enter_context(torch.compiler.set_stance('force_eager'))
      stack.enter_context(warnings.catch_warnings())
      warnings.filterwarnings('ignore', 'flex_attention called without')
    if not options.backward:
      stack.enter_context(torch.inference_mode())
      # The module of an exported program has a fixed mode and no `eval`.
      with contextlib.suppress(NotImplementedError):
        module.eval()
    else:
      stack.enter_context(torch.enable_grad())
      stack.enter_context(torch_counter.Differentiable(counter))
    if run:
      devices = {x.device for x in _tensors_of(module) if x.is_cuda}
      stack.enter_context(torch.random.fork_rng(devices))
      torch.manual_seed(0)
      copy_of = _copy
    else:
      stack.enter_context(fake)
      copy_of = functools.partial(_without_data, fake)
    try:
      _replace_tensors(module, copy_of)
      inputs = _inputs(module, copy_of, args, kwargs)
      stack.enter_context(counter.named())
      stack.enter_context(counter)
      output = counter.run(module, *inputs)
      if options.backward:
        _differentiate(counter, module, inputs, output)
    except torch_ops.FormulaError:
      raise
    except Exception as error:
      shapes = [
        tuple(leaf.shape)
        for leaf in pytree.tree_leaves(inputs)
        if isinstance(leaf, torch.Tensor)
      ]
      raise _Failure(module, shapes, counter.failed_in, error) from error
  return counter


def _without_data(
  fake: fake_tensor.FakeTensorMode, tensor: torch.Tensor
) -> torch.Tensor:
  if tensor.layout != torch.strided:
    raise NotImplementedError(
      f'the number of stored elements of a tensor of {tensor.layout} depends on'
      ' its data'
    )
  return fake.from_tensor(tensor)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
  copy = tensor.detach().clone()
  if isinstance(tensor, nn.Parameter):
    return nn.Parameter(copy, tensor.requires_grad)
  return copy.requires_grad_(tensor.requires_grad)


def _differentiate(counter, module, inputs, output) -> None:
  """Computes the gradients of all outputs by the parameters and inputs."""
  outputs, sources = (
    [
      leaf
      for leaf in leaves
      if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    for leaves in (
      pytree.tree_leaves(output),
      (*module.parameters(), *pytree.tree_leaves(inputs)),
    )
  )
  if not outputs:
    raise ValueError('no output depends on a tensor that requires a gradient')
  counter.differentiate(outputs, sources)


def _inputs(module, copy_of, args, kwargs) -> tuple[tuple, dict]:
  """Returns the arguments, with tensors copied and shapes made into tensors."""
  weights = [x for x in _tensors_of(module) if x.is_floating_point()]
  dtype = weights[0].dtype if weights else torch.get_default_dtype()
  device = weights[0].device if weights else torch.device('cpu')

  def is_shape(value):
    return (
      type(value) in (tuple, list, torch.Size)
      and len(value) > 0
      and all(type(size) is int for size in value)
    )

  def to_input(value):
    if isinstance(value, AsIs):
      return value.value
    if is_shape(value):
      return torch.randn(tuple(value), device=device).to(dtype)
    if isinstance(value, torch.Tensor):
      return copy_of(value)
    if callable(value):
      return value
    # For example a cache of keys and values that the module appends to.
    with contextlib.suppress(Exception):
      return copy.deepcopy(value)
    return value

  return pytree.tree_map(to_input, (args, dict(kwargs)), is_leaf=is_shape)


def _replace_tensors(
  module: nn.Module, copy_of: Callable[[torch.Tensor], torch.Tensor]
) -> None:
  """Replaces weights by copies, so that updates do not reach the originals."""
  copies: dict[int, torch.Tensor] = {}

  def replace(value):
    if not isinstance(value, torch.Tensor):
      return value
    if id(value) not in copies:
      copies[id(value)] = copy_of(value)
    return copies[id(value)]

  for child in module.modules():
    if isinstance(child, torch.jit.ScriptModule):
      continue
    for tensors in (child._parameters, child._buffers):
      tensors.update({name: replace(x) for name, x in tensors.items()})
    for name, value in child.__dict__.items():
      # Recurrent layers also keep their weights in a list.
      if isinstance(value, torch.Tensor):
        child.__dict__[name] = replace(value)
      elif type(value) is list and any(id(x) in copies for x in value):
        child.__dict__[name] = [replace(x) for x in value]


@contextlib.contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
  """Undoes the effects of a forward pass on modes, caches, buffers and hooks.

  Also turns off fused attention kernels, which hide the operations inside.
  """
  attributes = [
    (child.__dict__, dict(child.__dict__))
    for child in module.modules()
    if not isinstance(child, torch.jit.ScriptModule)
  ]
  # Weights, hooks and caches, which are modified in place.
  containers = [
    (value, copy.copy(value))
    for _, original in attributes
    for value in original.values()
    if type(value) in (dict, collections.OrderedDict, list, set)
  ]
  modes = {child: child.training for child in module.modules()}
  fused = torch.backends.mha.get_fastpath_enabled()
  torch.backends.mha.set_fastpath_enabled(False)
  # The fake tensor mode logs the errors that it raises.
  silent, fake_tensor.log.disabled = fake_tensor.log.disabled, True
  try:
    yield
  finally:
    fake_tensor.log.disabled = silent
    torch.backends.mha.set_fastpath_enabled(fused)
    for child, training in modes.items():
      child.training = training
    for current, original in (*attributes, *containers):
      current.clear()
      add = current.extend if isinstance(current, list) else current.update
      add(original)
