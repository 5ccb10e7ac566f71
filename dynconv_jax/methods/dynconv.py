"""DynConv: one decision per image and position, with a budget of MACs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import BatchNorm, conv_general_dilated
from dynconv_jax.masks import ExecutionMask, executed_fractions
from dynconv_jax.methods.budget import Budget, Opening, Warmup
from dynconv_jax.methods.drop import Dropping
from dynconv_jax.methods.gate import Decision, Gate, GateSite, MakeGate
from dynconv_jax.methods.gumbel import Gumbel, binary_gumbel
from dynconv_jax.methods.method import Method
from dynconv_jax.options import NOT_NEGATIVE, POSITIVE, Range, option

# Fraction of training after which the per-block bounds are [0, 1] (authors'
# code, `SparsityCriterion`).
_ANNEALED = 0.33

# PyTorch's default initialization, U(-1/sqrt(fan_in), 1/sqrt(fan_in)). About
# half of the positions are executed initially.
_torch_uniform = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def _uniform_bias(fan_in: int):
  bound = fan_in**-0.5

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Squeeze(nnx.Module):
  """Mask logits: a convolution plus a linear map of the global average.

  Verelst and Tuytelaars, CVPR 2020, section 3.2 and the authors' code.

  Args:
    in_features: channels of the input.
    strides: stride of the convolution.
    kernel_size: kernel size of the convolution, odd.
    pool: side of the patches over which the input is averaged first; 1 for no
      averaging.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self,
    in_features: int,
    *,
    strides: int,
    kernel_size: int,
    pool: int = 1,
    rngs: nnx.Rngs,
  ):
    padding = kernel_size // 2
    self.pool = pool
    self.conv = nnx.Conv(
      in_features,
      1,
      (kernel_size, kernel_size),
      strides=strides,
      padding=((padding, padding), (padding, padding)),
      dtype=jnp.float32,
      kernel_init=_torch_uniform,
      bias_init=_uniform_bias(in_features * kernel_size**2),
      conv_general_dilated=conv_general_dilated,
      rngs=rngs,
    )
    self.fc = nnx.Linear(
      in_features,
      1,
      dtype=jnp.float32,
      kernel_init=_torch_uniform,
      bias_init=_uniform_bias(in_features),
      rngs=rngs,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32[N, h, w] logits for a float[N, H, W, C] input."""
    x = average_pool(x, self.pool)
    squeezed = self.fc(jnp.mean(x, axis=(1, 2)))
    return (self.conv(x) + squeezed[:, None, None, :])[..., 0]


class MaskUnit(Gate):
  """A gate that executes or skips a block's branch at each position.

  The mask is sampled in training and is `logits >= 0` in evaluation. With a
  granularity above 1, each decision covers a patch of positions and is computed
  from the average-pooled input (Han et al., LASNet, NeurIPS 2022, section 3.2).
  Coarser masks run faster on a large GPU.

  Args:
    in_features: channels of the block's input.
    strides: stride of the block. The mask has the block's output resolution.
    kernel_size: 3, or 1 for the variant in the authors' pose network.
    granularity: side of a patch, in positions of the block's output.
    norm: whether to normalize the input per channel. The features of pretrained
      networks differ in scale by orders of magnitude; normalization makes the
      noise and the initial bias equally effective in every block.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self,
    in_features: int,
    *,
    strides: int,
    kernel_size: int = 3,
    granularity: int = 1,
    norm: bool = False,
    rngs: nnx.Rngs,
  ):
    super().__init__()
    self.norm = BatchNorm(in_features, rngs=rngs) if norm else None
    self.strides = strides
    self.granularity = granularity
    self.maskconv = Squeeze(
      in_features,
      # Pooling includes the block's stride.
      strides=strides if granularity == 1 else 1,
      kernel_size=kernel_size,
      pool=1 if granularity == 1 else granularity * strides,
      rngs=rngs,
    )

  def open(self, logit: float) -> None:
    """Sets the logit of all positions; above 0, the block runs everywhere."""
    unit = self.maskconv
    unit.fc.kernel[...] = jnp.zeros_like(unit.fc.kernel[...])
    unit.fc.bias[...] = jnp.zeros_like(unit.fc.bias[...])
    unit.conv.bias[...] = jnp.full_like(unit.conv.bias[...], logit)

  def __call__(
    self, x, carry=None, *, rngs=None, temperature=1.0, gumbel_noise=True
  ):
    logits = self.maskconv(x if self.norm is None else self.norm(x))
    if self.deterministic:
      hard = (logits >= 0).astype(jnp.float32)
    else:
      key = None if gumbel_noise is False else self.key(rngs)
      hard = binary_gumbel(logits, key, temperature, gumbel_noise)
    if self.granularity > 1:
      hard = jnp.repeat(hard, self.granularity, axis=1)
      hard = jnp.repeat(hard, self.granularity, axis=2)
      h, w = (-(-n // self.strides) for n in x.shape[1:3])
      hard = hard[:, :h, :w]
    return Decision(hard), carry


def average_pool(x: jax.Array, size: int) -> jax.Array:
  """Returns float32 means of size x size patches; edge patches are cropped."""
  if size == 1:
    return x.astype(jnp.float32)

  def summed(v):
    return jax.lax.reduce_window(
      v.astype(jnp.float32),
      0.0,
      jax.lax.add,
      (1, size, size, 1),
      (1, size, size, 1),
      [
        (0, -n % size if axis in (1, 2) else 0)
        for axis, n in enumerate(v.shape)
      ],
    )

  return summed(x) / summed(jnp.ones((1, *x.shape[1:3], 1)))


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


def make_gates(
  options: Options, sites: Sequence[GateSite], rngs: nnx.Rngs | None
) -> MakeGate:
  """Returns a function that makes a block's mask unit."""
  options.check_phases()
  sides = stage_granularities(options.mask_granularity, sites)

  def make(site: GateSite) -> MaskUnit:
    return MaskUnit(
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
