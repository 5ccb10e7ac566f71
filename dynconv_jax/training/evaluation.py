"""Accuracy, compute, and executed positions over a whole split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dynconv_jax import distributed
from dynconv_jax.masks import ExecutionMask, resize_nearest

Predict = Callable[[jax.Array], tuple[jax.Array, list[ExecutionMask]]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results of a network on each of n examples.

  Attributes:
    index: int[n], index of the example, counting padding examples too.
    label: int[n].
    prediction: int[n], the predicted class.
    cross_entropy: float64[n].
    executed_macs: float64[n], executed MACs of the masked layers. Empty for a
      dense network.
    dense_macs: MACs of the masked layers for one image at density 1.
    densities: float64[n, blocks], fraction of active positions.
    block_names: names of the gated blocks.
    stages: stage number of each gated block.
    macs: float64[n], MACs of the whole network. Empty without a MAC report.
    object_recall: float64[n, blocks], fraction of object pixels at active
      positions; NaN for images without an object. Empty if the data has no
      object masks.
    background_density: float64[n, blocks], fraction of background pixels at
      active positions; NaN for images without background. Empty if the data has
      no object masks.
    object_share: float64[n], fraction of the image covered by its object. Empty
      if the data has no object masks.
  """

  index: np.ndarray
  label: np.ndarray
  prediction: np.ndarray
  cross_entropy: np.ndarray
  executed_macs: np.ndarray
  dense_macs: int
  densities: np.ndarray
  block_names: tuple[str, ...]
  stages: tuple[int, ...]
  macs: np.ndarray
  object_recall: np.ndarray
  background_density: np.ndarray
  object_share: np.ndarray

  @property
  def correct(self) -> np.ndarray:
    """bool[n], whether the predicted class is the label."""
    return self.prediction == self.label

  @property
  def localization(self) -> tuple[np.ndarray, np.ndarray]:
    """(object_recall, background_density) of each image, both float64[n].

    They are means over the blocks that run on any image. A dropped block says
    nothing about positions. Empty if there are none, or no object masks.
    """
    if not self.object_recall.size or not self.densities.any():
      return np.zeros(0), np.zeros(0)
    runs = self.densities.any(0)
    recall, background = self.object_recall, self.background_density
    return recall[:, runs].mean(1), background[:, runs].mean(1)

  def summary(self) -> dict[str, Any]:
    """Returns JSON-serializable means over the examples.

    Always: 'accuracy' with its 95 % interval 'accuracy_low' and
    'accuracy_high', 'loss', and 'num_examples'. For gated networks:
    'executed_fraction', 'block_density', and 'block_stage'. With a MAC report:
    'gmacs_mean', 'gmacs_p50', and 'gmacs_p95'. With object masks:
    'object_recall' and 'background_density', averaged over the blocks that run
    on any image.
    """
    n = len(self.correct)
    low, high = wilson_interval(int(self.correct.sum()), n)
    result = {
      'accuracy': float(self.correct.mean()),
      'accuracy_low': low,
      'accuracy_high': high,
      'loss': float(self.cross_entropy.mean()),
      'num_examples': n,
    }
    if self.block_names:
      fraction = self.executed_macs.mean() / self.dense_macs
      result['executed_fraction'] = float(fraction)
      result['block_density'] = dict(
        zip(self.block_names, self.densities.mean(0).tolist(), strict=True)
      )
      result['block_stage'] = dict(
        zip(self.block_names, self.stages, strict=True)
      )
    if self.macs.size:
      gmacs = self.macs / 1e9
      result['gmacs_mean'] = float(gmacs.mean())
      result['gmacs_p50'] = float(np.percentile(gmacs, 50))
      result['gmacs_p95'] = float(np.percentile(gmacs, 95))
    for name, values in zip(
      ('object_recall', 'background_density'), self.localization, strict=True
    ):
      if not np.isnan(values).all():
        result[name] = float(np.nanmean(values))
    return result


def make_predict(graphdef: nnx.GraphDef):
  """Returns a jitted prediction function.

  Its arguments are (params, model_state, images, key=None) and it returns
  (logits, masks). With a PRNG key, gates sample their decisions if the view is
  `deterministic=False, use_running_average=True`.

  Args:
    graphdef: graph definition of the model's evaluation view.
  """

  @jax.jit
  def predict(params, model_state, images, key=None):
    streams = {} if key is None else {'rngs': nnx.Rngs(gumbel=key)}
    return nnx.merge(graphdef, params, model_state)(images, **streams)

  return predict


def evaluate(
  predict: Predict,
  batches: Iterable[Mapping[str, jax.Array]],
  report=None,
) -> Evaluation:
  """Evaluates a network, counting every example once.

  Args:
    predict: function from images to (logits, masks).
    batches: batches with 'image', 'label', 'weight', and optionally
      'object_mask', such as `EvalBatches`. Examples of weight 0 are padding.
    report: the MAC report for one image, or None.

  Raises:
    ValueError: there are no examples.
    FloatingPointError: the loss of an example is not finite.
  """
  rows, start = [], 0
  for batch in batches:
    logits, masks = predict(batch['image'])
    rest = {name: batch[name] for name in batch if name != 'image'}
    batch, logits, masks = distributed.fetch((rest, logits, masks))
    real = np.asarray(batch['weight']) > 0
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    masks = jax.tree.map(np.asarray, masks)
    row = {
      'index': start + np.arange(len(real)),
      'label': np.asarray(batch['label']),
      'prediction': np.asarray(jnp.argmax(logits, -1)),
      'cross_entropy': np.asarray(loss, np.float64),
    }
    start += len(real)
    names = tuple(mask.name for mask in masks)
    stages = tuple(mask.stage for mask in masks)
    dense_macs = sum(mask.dense_macs() for mask in masks)
    objects = batch.get('object_mask')
    if objects is not None:
      objects = np.asarray(objects)
      row['object_share'] = objects.mean((1, 2))
    if masks:
      executed = [np.asarray(m.executed_macs(), np.float64) for m in masks]
      row['executed_macs'] = np.sum(executed, axis=0)
      row['densities'] = np.stack(
        [m.hard.mean(tuple(range(1, m.hard.ndim))) for m in masks], -1
      )
      if objects is not None:
        shares = [_object_shares(m.hard, objects) for m in masks]
        row['object_recall'], row['background_density'] = (
          np.stack(values, -1) for values in zip(*shares, strict=True)
        )
    if report is not None:
      row['macs'] = (
        report.executed(masks)
        if masks
        else np.full(len(real), float(report.total))
      )
    rows.append({name: value[real] for name, value in row.items()})
  if not rows or not sum(len(row['label']) for row in rows):
    raise ValueError('there are no examples to evaluate')

  def joined(name):
    return np.concatenate([row.get(name, np.zeros(0)) for row in rows])

  finite = np.isfinite(joined('cross_entropy'))
  if not finite.all():
    raise FloatingPointError(
      f'the loss of {(~finite).sum()} of {len(finite)} examples is not finite: '
      'weights or images are damaged, or too large'
    )

  return Evaluation(
    block_names=names,
    stages=stages,
    dense_macs=dense_macs,
    **{
      field.name: joined(field.name)
      for field in dataclasses.fields(Evaluation)
      if field.name not in ('block_names', 'stages', 'dense_macs')
    },
  )


def _object_shares(hard: np.ndarray, objects: np.ndarray):
  """Returns the fractions of object and background pixels that are active."""
  active = resize_nearest(hard, objects.shape[1:])
  inside = objects.sum((1, 2))
  outside = np.prod(objects.shape[1:]) - inside
  hits = (active * objects).sum((1, 2))
  rest = (active * ~objects).sum((1, 2))
  # The evaluation crop may cut off the object, or keep nothing else.
  recall = np.where(inside > 0, hits / np.maximum(inside, 1), np.nan)
  background = np.where(outside > 0, rest / np.maximum(outside, 1), np.nan)
  return recall, background


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
  """Returns the 95 % confidence interval of a proportion (Wilson, 1927)."""
  z = 1.959963984540054  # 97.5 % point of the normal distribution.
  share = successes / n
  center = share + z**2 / (2 * n)
  spread = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
  scale = 1 + z**2 / n
  return (center - spread) / scale, (center + spread) / scale
