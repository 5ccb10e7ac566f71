"""Collects the work that the front ends find into a report."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping

from dynconv_jax.macs import conventions, formulas, report


class ReportBuilder:
  """Collects the work of a network's operations into a `Report`."""

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
    """Adds work to a layer, unless the convention does not count it.

    Args:
      name: the layer's path in the model. Work with the same name is merged
        into one layer.
      work: from a function in `formulas`, times the number of executions.
      output_shape: shape of the operation's result, in the framework's layout.
      parameters: number of weights that this operation introduces. If a weight
        is used several times, pass it once.
      itemsize: bytes per element of the result; 0 if unknown.
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
    """Sets the parameters of the model, used or not.

    Args:
      by_module: {path: number of parameters that the module owns directly}, in
        the model's order. A parameter shared by several modules is listed under
        one of them.
      size: total size of the parameters in bytes; 0 if unknown.
    """
    self._parameters = dict(by_module)
    self._parameter_bytes = size

  def note(self, text: str) -> None:
    """Adds a sentence to show below the table; duplicates are dropped."""
    self._notes[text] = None

  def leave_out(self, operation: str, layer: str, reason: str = '') -> None:
    """Records an uncounted operation; warns once per operation name."""
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
    """Returns the report of everything added so far."""
    layers = self._layers
    if self._parameters is not None:
      # The model's own parameter counts win, however often a layer is used.
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
