"""The paper's halting algorithm, position by position, in NumPy."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def algorithm(states, scores):
  """Runs algorithm 1 of Figurnov et al. at one position.

  Args:
    states: L vectors.
    scores: L - 1 numbers, for all but the last state.

  Returns:
    The output, the number of units N, and the remainder R.
  """
  cumulative, remainder, output = 0.0, 1.0, 0.0
  for n, state in enumerate(states, start=1):
    score = scores[n - 1] if n < len(states) else 1.0
    cumulative += score
    if cumulative < 1 - 0.01:
      output = output + score * state
      remainder -= score
    else:
      return output + remainder * state, n, remainder


def run_stage(states, scores):
  """Runs the algorithm at every position: (output, units, remainders)."""
  states, scores = np.float64(states), np.float64(scores)
  output = np.zeros(states.shape[1:])
  units, remainders = np.zeros((2, *states.shape[1:-1]))
  for at in np.ndindex(*units.shape):
    output[at], units[at], remainders[at] = algorithm(
      [state[at] for state in states], [score[at] for score in scores]
    )
  return output, units, remainders


def randomize(module, seed=0):
  """Sets all parameters and statistics to nontrivial values."""
  rng = np.random.default_rng(seed)
  for path, value in nnx.to_flat_state(nnx.state(module)):
    if path[-1] in ('scale', 'var'):
      value[...] = jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32)
    elif path[-1] in ('mean', 'bias'):
      value[...] = jnp.asarray(rng.normal(0, 0.3, value.shape), jnp.float32)
    elif path[-2] in ('local_conv', 'global_fc'):
      value[...] = jnp.asarray(rng.normal(0, 1, value.shape), jnp.float32)
