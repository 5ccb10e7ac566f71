"""Reports of a network's cost by layer, optionally weighted by masks."""

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
  """The cost of one layer for the given arguments (the whole batch).

  Attributes:
    name: its path in the model, such as 'layer2.0.conv2'.
    kind: the kind of its heaviest operation, one of `formulas.KINDS`.
    output_shape: output shape of its first operation of that kind; for a
      group, of its most expensive layer.
    parameters: number of weights; shared weights count once.
    macs: its count in the report's convention (FLOPs for `flops`).
    positions: output positions over the batch: N * h * w for convolutions,
      N * tokens for linear layers; 0 if unknown.
    activations: elements in the outputs of its convolutions and matrix
      products.
    activation_bytes: size of `activations` in bytes; 0 if unknown.
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
  """An operation whose cost is unknown, and the layer that contains it."""

  operation: str
  layer: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
  """The cost of a network for the given arguments (the whole batch).

  Attributes:
    convention: the counting convention.
    padding: whether multiply-accumulates on input padding count.
    by_layer: {layer name: LayerMacs}, in order of execution.
    uncounted: the operations that are missing from the count.
    unpriced: multiply-accumulates that the convention does not count, such as
      matrix products in `conv`.
    parameters_by_module: {path: number of parameters that the module owns
      directly}, for all modules; None if only the weights of layers are known.
    parameter_bytes: size of the parameters in bytes; 0 if unknown.
    notes: sentences about how the network was counted.
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
    """The sum over all layers."""
    return sum(layer.macs for layer in self.by_layer.values())

  @property
  def parameters(self) -> int:
    """The model's parameters, or the weights of its layers if unknown."""
    if self.parameters_by_module is not None:
      return sum(self.parameters_by_module.values())
    return sum(layer.parameters for layer in self.by_layer.values())

  @property
  def activations(self) -> int:
    """Elements in the outputs of convolutions and matrix products."""
    return sum(layer.activations for layer in self.by_layer.values())

  @property
  def activation_bytes(self) -> int:
    """Size of `activations` in bytes; 0 if unknown."""
    return sum(layer.activation_bytes for layer in self.by_layer.values())

  def executed(
    self, masks: Sequence[Any], batch: int | None = None
  ) -> np.ndarray:
    """Returns the cost of each image if masks select where layers run.

    A masked layer costs its share of active positions. All other layers cost
    their full count. A product of attention (kind 'pairs') costs its share of
    active pairs, n_q * n_k. If all masks are ones, the result is exactly
    `total` divided by the batch size.

    Args:
      masks: `masks.ExecutionMask`s, with `maps` (each [n, h, w] or [n, tokens]
        of {0, 1}) and the `layers` that they mask (a name, the `level` of its
        map, and a `kind`, 'positions' or 'pairs'). n can differ from the batch
        size that was counted.
      batch: number of images that were counted; by default, inferred from the
        positions of the layers.

    Returns:
      float64[n], the count of each image.

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
      if not size:
        raise ValueError(
          f'the mask of {layer.name} has no positions; its shape is'
          f' {active.shape}'
        )
      weights = active.sum(axis=tuple(range(1, active.ndim)))
      pairs = getattr(layer, 'kind', 'positions') == 'pairs'
      if pairs:
        # These include all heads and sizes, so they do not tell the batch size.
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
          'the masks only name products of attention, which do not tell how'
          ' many images were counted; pass batch='
        )
      if len(set(batches.values())) > 1:
        raise ValueError(
          f'the layers and masks imply different batch sizes: {batches}; do the'
          ' masks belong to images of another size?'
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
    """Returns a report with layers merged by the first `depth` path elements.

    At depth 1, 'layer2.0.conv2' is part of 'layer2'. Masks use full layer
    names, so call `executed` on the original report.
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
    """Returns the rows of the table as dicts (name, kind, output_shape, ...).

    Args:
      sort: 'order' (of execution), 'name', 'macs' or 'parameters'; the last
        two sort in descending order.
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
    """Returns the layers as aligned text, with a total.

    Args:
      sort: as in `rows`.
    """
    return tables.layers(self, sort)

  def to_tree(self, depth: int | None = None) -> str:
    """Returns the modules as aligned text, indented by depth.

    The line of a module is the sum over everything inside it.

    Args:
      depth: number of levels to show; None for all.
    """
    if depth is not None and depth < 1:
      raise ValueError(f'depth must be at least 1; got {depth}')
    return tables.modules(self, depth)

  def __str__(self) -> str:
    """Returns the tree of modules, limited in depth to fit 60 rows."""
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
  """Warns about an operation whose work is missing from a report."""


class Distribution(NamedTuple):
  """Mean, percentiles and histogram of the MACs per image."""

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
    executed: float[N], MACs of each image; concatenate the results of batches.
    percentiles: in [0, 100].
    bins: number of histogram bins of equal width, from minimum to maximum.
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
  """Merges layers; the shape is that of the first or most expensive one."""
  kind = min((layer.kind for layer in layers), key=formulas.KINDS.index)
  alike = [layer for layer in layers if layer.kind == kind]
  shaped = max(alike, key=lambda layer: layer.macs) if dearest else alike[0]
  return LayerMacs(
    name,
    kind,
    shaped.output_shape,
    sum(layer.parameters for layer in layers),
    sum(layer.macs for layer in layers),
    # A mask selects among the positions of one kind.
    sum(layer.positions for layer in alike),
    sum(layer.activations for layer in layers),
    sum(layer.activation_bytes for layer in layers),
  )
