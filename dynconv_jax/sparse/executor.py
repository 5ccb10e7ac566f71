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
from dynconv_jax.sparse.plan import BlockPlan, choose_plans
from dynconv_jax.sparse.sparsify import sparsify, trace_blocks

MODES = ('auto', 'sparse', 'dense')

# The structure of a tree, and the shape and dtype of each of its arrays.
_Layout = tuple[
  jax.tree_util.PyTreeDef, tuple[tuple[tuple[int, ...], str], ...]
]


@flax.struct.dataclass
class ExecutionStats:
  """Statistics of the execution of a batch.

  There are few arrays: each one that a jitted call returns takes time.

  Attributes:
    counts: int32[blocks, 3]; see `positions`, `dilated_positions`, and
      `fallbacks`.
    names: names of the gated blocks, such as 'layer2.0'.
    sizes: number of positions of each block's map over the batch.
    packed: float32[...], the concatenated values of the masks; None unless they
      were requested.
    layout: tree structure, shapes, and dtypes of the packed masks.
  """

  counts: jax.Array
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)
  sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)
  packed: jax.Array | None = None
  layout: _Layout | None = flax.struct.field(pytree_node=False, default=None)

  @classmethod
  def pack(
    cls, masks: Sequence[ExecutionMask], *, return_masks: bool = False
  ) -> ExecutionStats:
    """Returns the statistics of a forward pass.

    Args:
      masks: the masks that the network returns.
      return_masks: whether to keep the masks.
    """
    counts = [jnp.zeros(0, jnp.int32)]
    for mask in masks:
      fallback = jnp.int32(0) if mask.fallback is None else mask.fallback
      counts += [mask.counts, fallback[None]]
    stats = cls(
      counts=jnp.concatenate(counts).reshape(-1, 3),
      names=tuple(mask.name for mask in masks),
      sizes=tuple(mask.hard.size for mask in masks),
    )
    if not return_masks:
      return stats
    plain = [
      ExecutionMask(m.maps, m.name, m.layers, m.stage, m.score, m.fallback)
      for m in masks
    ]
    leaves, treedef = jax.tree.flatten(plain)
    packed = [leaf.ravel().astype(jnp.float32) for leaf in leaves]
    return stats.replace(
      packed=jnp.concatenate([jnp.zeros(0), *packed]),
      layout=(treedef, tuple((x.shape, x.dtype.name) for x in leaves)),
    )

  @functools.cached_property
  def masks(self) -> list[ExecutionMask]:
    """The execution masks that the model returns, one per gated block.

    Raises:
      ValueError: they were not requested.
    """
    if self.layout is None:
      raise ValueError(
        'the statistics contain counts only: call the executor with '
        'return_masks=True to get the masks'
      )
    return _unpack(self.packed, self.layout)

  @property
  def positions(self) -> jax.Array:
    """int32[blocks], active positions of each, over the batch."""
    return self.counts[:, 0]

  @property
  def dilated_positions(self) -> jax.Array:
    """int32[blocks], those of its first convolution."""
    return self.counts[:, 1]

  @property
  def fallbacks(self) -> jax.Array:
    """int32[blocks], 1 if a block used the dense fallback.

    A block falls back if the batch exceeds the limit of the block's plan.
    """
    return self.counts[:, 2]

  def __repr__(self) -> str:
    text = f'ExecutionStats({len(self.names)} blocks'
    if self.names and has_values(self.counts):
      density = np.mean(np.asarray(self.positions) / self.sizes)
      text += f', density={density:.3f}'
    return f'{text})'


@functools.partial(jax.jit, static_argnames='layout')
def _unpack(packed, layout):
  treedef, kinds = layout
  sizes = [math.prod(shape) for shape, _ in kinds]
  *parts, _ = jnp.split(packed, np.cumsum(sizes))
  return treedef.unflatten(
    part.reshape(shape).astype(dtype)
    for part, (shape, dtype) in zip(parts, kinds, strict=True)
  )


class SparseExecutor:
  """Runs a trained network's branches only where their masks are set.

  Wraps `sparsify` with `jax.jit` for one input shape, and returns statistics.
  The logits equal the model's up to rounding. Compiles on the first call, and
  again on the first call with given masks and the first that returns masks.

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
      those of `plans`. The result is the same; `ExecutionStats.fallbacks`
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

    def forward(arrays, images, masks, return_masks):
      network = nnx.merge(graphdef, treedef.unflatten(arrays))
      kwargs = {} if masks is None else {'masks': masks}
      logits, executed = network(images, **kwargs)
      return logits, ExecutionStats.pack(executed, return_masks=return_masks)

    if compiler_options is None:
      compiler_options = {}
      for its in {plan.backend for plan in chosen.values()}:
        compiler_options |= its.compiler_options(jax.default_backend())
    self._run = jax.jit(
      forward,
      static_argnames='return_masks',
      compiler_options=dict(compiler_options),
    )

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
    return self._run.lower(arrays, images, None, return_masks=False)

  def __call__(
    self,
    images: jax.Array,
    masks: Masks | None = None,
    *,
    return_masks: bool = False,
  ) -> tuple[jax.Array, ExecutionStats]:
    """Returns the logits and the execution statistics of a batch.

    Args:
      images: float[N, H, W, C], normalized.
      masks: masks to use instead of the gates' decisions, see `Gating`.
      return_masks: whether `stats.masks` is needed in addition to the counts.

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
    return self._run(self._arrays, images, masks, return_masks=return_masks)


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


def _check_image_shape(image_shape):
  shape = tuple(image_shape)
  whole = all(isinstance(n, (int, np.integer)) and n > 0 for n in shape)
  if len(shape) != 4 or not whole:
    raise ValueError(f'image_shape must be (N, H, W, C); got {image_shape}')
  return tuple(int(n) for n in shape)
