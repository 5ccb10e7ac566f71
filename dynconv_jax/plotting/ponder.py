"""Ponder-cost maps: where in an image the network computed."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dynconv_jax.files import replacing
from dynconv_jax.masks import ExecutionMask, resize_nearest
from dynconv_jax.plotting import style

# Its lightness rises strictly with the value, in grey print too.
_COLORMAP = 'inferno'
# The part of the color map that is used: its first shades are black and would
# hide the image where nothing was executed, its last are as pale as paper.
_FIRST_COLOR, _LAST_COLOR = 0.15, 0.93
# Share of a colour that is left on a black pixel: less, and the map is lost in
# dark images; more, and the image is lost in the map.
_OPACITY = 0.35
# Share of the plain grey image, which shows where the colours are dark.
_GREY_SHARE = 0.22
# Grey of the image on which the colour bar shows its colours.
_BAR_GREY = 190
# Brightness of what the network did not see.
_UNSEEN = 0.2
# Side of an image of the grid, in inches.
_CELL = 1.25
# Characters of a title beside the GMACs.
_TITLE_WIDTH = 24
# Of an image that are overlaid at a time.
_ROWS = 64
# Rec. 601 luma, the weights of Pillow's conversion to grey.
_LUMA = np.array([0.299, 0.587, 0.114])


def ponder_cost_map(
  masks: Sequence[ExecutionMask],
  image_shape: tuple[int, int],
  weighting: str = 'blocks',
) -> np.ndarray:
  """Returns float32[N, H, W] in [0, 1], the share of blocks executed there.

  The map of DynConv (arXiv 1912.03203, section 4) is the number of blocks
  executed at each position of the image; here it is divided by the number of
  gated blocks, so that 1 is a position where each of them ran. The masks are
  resized to the image by the nearest neighbor of each pixel's centre, and are
  not changed.

  Args:
    masks: as the model returns them.
    image_shape: (H, W) of the map, usually of the images the model was given.
    weighting: 'blocks' counts each block once. 'macs' counts each masked
      convolution by its MACs, on the mask that it runs on (the dilated one for
      a block's first): where H and W are multiples of every mask's size, the
      mean of the map is exactly executed over dense MACs.

  Raises:
    ValueError: if there is no mask, masks are of different batches, or
      `image_shape` or `weighting` is unknown.
  """
  if not masks:
    raise ValueError(
      'a ponder-cost map needs at least one execution mask; got none (a dense '
      'network has no masks)'
    )
  if len(image_shape) != 2 or min(image_shape) < 1:
    raise ValueError(f'image_shape must be (H, W); got {tuple(image_shape)}')
  if weighting not in ('blocks', 'macs'):
    raise ValueError(
      f"weighting must be one of 'blocks', 'macs'; got {weighting!r}"
    )
  terms = [
    (np.asarray(values, np.float64), weight)
    for mask in masks
    for values, weight in _terms(mask, weighting)
  ]
  shapes = [values.shape for values, _ in terms]
  if {len(shape) for shape in shapes} != {3} or len({s[0] for s in shapes}) > 1:
    raise ValueError(f'masks must be float[N, h, w] of one N; got {shapes}')
  total = sum(weight for _, weight in terms)
  # Masks of one size are added before they are resized, and into fresh memory.
  sums = {}
  for values, weight in terms:
    size = values.shape[1:]
    sums[size] = sums.get(size, 0) + weight * values
  cost = sum(resize_nearest(values, image_shape) for values in sums.values())
  return (cost / total).astype(np.float32)


def _terms(mask: ExecutionMask, weighting: str) -> list[tuple]:
  """Returns (float[N, h, w], its weight) for what one mask adds to a map."""
  if weighting == 'blocks':
    return [(mask.hard, 1)]
  terms = []
  for layer in mask.layers:
    values = mask.maps[layer.level]
    positions = values.shape[1] * values.shape[2]
    terms.append((values, layer.macs_per_position * positions))
  return terms


def overlay_ponder_map(
  image: np.ndarray,
  cost: np.ndarray,
  limits: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
  """Returns uint8[H, W, 3], the image lit where the network computed.

  The image in grey, and a colour map multiplied by it: a pixel
  gets strictly brighter with the cost at any grey of the image, and with the
  grey at any cost.

  Args:
    image: uint8[H, W, 3].
    cost: float[H, W]; NaN where the network did not see the image, which is
      shown dark and without colour.
    limits: the costs drawn darkest and brightest.

  Raises:
    ValueError: if image, cost or limits are not as above.
  """
  image, cost = np.asarray(image), np.asarray(cost, np.float64)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(
      f'image must be uint8[H, W, 3]; got {image.dtype}{list(image.shape)}'
    )
  if cost.shape != image.shape[:2]:
    raise ValueError(
      f'cost must have the size of the image, {list(image.shape[:2])}; got '
      f'{list(cost.shape)}'
    )
  low, high = limits
  if not low < high:
    raise ValueError(
      f'limits must be (low, high) with low < high; got {limits}'
    )
  overlay = np.empty_like(image)
  # By rows: a photo of 12 megapixels would take 1.7 GB of float64 at once.
  for start in range(0, len(image), _ROWS):
    rows = slice(start, start + _ROWS)
    overlay[rows] = _overlay(image[rows], cost[rows], low, high)
  return overlay


def _overlay(image, cost, low: float, high: float) -> np.ndarray:
  unseen = np.isnan(cost)
  level = np.clip((np.where(unseen, low, cost) - low) / (high - low), 0, 1)
  grey = (image @ _LUMA)[..., None]
  shade = _OPACITY + (1 - _OPACITY) * grey / 255
  hue = _FIRST_COLOR + (_LAST_COLOR - _FIRST_COLOR) * level
  color = 255 * matplotlib.colormaps[_COLORMAP](hue)[..., :3]
  overlay = _GREY_SHARE * grey + (1 - _GREY_SHARE) * shade * color
  seen_or_dim = np.where(unseen[..., None], _UNSEEN * grey, overlay)
  return np.rint(seen_or_dim).astype(np.uint8)


def save_overlay(
  path: str | os.PathLike,
  image: np.ndarray,
  cost: np.ndarray,
  box: tuple[int, int, int, int] | None = None,
  limits: tuple[float, float] = (0.0, 1.0),
) -> None:
  """Writes the overlay of a ponder-cost map as a PNG of the image's own size.

  Args:
    path: of the PNG; missing folders are made.
    image: uint8[H, W, 3], at its own size.
    cost: float[h, w] at the size that the network saw.
    box: (left, top, right, bottom) in pixels, the part of the image that the
      network saw, as in `PIL.Image.crop`; the whole image where None.
    limits: the costs drawn darkest and brightest.

  Raises:
    ValueError: if the path does not end in .png, the box is empty or outside
      the image, or image and cost are not as above.
  """
  path, image, cost = Path(path), np.asarray(image), np.asarray(cost)
  if path.suffix.lower() != '.png':
    raise ValueError(f'an overlay is written as .png; got {str(path)!r}')
  if cost.ndim != 2 or not cost.size:
    raise ValueError(f'cost must be float[h, w]; got shape {cost.shape}')
  height, width = image.shape[:2]
  left, top, right, bottom = box or (0, 0, width, height)
  if not (0 <= left < right <= width and 0 <= top < bottom <= height):
    raise ValueError(
      f'box must be (left, top, right, bottom) within the image of {width} x '
      f'{height} pixels; got {box}'
    )
  seen = np.full((height, width), np.nan)
  seen[top:bottom, left:right] = resize_nearest(
    cost, (bottom - top, right - left)
  )
  overlay = Image.fromarray(overlay_ponder_map(image, seen, limits))
  with replacing(path) as partial:
    overlay.save(partial, format='PNG')


@style.styled()
def plot_ponder_grid(
  images: Sequence[np.ndarray],
  cost_maps: Sequence[np.ndarray],
  gmacs: Sequence[float],
  titles: Sequence[str],
  path: str | os.PathLike,
  columns: int = 4,
  object_masks: Sequence[np.ndarray] | None = None,
  label: str = 'blocks executed (%)',
) -> Figure:
  """Draws each image beside the map of where the network computed in it.

  All maps share one scale, from the least to the greatest cost among them, that
  the color bar shows.

  Args:
    images: each uint8[H, W, 3].
    cost_maps: each float[H, W], from `ponder_cost_map`.
    gmacs: GMACs executed for each image.
    titles: one an image, such as its class.
    path: the figure is written as PNG and SVG; see `style.figure_paths`.
    columns: pairs of image and map side by side, at most.
    object_masks: each bool[H, W], whose bounding box is drawn on the map,
      unless it is empty or all of the image; None where there are none.
    label: what the color bar shows, in percent.

  Returns:
    The figure: axes 2 i and 2 i + 1 hold image i and its overlay.

  Raises:
    ValueError: if there is no image, the sequences differ in length, or an
      image and its map do not fit.
  """
  if object_masks is None:
    object_masks = [np.zeros((1, 1), bool)] * len(images)
  sequences = (images, cost_maps, gmacs, titles, object_masks)
  lengths = list(map(len, sequences))
  if lengths[0] < 1 or len(set(lengths)) > 1:
    raise ValueError(
      'images, cost_maps, gmacs, titles and object_masks must be of one '
      f'length, at least 1; got {lengths}'
    )
  if columns < 1:
    raise ValueError(f'columns must be at least 1; got {columns}')
  limits = _shared_limits(cost_maps)
  rows = math.ceil(len(images) / columns)
  columns = math.ceil(len(images) / rows)
  titles = [
    '\n'.join(textwrap.fill(line, _TITLE_WIDTH) for line in title.split('\n'))
    for title in titles
  ]
  lines = [1 + title.count('\n') for title in titles]
  # Inches: room for the titles of a row, its images, and the gap to the next.
  rooms = [
    0.1 + 0.14 * max(lines[row * columns : (row + 1) * columns])
    for row in range(rows)
  ]
  tops = np.cumsum(rooms) + _CELL * np.arange(rows)
  # Two images and the gap to the next pair.
  width, left, bar_width = 2 * _CELL + 0.2, 0.05, 0.75
  bottom = tops[-1] + _CELL
  total = (left + columns * width + bar_width, bottom + 0.05)
  decimals = max(0, 2 - math.floor(math.log10(max([*gmacs, 1e-6]))))
  figure = style.new_figure(*total)
  figure.set_layout_engine('none')

  def place(x: float, y: float, w: float, h: float):
    """Returns axes at inches from the left and the top."""
    down = total[1] - y - h
    return figure.add_axes(
      (x / total[0], down / total[1], w / total[0], h / total[1])
    )

  for i, (image, cost, macs, title, mask) in enumerate(
    zip(*sequences, strict=True)
  ):
    row, column = divmod(i, columns)
    x, y = left + column * width, tops[row]
    plain, lit = (
      place(x + j * (_CELL + 0.04), y, _CELL, _CELL) for j in (0, 1)
    )
    plain.imshow(image)
    lit.imshow(overlay_ponder_map(image, cost, limits))
    _draw_box(lit, np.asarray(mask, bool))
    plain.set_title(title, loc='left', fontsize=9, pad=3, linespacing=1.05)
    lit.set_title(
      f'{macs:.{decimals}f} GMACs',
      loc='right',
      fontsize=8,
      pad=3,
      color=style.GREY,
    )
    for ax in (plain, lit):
      ax.set(xticks=[], yticks=[])
      ax.spines[:].set_visible(False)
      ax.grid(False)
  bar = figure.colorbar(
    ScalarMappable(Normalize(*limits), _overlay_colors()),
    cax=place(left + columns * width, tops[0], 0.12, bottom - tops[0]),
    format=lambda value, _: f'{100 * value:.3g}',
    ticks=MaxNLocator(5),
  )
  bar.outline.set_visible(False)
  bar.set_label(label)
  style.save_figure(figure, path)
  return figure


def _draw_box(ax: Axes, mask: np.ndarray) -> None:
  """Draws the bounding box of a mask that covers a part of the image."""
  (ys,), (xs,) = (np.nonzero(mask.any(axis)) for axis in (1, 0))
  if not ys.size or (len(ys), len(xs)) == mask.shape:
    return
  for color, width in (('black', 2.4), ('white', 1.1)):
    ax.add_patch(
      Rectangle(
        (xs[0] - 0.5, ys[0] - 0.5),
        xs[-1] - xs[0] + 1,
        ys[-1] - ys[0] + 1,
        fill=False,
        edgecolor=color,
        linewidth=width,
      )
    )


def _overlay_colors() -> ListedColormap:
  """Returns the colours that an overlay has on a plain grey image."""
  grey = np.full((1, 256, 3), _BAR_GREY, np.uint8)
  (colors,) = overlay_ponder_map(grey, np.linspace(0, 1, 256)[None])
  return ListedColormap(colors / 255)


def _shared_limits(cost_maps: Sequence[np.ndarray]) -> tuple[float, float]:
  """Returns the least and greatest cost; (0, 1) where all are the same."""
  low = min(float(np.nanmin(cost)) for cost in cost_maps)
  high = max(float(np.nanmax(cost)) for cost in cost_maps)
  return (low, high) if low < high else (0.0, 1.0)
