"""DynConv: one decision per image and position, with a budget of MACs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.masks import ExecutionMask, executed_fractions
from dynconv_jax.methods.budget import Budget, Opening, Warmup
from dynconv_jax.methods.drop import Dropping
from dynconv_jax.methods.gate import Gate, GateSite, MakeGate
from dynconv_jax.methods.gumbel import Gumbel
from dynconv_jax.methods.mask_unit import (
  InheritedMask,
  MaskUnit,
  RecordedMaskUnit,
)
from dynconv_jax.methods.method import Method
from dynconv_jax.options import NOT_NEGATIVE, POSITIVE, Range, option

# Fraction of training after which the per-block bounds are [0, 1] (authors'
# code, `SparsityCriterion`).
_ANNEALED = 0.33


@dataclasses.dataclass(frozen=True)
class Options(Budget, Warmup, Opening, Gumbel, Dropping):
  """DynConv's options."""

  mask_kernel_size: int = option(
    3,
    "Kernel of DynConv's mask units: 3 or 1.",
    allowed=Range(lambda size: size in (1, 3), '1 or 3'),
  )
  mask_granularity: tuple[int, ...] = option(
    (1,),
    "Side of DynConv's patches, in positions of a block's output: one value "
    'for all stages, or one per stage.',
  )
  mask_norm: bool = option(
    False,
    "Whether DynConv's mask units normalize their input per channel.",
    before=False,
  )
  inherited_masks: bool = option(
    False,
    'Whether blocks without an identity shortcut take the masks of the '
    'previous stage instead of having a mask unit. Blocks before the first '
    'mask unit then run everywhere. Needs gates in such blocks, for example '
    'gated_blocks=all.',
    before=False,
  )
  mask_units: tuple[str, ...] = option(
    (),
    'Blocks that have a mask unit, such as blocks.1.1; the others inherit. '
    'Empty: all blocks with an identity shortcut. Needs inherited_masks.',
  )
  block_bounds_until: float = option(
    _ANNEALED,
    "Fraction of training after which DynConv no longer bounds each block's "
    'executed fraction, as in the paper. Above 1, the bounds never open '
    'completely: with a large value, every block keeps the budget.',
    allowed=POSITIVE,
    before=_ANNEALED,
  )
  sparsity_weight: float = option(
    10.0, "Weight of DynConv's sparsity loss.", allowed=NOT_NEGATIVE
  )


# Any value above the side of the feature map yields a single patch.
_MAX_GRANULARITY = 1024


def stage_granularities(
  given: Sequence[int], sites: Sequence[GateSite]
) -> tuple[int, ...]:
  """Returns the side of the patches in each stage.

  Args:
    given: one value for all stages, or one per stage.
    sites: all sites of the network.

  Raises:
    ValueError: the number of values is wrong, or a value is out of range.
  """
  stages = 1 + max((site.stage for site in sites), default=0)
  if len(given) not in (1, stages) or not all(
    1 <= side <= _MAX_GRANULARITY for side in given
  ):
    raise ValueError(
      f'mask_granularity must be 1 or {stages} integers (one per stage) in [1, '
      f'{_MAX_GRANULARITY}]; got {",".join(map(str, given))}'
    )
  return tuple(given) * (stages if len(given) == 1 else 1)


def mask_units(options: Options, sites: Sequence[GateSite]) -> list[GateSite]:
  """Returns the sites of the mask units whose masks can be inherited.

  Args:
    options: options of the method.
    sites: all sites of the network, in its order.

  Raises:
    ValueError: `mask_units` is given without `inherited_masks`, or names a
      block that cannot have a mask unit.
  """
  named = options.mask_units
  if named and not options.inherited_masks:
    raise ValueError(
      f'mask_units needs inherited_masks; got {", ".join(named)} without it'
    )
  possible = [
    site
    for site in sites
    if site.identity and site.name not in options.dropped_blocks
  ]
  names = [site.name for site in possible]
  unknown = [name for name in named if name not in names]
  if unknown:
    raise ValueError(
      'mask_units must name blocks with an identity shortcut that are not '
      f'dropped, {", ".join(names)}; got {", ".join(unknown)}'
    )
  return [site for site in possible if not named or site.name in named]


def make_gates(
  options: Options, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns a function that makes a block's gate."""
  options.check_phases()
  sides = stage_granularities(options.mask_granularity, sites)
  inherits = options.inherited_masks
  if inherits and all(site.identity for site in sites):
    raise ValueError(
      'inherited_masks needs gates in blocks without an identity shortcut, for '
      'example gated_blocks=all; got none'
    )
  units = mask_units(options, sites)
  unit = RecordedMaskUnit if inherits else MaskUnit

  def make(site: GateSite) -> Gate | None:
    if inherits and site not in units:
      if not units or site.index < units[0].index:
        return None
      return InheritedMask(site.strides, site.identity)
    return unit(
      site.in_features,
      strides=site.strides,
      kernel_size=options.mask_kernel_size,
      granularity=sides[site.stage],
      norm=options.mask_norm,
      rngs=rngs,
    )

  return options.drop(sites, make)


def budget_bounds(
  budget: float | jax.Array,
  progress: float | jax.Array,
  until: float = _ANNEALED,
) -> tuple[jax.Array, jax.Array]:
  """Returns the (lower, upper) bounds of a block's executed fraction.

  Both bounds start at the budget and widen to [0, 1] over the first third of
  training (Verelst and Tuytelaars, CVPR 2020, section 3.4), or until another
  moment.

  Args:
    budget: target executed fraction, in [0, 1].
    progress: fraction of training completed, in [0, 1].
    until: fraction of training after which they are [0, 1], > 0.
  """
  q = jnp.cos(jnp.pi / 2 * jnp.minimum(1.0, progress / until)) ** 2
  return q * budget, 1.0 - q * (1.0 - budget)


def sparsity_loss(
  masks: Sequence[ExecutionMask],
  *,
  budget: float | jax.Array,
  progress: float | jax.Array,
  bounds_until: float = _ANNEALED,
) -> jax.Array:
  """Returns DynConv's unweighted loss on the executed fraction.

  The loss pulls the network's executed fraction toward the budget and each
  block's into bounds that widen during training (Verelst and Tuytelaars, CVPR
  2020, section 3.4). The authors weight it by 10, and by 0.01 for pose.

  Args:
    masks: one mask per gated block, with straight-through gradients.
    budget: target executed fraction of the masked layers' MACs, in [0, 1].
    progress: fraction of training completed, in [0, 1].
    bounds_until: fraction of training after which blocks have no bounds.

  Returns:
    float32 scalar.

  Raises:
    ValueError: there are no masks, or a constant budget is outside [0, 1].
  """
  if not masks:
    raise ValueError(
      'the sparsity loss needs at least one execution mask; got none (a dense '
      'network has no budget)'
    )
  if not isinstance(budget, jax.Array) and not 0 <= budget <= 1:
    raise ValueError(f'budget must be in [0, 1]; got {budget}')
  network, blocks = executed_fractions(masks)
  lower, upper = budget_bounds(budget, progress, bounds_until)
  outside = jax.nn.relu(blocks - upper) ** 2 + jax.nn.relu(lower - blocks) ** 2
  return (network - budget) ** 2 + jnp.mean(outside)


def target(options: Options, progress: float | jax.Array) -> float | jax.Array:
  """Returns the target executed fraction at the given training progress."""
  if not options.budget_warmup:
    return options.budget
  return 1.0 - (1.0 - options.budget) * options.warm(progress)


def _loss(options, masks, cross_entropy, progress):
  del cross_entropy
  return options.sparsity_weight, sparsity_loss(
    masks,
    budget=target(options, progress),
    progress=progress,
    bounds_until=options.block_bounds_until,
  )


def _open(options: Options, gate: MaskUnit) -> None:
  if options.mask_bias is not None and isinstance(gate, MaskUnit):
    gate.open(options.mask_bias)


METHOD = Method(
  'dynconv',
  Options,
  make_gates,
  _loss,
  target,
  anneal=Options.anneal,
  open_gate=_open,
  samples=True,
  knob='budget',
  label='DynConv',
  color='vermilion',
  marker='o',
)
