"""Executes gated networks only where their masks are set."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from dynconv_jax.layers import max_pool
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.models.resnet import ResNet, check_choice
from dynconv_jax.sparse import cudnn, gpu
from dynconv_jax.sparse import native as native_lib
from dynconv_jax.sparse.cost import calibrate
from dynconv_jax.sparse.dense import convolve, run_dense
from dynconv_jax.sparse.fold import check_evaluation, fold_network
from dynconv_jax.sparse.plan import (
  BlockPlan,
  default_plan,
  kernel_form,
  run_block,
)

MODES = ('auto', 'sparse', 'dense')

# The structure of a tree, and shape and dtype of each of its arrays.
_Layout = tuple[
  jax.tree_util.PyTreeDef, tuple[tuple[tuple[int, ...], str], ...]
]


@flax.struct.dataclass
class ExecutionStats:
  """What was executed of a batch.

  It comes as one array, since each that a call returns takes its time; what is
  asked for is taken out of it.

  Attributes:
    packed: float32[...], the values of the arrays below, one after the other.
    layout: how they are packed.
    names: of the masked blocks, such as 'layer2.0'.
  """

  packed: jax.Array
  layout: _Layout = flax.struct.field(pytree_node=False)
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)

  @classmethod
  def pack(
    cls,
    masks: list[ExecutionMask],
    decisions: list[jax.Array],
    overflows: jax.Array,
  ) -> ExecutionStats:
    """Returns the statistics of what the properties of the same names say."""
    leaves, treedef = jax.tree.flatten((masks, decisions, overflows))
    return cls(
      packed=jnp.concatenate([x.ravel().astype(jnp.float32) for x in leaves]),
      layout=(treedef, tuple((x.shape, x.dtype.name) for x in leaves)),
      names=tuple(mask.name for mask in masks),
    )

  @functools.cached_property
  def _unpacked(self):
    return _unpack(self.packed, self.layout)

  @property
  def masks(self) -> list[ExecutionMask]:
    """One ExecutionMask a masked block, as the model returns them."""
    return self._unpacked[0]

  @property
  def decisions(self) -> list[jax.Array]:
    """float32[N, h, w] of {0, 1} a masked block: what its gate chose.

    That is the mask unless one was given.
    """
    return self._unpacked[1]

  @property
  def overflows(self) -> jax.Array:
    """int32[blocks], 1 where all positions of a masked block were computed.

    That is where the batch was above what the block's plan executes sparsely; 0
    elsewhere, and where the plan is dense by itself.
    """
    return self._unpacked[2]

  @property
  def positions(self) -> jax.Array:
    """int32[blocks], active positions of each, over the batch."""
    return _counts(mask.hard for mask in self.masks)

  @property
  def dilated_positions(self) -> jax.Array:
    """int32[blocks], those of its first convolution."""
    return _counts(mask.dilated for mask in self.masks)


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
  """Runs a trained network, each branch where its mask is set only.

  The logits are those of the model, whose branches are computed everywhere and
  multiplied by the mask, up to rounding. Batch norm is folded into the
  convolutions when the executor is made: later changes of the model's
  parameters do not reach it. One function is compiled, at the first call (one
  more where masks are given).

  Args:
    model: the evaluation view of a gated network, nnx.view(model,
      deterministic=True, use_running_average=True).
    image_shape: (N, H, W, 3) of every batch.
    mode: 'sparse': every gated block by its active positions, or images;
      'dense': every block everywhere, masked; 'auto': the faster of both by a
      cost model, measured here for each distinct shape of block, and decided
      anew for each batch by its masks, but by kernels for a GPU once, for
      `density`.
    limit: share of a block's dense MACs in (0, 1] above which it is executed
      densely, however the cost model decides; exact all the same, and counted.
    density: for 'auto', the density of masks to expect, in (0, 1].
    plans: one BlockPlan a block in network order, instead of those of the mode.
    native: whether kernels of our own may serve: on a CPU `native.py`, on a GPU
      `gpu.py`; None: where they are the faster ones.

  Attributes:
    plans: one BlockPlan a block.
    kernels: the form of the plans by kernels, 'native' or 'triton'; None where
      they do not serve.
  """

  def __init__(
    self,
    model: ResNet,
    image_shape: Sequence[int],
    *,
    mode: str = 'auto',
    limit: float = 1.0,
    density: float = 0.5,
    plans: Sequence[BlockPlan] | None = None,
    native: bool | None = None,
  ):
    check_choice('mode', mode, MODES)
    self.image_shape = _check_image_shape(image_shape)
    _check_model(model)
    for name, value in (('limit', limit), ('density', density)):
      if not 0 < value <= 1:
        raise ValueError(f'{name} must be in (0, 1]; got {value}')
    num_blocks = len(model.blocks)
    if plans is not None and len(plans) != num_blocks:
      raise ValueError(
        f'plans must be one a block, {num_blocks}; got {len(plans)}'
      )
    self.mode = mode
    self.kernels = _choose_kernels(mode, model.dtype, native, plans or ())
    network = fold_network(model)
    if self.kernels == 'native':
      network = native_lib.pack(network)
      model = native_lib.with_native_gates(model)
    elif self.kernels == 'triton':
      gpu.load()
      model = gpu.with_kernel_gates(model)
    # What is folded is not passed: its shapes will do.
    graphdef, state, rest = nnx.split(model, _is_unfolded, ...)
    shapes = jax.eval_shape(lambda: nnx.as_pure(rest))
    self._network, state = network, nnx.as_pure(state)
    self._inputs = _block_shapes(model, self.image_shape)
    self._names = [block.name for block in model.blocks]

    self._options = (mode, limit, density)
    self.plans = self._make_plans(model) if plans is None else list(plans)
    if self.kernels == 'native':
      self._network = self._drop_kernels()
    if jax.default_backend() == 'gpu':
      dense = [plan.form == 'dense' for plan in self.plans]
      self._network = cudnn.lay_out(self._network, dense)
    # Arrays are passed, not trees of them, which take their time at each call.
    self._arrays, treedef = jax.tree.flatten((self._network, state))

    def forward(arrays, images, masks):
      network, state = treedef.unflatten(arrays)
      model = nnx.merge(graphdef, state, shapes)
      return self._forward(model, network, images, masks)

    self._run = jax.jit(forward)

  @property
  def native(self) -> bool:
    """Whether kernels of our own serve."""
    return self.kernels is not None

  def __call__(
    self, images: jax.Array, masks: Sequence[jax.Array] | None = None
  ) -> tuple[jax.Array, ExecutionStats]:
    """Returns logits, and what was executed.

    Args:
      images: float[N, H, W, 3], normalised.
      masks: float32[N, h, w] of {0, 1}, one a block in network order, to obey
        instead of the gates' decisions; [N, 1, 1] for whole images. The gates
        are evaluated all the same: they are a part of the cost.

    Returns:
      logits: float32[N, num_classes].
      stats: ExecutionStats.

    Raises:
      ValueError: images or masks of another shape.
    """
    if tuple(jnp.shape(images)) != self.image_shape:
      raise ValueError(
        f'images must be {self.image_shape}; got {tuple(jnp.shape(images))}'
      )
    if masks is not None:
      masks = self._check_masks(masks)
    return self._run(self._arrays, images, masks)

  def _check_masks(self, masks):
    masks, num_blocks = list(masks), len(self._names)
    if len(masks) != num_blocks:
      raise ValueError(
        f'masks must be one a block, {num_blocks}; got {len(masks)}'
      )
    for mask, name, block, shape in zip(
      masks, self._names, self._network.blocks, self._inputs, strict=True
    ):
      shape, given = block.output_shape(shape), tuple(jnp.shape(mask))
      if given not in (shape, (shape[0], 1, 1)):
        raise ValueError(f'mask of {name} must be {shape}; got {given}')
    return masks

  def _forward(self, model, network, images, forced):
    """The model's `__call__` with the blocks executed by their plans."""
    x = images.astype(model.dtype)
    native = self.kernels == 'native'
    if native:
      x = native_lib.convolve(x, network.stem, relu=True)
      pool = native_lib.max_pool
    elif self.kernels == 'triton':
      x, pool = gpu.stem(x, network.stem), gpu.max_pool
    else:
      x, pool = jax.nn.relu(convolve(x, network.stem)).astype(x.dtype), max_pool
    if model.architecture.stem == 'imagenet':
      x = pool(x)
    given = iter(forced or [None] * len(model.blocks))
    folded, plans = iter(network.blocks), iter(self.plans)
    carry = squeezed = None
    executed, decisions, overflows = [], [], []
    for stage in model.stages:
      for block in stage:
        hard, plan, layers = next(given), next(plans), next(folded)
        lists = None
        if gpu.decides(block):
          obeyed = None if hard is None else _spread(block, x, hard)
          mask, decision, lists, squeezed = gpu.decide(
            block, layers, x, obeyed, squeezed
          )
        else:
          mask, carry = block.decide(x, carry)
          decision = None if mask is None else mask.hard
          if hard is not None:
            mask = _obey(block, x, _spread(block, x, hard), decision)
        x, overflow = _execute(layers, x, mask, plan, hard, lists)
        if mask is not None:
          executed.append(mask)
          decisions.append(mask.hard if decision is None else decision)
          overflows.append(overflow)
      if block.masker is not None:
        output, carry = block.masker.end_stage(x, carry)
        if forced is None:
          x = output
        else:
          # A stage's output is its last block's, but XLA, which cannot know
          # that there is no negative sum, computes the gates' as well.
          x = jnp.where(jnp.sum(decisions[-1]) < 0, output, x)
    x = jnp.mean(x.astype(jnp.float32), (1, 2), keepdims=True)
    if native:
      logits = native_lib.convolve(x, network.head, relu=False)
    else:
      logits = convolve(x, network.head)
    return logits[:, 0, 0], ExecutionStats.pack(
      executed, decisions, jnp.stack(overflows)
    )

  def _drop_kernels(self):
    """The network without weights that no plan reads: memory, and arguments."""
    network = self._network
    return network.replace(
      stem=native_lib.drop_kernels(network.stem),
      head=native_lib.drop_kernels(network.head),
      blocks=tuple(
        native_lib.drop_kernels(block)
        if plan.form == 'native' and not plan.may_overflow
        else block
        for block, plan in zip(network.blocks, self.plans, strict=True)
      ),
    )

  def _make_plans(self, model):
    mode, limit, density = self._options
    plans, measured = [], {}
    for block, folded, shape in zip(
      model.blocks, self._network.blocks, self._inputs, strict=True
    ):
      per_image = block.masker is not None and block.masker.per_image
      if mode == 'dense':
        plan = BlockPlan('dense')
      elif mode == 'sparse':
        plan = default_plan(folded.output_shape(shape), per_image, self.native)
      else:
        key = (shape, jax.tree.map(jnp.shape, folded), per_image)
        key = str((key, jax.tree.structure(folded)))
        if key not in measured:
          measured[key] = calibrate(
            folded,
            shape,
            model.dtype,
            per_image=per_image,
            density=density,
            native=self.native,
          )
          logging.info('%s of %s: %s', block.name, shape, measured[key])
        plan = measured[key]
      plans.append(plan.limited(limit))
    return plans


def _is_unfolded(path, _):
  return 'masker' in path


def _spread(block, x, hard):
  """The given mask at the resolution of a block's output."""
  shape = (x.shape[0], *(-(-n // block.strides) for n in x.shape[1:3]))
  return jnp.broadcast_to(jnp.asarray(hard, jnp.float32), shape)


def _obey(block, x, hard, decision):
  """The given mask instead of the gate's decision, which it waits for."""
  if decision is not None:
    # No decision is negative. Without the dependence XLA would copy x, which
    # the gate reads, before the block is written over it.
    hard = jnp.where(decision < 0, decision, hard)
  return block.decide(x, None, hard)[0]


def _execute(block, x, mask, plan, given, lists):
  """A block's output, and 1 where its plan's limit was passed."""
  if mask is None:
    if plan.form == 'native':
      return native_lib.run_native(block, x), None
    return run_dense(block, x, im2col=plan.im2col), None
  if plan.form == 'images' and given is not None and given.shape[1:] != (1, 1):
    plan = default_plan(mask.hard.shape, False).limited(plan.limit)
  load = jnp.sum(mask.executed_macs()) / float(mask.dense_macs() * len(x))
  x = run_block(block, x, mask.hard, mask.dilated, load, plan, lists)
  passed = load > plan.limit if plan.may_overflow else False
  return x, jnp.asarray(passed, jnp.int32)


def _choose_kernels(mode, dtype, native, plans):
  """The form of the kernels that serve, None: none."""
  form = kernel_form()
  library = {'native': native_lib, 'triton': gpu}[form]
  usable = mode != 'dense' and library.usable(dtype)
  planned = {plan.form for plan in plans} & {'native', 'triton'}
  asked = bool(native or planned)
  if asked and not (usable and native is not False and planned <= {form}):
    raise ValueError(
      'native needs a CPU, a C++ compiler, a model in float32, or a GPU, and a '
      f"mode other than 'dense'; got native {native}, mode {mode!r}, "
      f'{dtype} on {jax.default_backend()}'
    )
  preferred = form == 'native' or gpu.preferred(dtype)
  serve = asked or (native is None and preferred)
  return form if usable and serve else None


def _counts(maps):
  return jnp.stack([jnp.sum(m, dtype=jnp.int32) for m in maps])


def _block_shapes(model, image_shape):
  """The input shape of each block, (N, H, W, C)."""
  images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
  shapes = []

  def trace(images):
    x = model.stem(images)
    for block in model.blocks:
      shapes.append(x.shape)
      x = block(x)

  jax.eval_shape(trace, images)
  return shapes


def _check_image_shape(image_shape):
  shape = tuple(image_shape)
  whole = all(isinstance(n, (int, np.integer)) and n > 0 for n in shape)
  if len(shape) != 4 or not whole or shape[-1] != 3:
    raise ValueError(f'image_shape must be (N, H, W, 3); got {image_shape}')
  return tuple(int(n) for n in shape)


def _check_model(model):
  if all(block.masker is None for block in model.blocks):
    raise ValueError(
      'the network has no gates: every position would be executed; make it '
      'with a gated method'
    )
  check_evaluation(model)
