"""Training state and training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dynconv_jax import losses
from dynconv_jax.training.config import Config
from dynconv_jax.training.selection import factors_of

Batch = Mapping[str, jax.Array]

# Ordered as a non-finite value propagates through a step.
QUANTITIES = ('cross_entropy', 'distillation', 'gating', 'gradient_norm')
CHECKED = (*QUANTITIES, 'an updated weight', 'a batch statistic')

# Separates the keys of a run's network from those of its batches, which have
# the same seed and are numbered by step.
_STREAM = 2**32 - 1


@flax.struct.dataclass
class TrainState:
  """Everything needed to resume a run, except the data iterator's position.

  Attributes:
    step: int32 scalar, number of steps done.
    params: the trained weights, unwrapped.
    model_state: batch statistics, unwrapped.
    opt_state: state of the optimizer.
    ema: exponential moving averages of (params, model_state), or None.
    key: PRNG key. Each step folds in its step number.
    sums: float32 scalars, metrics summed over the steps of this epoch.
    first_bad: int32[2], step and index in CHECKED of the first non-finite
      value; -1 if there is none.
  """

  step: jax.Array
  params: nnx.State
  model_state: nnx.State
  opt_state: optax.OptState
  ema: tuple[nnx.State, nnx.State] | None
  key: jax.Array
  sums: dict[str, jax.Array]
  first_bad: jax.Array

  def evaluated(self) -> tuple[nnx.State, nnx.State]:
    """Returns (params, model_state) for evaluation: the EMA if there is one."""
    return self.ema or (self.params, self.model_state)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
  """Returns (graph definition, params, remaining state), unwrapped."""
  graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
  return graphdef, nnx.as_pure(params), nnx.as_pure(model_state)


def create_state(
  model: nnx.Module, tx: optax.GradientTransformation, config: Config
) -> TrainState:
  """Returns the initial training state, made of new arrays."""
  _, params, model_state = split(model)
  # Copies, because the step donates its input state.
  params, model_state = jax.tree.map(jnp.copy, (params, model_state))
  ema = None
  if config.optimization.ema_decay:
    ema = jax.tree.map(jnp.copy, (params, model_state))
  names = ['loss', 'correct', *QUANTITIES]
  if config.method.record.gated:
    names.append('executed_fraction')
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=tx.init(params),
    ema=ema,
    key=jax.random.fold_in(jax.random.key(config.run.seed), _STREAM),
    sums={name: jnp.zeros((), jnp.float32) for name in names},
    first_bad=jnp.full((2,), -1, jnp.int32),
  )


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  config: Config,
  steps_per_epoch: int,
  teacher: nnx.Module | None = None,
  shardings: TrainState | None = None,
  masks: Callable[[Batch], Mapping[str, jax.Array]] | None = None,
) -> Callable[[TrainState, Batch], TrainState]:
  """Returns the jitted training step, from (state, batch) to the new state.

  The step donates its input state.

  Args:
    graphdef: graph definition of the model's training view.
    tx: the optimizer.
    config: the run's configuration.
    steps_per_epoch: number of steps after which summed metrics are reset.
    teacher: evaluation view of the teacher for distillation, or None.
    shardings: shardings of the state if weights are sharded. The step gathers
      the weights before it uses them.
    masks: function from a batch to masks by block name, which replace the
      decisions of the gates. None: the gates decide.
  """
  total_steps = config.optimization.epochs * steps_per_epoch
  method, options = config.method.record, config.method.options
  decay, factors = config.optimization.ema_decay, config.optimization.factors
  # Pass the teacher as an argument. Large constants would slow compilation.
  teacher_graphdef, teacher_state = None, {}
  if teacher is not None:
    teacher_graphdef, teacher_state = nnx.split(teacher)
    teacher_state = nnx.as_pure(teacher_state)

  def loss_fn(params, state, batch, teacher_state):
    if shardings:
      whole = NamedSharding(shardings.step.mesh, PartitionSpec())
      params = jax.lax.with_sharding_constraint(params, whole)
    key = jax.random.fold_in(state.key, state.step)
    progress = state.step / total_steps
    # Skip the gradients of weights that are not trained.
    params = jax.tree.map(
      lambda p, factor: p if factor else jax.lax.stop_gradient(p),
      params,
      factors_of(params, factors),
    )
    model = nnx.merge(graphdef, params, state.model_state)
    temperature, noise = method.anneal(options, progress)
    logits, executed = model(
      batch['image'],
      rngs=nnx.Rngs(gumbel=key, dropout=jax.random.fold_in(key, 1)),
      temperature=temperature,
      gumbel_noise=noise,
      masks=masks and masks(batch),
    )
    zero = jnp.zeros((), jnp.float32)
    terms = dict.fromkeys(QUANTITIES, zero)
    cross_entropy = losses.classification_losses(
      logits, batch['label'], config.optimization.loss
    )
    terms['cross_entropy'] = jnp.mean(cross_entropy)
    loss = terms['cross_entropy']
    if teacher is not None:
      terms['distillation'] = losses.distillation_loss(
        logits,
        nnx.merge(teacher_graphdef, teacher_state)(batch['image'])[0],
        config.optimization.distill_temperature,
      )
      share = config.optimization.distill_weight
      loss = (1 - share) * loss + share * terms['distillation']
    if executed and method.loss is not None:
      weight, terms['gating'] = method.loss(
        options, executed, cross_entropy, progress
      )
      loss += weight * terms['gating']
    if executed:
      terms['executed_fraction'], _ = losses.executed_fractions(executed)
    hits = jnp.argmax(logits, -1) == jnp.argmax(batch['label'], -1)
    metrics = {**terms, 'loss': loss, 'correct': jnp.mean(hits)}
    return loss, (split(model)[2], metrics)

  gradient = jax.grad(loss_fn, has_aux=True)
  if config.optimization.grad_accum_steps > 1:
    gradient = _accumulated(gradient, config.optimization.grad_accum_steps)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
  def train_step(state, batch, teacher_state):
    grads, (model_state, metrics) = gradient(
      state.params, state, batch, teacher_state
    )
    if shardings:
      grads = jax.lax.with_sharding_constraint(grads, shardings.params)
    metrics['gradient_norm'] = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    first_of_epoch = state.step % steps_per_epoch == 0
    return TrainState(
      step=state.step + 1,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      ema=_averaged(state, (params, model_state), decay),
      key=state.key,
      sums={
        name: jnp.where(first_of_epoch, 0.0, total) + metrics[name]
        for name, total in state.sums.items()
      },
      first_bad=_first_bad(
        state, [*(metrics[n] for n in QUANTITIES), params, model_state]
      ),
    )

  return lambda state, batch: train_step(state, batch, teacher_state)


def _accumulated(gradient: Callable, parts: int) -> Callable:
  """Returns a gradient function that averages over parts of a batch.

  The parts are computed one by one. Each has its own batch statistics, random
  numbers, and losses, including losses that are not means over images.

  Args:
    gradient: function from (params, state, batch, teacher_state) to (gradient,
      (model_state, metrics)).
    parts: number of equal parts of a batch.
  """

  def accumulated(params, state, batch, teacher_state):
    # Strided parts, so that each device keeps its own rows.
    batches = jax.tree.map(
      lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch
    )

    def of_part(model_state, i):
      part = jax.tree.map(lambda a: a[i], batches)
      key = jax.random.fold_in(state.key, i)
      here = state.replace(model_state=model_state, key=key)
      return gradient(params, here, part, teacher_state)

    def add(i, carry):
      total, model_state = carry
      grads, (model_state, metrics) = of_part(model_state, i)
      return optax.tree.add(total, (grads, metrics)), model_state

    grads, (_, metrics) = jax.eval_shape(of_part, state.model_state, 0)
    zeros = optax.tree.zeros_like((grads, metrics))
    total, model_state = jax.lax.fori_loop(
      0, parts, add, (zeros, state.model_state)
    )
    grads, metrics = optax.tree.scale(1 / parts, total)
    return grads, (model_state, metrics)

  return accumulated


def _averaged(state: TrainState, new: Any, decay: float) -> Any:
  if state.ema is None:
    return None
  # Average faster in the first steps, as TensorFlow's `num_updates` does.
  step = state.step.astype(jnp.float32)
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return optax.incremental_update(new, state.ema, 1 - decay)


def _first_bad(state: TrainState, checked: list[Any]) -> jax.Array:
  finite = [
    jax.tree.reduce(
      jnp.logical_and, jax.tree.map(lambda a: jnp.isfinite(a).all(), tree), True
    )
    for tree in checked
  ]
  bad = ~jnp.stack(finite)
  here = jnp.stack([state.step, jnp.argmax(bad).astype(jnp.int32)])
  new = jnp.any(bad) & (state.first_bad[0] < 0)
  return jnp.where(new, here, state.first_bad)
