"""What ptflops 0.7.5, with its module backend, counts for an operation.

It has hooks on modules and patches functions. If a hooked module calls a
patched function, ptflops counts both. Its totals, and published numbers based
on them, therefore count the activations and pooling of modules twice.
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
  """Adds what ptflops counts for the work beyond MACs and bias.

  Args:
    work: of one operation.
    name: the operation's name in ATen.
    module: the module that called it.
    elements: size of its output.
  """
  if type(module) is nn.MultiheadAttention:
    # The module's hook counts the scaling of the queries, which have the size
    # of the output, and a softmax. Functions below it are not patched.
    scaling = name in ('mul', 'scaled_dot_product_attention')
    return dataclasses.replace(work, ptflops=work.ptflops + elements * scaling)
  if work.kind in ('conv', 'matmul', 'elementwise') and 'upsample' not in name:
    return work
  patched = name in _PATCHED or 'pool' in name or 'upsample' in name
  times = patched + (type(module) in _HOOKED)
  # ptflops checks `affine` for scale and bias, which nn.LayerNorm lacks.
  each = elements if type(module) is nn.LayerNorm else work.ptflops
  return dataclasses.replace(work, ptflops=times * each)
