"""What ptflops 0.7.5, by its module backend, charges PyTorch's operations.

It has hooks on modules and patches of functions. Where a hooked module calls
a patched function it counts both, so activations and pooling made by modules
are in its totals, and in what people publish from them, twice.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from dynconv_jax.macs import formulas

_HOOKED = {
  nn.ReLU,
  nn.PReLU,
  nn.ELU,
  nn.LeakyReLU,
  nn.ReLU6,
  nn.GELU,
  nn.Upsample,
  nn.BatchNorm1d,
  nn.BatchNorm2d,
  nn.BatchNorm3d,
  nn.InstanceNorm1d,
  nn.InstanceNorm2d,
  nn.InstanceNorm3d,
  nn.GroupNorm,
  nn.LayerNorm,
  *(
    getattr(nn, f'{prefix}{kind}Pool{dimensions}d')
    for prefix in ('', 'Adaptive')
    for kind in ('Avg', 'Max')
    for dimensions in (1, 2, 3)
  ),
}

_PATCHED = ('relu', 'prelu', 'elu', 'relu6', 'gelu', 'silu', 'softmax')


def charged(
  work: formulas.Work, name: str, module: nn.Module, elements: int
) -> formulas.Work:
  """Returns the work with what ptflops charges for it beyond MACs and bias.

  Args:
    work: of one operation.
    name: the operation's name in ATen.
    module: the module that called it.
    elements: size of its output.
  """
  if type(module) is nn.MultiheadAttention:
    # The module's formula has the scaling of the queries, which have the size
    # of the output, and a softmax; functions are not patched below it.
    scaling = name in ('mul', 'scaled_dot_product_attention')
    return dataclasses.replace(work, ptflops=work.ptflops + elements * scaling)
  if work.kind in ('conv', 'matmul', 'elementwise') and 'upsample' not in name:
    return work
  patched = name in _PATCHED or 'pool' in name or 'upsample' in name
  times = patched + (type(module) in _HOOKED)
  # ptflops tells scale and bias by `affine`, which nn.LayerNorm does not have.
  each = elements if type(module) is nn.LayerNorm else work.ptflops
  return dataclasses.replace(work, ptflops=times * each)
