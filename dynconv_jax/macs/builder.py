"""Gathers what the front ends find into a report."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping

from dynconv_jax.macs import conventions, formulas, report


class ReportBuilder:
  """Gathers the work of a network's operations into a `Report`."""

  def __init__(
    self, convention: str | conventions.Convention, padding: bool = True
  ):
    self._convention = conventions.get_convention(convention)
    self._padding = padding
    self._layers: dict[str, report.LayerMacs] = {}
    self._uncounted: dict[report.Uncounted, None] = {}
    self._notes: dict[str, None] = {}
    self._unpriced = 0
    self._parameters: Mapping[str, int] | None = None
    self._parameter_bytes = 0

  def add(
    self,
    name: str,
    work: formulas.Work,
    *,
    output_shape: Iterable[int] = (),
    parameters: int = 0,
    itemsize: int = 0,
  ) -> None:
    """Adds work to a layer; what the convention gives no price is left out.

    Args:
      name: the layer's path in the model. Work of one name is one layer.
      work: from a function of `formulas`, times how often it is done.
      output_shape: shape of the operation's result, in the framework's layout.
      parameters: elements of weights that this operation brings in; pass them
        once for a weight that is used several times.
      itemsize: bytes of an element of the result; 0 where it is not known.
    """
    macs = self._convention(work, self._padding)
    if not macs:
      self._unpriced += work.macs if self._padding else work.inside_macs
      return
    layer = report.LayerMacs(
      name,
      work.kind,
      tuple(output_shape),
      parameters,
      macs,
      work.positions,
      work.outputs,
      work.outputs * itemsize,
    )
    if name in self._layers:
      layer = report.merge(name, [self._layers[name], layer], dearest=False)
    self._layers[name] = layer

  def set_parameters(self, by_module: Mapping[str, int], size: int = 0) -> None:
    """Says what parameters the model has, used or not.

    Args:
      by_module: {path: elements of the parameters that the module holds
        itself}, in the model's order. A parameter that several modules share
        stands with one of them.
      size: of all of them in bytes; 0 where it is not known.
    """
    self._parameters = dict(by_module)
    self._parameter_bytes = size

  def note(self, text: str) -> None:
    """Adds a sentence that is shown below the table, once."""
    self._notes[text] = None

  def leave_out(self, operation: str, layer: str, reason: str = '') -> None:
    """Notes an operation that is not counted; warns once for each name."""
    entry = report.Uncounted(operation, layer)
    if all(entry.operation != other.operation for other in self._uncounted):
      warnings.warn(
        f'{operation} in {layer or "the network"} is not counted'
        + (f': {reason}' if reason else ''),
        report.UncountedWarning,
        stacklevel=3,
      )
    self._uncounted[entry] = None

  def build(self) -> report.Report:
    """Returns the report of all that was added."""
    layers = self._layers
    if self._parameters is not None:
      # What the model says of a layer holds, however often it is used.
      layers = {
        name: dataclasses.replace(
          layer, parameters=self._parameters.get(name, 0)
        )
        for name, layer in layers.items()
      }
    return report.Report(
      self._convention,
      self._padding,
      layers,
      tuple(self._uncounted),
      self._unpriced,
      self._parameters,
      self._parameter_bytes,
      tuple(self._notes),
    )
