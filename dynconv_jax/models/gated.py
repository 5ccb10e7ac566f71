"""Residual blocks whose branch runs where a mask is set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import ACTIVATIONS, BatchNorm, Dropout, conv, streams
from dynconv_jax.masks import ExecutionMask, execution_mask
from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.options import BELOW_ONE

# An option of networks: see `drop_rate`.
DropPath = Annotated[
  float,
  {
    'help': "Stochastic depth: the probability of dropping an image's branch "
    'in training, which rises linearly from 0 at the first block toward this '
    'value; 0: off. The default is the value published with the network.',
    'allowed': BELOW_ONE,
  },
]
Masks = Sequence[jax.Array | None] | Mapping[str, jax.Array]

# Attribute of a block that is its gate.
GATE = 'masker'


class Gating:
  """The decisions of one forward pass.

  A network creates one, passes it to each of its gated blocks, and returns
  `finish()` with the logits.

  Args:
    rngs: random streams: `gumbel` for gates that sample, and `dropout` for
      blocks that drop their branch.
    temperature: temperature of the gates' Gumbel-softmax, > 0.
    gumbel_noise: whether gates add noise in training.
    masks: [N, h, w] of {0, 1}, float, int, or bool, to use instead of the
      gates' decisions: one per block in order of execution, or by block name.
      If a mask is None or a name is missing, the gate decides.
  """

  def __init__(
    self,
    *,
    rngs: nnx.Rngs | None = None,
    temperature: float | jax.Array = 1.0,
    gumbel_noise: bool | jax.Array = True,
    masks: Masks | None = None,
  ):
    self.rngs = streams.linear(rngs)
    self._kwargs = dict(
      rngs=self.rngs, temperature=temperature, gumbel_noise=gumbel_noise
    )
    self._named = dict(masks) if isinstance(masks, Mapping) else {}
    self._ordered = None
    if masks is not None and not isinstance(masks, Mapping):
      self._ordered = list(masks)
    self._asked: list[str] = []
    self._gate: Gate | None = None
    self._carry: Any = None
    self._masks: list[ExecutionMask] = []
    # Data that sparse blocks pass to each other, by backend.
    self.scratch: dict[str, Any] = {}

  def given(self, name: str, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns the given mask of the next block, float32, or None.

    Args:
      name: the block's path in the model.
      shape: shape of the mask. A mask that is constant over an image may be
        [N, 1, 1].

    Raises:
      ValueError: the mask has another shape, or no mask is left.
    """
    self._asked.append(name)
    if self._ordered is not None:
      if len(self._asked) > len(self._ordered):
        raise ValueError(
          f'masks must be one per block; got {len(self._ordered)}, none for '
          f'{name}'
        )
      mask = self._ordered[len(self._asked) - 1]
    else:
      mask = self._named.get(name)
    if mask is None:
      return None
    return _as_mask(mask, shape, f'the mask of {name}')

  def ask(self, gate: Gate, x: jax.Array, shape: tuple[int, ...]) -> Decision:
    """Returns a gate's decision in the shape of the mask.

    Args:
      gate: the gate of the next block.
      x: the block's input.
      shape: shape of the mask.

    Raises:
      ValueError: the decision has another shape and is not [N, 1, 1].
    """
    decision, self._carry = gate(x, self._carry, **self._kwargs)
    self._gate = gate
    name = self._asked[-1] if self._asked else type(gate).__name__
    what = f'the decision of {name}'
    return jax.tree.map(lambda v: _as_mask(v, shape, what), decision)

  def record(self, gate: Gate, hard: jax.Array) -> None:
    """Tells the later gates about a mask that was given instead of decided.

    Args:
      gate: the gate of the block.
      hard: float32[N, h, w] of {0, 1}, the mask.
    """
    self._carry = gate.record(hard, self._carry)

  def add(self, mask: ExecutionMask) -> None:
    """Adds the execution mask of the next gated block."""
    self._masks.append(mask)

  def end_stage(self, x: jax.Array) -> jax.Array:
    """Returns the output of a stage; for most methods, that is `x`.

    Args:
      x: float[N, h, w, C], the output of the stage's last block.
    """
    if self._gate is None:
      return x
    x, self._carry = self._gate.end_stage(x, self._carry)
    if self._gate.spans_stage:
      self._gate = None
    return x

  def finish(self) -> list[ExecutionMask]:
    """Returns one ExecutionMask per gated block, in order of execution.

    Raises:
      ValueError: no block used some of the given masks, or the network did not
        call `end_stage` for gates that need it.
    """
    left = set(self._named) - set(self._asked)
    if left:
      raise ValueError(
        f'masks are given for {", ".join(sorted(left))}; the gated blocks are '
        f'{", ".join(self._asked)}'
      )
    if self._ordered is not None and len(self._ordered) != len(self._asked):
      raise ValueError(
        f'masks must be one per block ({len(self._asked)}); got '
        f'{len(self._ordered)}'
      )
    if self._gate is not None and self._gate.spans_stage:
      raise ValueError(
        f'gates of type {type(self._gate).__name__} weight the blocks of a '
        'stage; the network must call gating.end_stage(x) after each stage'
      )
    return self._masks


class GatedBlock(nnx.Module):
  """`activation(shortcut(x) + mask * branch(x))`.

  The shortcut always runs. The block computes its branch, a chain of
  convolutions and batch norms, everywhere, and multiplies it by the mask after
  the last batch norm. Batch statistics thus include masked-out positions
  (Verelst and Tuytelaars, CVPR 2020, section 3.3 and the authors' code).

  `branch` describes the branch completely. A subclass that computes something
  else in `run_branch`, or overrides `decide`, cannot run sparsely: it sets
  `describable = False`, and sparse networks run it densely.

  Args:
    branch: description of the branch.
    name: path in the model, such as 'layer2.0'.
    stage: index of the block's stage.
    gate: decides where the branch runs; None for everywhere.
    norm: creates a batch norm: `BatchNorm`, or a partial with other constants.
    drop_rate: probability of dropping an image's branch in training (stochastic
      depth, Huang et al., ECCV 2016). The remaining branches are scaled up.
    dtype: compute dtype.
    rngs: random streams; uses `params`.
  """

  describable = True

  def __init__(
    self,
    branch: Branch,
    *,
    name: str,
    stage: int = 0,
    gate: Gate | None = None,
    norm: Callable[..., BatchNorm] = BatchNorm,
    drop_rate: float = 0.0,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.branch = branch
    self.name = name
    self.stage = stage
    self.dtype = jnp.dtype(dtype)
    self.downsample = nnx.data(None)
    if (projection := branch.projection) is not None:
      self.downsample = nnx.List(
        [
          make_conv(projection, dtype=dtype, rngs=rngs),
          norm(branch.features, rngs=rngs),
        ]
      )
    self.masker = nnx.data(gate)
    for c in branch.convs:
      setattr(self, c.name, make_conv(c, dtype=dtype, rngs=rngs))
      setattr(
        self,
        c.norm,
        norm(c.features, activation=c.activation, rngs=rngs),
      )
    self.drop = nnx.data(
      Dropout(drop_rate, broadcast_dims=(1, 2, 3)) if drop_rate else None
    )

  @property
  def strides(self) -> int:
    """Stride of the block."""
    return self.branch.strides

  def run_branch(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, features] before mask and shortcut.

    Args:
      x: float[N, H, W, in_features].
    """
    for c in self.branch.convs:
      x = getattr(self, c.norm)(getattr(self, c.name)(x))
    return x

  def shortcut(self, x: jax.Array) -> jax.Array | float:
    """Returns x or its projection, float[N, h, w, features], or 0 for none.

    Args:
      x: float[N, H, W, in_features].
    """
    if self.branch.shortcut == 'none':
      return 0.0
    if self.downsample is None:
      return x
    projection, norm = self.downsample
    return norm(projection(x))

  def decide(self, x: jax.Array, gating: Gating) -> ExecutionMask | None:
    """Returns where the branch runs, or None for everywhere.

    Args:
      x: float[N, H, W, in_features], the block's input.
      gating: the decisions of this forward pass.
    """
    return decide(self, x, gating)

  def execute(
    self,
    x: jax.Array,
    mask: ExecutionMask | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """Returns the block's output, float[N, h, w, features].

    Args:
      x: float[N, H, W, in_features].
      mask: where the branch runs; None for everywhere.
      rngs: random streams; blocks that drop their branch use `dropout`.
    """
    shortcut, branch = self.shortcut(x), self.run_branch(x)
    if self.drop is not None:
      branch = self.drop(branch, rngs=rngs)
    act = ACTIVATIONS[self.branch.activation]
    if mask is None:
      return act(shortcut + branch)
    hard = mask.hard[..., None].astype(branch.dtype)
    if self.masker is not None and self.masker.interpolates:
      executed, skipped = act(shortcut + branch), act(shortcut)
      return hard * executed + (1 - hard) * skipped
    return act(shortcut + hard * branch)

  def __call__(self, x: jax.Array, gating: Gating | None = None) -> jax.Array:
    """Returns the block's output, float[N, h, w, features].

    Args:
      x: float[N, H, W, in_features].
      gating: the decisions of this forward pass, to which the execution mask is
        added; None to run the branch everywhere.
    """
    mask = None if gating is None else self.decide(x, gating)
    if mask is not None:
      gating.add(mask)
    return self.execute(x, mask, None if gating is None else gating.rngs)

  def set_view(self, deterministic: bool | None = None):
    """Accepts `deterministic` of ``nnx.view``, even without a gate.

    Args:
      deterministic: not used here; ``nnx.view`` passes it to the gate.
    """


def decide(block: Any, x: jax.Array, gating: Gating) -> ExecutionMask | None:
  """Returns where a block's branch runs, or None for everywhere.

  Args:
    block: has `branch`, `name`, `stage`, and `masker`.
    x: float[N, H, W, in_features], the block's input.
    gating: the decisions of this forward pass.
  """
  size = x.shape[1:3]
  shape = (x.shape[0], *block.branch.sizes(size)[-1])
  hard = gating.given(block.name, shape)
  if hard is not None:
    decision = Decision(hard)
    if block.masker is not None:
      gating.record(block.masker, hard)
  elif block.masker is None:
    return None
  else:
    decision = gating.ask(block.masker, x, shape)
  return execution_mask(
    block.branch,
    decision.hard,
    size,
    name=block.name,
    stage=block.stage,
    score=decision.score,
  )


def _as_mask(mask: Any, shape: tuple[int, ...], what: str) -> jax.Array:
  """Returns a mask as float32 of the given shape.

  Args:
    mask: float, int, or bool, in this shape or constant over an image.
    shape: shape of the result.
    what: name of the mask in errors.
  """
  mask = jnp.asarray(mask)
  constant = (shape[0], *(1 for _ in shape[1:]))
  if mask.shape not in (shape, constant):
    raise ValueError(f'{what} must be {shape} or {constant}; got {mask.shape}')
  if not (
    jnp.issubdtype(mask.dtype, jnp.floating)
    or jnp.issubdtype(mask.dtype, jnp.integer)
    or mask.dtype == bool
  ):
    raise ValueError(f'{what} must be float, int or bool; got {mask.dtype}')
  return jnp.broadcast_to(mask.astype(jnp.float32), shape)


def drop_rate(drop_path: float, index: int, total: int) -> float:
  """Returns the probability of dropping a block's branch.

  It rises linearly with the block's index, starting at 0 (Huang et al., ECCV
  2016, equation 4). As in EfficientNet's code, the last block stays below
  `drop_path`.

  Args:
    drop_path: the network's stochastic depth, in [0, 1).
    index: index of the block.
    total: number of blocks in the network.
  """
  return drop_path * index / total


def make_conv(c: Conv, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
  """Returns a convolution from its description.

  Args:
    c: the description.
    dtype: compute dtype.
    rngs: random streams; uses `params`.
  """
  return conv(
    c.in_features,
    c.features,
    c.kernel_size,
    strides=c.strides,
    groups=c.groups,
    padding=c.padding,
    dtype=dtype,
    rngs=rngs,
  )


def gated_blocks(model: nnx.Module) -> list[GatedBlock]:
  """Returns the gated blocks of a network, in the order of its modules."""
  return [
    node for _, node in nnx.iter_modules(model) if isinstance(node, GatedBlock)
  ]
