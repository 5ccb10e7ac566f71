"""Inverted residuals at active positions on a GPU, with Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dynconv_jax.branch import Branch
from dynconv_jax.sparse.backends import triton_launch
from dynconv_jax.sparse.backends.triton_launch import cdiv, tile_side
from dynconv_jax.sparse.backends.triton_masks import Lists
from dynconv_jax.sparse.fold import FoldedBlock

# Upper bounds of activations; 0 for none.
MAXIMA = {'relu': 0, 'relu6': 6}


def computes(branch: Branch) -> bool:
  """Returns whether the kernels support a branch.

  They support a 1x1, a depthwise 3x3 or 5x5, and a linear 1x1 convolution.

  Args:
    branch: description of the branch.
  """
  if len(branch.convs) != 3 or branch.activation is not None:
    return False
  expand, depthwise, project = branch.convs
  return (
    expand.is_pointwise
    and project.is_pointwise
    and expand.groups == project.groups == 1
    and depthwise.groups == depthwise.in_features == depthwise.features
    and depthwise.kernel_size in (3, 5)
    and expand.activation in MAXIMA
    and depthwise.activation in MAXIMA
    and project.activation is None
    and branch.shortcut in ('identity', 'none')
  )


def run_block(
  block: FoldedBlock, x: jax.Array, lists: Lists, convolve: Callable[..., Any]
) -> jax.Array:
  """Returns a block's output, with the branch computed at active positions.

  Launches two kernels: one for the expanding convolution, and one for the rest.

  Args:
    block: a block that `computes` accepts.
    x: float32 or bfloat16[N, H, W, in_features].
    lists: where to execute the branch.
    convolve: `triton.convolve` or a replacement.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  active, needed = lists
  expand, depthwise, project = block.convs
  shape = (*x.shape[:1], *block.branch.sizes(x.shape[1:3])[-1])
  y = convolve(x, x.shape, needed, needed, expand, lookup=False)
  added = block.branch.shortcut == 'identity'
  base = x if added else jnp.zeros((*shape, project.bias.size), x.dtype)
  (top, _), (left, _) = map(depthwise.conv.pads, x.shape[1:3])
  features = tile_side(project.bias.size)
  side = depthwise.conv.kernel_size
  # Each thread holds at most 64 values of the output tile.
  rows, num_warps = (64, 4) if features <= 128 else (32, 8)
  if x.dtype == jnp.float32:
    rows, num_warps = 32, 8
  return triton_launch.launch(
    'depthwise_matmul_add',
    *(y, needed.rows, active.indices, active.count),
    *(depthwise.kernel, depthwise.bias, project.kernel, project.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={8: 0},
    grid=cdiv(active.rows.size, rows),
    ADDED=added,
    MAXIMUM=MAXIMA[depthwise.conv.activation],
    SIDE=side,
    STRIDES=depthwise.conv.strides,
    TOP=top,
    LEFT=left,
    HEIGHT=x.shape[1],
    WIDTH=x.shape[2],
    DEPTH=depthwise.bias.size,
    FEATURES=project.bias.size,
    BLOCK_ROWS=rows,
    BLOCK_FEATURES=features,
    BLOCK_DEPTH=32,
    UNROLLED=9 if side == 3 else 5,
    num_warps=num_warps,
    num_stages=2,
  )
