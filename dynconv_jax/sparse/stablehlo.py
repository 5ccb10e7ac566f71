"""Export to StableHLO, which runs anywhere that JAX or XLA runs.

Exports the dense form: branches run everywhere and are multiplied by the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from dynconv_jax.checks import check_choice
from dynconv_jax.layers import conv_general_dilated
from dynconv_jax.sparse.fold import check_evaluation

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def export_stablehlo(
  model: nnx.Module,
  image_size: tuple[int, int],
  *,
  batch_size: int | None = None,
  channels: int = 3,
  platforms: Sequence[str] = ('cpu', 'cuda'),
) -> export.Exported:
  """Returns a network and its weights as one StableHLO module.

  `Exported.serialize()` returns bytes, which JAX can run without this package:
  `jax.export.deserialize(bytearray(data)).call(images)`. The input is
  normalized float32[N, H, W, channels]. The output is a tuple of the logits
  and, for a gated network, the density of each block, float32[N, blocks].

  Args:
    model: the evaluation view of any network,
      nnx.view(model, deterministic=True, use_running_average=True).
    image_size: (H, W).
    batch_size: N, or None for any.
    channels: channels of the images.
    platforms: target platforms, a subset of PLATFORMS.

  Raises:
    ValueError: an argument is out of range, the model is not in evaluation, or
      the network needs a fixed batch size.
  """
  if not platforms:
    raise ValueError(
      f'platforms must be one or more of {", ".join(PLATFORMS)}; got none'
    )
  for platform in platforms:
    check_choice('platform', platform, PLATFORMS)
  images = image_type(image_size, batch_size, channels)
  check_evaluation(model)
  exporting = export.export(
    jax.jit(inference_function(_portable(model))), platforms=tuple(platforms)
  )
  return for_any_batch(exporting, images)


def _portable(model: nnx.Module) -> nnx.Module:
  """Returns a copy whose convolutions do not use this package's kernels."""
  model = nnx.clone(model)
  for _, module in nnx.iter_modules(model):
    own = getattr(module, 'conv_general_dilated', None)
    if own is conv_general_dilated:
      module.conv_general_dilated = jax.lax.conv_general_dilated
  return model


def image_type(
  image_size: tuple[int, int], batch_size: int | None, channels: int
) -> jax.ShapeDtypeStruct:
  """Returns the type float32[N, H, W, channels], with symbolic N for None.

  Raises:
    ValueError: an argument is out of range.
  """
  if np.shape(image_size) != (2,) or min(image_size) < 1:
    raise ValueError(f'image_size must be (height, width); got {image_size!r}')
  if batch_size is not None and batch_size < 1:
    raise ValueError(
      f'batch_size must be at least 1, or None for any; got {batch_size}'
    )
  batch = batch_size or export.symbolic_shape('N')[0]
  return jax.ShapeDtypeStruct((batch, *image_size, channels), jnp.float32)


def inference_function(
  model: nnx.Module, *, masks: bool = False
) -> Callable[..., tuple]:
  """Returns a function from images to logits and, for a gated network, density.

  Args:
    model: the evaluation view of any network.
    masks: whether to also return the MACs of the masked layers at active
      positions, float32[N], and the mask of each block.
  """

  def forward(images):
    result = model(images)
    logits, executed = result if isinstance(result, tuple) else (result, [])
    if not executed:
      return (logits,)
    density = jnp.stack([mask.density() for mask in executed], axis=1)
    if not masks:
      return logits, density
    macs = sum(mask.executed_macs() for mask in executed)
    return logits, density, macs, *(mask.hard for mask in executed)

  return forward


def for_any_batch(trace: Callable, images: jax.ShapeDtypeStruct):
  """Returns `trace(images)`.

  Raises:
    ValueError: N is symbolic, but the network needs its value.
  """
  try:
    return trace(images)
  except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
    if isinstance(error, TypeError) and '_DimExpr' not in str(error):
      raise
    raise ValueError(
      'the network depends on the number of images, so the export needs '
      f'batch_size ({error})'
    ) from error
