"""What a network costs, layer by layer; weighted by execution masks."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynconv_jax.macs import conventions, formulas


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
    positions: output positions of its convolutions over the batch, N * h * w.
  """

  name: str
  kind: str
  output_shape: tuple[int, ...]
  parameters: int
  macs: int
  positions: int


class Uncounted(NamedTuple):
  """An operation whose cost is not known, and the layer that it stands in."""

  operation: str
  layer: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What a network costs for the arguments as given (the whole batch).

  Attributes:
    convention: the counting convention.
    padding: whether positions of input padding count as work.
    by_layer: {layer name: LayerMacs}, in order of execution.
    uncounted: the operations that are missing from the count.
  """

  convention: conventions.Convention
  padding: bool
  by_layer: Mapping[str, LayerMacs]
  uncounted: tuple[Uncounted, ...] = ()

  @property
  def total(self) -> int:
    """The sum over the layers."""
    return sum(layer.macs for layer in self.by_layer.values())

  @property
  def parameters(self) -> int:
    """The weights of the layers that are listed."""
    return sum(layer.parameters for layer in self.by_layer.values())

  def executed(self, masks: Sequence[Any]) -> np.ndarray:
    """Returns float64[N]: what each image costs where its masks execute.

    A layer that a mask names costs its share of active positions; every other
    layer its whole. Masks of ones give `total` over the batch exactly.

    Args:
      masks: `gating.mask.ExecutionMask`s: `hard` and `dilated`, [n, h, w] of
        {0, 1}, and the `layers` that they mask. n need not be the batch that
        was counted.

    Raises:
      ValueError: if a masked layer is not in the report, is masked twice, or
        does not have the mask's number of positions.
    """
    if not masks:
      raise ValueError('executed needs at least one mask; got none')
    masked = [(layer, mask) for mask in masks for layer in mask.layers]
    names = [layer.name for layer, _ in masked]
    if missing := [name for name in names if name not in self.by_layer]:
      raise ValueError(
        f'the masks name layers that the report does not have: {missing};'
        f' it has {list(self.by_layer)}'
      )
    if twice := sorted({name for name in names if names.count(name) > 1}):
      raise ValueError(f'layers masked more than once: {twice}')

    batches, executed = {}, 0
    for layer, mask in masked:
      active = np.asarray(mask.maps[layer.level])
      counted = self.by_layer[layer.name]
      size = int(np.prod(active.shape[1:]))
      if not counted.positions or counted.positions % size:
        raise ValueError(
          f'{layer.name} has {counted.positions} output positions, not a'
          f' multiple of the {active.shape[1:]} of its mask'
        )
      batches[layer.name] = counted.positions // size
      weights = active.sum(axis=(1, 2), dtype=np.float64)
      executed = executed + weights * counted.macs / counted.positions
    if len(set(batches.values())) > 1:
      raise ValueError(
        'the masks fit the layers at different batch sizes:'
        f' {batches}; were they made from images of another size?'
      )
    batch = next(iter(batches.values()))
    always = self.total - sum(self.by_layer[name].macs for name in names)
    return always / batch + executed

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
        name: _merge(name, group, dearest=True)
        for name, group in groups.items()
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
    """Returns the report as aligned text, with a line for the total."""
    header = (
      'name',
      'kind',
      'output shape',
      'parameters',
      self.convention.unit,
      'share',
    )
    lines = [
      (
        row['name'],
        row['kind'],
        'x'.join(map(str, row['output_shape'])),
        f'{row["parameters"]:,}',
        f'{row["macs"]:,}',
        f'{row["share"]:.1%}',
      )
      for row in self.rows(sort)
    ]
    lines.append(
      ('total', '', '', f'{self.parameters:,}', f'{self.total:,}', '100.0%')
    )
    widths = [max(map(len, column)) for column in zip(header, *lines)]  # noqa: B905
    text = [
      '  '.join(
        cell.ljust(width) if i < 3 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=True))
      ).rstrip()
      for line in (header, *lines)
    ]
    text.insert(1, '-' * (sum(widths) + 2 * (len(widths) - 1)))
    text.insert(-1, text[1])
    text += [
      f'not counted: {operation} in {layer or "the network"}'
      for operation, layer in self.uncounted
    ]
    return '\n'.join(text)

  def to_csv(self, sort: str = 'order') -> str:
    """Returns the rows as CSV text, without a total."""
    file = io.StringIO()
    fields = ('name', 'kind', 'output_shape', 'parameters', 'macs', 'share')
    writer = csv.DictWriter(file, fields, lineterminator='\n')
    writer.writeheader()
    for row in self.rows(sort):
      shape = 'x'.join(map(str, row['output_shape']))
      writer.writerow(row | {'output_shape': shape})
    return file.getvalue()

  def to_json(self, indent: int | None = None) -> str:
    """Returns {convention, unit, padding, total, by_layer, uncounted}."""
    document = {
      'convention': self.convention.name,
      'unit': self.convention.unit,
      'padding': self.padding,
      'total': self.total,
      'parameters': self.parameters,
      'by_layer': {row.pop('name'): row for row in self.rows()},
      'uncounted': [list(entry) for entry in self.uncounted],
    }
    return json.dumps(document, indent=indent)


class ReportBuilder:
  """Gathers the work of a network's operations into a `Report`."""

  def __init__(
    self, convention: str | conventions.Convention, padding: bool = True
  ):
    self._convention = conventions.get_convention(convention)
    self._padding = padding
    self._layers: dict[str, LayerMacs] = {}
    self._uncounted: dict[Uncounted, None] = {}

  def add(
    self,
    name: str,
    work: formulas.Work,
    *,
    output_shape: Iterable[int] = (),
    parameters: int = 0,
  ) -> None:
    """Adds work to a layer; what the convention gives no price is left out.

    Args:
      name: the layer's path in the model. Work of one name is one layer.
      work: from a function of `formulas`, times how often it is done.
      output_shape: shape of the operation's result, in the framework's layout.
      parameters: elements of weights that this operation brings in; pass them
        once for a weight that is used several times.
    """
    macs = self._convention(work, self._padding)
    if not macs:
      return
    layer = LayerMacs(
      name,
      work.kind,
      tuple(output_shape),
      parameters,
      macs,
      work.positions,
    )
    if name in self._layers:
      layer = _merge(name, [self._layers[name], layer], dearest=False)
    self._layers[name] = layer

  def leave_out(self, operation: str, layer: str, reason: str = '') -> None:
    """Notes an operation that is not counted; warns once for each name."""
    entry = Uncounted(operation, layer)
    if all(entry.operation != other.operation for other in self._uncounted):
      warnings.warn(
        f'{operation} in {layer or "the network"} is not counted'
        + (f': {reason}' if reason else ''),
        UncountedWarning,
        stacklevel=3,
      )
    self._uncounted[entry] = None

  def build(self) -> Report:
    """Returns the report of all that was added."""
    return Report(
      self._convention, self._padding, self._layers, tuple(self._uncounted)
    )


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


def _merge(name: str, layers: Sequence[LayerMacs], dearest: bool) -> LayerMacs:
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
    sum(layer.positions for layer in layers),
  )
