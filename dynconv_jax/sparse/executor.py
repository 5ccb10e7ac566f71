"""Jitted sparse execution of gated networks, with statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.checks import check_choice
from dynconv_jax.masks import ExecutionMask, has_values
from dynconv_jax.models.gated import Masks, gated_blocks
from dynconv_jax.sparse.backend import Backend
from dynconv_jax.sparse.calibrate import calibrate
from dynconv_jax.sparse.sparsify import (
  BlockPlan,
  choose_plans,
  sparsify,
  trace_blocks,
)

MODES = ('auto', 'sparse', 'dense')

# The structure of a tree, and the shape and dtype of each of its arrays.
_Layout = tuple[
  jax.tree_util.PyTreeDef, tuple[tuple[tuple[int, ...], str], ...]
]


@flax.struct.dataclass
class ExecutionStats:
  """Statistics of the execution of a batch.

  All masks are packed into one array, because each array that a jitted call
  returns costs time. Properties unpack it on demand.

  Attributes:
    packed: float32[...], the concatenated values of the masks.
    layout: tree structure, shapes, and dtypes of the packed masks.
    names: names of the gated blocks, such as 'layer2.0'.
  """

  packed: jax.Array
  layout: _Layout = flax.struct.field(pytree_node=False)
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)

  @classmethod
  def pack(cls, masks: Sequence[ExecutionMask]) -> ExecutionStats:
    """Returns the statistics of a forward pass.

    Args:
      masks: the masks that the network returns.
    """
    masks = [
      ExecutionMask(m.maps, m.name, m.layers, m.stage, m.score, m.overflow)
      for m in masks
    ]
    leaves, treedef = jax.tree.flatten(masks)
    packed = [leaf.ravel().astype(jnp.float32) for leaf in leaves]
    return cls(
      packed=jnp.concatenate(packed) if packed else jnp.zeros(0),
      layout=(treedef, tuple((x.shape, x.dtype.name) for x in leaves)),
      names=tuple(mask.name for mask in masks),
    )

  @functools.cached_property
  def masks(self) -> list[ExecutionMask]:
    """The execution masks that the model returns, one per gated block."""
    return _unpack(self.packed, self.layout)

  @property
  def overflows(self) -> jax.Array:
    """int32[blocks], 1 if a block used the dense fallback.

    A block falls back if the batch exceeds the limit of the block's plan.
    """
    zero = jnp.int32(0)
    flags = [m.overflow for m in self.masks]
    return jnp.stack([zero if v is None else v for v in flags])

  @property
  def positions(self) -> jax.Array:
    """int32[blocks], number of active positions of each block in the batch."""
    return _counts(mask.hard for mask in self.masks)

  @property
  def dilated_positions(self) -> jax.Array:
    """int32[blocks], number of positions of each block's first convolution."""
    return _counts(mask.dilated for mask in self.masks)

  def __repr__(self) -> str:
    text = f'ExecutionStats({len(self.names)} blocks'
    if self.names and has_values(self.packed):
      text += f', density={np.mean([m.hard.mean() for m in self.masks]):.3f}'
    return f'{text})'


@functools.partial(jax.jit, static_argnames='layout')
def _unpack(packed, layout):
  treedef, kinds = layout
  sizes = [math.prod(shape) for shape, _ in kinds]
  parts = jnp.split(packed, np.cumsum(sizes)[:-1])
  return treedef.unflatten(
    part.reshape(shape).astype(dtype)
    for part, (shape, dtype) in zip(parts, kinds, strict=True)
  )


class SparseExecutor:
  """Runs a trained network's branches only where their masks are set.

  Wraps `sparsify` with `jax.jit` for one input shape, and returns statistics.
  The logits equal the model's up to rounding. Compiles on the first call, and
  again on the first call with given masks.

  Args:
    model: the evaluation view of any network with gated blocks, nnx.view(model,
      deterministic=True, use_running_average=True).
    image_shape: (N, H, W, C) of every batch.
    mode: 'sparse' runs every block with the backend. 'dense' runs every block
      everywhere and multiplies by the mask. 'auto' is like 'sparse', but if
      `backend` is also 'auto', backends that may be slower than dense execution
      are timed against it for each distinct block shape.
    backend: see `sparsify`; 'auto' or 'dense' in mode 'dense'.
    limit: executed fraction of a block's dense MACs, in (0, 1], above which the
      block uses the dense fallback. Lowers the limits of chosen plans, but not
      those of `plans`. The result is the same; `ExecutionStats.overflows`
      reports fallbacks.
    density: expected density of masks for 'auto', in (0, 1].
    budget: expected executed fraction of a block's dense MACs for 'auto', in
      (0, 1], such as the budget of training. None to derive it from `density`.
    plans: plans by block name, which override the chosen ones.
    compiler_options: XLA compiler options; None for those of the backends.

  Attributes:
    model: the sparse network.
    plans: the BlockPlan of each block, by name.
  """

  def __init__(
    self,
    model: nnx.Module,
    image_shape: Sequence[int],
    *,
    mode: str = 'auto',
    backend: str | Backend = 'auto',
    limit: float = 1.0,
    density: float = 0.5,
    budget: float | None = None,
    plans: Mapping[str, BlockPlan] | None = None,
    compiler_options: Mapping[str, str] | None = None,
  ):
    check_choice('mode', mode, MODES)
    self.image_shape = _check_image_shape(image_shape)
    for name, value in (
      ('limit', limit),
      ('density', density),
      ('budget', budget),
    ):
      if value is not None and not 0 < value <= 1:
        raise ValueError(f'{name} must be in (0, 1]; got {value}')
    blocks = gated_blocks(model)
    if mode == 'dense':
      if backend not in ('auto', 'dense'):
        raise ValueError(f"mode 'dense' has no backend; got {backend!r}")
      backend = 'dense'
    chosen = choose_plans(blocks, backend)
    if mode == 'auto' and backend == 'auto':
      chosen = _calibrated(model, chosen, self.image_shape, density, budget)
    chosen = {
      name: BlockPlan(plan.backend, min(plan.limit, limit))
      for name, plan in chosen.items()
    } | dict(plans or {})
    self.model = sparsify(
      model, backend, image_shape=self.image_shape, plans=chosen
    )
    self.plans = chosen
    graphdef, state = nnx.split(self.model)
    # Pass a flat list of arrays, because flattening trees at each call is slow.
    self._arrays, treedef = jax.tree.flatten(nnx.as_pure(state))

    def forward(arrays, images, masks):
      network = nnx.merge(graphdef, treedef.unflatten(arrays))
      kwargs = {} if masks is None else {'masks': masks}
      logits, executed = network(images, **kwargs)
      return logits, ExecutionStats.pack(executed)

    if compiler_options is None:
      compiler_options = {}
      for its in {plan.backend for plan in chosen.values()}:
        compiler_options |= its.compiler_options(jax.default_backend())
    self._run = jax.jit(forward, compiler_options=dict(compiler_options))

  def lower(self, *, device: jax.Device | None = None) -> jax.stages.Lowered:
    """Returns the network lowered for compilation, without running it.

    Args:
      device: device to compile for, which need not be present; None for JAX's
        default.
    """
    sharding = device and jax.sharding.SingleDeviceSharding(device)
    images = jax.ShapeDtypeStruct(self.image_shape, jnp.float32)
    *arrays, images = (
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      for x in (*self._arrays, images)
    )
    return self._run.lower(arrays, images, None)

  def __call__(
    self, images: jax.Array, masks: Masks | None = None
  ) -> tuple[jax.Array, ExecutionStats]:
    """Returns the logits and the execution statistics of a batch.

    Args:
      images: float[N, H, W, C], normalized.
      masks: masks to use instead of the gates' decisions, see `Gating`.

    Returns:
      logits: the network's output, float32[N, num_classes].
      stats: ExecutionStats.

    Raises:
      ValueError: images or masks have the wrong shape.
    """
    if tuple(jnp.shape(images)) != self.image_shape:
      raise ValueError(
        f'images must be {self.image_shape}; got {tuple(jnp.shape(images))}'
      )
    return self._run(self._arrays, images, masks)


def _calibrated(
  model: nnx.Module,
  plans: dict[str, BlockPlan],
  image_shape: tuple[int, ...],
  density: float,
  budget: float | None,
) -> dict[str, BlockPlan]:
  """Returns the plans, with blocks run densely if that is faster."""
  if not any(plan.backend.calibrated for plan in plans.values()):
    return plans
  blocks = {block.name: block for block in gated_blocks(model)}
  measured: dict[Any, BlockPlan] = {}
  for trace in trace_blocks(model, image_shape):
    block, plan = blocks[trace.name], plans[trace.name]
    if not plan.backend.calibrated or not block.describable:
      continue
    per_image = block.masker is not None and block.masker.per_image
    key = (block.branch, trace.shape, per_image, plan.backend.name)
    if key not in measured:
      measured[key] = calibrate(
        block,
        plan,
        trace.shape,
        per_image=per_image,
        density=density,
        budget=budget,
      )
    plans[trace.name] = measured[key]
  return plans


def _counts(maps):
  return jnp.stack([jnp.sum(m, dtype=jnp.int32) for m in maps])


def _check_image_shape(image_shape):
  shape = tuple(image_shape)
  whole = all(isinstance(n, (int, np.integer)) and n > 0 for n in shape)
  if len(shape) != 4 or not whole:
    raise ValueError(f'image_shape must be (N, H, W, C); got {image_shape}')
  return tuple(int(n) for n in shape)
