"""What a network costs, layer by layer; weighted by execution masks."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynconv_jax.macs import conventions, formulas, tables


@dataclasses.dataclass(frozen=True)
class LayerMacs:
  """What one layer costs for the arguments as given (the whole batch).

  Attributes:
    name: its path in the model, such as 'layer2.0.conv2'.
    kind: the kind of its heaviest operation, one of `formulas.KINDS`.
    output_shape: shape of its first operation of that kind; of a group, of
      its dearest layer.
    parameters: elements of its weights, counted once.
    macs: its price by the report's convention (FLOPs by the convention
      `flops`).
    positions: output positions over the batch: N * h * w of convolutions,
      N * tokens of linear layers; 0 where they are not known.
    activations: elements that its convolutions and matrix products output.
    activation_bytes: their size in bytes; 0 where it is not known.
  """

  name: str
  kind: str
  output_shape: tuple[int, ...]
  parameters: int
  macs: int
  positions: int
  activations: int = 0
  activation_bytes: int = 0


class Uncounted(NamedTuple):
  """An operation whose cost is not known, and the layer that it stands in."""

  operation: str
  layer: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
  """What a network costs for the arguments as given (the whole batch).

  Attributes:
    convention: the counting convention.
    padding: whether positions of input padding count as work.
    by_layer: {layer name: LayerMacs}, in order of execution.
    uncounted: the operations that are missing from the count.
    unpriced: multiply-accumulates that the convention leaves out: those of
      matrix products in `conv`.
    parameters_by_module: {path: elements of the parameters that the module
      holds itself}, of all modules; None where only the weights of the layers
      are known.
    parameter_bytes: size of the parameters in bytes; 0 where it is not known.
    notes: what else is to be known about the count, one sentence each.
  """

  convention: conventions.Convention
  padding: bool
  by_layer: Mapping[str, LayerMacs]
  uncounted: tuple[Uncounted, ...] = ()
  unpriced: int = 0
  parameters_by_module: Mapping[str, int] | None = None
  parameter_bytes: int = 0
  notes: tuple[str, ...] = ()

  @property
  def total(self) -> int:
    """The sum over the layers."""
    return sum(layer.macs for layer in self.by_layer.values())

  @property
  def parameters(self) -> int:
    """The model's parameters; the weights of the layers if it is unknown."""
    if self.parameters_by_module is not None:
      return sum(self.parameters_by_module.values())
    return sum(layer.parameters for layer in self.by_layer.values())

  @property
  def activations(self) -> int:
    """Elements that convolutions and matrix products output."""
    return sum(layer.activations for layer in self.by_layer.values())

  @property
  def activation_bytes(self) -> int:
    """Size of `activations` in bytes; 0 where it is not known."""
    return sum(layer.activation_bytes for layer in self.by_layer.values())

  def executed(
    self, masks: Sequence[Any], batch: int | None = None
  ) -> np.ndarray:
    """Returns float64[N]: what each image costs where its masks execute.

    A layer that a mask names costs its share of active positions; every other
    layer its whole. A product of attention (kind 'pairs') costs its share of
    active pairs, n_q * n_k. Masks of ones give `total` over the batch exactly.

    Args:
      masks: `masks.ExecutionMask`s: `maps`, each [n, h, w] or [n, tokens] of
        {0, 1}, and the `layers` that they mask: a name, the `level` of its map
        and a `kind`, 'positions' or 'pairs'. n need not be the batch that was
        counted.
      batch: images that were counted; None: as the positions of the layers
        tell.

    Raises:
      ValueError: if a masked layer is not in the report, is masked twice, or
        does not have the mask's number of positions.
    """
    if not masks:
      raise ValueError('executed needs at least one mask; got none')
    if batch is not None and batch < 1:
      raise ValueError(f'batch must be at least 1; got {batch}')
    masked = [(layer, mask) for mask in masks for layer in mask.layers]
    self._check_names([layer.name for layer, _ in masked])

    batches, shares = {}, {}
    for layer, mask in masked:
      active = np.asarray(mask.maps[layer.level], np.float64)
      size, counted = math.prod(active.shape[1:]), self.by_layer[layer.name]
      weights = active.sum(axis=tuple(range(1, active.ndim)))
      pairs = getattr(layer, 'kind', 'positions') == 'pairs'
      if pairs:
        # Of all heads and sizes: they do not tell the batch.
        weights, size, number = weights**2, size**2, counted.macs
        exact = self.convention.unit == 'MACs'
      else:
        number, exact = counted.positions, True
        batches[layer.name] = number // size
      if not number or (exact and number % (size * (batch or 1))):
        images = f' for {batch} images' if batch else ''
        raise ValueError(
          f'{layer.name} has {number} {"MACs" if pairs else "output positions"}'
          f'{images}, not a multiple of the {active.shape[1:]} of its mask'
          f'{" squared" * pairs}'
        )
      shares[layer.name] = weights, size
    if batch is None:
      if not batches:
        raise ValueError(
          'the masks name products of attention alone, which do not tell how'
          ' many images were counted; give batch='
        )
      if len(set(batches.values())) > 1:
        raise ValueError(
          'the masks fit the layers at different batch sizes:'
          f' {batches}; were they made from images of another size?'
        )
      batch = next(iter(batches.values()))

    executed = 0
    for name, (weights, size) in shares.items():
      executed = executed + weights * self.by_layer[name].macs / (size * batch)
    always = self.total - sum(self.by_layer[name].macs for name in shares)
    return always / batch + executed

  def _check_names(self, names: Sequence[str]) -> None:
    """Raises an error unless masks name layers of the report, each once."""
    if missing := [name for name in names if name not in self.by_layer]:
      hint = f'; {note}' if (note := tables.unpriced(self)) else ''
      raise ValueError(
        f'the masks name layers that the report does not have: {missing};'
        f' it has {list(self.by_layer)}{hint}'
      )
    if twice := sorted({name for name in names if names.count(name) > 1}):
      raise ValueError(f'layers masked more than once: {twice}')

  def grouped(self, depth: int) -> Report:
    """Returns the report with layers merged by the first `depth` names.

    At depth 1, 'layer2.0.conv2' is part of 'layer2'. Masks name layers in
    full, so `executed` is for the report that was not grouped.
    """
    if depth < 1:
      raise ValueError(f'depth must be at least 1; got {depth}')
    groups: dict[str, list[LayerMacs]] = {}
    for name, layer in self.by_layer.items():
      groups.setdefault('.'.join(name.split('.')[:depth]), []).append(layer)
    return dataclasses.replace(
      self,
      by_layer={
        name: merge(name, group, dearest=True) for name, group in groups.items()
      },
    )

  def rows(self, sort: str = 'order') -> list[dict[str, Any]]:
    """Returns the table's rows: name, kind, output_shape, parameters, ...

    Args:
      sort: 'order' (of execution), 'name', 'macs' or 'parameters', the last
        two from the largest.
    """
    if sort not in ('order', 'name', 'macs', 'parameters'):
      raise ValueError(
        f"sort must be 'order', 'name', 'macs' or 'parameters'; got {sort!r}"
      )
    total = self.total or 1
    rows = [
      {
        'name': layer.name,
        'kind': layer.kind,
        'output_shape': layer.output_shape,
        'parameters': layer.parameters,
        'activations': layer.activations,
        'macs': layer.macs,
        'share': layer.macs / total,
      }
      for layer in self.by_layer.values()
    ]
    if sort == 'name':
      rows.sort(key=lambda row: row['name'])
    elif sort != 'order':
      rows.sort(key=lambda row: row[sort], reverse=True)
    return rows

  def to_table(self, sort: str = 'order') -> str:
    """Returns the layers as aligned text, with a line for the total.

    Args:
      sort: as in `rows`.
    """
    return tables.layers(self, sort)

  def to_tree(self, depth: int | None = None) -> str:
    """Returns the modules as aligned text, each indented below its parent.

    A module's line has the sum of what is inside of it.

    Args:
      depth: levels to show; None: all.
    """
    if depth is not None and depth < 1:
      raise ValueError(f'depth must be at least 1; got {depth}')
    return tables.modules(self, depth)

  def __str__(self) -> str:
    """Returns the tree of modules, as deep as 60 rows allow."""
    return tables.modules_that_fit(self)

  def __repr__(self) -> str:
    return tables.one_line(self)

  def _repr_html_(self) -> str:
    """Returns the tree of modules as an HTML table, for notebooks."""
    return tables.modules_as_html(self)

  def to_csv(self, sort: str = 'order') -> str:
    """Returns the rows as CSV text, without a total."""
    file = io.StringIO()
    fields = ('name', 'kind', 'output_shape', 'parameters', 'activations')
    writer = csv.DictWriter(
      file, (*fields, 'macs', 'share'), lineterminator='\n'
    )
    writer.writeheader()
    for row in self.rows(sort):
      shape = 'x'.join(map(str, row['output_shape']))
      writer.writerow(row | {'output_shape': shape})
    return file.getvalue()

  def to_json(self, indent: int | None = None) -> str:
    """Returns {convention, unit, padding, total, by_layer, uncounted, ...}."""
    document = {
      'convention': self.convention.name,
      'unit': self.convention.unit,
      'padding': self.padding,
      'total': self.total,
      'unpriced': self.unpriced,
      'parameters': self.parameters,
      'parameter_bytes': self.parameter_bytes,
      'activations': self.activations,
      'activation_bytes': self.activation_bytes,
      'by_layer': {row.pop('name'): row for row in self.rows()},
      'uncounted': [list(entry) for entry in self.uncounted],
      'notes': list(self.notes),
    }
    return json.dumps(document, indent=indent)


class UncountedWarning(UserWarning):
  """An operation does work that the report does not contain."""


class Distribution(NamedTuple):
  """MACs an image: their mean, percentiles and histogram."""

  mean: float
  percentiles: dict[float, float]
  histogram: np.ndarray
  bin_edges: np.ndarray


def distribution(
  executed: np.ndarray,
  percentiles: Sequence[float] = (5, 50, 95),
  bins: int = 20,
) -> Distribution:
  """Returns the distribution of `Report.executed` over images.

  Args:
    executed: float[N], MACs of each image; batches are concatenated.
    percentiles: in [0, 100].
    bins: of the histogram, equally wide from the least to the most.
  """
  executed = np.asarray(executed, np.float64)
  if executed.ndim != 1 or not executed.size:
    raise ValueError(
      f'executed must be float[N] with N > 0; got shape {executed.shape}'
    )
  counts, edges = np.histogram(executed, bins)
  values = np.percentile(executed, percentiles)
  return Distribution(
    float(executed.mean()),
    dict(zip(percentiles, map(float, values), strict=True)),
    counts,
    edges,
  )


def merge(name: str, layers: Sequence[LayerMacs], dearest: bool) -> LayerMacs:
  """Returns layers as one, shaped as the first or dearest of its kind."""
  kind = min((layer.kind for layer in layers), key=formulas.KINDS.index)
  alike = [layer for layer in layers if layer.kind == kind]
  shaped = max(alike, key=lambda layer: layer.macs) if dearest else alike[0]
  return LayerMacs(
    name,
    kind,
    shaped.output_shape,
    sum(layer.parameters for layer in layers),
    sum(layer.macs for layer in layers),
    # A mask selects from the positions of one kind.
    sum(layer.positions for layer in alike),
    sum(layer.activations for layer in layers),
    sum(layer.activation_bytes for layer in layers),
  )
