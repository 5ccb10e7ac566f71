"""Ponder-cost maps, which show where in an image a network computes."""

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

# Its lightness increases strictly with the value, also in grayscale.
_COLORMAP = 'inferno'
# Range of the colormap that is used. Its first colors are black and would hide
# the image where nothing was executed; its last are almost white.
_FIRST_COLOR, _LAST_COLOR = 0.15, 0.93
# Fraction of a color that remains on a black pixel. Lower values hide the map
# in dark images, higher values hide the image.
_OPACITY = 0.35
# Fraction of the plain gray image, which remains visible under dark colors.
_GREY_SHARE = 0.22
# Gray level on which the color bar shows its colors.
_BAR_GREY = 190
# Brightness of the part of the image that the network did not see.
_UNSEEN = 0.2
# Side of an image in the grid, in inches.
_CELL = 1.25
# Maximum characters per line of a title.
_TITLE_WIDTH = 24
# Number of image rows that are overlaid at a time.
_ROWS = 64
# Rec. 601 luma, the weights of Pillow's conversion to grayscale.
_LUMA = np.array([0.299, 0.587, 0.114])


def ponder_cost_map(
  masks: Sequence[ExecutionMask],
  image_shape: tuple[int, int],
  weighting: str = 'blocks',
) -> np.ndarray:
  """Returns the fraction of blocks executed at each position of images.

  DynConv's map (arXiv 1912.03203, section 4) is the number of blocks executed
  at each position. This map is also divided by the number of gated blocks, so 1
  means that all of them ran. Masks are resized with nearest-neighbor sampling
  at pixel centers.

  Args:
    masks: execution masks from the model.
    image_shape: (H, W) of the map, usually that of the model's input.
    weighting: 'blocks' gives each block the same weight. 'macs' weights each
      masked convolution by its MACs and uses its own mask (dilated for the
      first convolution of a block). If H and W are multiples of all mask sizes,
      the mean of the map is then exactly executed over dense MACs.

  Returns:
    float32[N, H, W] in [0, 1].

  Raises:
    ValueError: there are no masks, masks have different batch sizes, or
      `image_shape` or `weighting` is invalid.
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
    raise ValueError(
      f'masks must be float[N, h, w] with the same N; got {shapes}'
    )
  total = sum(weight for _, weight in terms)
  # Add masks of the same size before resizing them.
  sums = {}
  for values, weight in terms:
    size = values.shape[1:]
    sums[size] = sums.get(size, 0) + weight * values
  cost = sum(resize_nearest(values, image_shape) for values in sums.values())
  return (cost / total).astype(np.float32)


def _terms(mask: ExecutionMask, weighting: str) -> list[tuple]:
  """Returns the terms (float[N, h, w], weight) that a mask adds to a map."""
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
  """Returns an image overlaid with its ponder-cost map, as uint8[H, W, 3].

  The overlay multiplies the grayscale image with the map's colors. A pixel is
  strictly brighter for higher cost and for a brighter image.

  Args:
    image: uint8[H, W, 3].
    cost: float[H, W], NaN where the network did not see the image. These pixels
      are dark and gray.
    limits: (lowest, highest) cost of the color scale.

  Raises:
    ValueError: image, cost, or limits are invalid.
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
  # Process blocks of rows. All of a 12-megapixel photo would take 1.7 GB.
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
  """Writes an overlaid ponder-cost map as a PNG with the size of the image.

  Args:
    path: path of the PNG. Missing folders are created.
    image: uint8[H, W, 3].
    cost: float[h, w], at any size.
    box: (left, top, right, bottom) in pixels, as in `PIL.Image.crop`, of the
      part of the image that the network saw. None: the whole image.
    limits: (lowest, highest) cost of the color scale.

  Raises:
    ValueError: the path does not end in .png, the box is empty or outside the
      image, or image, cost, or limits are invalid.
  """
  path, image, cost = Path(path), np.asarray(image), np.asarray(cost)
  if path.suffix.lower() != '.png':
    raise ValueError(f'overlays are written as .png; got {str(path)!r}')
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
  """Plots images next to their overlaid ponder-cost maps.

  All maps share one color scale, from the lowest to the highest cost.

  Args:
    images: images as uint8[H, W, 3].
    cost_maps: maps as float[H, W], from `ponder_cost_map`.
    gmacs: executed GMACs of each image.
    titles: title of each image, such as its class.
    path: path of the figure, written as PNG and SVG; see `style.figure_paths`.
    columns: maximum number of pairs of image and map in a row.
    object_masks: bool[H, W] of each image. Its bounding box is drawn on the
      map, unless the mask is empty or its box is the whole image. None: no
      object masks.
    label: label of the color bar, in percent.

  Returns:
    The figure. Axes 2 i and 2 i + 1 show image i and its overlay.

  Raises:
    ValueError: there are no images, the sequences differ in length, or an image
      and its map do not match.
  """
  if object_masks is None:
    object_masks = [np.zeros((1, 1), bool)] * len(images)
  sequences = (images, cost_maps, gmacs, titles, object_masks)
  lengths = list(map(len, sequences))
  if lengths[0] < 1 or len(set(lengths)) > 1:
    raise ValueError(
      'images, cost_maps, gmacs, titles, and object_masks must have the same '
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
  # Height in inches of the titles of each row and the gap above them.
  rooms = [
    0.1 + 0.14 * max(lines[row * columns : (row + 1) * columns])
    for row in range(rows)
  ]
  tops = np.cumsum(rooms) + _CELL * np.arange(rows)
  # Width in inches of two images and the gap to the next pair.
  width, left, bar_width = 2 * _CELL + 0.2, 0.05, 0.75
  bottom = tops[-1] + _CELL
  total = (left + columns * width + bar_width, bottom + 0.05)
  decimals = max(0, 2 - math.floor(math.log10(max([*gmacs, 1e-6]))))
  figure = style.new_figure(*total)
  figure.set_layout_engine('none')

  def place(x: float, y: float, w: float, h: float):
    """Returns axes at a position in inches from the top left."""
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
  """Draws the bounding box of a mask, unless it is empty or the whole image."""
  (ys,), (xs,) = (np.nonzero(mask.any(axis)) for axis in (1, 0))
  if not ys.size or (len(ys), len(xs)) == mask.shape:
    return
  # Not exactly black and white, which dark themes replace.
  for color, width in (('#010101', 2.4), ('#fefefe', 1.1)):
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
  """Returns the colors of an overlay on a plain gray image."""
  grey = np.full((1, 256, 3), _BAR_GREY, np.uint8)
  (colors,) = overlay_ponder_map(grey, np.linspace(0, 1, 256)[None])
  return ListedColormap(colors / 255)


def _shared_limits(cost_maps: Sequence[np.ndarray]) -> tuple[float, float]:
  """Returns the lowest and highest cost, or (0, 1) if all are equal."""
  low = min(float(np.nanmin(cost)) for cost in cost_maps)
  high = max(float(np.nanmax(cost)) for cost in cost_maps)
  return (low, high) if low < high else (0.0, 1.0)
