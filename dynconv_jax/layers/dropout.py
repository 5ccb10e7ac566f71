"""Dropout with random streams passed to the call."""

from __future__ import annotations

import jax
from flax import nnx


class Dropout(nnx.Dropout):
  """Zeros values at random in training, and scales up the others.

  With broadcast_dims=(1, 2, 3), drops whole images, as in stochastic depth.
  """

  def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None):
    """Returns x, with values dropped in training.

    Args:
      x: array of any shape.
      rngs: random streams; uses `dropout` in training.

    Raises:
      ValueError: in training, `rngs` has no `dropout` or `default` stream.
    """
    if self.rate and not self.deterministic:
      if rngs is None or not ('dropout' in rngs or 'default' in rngs):
        given = None if rngs is None else [name for name, _ in rngs.items()]
        raise ValueError(
          'dropout in training needs rngs=nnx.Rngs(dropout=key); got '
          f'{given}. For evaluation use nnx.view(model, deterministic=True, '
          'use_running_average=True)'
        )
      rngs = rngs['dropout']
    return super().__call__(x, rngs=rngs)

  def set_view(
    self,
    deterministic: bool | None = None,
    use_running_average: bool | None = None,
  ):
    """Sets attributes for ``nnx.view``.

    Args:
      deterministic: if True, nothing is dropped.
      use_running_average: if True, nothing is dropped, because the model is in
        evaluation even if gates sample.
    """
    if deterministic is not None or use_running_average is not None:
      self.deterministic = bool(deterministic or use_running_average)
