import numpy as np
import pytest
from PIL import Image

from dynconv_jax.masks import ExecutionMask, MaskedLayer
from dynconv_jax.plotting import ponder, style
from dynconv_jax.plotting.ponder import (
  overlay_ponder_map,
  plot_ponder_grid,
  ponder_cost_map,
  save_overlay,
)


def _mask(hard, dilated=None, macs=(3, 5)):
  hard = np.asarray(hard, np.float32)
  dilated = hard if dilated is None else np.asarray(dilated, np.float32)
  layers = (
    MaskedLayer('conv1', macs[0], level=1),
    MaskedLayer('conv2', macs[1], level=0),
  )
  return ExecutionMask((hard, dilated), 'b', layers)


def _random_masks(sizes, n=2, seed=0):
  rng = np.random.default_rng(seed)
  masks = []
  for i, (h, w, stride) in enumerate(sizes):
    hard = rng.integers(0, 2, (n, h, w))
    dilated = rng.integers(0, 2, (n, h * stride, w * stride))
    masks.append(_mask(hard, dilated, macs=(7 + i, 11 * (i + 1))))
  return masks


def _nearest(values, y, x, height, width):
  """Returns the value of the cell with the pixel's center, by fractions."""
  h, w = values.shape
  row = next(r for r in range(h) if (2 * y + 1) * h < (r + 1) * 2 * height)
  col = next(c for c in range(w) if (2 * x + 1) * w < (c + 1) * 2 * width)
  return values[row, col]


@pytest.mark.parametrize('image_shape', [(8, 8), (13, 9), (3, 2), (16, 24)])
@pytest.mark.parametrize('weighting', ['blocks', 'macs'])
def test_map_equals_a_loop_over_pixels(image_shape, weighting):
  masks = _random_masks([(4, 4, 2), (4, 4, 1), (3, 5, 2), (1, 1, 1)])
  got = ponder_cost_map(masks, image_shape, weighting)
  height, width = image_shape
  assert got.shape == (2, height, width)
  assert got.dtype == np.float32
  for n in range(2):
    for y in range(height):
      for x in range(width):
        done = total = 0
        for mask in masks:
          if weighting == 'blocks':
            parts = [(mask.hard[n], 1)]
          else:
            parts = [
              (mask.dilated[n], mask.layers[0].macs_per_position),
              (mask.hard[n], mask.layers[1].macs_per_position),
            ]
            parts = [(m, macs * m.size) for m, macs in parts]
          for values, weight in parts:
            done += weight * _nearest(values, y, x, height, width)
            total += weight
        assert got[n, y, x] == np.float32(done / total)


def test_mean_of_the_map_is_executed_over_dense_macs():
  masks = _random_masks([(4, 4, 2), (2, 2, 2), (1, 1, 1)], n=3)
  cost = ponder_cost_map(masks, (16, 16), 'macs')
  got = cost.mean(axis=(1, 2), dtype=np.float64)
  executed = sum(np.asarray(mask.executed_macs()) for mask in masks)
  dense = sum(mask.dense_macs() for mask in masks)
  np.testing.assert_allclose(got, executed / dense, rtol=1e-6)


@pytest.mark.parametrize('weighting', ['blocks', 'macs'])
def test_full_and_empty_masks_are_one_and_zero(weighting):
  ones = [_mask(np.ones((1, s, s))) for s in (7, 4, 3)]
  zeros = [_mask(np.zeros((1, s, s))) for s in (7, 4, 3)]
  assert np.all(ponder_cost_map(ones, (15, 15), weighting) == 1)
  assert np.all(ponder_cost_map(zeros, (15, 15), weighting) == 0)


def test_masks_are_not_changed():
  masks = _random_masks([(4, 4, 1), (4, 4, 1)])
  before = [(mask.hard.copy(), mask.dilated.copy()) for mask in masks]
  for weighting in ('blocks', 'macs'):
    ponder_cost_map(masks, (4, 4), weighting)
  for mask, (hard, dilated) in zip(masks, before, strict=True):
    np.testing.assert_array_equal(mask.hard, hard)
    np.testing.assert_array_equal(mask.dilated, dilated)


@pytest.mark.parametrize(
  ('masks', 'shape', 'weighting', 'message'),
  [
    ([], (4, 4), 'blocks', 'at least one execution mask; got none'),
    ([_mask(np.ones((1, 2, 2)))], (4,), 'blocks', r'\(H, W\); got \(4,\)'),
    ([_mask(np.ones((1, 2, 2)))], (0, 4), 'blocks', r'got \(0, 4\)'),
    ([_mask(np.ones((1, 2, 2)))], (4, 4), 'flops', "'macs'; got 'flops'"),
    (
      [_mask(np.ones((1, 2, 2))), _mask(np.ones((2, 2, 2)))],
      (4, 4),
      'blocks',
      r'the same N; got \[\(1, 2, 2\), \(2, 2, 2\)\]',
    ),
  ],
)
def test_bad_masks(masks, shape, weighting, message):
  with pytest.raises(ValueError, match=message):
    ponder_cost_map(masks, shape, weighting)


def _luma(image):
  return np.asarray(image, np.float64) @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize('grey', [0, 60, 128, 255])
def test_overlay_gets_brighter_with_the_cost(grey):
  image = np.full((1, 21, 3), grey, np.uint8)
  overlay = overlay_ponder_map(image, np.linspace(0, 1, 21)[None])
  assert overlay.dtype == np.uint8
  assert overlay.shape == image.shape
  assert np.all(np.diff(_luma(overlay)[0]) > 0)


@pytest.mark.parametrize('cost', [0.0, 0.5, 1.0])
def test_overlay_shows_the_image_at_any_cost(cost):
  image = np.repeat(np.arange(0, 256, 15, dtype=np.uint8), 3).reshape(1, -1, 3)
  overlay = overlay_ponder_map(image, np.full(image.shape[:2], cost))
  assert np.all(np.diff(_luma(overlay)[0]) > 0)


def test_limits_stretch_and_clip():
  image = np.full((1, 4, 3), 90, np.uint8)
  overlay = overlay_ponder_map(image, [[0.1, 0.2, 0.6, 0.9]], (0.2, 0.6))
  full = overlay_ponder_map(image, [[0, 0, 1, 1]])
  np.testing.assert_array_equal(overlay, full)


def test_what_was_not_seen_is_dark_and_grey():
  image = np.full((1, 2, 3), (200, 100, 50), np.uint8)
  overlay = overlay_ponder_map(image, [[np.nan, 0.0]])
  assert len(set(overlay[0, 0])) == 1
  assert _luma(overlay)[0, 0] < _luma(overlay)[0, 1]


@pytest.mark.parametrize(
  ('image', 'cost', 'limits', 'message'),
  [
    (np.zeros((2, 2, 3)), np.zeros((2, 2)), (0, 1), r'got float64\[2, 2, 3\]'),
    (np.zeros((2, 2), np.uint8), np.zeros((2, 2)), (0, 1), r'uint8\[2, 2\]'),
    (
      np.zeros((2, 3, 3), np.uint8),
      np.zeros((3, 2)),
      (0, 1),
      r'size of the image, \[2, 3\]; got \[3, 2\]',
    ),
    (
      np.zeros((2, 2, 3), np.uint8),
      np.zeros((2, 2)),
      (0.5, 0.5),
      r'low < high; got \(0.5, 0.5\)',
    ),
  ],
)
def test_bad_overlay(image, cost, limits, message):
  with pytest.raises(ValueError, match=message):
    overlay_ponder_map(image, cost, limits)


def test_saved_overlay_has_the_size_of_the_image(tmp_path):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (30, 50, 3), np.uint8)
  cost = np.array([[0.0, 1.0], [1.0, 0.0]])
  path = tmp_path / 'new' / 'overlay.png'
  save_overlay(path, image, cost, box=(10, 5, 40, 25))
  seen = np.full((30, 50), np.nan)
  seen[5:15, 10:25] = seen[15:25, 25:40] = 0
  seen[5:15, 25:40] = seen[15:25, 10:25] = 1
  with Image.open(path) as saved:
    np.testing.assert_array_equal(
      np.asarray(saved), overlay_ponder_map(image, seen)
    )
  assert [p.name for p in path.parent.iterdir()] == ['overlay.png']


def test_saved_overlay_covers_the_image_without_a_box(tmp_path):
  image = np.full((6, 4, 3), 99, np.uint8)
  save_overlay(tmp_path / 'a.png', image, [[0.3]])
  with Image.open(tmp_path / 'a.png') as saved:
    np.testing.assert_array_equal(
      np.asarray(saved), overlay_ponder_map(image, np.full((6, 4), 0.3))
    )


@pytest.mark.parametrize(
  ('name', 'cost', 'box', 'message'),
  [
    ('a.jpg', np.zeros((2, 2)), None, r"as \.png; got '.*a\.jpg'"),
    ('a.png', np.zeros((1, 2, 2)), None, r'got shape \(1, 2, 2\)'),
    ('a.png', np.zeros((2, 2)), (0, 0, 5, 4), r'4 x 6 pixels; got \(0, 0, 5'),
    ('a.png', np.zeros((2, 2)), (2, 0, 2, 4), r'got \(2, 0, 2, 4\)'),
  ],
)
def test_bad_saved_overlay(tmp_path, name, cost, box, message):
  with pytest.raises(ValueError, match=message):
    save_overlay(tmp_path / name, np.zeros((6, 4, 3), np.uint8), cost, box)
  assert not any(tmp_path.iterdir())


def test_grid_shows_each_image_beside_its_map(tmp_path):
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
  costs = rng.uniform(0.2, 0.7, (3, 8, 8))
  figure = plot_ponder_grid(
    images,
    costs,
    [0.0806, 0.1, 4.2],
    ['a', 'b\nnot d', 'c'],
    tmp_path / 'grid',
    2,
    label='share',
  )
  *axes, bar = figure.axes
  limits = costs.min(), costs.max()
  for i, (plain, lit) in enumerate(zip(axes[::2], axes[1::2], strict=True)):
    np.testing.assert_array_equal(plain.images[0].get_array(), images[i])
    np.testing.assert_array_equal(
      lit.images[0].get_array(),
      overlay_ponder_map(images[i], costs[i], limits),
    )
    left, right = plain.get_position(), lit.get_position()
    assert left.x1 < right.x0
    assert left.y0 == right.y0
    assert not lit.patches
  titles = [ax.get_title('left') for ax in axes[::2]]
  assert titles == ['a', 'b\nnot d', 'c']
  labels = [ax.get_title('right') for ax in axes[1::2]]
  assert labels == ['0.08 GMACs', '0.10 GMACs', '4.20 GMACs']
  assert bar.get_ylabel() == 'share'
  # Nothing overlaps: pairs, their titles, and the color bar.
  figure.canvas.draw()
  boxes = [ax.get_tightbbox() for ax in figure.axes]
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    assert figure.bbox.padded(1).count_contains(box.corners()) == 4
  assert bar.get_ylim() == pytest.approx(limits)
  assert (tmp_path / 'grid.png').exists()
  assert (tmp_path / 'grid.svg').exists()


def test_grid_outlines_objects(tmp_path, monkeypatch):
  monkeypatch.setattr(style, 'save_figure', lambda *unused: None)
  images = np.zeros((3, 6, 6, 3), np.uint8)
  objects = np.zeros((3, 6, 6), bool)
  objects[0, [1, 3], [2, 4]] = True  # rows 1 to 3, columns 2 to 4
  objects[2] = True
  figure = plot_ponder_grid(
    *(images, np.ones((3, 6, 6)), [1] * 3, ['a'] * 3, tmp_path / 'grid'),
    object_masks=objects,
  )
  first, empty, whole = (ax.patches for ax in figure.axes[1:6:2])
  assert {patch.get_bbox().bounds for patch in first} == {(1.5, 0.5, 3, 3)}
  assert not empty
  assert not whole


def test_grid_of_equal_costs_has_a_scale(tmp_path, monkeypatch):
  monkeypatch.setattr(style, 'save_figure', lambda *unused: None)
  images = np.zeros((1, 4, 4, 3), np.uint8)
  figure = plot_ponder_grid(
    images, np.full((1, 4, 4), 0.5), [1.0], ['a'], tmp_path / 'grid'
  )
  assert figure.axes[-1].get_ylim() == (0, 1)


def test_grid_sequences_must_match(tmp_path):
  images = np.zeros((2, 4, 4, 3), np.uint8)
  costs = np.zeros((2, 4, 4))
  with pytest.raises(ValueError, match=r'at least 1; got \[2, 2, 1, 2, 2\]'):
    plot_ponder_grid(images, costs, [1.0], ['a', 'b'], tmp_path / 'grid')
  with pytest.raises(ValueError, match=r'got \[0, 0, 0, 0, 0\]'):
    plot_ponder_grid([], [], [], [], tmp_path / 'grid')
  with pytest.raises(ValueError, match='columns must be at least 1; got 0'):
    plot_ponder_grid(images, costs, [1, 1], ['a', 'b'], tmp_path / 'grid', 0)


def test_nearest_by_hand():
  values = np.array([[1, 2, 3]])
  np.testing.assert_array_equal(
    ponder.resize_nearest(values, (1, 7)), [[1, 1, 2, 2, 2, 3, 3]]
  )
  np.testing.assert_array_equal(
    ponder.resize_nearest(values, (2, 1)), [[2], [2]]
  )
