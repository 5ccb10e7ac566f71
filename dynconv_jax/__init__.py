"""Dynamic convolutions in JAX: networks that compute only where needed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from dynconv_jax.models.create import create_model as create_model

__all__ = ['create_model']


def __getattr__(name):
  # Import on demand: `dynconv_jax.macs` works without the training packages.
  if name == 'create_model':
    from dynconv_jax.models.create import create_model

    return create_model
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
