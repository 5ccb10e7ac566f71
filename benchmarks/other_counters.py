"""A common interface to counters for PyTorch models.

Each function takes a model and its inputs (one argument, or a dict of keyword
arguments) and returns multiply-accumulates.
"""

from __future__ import annotations

import inspect
import io
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

from dynconv_jax.macs.torch import count_macs


def by_ours(model, inputs) -> float:
  args, kwargs = split(inputs)
  return count_macs(model, *args, kwargs=kwargs).total


def by_torch(model, inputs) -> float:
  counter = flop_counter.FlopCounterMode(display=False)
  with torch.no_grad(), counter:
    _call(model, inputs)
  return counter.get_total_flops() / 2


def by_ptflops(model, inputs, backend='pytorch') -> float:
  import ptflops

  macs, _ = ptflops.get_model_complexity_info(
    model,
    (1,),
    input_constructor=lambda _: _named(model, inputs),
    as_strings=False,
    print_per_layer_stat=False,
    backend=backend,
    ost=io.StringIO(),
    verbose=False,
  )
  return macs


def by_fvcore(model, inputs) -> float:
  from fvcore.nn import FlopCountAnalysis

  analysis = FlopCountAnalysis(*positional(model, inputs))
  analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
  return analysis.total()


def by_thop(model, inputs) -> float:
  import thop

  model, args = positional(model, inputs)
  macs, _ = thop.profile(model, inputs=args, verbose=False)
  return macs


def by_torchinfo(model, inputs) -> float:
  import torchinfo

  return torchinfo.summary(
    model, input_data=inputs, verbose=0, mode='eval'
  ).total_mult_adds


def by_calflops(model, inputs) -> float:
  import calflops

  args, kwargs = split(inputs)
  _, macs, _ = calflops.calculate_flops(
    model,
    **({'kwargs': kwargs} if kwargs else {'args': list(args)}),
    output_as_string=False,
    print_results=False,
    print_detailed=False,
  )
  return macs


COUNTERS = {
  'ours': by_ours,
  'ptflops': by_ptflops,
  'fvcore': by_fvcore,
  'torch': by_torch,
  'thop': by_thop,
  'torchinfo': by_torchinfo,
  'calflops': by_calflops,
}


class Positional(nn.Module):
  """Wraps a `transformers` model for tracers: positional arguments, tuples."""

  def __init__(self, module, names):
    super().__init__()
    self.module, self.names = module, names

  def forward(self, *values):
    named = dict(zip(self.names, values, strict=True))
    outputs = self.module(**named, use_cache=False, return_dict=False)
    return tuple(x for x in outputs if isinstance(x, torch.Tensor))


def positional(model, inputs) -> tuple[nn.Module, tuple[Any, ...]]:
  """Returns a model that takes positional arguments, and its arguments."""
  args, kwargs = split(inputs)
  if not kwargs:
    return model, args
  return Positional(model, list(kwargs)), tuple(kwargs.values())


def split(inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
  return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def _call(model, inputs):
  args, kwargs = split(inputs)
  return model(*args, **kwargs)


def _named(model, inputs):
  if isinstance(inputs, dict):
    return inputs
  (name, *_) = inspect.signature(model.forward).parameters
  return {name: inputs}
