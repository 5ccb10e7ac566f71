"""Formats a report as text or HTML: a table of layers or a module tree."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
  from dynconv_jax.macs.report import Report

# Maximum number of rows of a printed tree.
_ROWS = 60


class _Module(NamedTuple):
  """A module: its own kind and shape, and sums over everything inside it."""

  kind: str
  output_shape: tuple[int, ...]
  parameters: int
  macs: int


def layers(report: Report, sort: str = 'order') -> str:
  """Returns the layers as aligned text, with a total."""
  lines = []
  rest = report.parameters
  for row in report.rows(sort):
    layer = report.by_layer[row['name']]
    rest -= layer.parameters
    lines.append(_line(report, row['name'], layer))
  if rest:
    lines.append(('all else', '', '', quantity(rest), '0', '0.0%'))
  return _text(report, 'name', lines)


def modules(report: Report, depth: int | None = None) -> str:
  """Returns the modules as aligned text, indented by depth."""
  lines = [
    _line(report, '  ' * (level - 1) + name, module)
    for level, name, module in _tree(report)
    if depth is None or level <= depth
  ]
  return _text(report, 'module', lines)


def modules_that_fit(report: Report) -> str:
  """Returns the modules as text, limited in depth to fit `_ROWS` rows."""
  levels = [level for level, _, _ in _tree(report)]
  depth = deepest = max(levels, default=1)
  while depth > 1 and sum(level <= depth for level in levels) > _ROWS:
    depth -= 1
  text = modules(report, depth)
  if depth < deepest:
    text += f'\nmodules to depth {depth} of {deepest}; to_tree() shows all'
  return text


def modules_as_html(report: Report) -> str:
  """Returns the modules as an HTML table."""
  lines = [
    (f'padding-left: {level}em', _line(report, name, module))
    for level, name, module in _tree(report)
  ]
  lines.append(('font-weight: bold', _total(report)))
  cells = [
    f'<td style="text-align: left; {style}">{html.escape(line[0])}</td>'
    + ''.join(f'<td>{html.escape(cell)}</td>' for cell in line[1:])
    for style, line in lines
  ]
  head = ''.join(f'<th>{cell}</th>' for cell in _header(report, 'module'))
  body = ''.join(f'<tr>{row}</tr>' for row in cells)
  foot = '<br>'.join(map(html.escape, _footer(report)))
  return (
    f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    f'<p>{foot}</p>'
  )


def one_line(report: Report) -> str:
  """Returns the total, and the number of uncounted operations, in one line."""
  count = len(report.uncounted)
  missing = f', {count} operations not counted' if count else ''
  if not report.total and report.unpriced:
    missing += f"; 'conv+linear' counts {quantity(report.unpriced)}"
  total = f'{quantity(report.total)} {report.convention.unit}'
  return (
    f'Report({report.convention.name!r}: {total} in {len(report.by_layer)}'
    f' layers{missing})'
  )


def unpriced(report: Report) -> str:
  """Returns what the convention does not count, '' if nothing."""
  if not report.unpriced:
    return ''
  return (
    f'the convention {report.convention.name!r} leaves out'
    f' {quantity(report.unpriced)} MACs of matrix products;'
    " 'conv+linear' counts them"
  )


def quantity(number: int, unit: str = '') -> str:
  """Formats a count with four digits: '960', '12.35 k', '4.087 G'."""
  if number < 1000:
    return f'{number} {unit}'.rstrip()
  value, prefixes = number / 1000, 'kMGTPE'
  while value >= 999.95 and len(prefixes) > 1:
    value, prefixes = value / 1000, prefixes[1:]
  return f'{value:.{max(4 - len(str(int(value))), 0)}f} {prefixes[0]}{unit}'


def _tree(report: Report) -> list[tuple[int, str, _Module]]:
  """Returns (depth, name in its parent, module), in depth-first order."""
  held = report.parameters_by_module
  found = {
    name: _Module(layer.kind, layer.output_shape, layer.parameters, layer.macs)
    for name, layer in report.by_layer.items()
  }
  for name in held or ():
    found.setdefault(name, _Module('', (), held[name], 0))
  nodes: dict[tuple[str, ...], _Module] = {}
  for name, module in found.items():
    path = tuple(name.split('.')) if name else ('(itself)',)
    for length in range(1, len(path) + 1):
      own = length == len(path)
      before = nodes.get(path[:length], _Module('', (), 0, 0))
      nodes[path[:length]] = _Module(
        module.kind if own else before.kind,
        module.output_shape if own else before.output_shape,
        before.parameters + module.parameters,
        before.macs + module.macs,
      )
  children: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
  for path in nodes:
    children.setdefault(path[:-1], []).append(path)
  ordered, stack = [], children.get((), [])[::-1]
  while stack:
    path = stack.pop()
    ordered.append((len(path), path[-1], nodes[path]))
    stack += children.get(path, [])[::-1]
  return ordered


def _line(report: Report, name: str, layer) -> tuple[str, ...]:
  return (
    name,
    layer.kind,
    'x'.join(map(str, layer.output_shape)),
    quantity(layer.parameters),
    quantity(layer.macs),
    f'{layer.macs / (report.total or 1):.1%}',
  )


def _header(report: Report, first: str) -> tuple[str, ...]:
  unit = report.convention.unit
  return first, 'kind', 'output shape', 'parameters', unit, 'share'


def _total(report: Report) -> tuple[str, ...]:
  whole = '100.0%' if report.total else '0.0%'
  numbers = quantity(report.parameters), quantity(report.total)
  return ('total', '', '', *numbers, whole)


def _text(report: Report, first: str, lines: Sequence[tuple[str, ...]]) -> str:
  lines = [_header(report, first), *lines, _total(report)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = [
    '  '.join(
      cell.ljust(width) if i < 3 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
  text.insert(1, '-' * (sum(widths) + 2 * (len(widths) - 1)))
  text.insert(-1, text[1])
  return '\n'.join([*text, *_footer(report)])


def _footer(report: Report) -> list[str]:
  """Returns the lines below a table: memory, notes and uncounted operations."""
  sizes = [
    f'{name} {quantity(count)} ({quantity(size, "B")})'
    for name, count, size in (
      ('parameters', report.parameters, report.parameter_bytes),
      ('activations', report.activations, report.activation_bytes),
    )
    if size
  ]
  lines = [f'convention: {report.convention.name}']
  lines += [f'memory: {", ".join(sizes)}'] if sizes else []
  lines += [note] if (note := unpriced(report)) else []
  lines += report.notes
  return lines + [
    f'not counted: {operation} in {layer or "the network"}'
    for operation, layer in report.uncounted
  ]
