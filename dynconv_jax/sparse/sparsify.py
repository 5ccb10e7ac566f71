"""Conversion of networks to sparse execution of their gated blocks."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.masks import executed_fractions
from dynconv_jax.models.gated import GatedBlock, Gating, gated_blocks
from dynconv_jax.sparse.backend import Backend, get_backend
from dynconv_jax.sparse.descriptions import check_descriptions
from dynconv_jax.sparse.fold import (
  check_evaluation,
  describe_conv,
  fold_block,
  fold_conv,
)
from dynconv_jax.sparse.plan import BlockPlan, check_support, choose_plans


class Replacement(nnx.Module):
  """A module in the place of a gated block.

  Has the attributes that a network's `__call__` may read.

  Args:
    block: the block to replace.
  """

  def __init__(self, block: GatedBlock):
    self.branch, self.name = block.branch, block.name
    self.stage, self.dtype = block.stage, block.dtype

  @property
  def strides(self) -> int:
    """Stride of the block."""
    return self.branch.strides


class SparseBlock(Replacement):
  """A gated block that executes its branch only where its mask is set.

  Args:
    block: the block to replace, in evaluation; its branch must describe it.
    plan: how to execute the block.
  """

  def __init__(self, block: GatedBlock, plan: BlockPlan):
    super().__init__(block)
    self.masker = block.masker
    self.plan = plan
    folded = fold_block(block)
    self.packed = _Arrays(plan.backend.pack(folded))
    self.dense = nnx.data(None)
    if plan.limit < 1:
      self.dense = _Arrays(get_backend('dense').pack(folded))

  def __call__(self, x: jax.Array, gating: Gating | None = None) -> jax.Array:
    """Returns the block's output, float[N, h, w, features].

    Args:
      x: float[N, H, W, in_features].
      gating: state of this forward pass, to which the execution mask is added.
        None to execute the branch everywhere.
    """
    backend = self.plan.backend
    mask = None if gating is None else backend.decide(self, x, gating)
    # As in `GatedBlock`: convolutions cast their input, an identity does not.
    dtype = self.dtype
    if self.branch.shortcut == 'identity':
      dtype = jnp.promote_types(dtype, x.dtype)
    x = jnp.asarray(x, self.dtype)  # It may be a NumPy array.
    if mask is None:
      return backend.run(self.packed.tree(), x, None).astype(dtype)
    if self.dense is None:
      out, fallback = backend.run_gated(self, x, mask, gating), jnp.int32(0)
    else:
      fraction, _ = executed_fractions([mask])
      fallback = fraction > self.plan.limit
      out = jax.lax.cond(
        fallback,
        lambda: get_backend('dense').run(self.dense.tree(), x, mask),
        lambda: backend.run(self.packed.tree(), x, mask),
      )
    gating.add(mask.replace(fallback=fallback.astype(jnp.int32)))
    return out.astype(dtype)


class _Arrays(nnx.Module):
  """A module that stores a tree of arrays as variables."""

  def __init__(self, tree: Any):
    leaves, self.treedef = jax.tree.flatten(tree)
    self.leaves = nnx.List([nnx.Variable(leaf) for leaf in leaves])

  def tree(self) -> Any:
    return self.treedef.unflatten([leaf[...] for leaf in self.leaves])


class _Identity(nnx.Module):
  """Replaces a folded batch norm."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x


def sparsify(
  model: nnx.Module,
  backend: str | Backend = 'auto',
  *,
  image_shape: Sequence[int] | None = None,
  plans: Mapping[str, BlockPlan] | None = None,
) -> nnx.Module:
  """Returns a copy of a network that computes only where its masks are set.

  Replaces every gated block with a module that executes its branch at active
  positions. Folds batch norm into the convolutions that modules list in
  `foldable`, and replaces other layers if the backend has faster ones. The
  network's own `__call__` runs unchanged and returns the same result up to
  rounding. Later changes to the model's parameters do not affect the copy.

  Args:
    model: the evaluation view of any network with gated blocks,
      nnx.view(model, deterministic=True, use_running_average=True).
    backend: 'auto' for the best backend for each block on JAX's default
      platform; or a key of `BACKENDS`, `package.module:CLASS`, or a Backend for
      all blocks. Blocks that it does not support use 'xla'.
    image_shape: (N, H, W, C) of an example input, used to trace the order of
      the blocks, so that gates that read the same map can share work. The copy
      accepts other shapes.
    plans: plans by block name, which override `backend`.

  Raises:
    ValueError: the model is not in evaluation or has no gated block; blocks
      share a name; the backend does not exist or supports no block; a plan's
      backend does not support its block; or a block does not match its
      description.
  """
  check_evaluation(model)
  blocks = gated_blocks(model)
  if not blocks:
    raise ValueError(
      'the network has no gated block (GatedBlock), so there is nothing to '
      'execute sparsely'
    )
  check_descriptions(blocks)
  chosen = choose_plans(blocks, backend)
  unknown = set(plans or {}) - set(chosen)
  if unknown:
    raise ValueError(
      f'plans name {", ".join(sorted(unknown))}; the gated blocks are '
      f'{", ".join(chosen)}'
    )
  check_support(blocks, plans or {})
  chosen |= plans or {}
  traces = () if image_shape is None else trace_blocks(model, image_shape)
  model = nnx.clone(model)
  described = [b for b in gated_blocks(model) if b.describable]
  for user in {chosen[block.name].backend for block in described}:
    its = {b.name: b for b in described if chosen[b.name].backend == user}
    user.prepare(_chains(its, traces))
  # Layers outside blocks use the backend that most blocks use.
  users = [chosen[block.name].backend for block in described]
  main = max(users, key=users.count, default=get_backend('dense'))

  def replace_block(module: nnx.Module) -> nnx.Module | None:
    if isinstance(module, GatedBlock) and module.describable:
      return SparseBlock(module, chosen[module.name])
    return None

  fold_pairs(model, main)
  own = {b.name: b.masker for b in described if chosen[b.name].backend == main}
  fuse_stem(model, main, own.get(traces[0].name) if traces else None)
  replace_modules(model, main.replacement)
  # Replace blocks last, after the modules of their gates.
  replace_modules(model, replace_block)
  return model


@dataclasses.dataclass(frozen=True)
class BlockTrace:
  """A call of a gated block, as traced in a network.

  Attributes:
    name: name of the block.
    shape: shape of the block's input.
    follows: whether the input is the output of the previously called block.
  """

  name: str
  shape: tuple[int, ...]
  follows: bool


class _Recorder(Replacement):
  """Records the calls of a block."""

  def __init__(self, block: GatedBlock, note: Callable[..., None]):
    super().__init__(block)
    self.block, self.note = block, note

  @property
  def masker(self):
    return self.block.masker

  def __call__(self, x, gating=None):
    out = self.block(x, gating)
    self.note(self.block.name, x, out)
    return out


def trace_blocks(
  model: nnx.Module, image_shape: Sequence[int]
) -> tuple[BlockTrace, ...]:
  """Returns the calls of a network's gated blocks, in order of execution.

  Args:
    model: the network, in evaluation. Its weights may be abstract.
    image_shape: shape of the input.
  """
  traces, last = [], [None]

  def note(name, x, out):
    traces.append(BlockTrace(name, tuple(x.shape), x is last[0]))
    last[0] = out

  model = nnx.clone(model)
  replace_modules(
    model, lambda m: _Recorder(m, note) if isinstance(m, GatedBlock) else None
  )
  images = jax.ShapeDtypeStruct(tuple(image_shape), jnp.float32)
  graphdef, state = nnx.split(model)
  jax.eval_shape(
    lambda state, images: nnx.merge(graphdef, state)(images)[0],
    nnx.as_pure(state),
    images,
  )
  return tuple(traces)


def _chains(
  blocks: Mapping[str, GatedBlock], traces: Sequence[BlockTrace]
) -> list[list[GatedBlock]]:
  """Groups blocks into lists in which each reads the previous one's output."""
  chains, before = [], None
  for trace in traces:
    if trace.name in blocks:
      if trace.follows and before in blocks:
        chains[-1].append(blocks[trace.name])
      else:
        chains.append([blocks[trace.name]])
    before = trace.name
  known = {trace.name for trace in traces}
  return chains + [[b] for name, b in blocks.items() if name not in known]


def fold_pairs(model: nnx.Module, backend: Backend) -> None:
  """Folds the batch norms that modules list in `foldable`, in place.

  Args:
    model: the network, in evaluation.
    backend: its `convolution` makes the replacements.
  """
  for _, module in list(nnx.iter_modules(model)):
    if isinstance(module, GatedBlock):
      continue
    for conv_name, norm_name in getattr(module, 'foldable', ()):
      conv, norm = getattr(module, conv_name), getattr(module, norm_name)
      what = describe_conv(conv, norm)
      if what is None:
        continue
      folded = fold_conv(conv, norm, what, conv.dtype or jnp.float32)
      new = backend.convolution(folded)
      new = new or get_backend('dense').convolution(folded)
      setattr(module, conv_name, new)
      setattr(module, norm_name, _Identity())


def fuse_stem(
  model: nnx.Module, backend: Backend, gate: nnx.Module | None
) -> None:
  """Puts one module in the place of a network's `stem`, if a backend has one.

  Args:
    model: folded; its class names what `stem` consists of as `stem.layers`.
    backend: its `stem` makes the module.
    gate: of the block that reads the stem's output, as it is passed on.
  """
  names = getattr(getattr(type(model), 'stem', None), 'layers', ())
  layers = [getattr(model, name) for name in names]
  if layers and (new := backend.stem(*layers, gate)) is not None:
    model.stem = new
    for name in names:
      delattr(model, name)


def replace_modules(
  model: nnx.Module, replace: Callable[[nnx.Module], nnx.Module | None]
) -> None:
  """Replaces modules in place, at any depth, also in lists, dicts, and tuples.

  Args:
    model: the network to modify.
    replace: returns the replacement of a module, or None to keep it.
  """
  for _, parent in list(nnx.iter_modules(model)):
    if isinstance(parent, SparseBlock | _Arrays):
      continue
    if isinstance(parent, nnx.List):
      items = list(enumerate(parent))
    else:
      items = list(vars(parent).items())
    for key, value in items:
      new = _replaced(value, replace)
      if new is value:
        continue
      if isinstance(parent, nnx.List | nnx.Dict):
        parent[key] = nnx.data(new)
      else:
        setattr(parent, key, nnx.data(new))


def _replaced(value: Any, replace: Callable) -> Any:
  """Returns a value with its modules replaced, or the same value if none is."""
  if isinstance(value, nnx.Module):
    new = replace(value)
    return value if new is None else new
  if type(value) not in (list, tuple, dict):
    return value
  old = list(value.values() if type(value) is dict else value)
  new = [_replaced(v, replace) for v in old]
  if all(map(operator.is_, old, new)):
    return value
  if type(value) is dict:
    return dict(zip(value, new, strict=True))
  return type(value)(new)
