"""The work of the gradients of PyTorch's operations.

Each gradient of a product costs as much as the product, as in JAX. Values that
a fused kernel recomputes to save memory do not count.
"""

from __future__ import annotations

import dataclasses
import types

from dynconv_jax.macs import formulas, torch_formulas, torch_recurrent


def _gradients(work: formulas.Work, count: int) -> formulas.Work:
  """Returns `count` times the products of a forward pass, nothing else."""
  return formulas.Work(work.kind, work.macs * count, work.inside_macs * count)


def _convolution(a) -> formulas.Work:
  a.bias = None
  wanted_input, wanted_weight, wanted_bias = a.output_mask
  work = _gradients(torch_formulas.convolution(a), wanted_input + wanted_weight)
  if wanted_bias:
    outputs = a.grad_output
    work += dataclasses.replace(
      formulas.reduction(outputs.numel(), outputs.shape[1]), kind='conv'
    )
  return work


def _attention(a) -> formulas.Work:
  forward = torch_formulas.attention(
    types.SimpleNamespace(**(vars(a) | {'output': a.out}))
  )
  work = _gradients(forward, 2)
  # Through the softmax (3 per element) and the scaling.
  return work + formulas.elementwise(4 * (forward.macs // _pair(a)))


def _pair(a) -> int:
  return a.query.shape[-1] + a.value.shape[-1]


def _distances(a) -> formulas.Work:
  """Differences, weighted and summed, as for the distances themselves."""
  done = a.pdist if hasattr(a, 'pdist') else a.cdist
  work = torch_formulas.distances(
    types.SimpleNamespace(**(vars(a) | {'output': done}))
  )
  # A distance of `pdist` is part of the gradients of two rows.
  return work * (1 + hasattr(a, 'pdist'))


def _onednn_recurrent(a) -> formulas.Work:
  a.weight0, a.weight1 = a.weight1, a.weight2
  return _gradients(torch_recurrent.onednn_recurrent(a), 2)


def _cudnn_recurrent(a) -> formulas.Work:
  return _gradients(torch_recurrent.cudnn_recurrent(a), 2)


def _norm(a) -> formulas.Work:
  """Two sums per feature, and the input's gradient."""
  inputs = torch_formulas.input_of(a)
  return formulas.Work('norm', operations=9 * inputs.numel())


def _softmax(a) -> formulas.Work:
  return formulas.Work('activation', operations=4 * a.output.numel())


def _steps(steps: int):
  """Returns the formula for `steps` operations per element."""

  def formula(a) -> formulas.Work:
    return formulas.Work('activation', operations=steps * a.output.numel())

  return formula


def _upsample(taps: int):
  """Returns the formula for adding each output gradient to `taps` inputs."""

  def formula(a) -> formulas.Work:
    return formulas.elementwise(2 * taps * a.grad_output.numel())

  return formula


def _scattered(a) -> formulas.Work:
  """Adds each element of the output gradient to one input element."""
  return formulas.elementwise(a.grad_output.numel())


FORMULAS = {
  'convolution_backward': _convolution,
  **dict.fromkeys(
    (
      '_scaled_dot_product_flash_attention_backward',
      '_scaled_dot_product_flash_attention_for_cpu_backward',
      '_scaled_dot_product_efficient_attention_backward',
      '_scaled_dot_product_cudnn_attention_backward',
      '_scaled_dot_product_fused_attention_overrideable_backward',
    ),
    _attention,
  ),
  **dict.fromkeys(('_cdist_backward', '_pdist_backward'), _distances),
  'mkldnn_rnn_layer_backward': _onednn_recurrent,
  '_cudnn_rnn_backward': _cudnn_recurrent,
  **dict.fromkeys(
    (
      'native_batch_norm_backward',
      'cudnn_batch_norm_backward',
      'miopen_batch_norm_backward',
      'batch_norm_backward',
      'native_layer_norm_backward',
      'native_group_norm_backward',
    ),
    _norm,
  ),
  '_softmax_backward_data': _softmax,
  '_log_softmax_backward_data': _softmax,
  **{
    f'{name}_backward': _steps(steps)
    for name, steps in {
      'threshold': 1,
      'hardtanh': 2,
      'gelu': 8,
      'silu': 5,
      'elu': 3,
      'leaky_relu': 2,
      'hardswish': 4,
      'hardsigmoid': 2,
      'softplus': 3,
      '_weight_norm_interface': 8,
      'sigmoid': 3,
      'tanh': 3,
      'log_sigmoid': 3,
      '_prelu_kernel': 3,
      'glu': 4,
      'mse_loss': 3,
      'smooth_l1_loss': 3,
      'nll_loss': 1,
      'nll_loss2d': 1,
    }.items()
  },
  **{
    f'upsample_{name}_backward': _upsample(taps)
    for name, taps in torch_formulas.UPSAMPLE_TAPS.items()
  },
  **{
    f'{name}_backward': _scattered
    for name in (
      'avg_pool2d',
      'avg_pool3d',
      'max_pool2d_with_indices',
      'max_pool3d_with_indices',
      'adaptive_max_pool2d',
      'adaptive_max_pool3d',
      '_adaptive_avg_pool2d',
      '_adaptive_avg_pool3d',
      'embedding_dense',
    )
  },
}
