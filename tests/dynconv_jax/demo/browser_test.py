"""Tests of the page in a headless Chromium, with both of its back ends.

Needs Playwright and a Chromium. The static page's runtime is fetched with npm,
or taken from the folder named by ONNXRUNTIME_WEB: `dist` of the package.
"""

import functools
import http.server
import io
import os
import shutil
import subprocess
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from dynconv_jax.data.decode import evaluation_box
from dynconv_jax.demo import Server, export_web
from dynconv_jax.demo.web import RUNTIME_FILES, RUNTIME_URL, RUNTIME_VERSION
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.plotting import overlay_ponder_map, ponder_cost_map, style

sync_api = pytest.importorskip(
  'playwright.sync_api', reason='pip install dynconv_jax[browser]'
)
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not CHROMIUM, reason='apt-get install chromium'),
]

# In milliseconds; includes the compilation of networks.
TIMEOUT = 300_000


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as playwright:
    # The root user of a container has no sandbox.
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=['--no-sandbox']
    )
    yield browser
    browser.close()


@pytest.fixture
def page(browser):
  """A page that turns console errors into test failures."""
  page, complaints = browser.new_page(), []
  page.set_default_timeout(TIMEOUT)
  page.on('pageerror', lambda error: complaints.append(str(error)))
  page.on(
    'console',
    lambda message: (
      complaints.append(message.text)
      if message.type in ('error', 'warning')
      else None
    ),
  )
  yield page
  page.close()
  assert complaints == []


@pytest.mark.parametrize(
  ('theme', 'background'),
  [('light', style.WHITE), ('dark', style.DARK[style.WHITE])],
)
def test_svg_figures_follow_the_theme(page, tmp_path, theme, background):
  figure = style.new_figure(2, 1)
  figure.add_subplot().set_xlabel('x', color=style.INK)
  _, svg = style.save_figure(figure, tmp_path / 'figure')
  page.emulate_media(color_scheme=theme)
  page.goto(svg.as_uri())
  corner = Image.open(io.BytesIO(page.screenshot())).convert('RGB')
  red, green, blue = corner.getpixel((1, 1))
  assert f'#{red:02x}{green:02x}{blue:02x}' == background


@pytest.fixture(scope='module')
def served(networks):
  with Server(port=0) as server:
    thread = threading.Thread(
      target=server.start, args=(networks,), kwargs={'warm_up': False}
    )
    thread.start()
    yield server.url
    server.shutdown()
    thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture(scope='module')
def site(networks, photograph_file, tmp_path_factory):
  """The address of the static page."""
  pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
  folder = tmp_path_factory.mktemp('site')
  examples = [('club_sandwich', photograph_file.read_bytes())]
  export_web(networks, folder, examples)
  handler = functools.partial(_Quiet, directory=folder)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f'http://127.0.0.1:{server.server_address[1]}/'
    server.shutdown()
    thread.join()


@pytest.fixture(scope='module')
def runtime(tmp_path_factory):
  """The folder of onnxruntime-web's files."""
  if 'ONNXRUNTIME_WEB' in os.environ:
    return os.environ['ONNXRUNTIME_WEB']
  if not shutil.which('npm'):
    pytest.skip('npm fetches onnxruntime-web')
  folder = tmp_path_factory.mktemp('runtime')
  package = f'onnxruntime-web@{RUNTIME_VERSION}'
  packed = subprocess.run(
    ['npm', 'pack', '--silent', package], cwd=folder, check=False
  )
  if packed.returncode:
    pytest.skip(f'npm cannot fetch {package}')
  (archive,) = folder.glob('*.tgz')
  with tarfile.open(archive) as tar:
    for name in RUNTIME_FILES:
      content = tar.extractfile(f'package/dist/{name}').read()
      (folder / name).write_bytes(content)
  return folder


@pytest.fixture
def static_page(page, site, runtime):
  """The static page, with a folder in place of the CDN."""

  def fulfill(route):
    name = route.request.url.removeprefix(RUNTIME_URL)
    route.fulfill(
      path=os.path.join(runtime, name),
      headers={
        'Access-Control-Allow-Origin': '*',
        'Content-Type': (
          'text/javascript' if name.endswith('.mjs') else 'application/wasm'
        ),
      },
    )

  page.route(f'{RUNTIME_URL}**', fulfill)
  page.goto(site)
  return page


def _upload(page, path):
  """Uploads a photograph and waits for the result and the timings."""
  page.set_input_files('#file', path)
  page.wait_for_selector('#result:not(.stale) #times li')


def _check_result(page, network, photograph):
  """Checks that the page shows the network's results; returns them."""
  expected = network.predict(photograph)
  probability = max(expected['probabilities'])
  name = network.run.class_names[np.argmax(expected['probabilities'])]
  assert page.inner_text('#class') == name.replace('_', ' ')
  assert page.inner_text('#probability') == f'{100 * probability:.1f} %'
  gmacs = float(f'{expected["macs"] / 1e9:.3g}')
  assert float(page.inner_text('#gmacs').removesuffix(' GMACs')) == gmacs
  labels = page.locator('#block-list .label').all_inner_texts()
  blocks = [block['name'] for block in network.blocks]
  assert labels == ['Photo', 'All blocks', *blocks] * bool(blocks)
  shares = page.locator('#block-list .value').all_inner_texts()[2:]
  for share, mask in zip(shares, expected['masks'], strict=True):
    density = mask.count('1') / len(mask)
    assert abs(float(share.removesuffix(' %')) - 100 * density) <= 0.5
  return expected


def _pixels(page):
  """Returns the large canvas as uint8[h, w, 3]."""
  values = page.evaluate(
    """() => {
      const canvas = document.querySelector('#map');
      const {width, height} = canvas;
      const {data} = canvas.getContext('2d').getImageData(0, 0, width, height);
      return [height, width, Array.from(data)];
    }"""
  )
  return np.array(values[2], np.uint8).reshape(*values[:2], 4)[..., :3]


def _saturated(pixels):
  """Returns the share of colored pixels."""
  return np.mean(np.ptp(pixels.astype(int), axis=-1) > 25)


def test_a_photograph_is_uploaded(
  page, served, networks, photograph, photograph_file
):
  page.goto(served)
  assert page.is_hidden('#result') and page.is_hidden('#examples')
  _upload(page, photograph_file)
  _check_result(page, networks[0], photograph)
  assert page.locator('#times li').count() == 2
  assert 'of them ran at a position' in page.inner_text('#caption')
  # Each view draws a different picture.
  views = [_pixels(page)]
  assert views[0].shape == (665, 960, 3) and _saturated(views[0]) > 0.3
  for label in ('Photo', networks[0].blocks[0]['name']):
    page.locator('#block-list label', has_text=label).click()
    views.append(_pixels(page))
    assert np.abs(views[-1].astype(int) - views[-2]).mean() > 5
  assert 'of 24 × 24 positions' in page.inner_text('#caption')


def test_the_slider_picks_the_nearest_budget(
  page, served, networks, photograph, photograph_file
):
  page.goto(served)
  _upload(page, photograph_file)
  slider = page.locator('#budget')
  assert (slider.get_attribute('min'), slider.get_attribute('max')) == (
    '0.25',
    '0.75',
  )
  with page.expect_response('**/predict?network=high'):
    slider.fill('0.6')
  page.wait_for_selector('#result:not(.stale) #times li')
  assert page.input_value('#network') == 'high'
  assert page.input_value('#budget') == '0.75'
  _check_result(page, networks[1], photograph)
  # Networks without gates have no budget, no masks, and a single time.
  page.select_option('#network', 'dense')
  page.wait_for_selector('#result:not(.stale) #times li')
  _check_result(page, networks[2], photograph)
  assert page.is_hidden('#budget') and page.is_hidden('#blocks')
  assert page.locator('#times li').count() == 1
  assert 'computes everywhere' in page.inner_text('#caption')


def test_a_photograph_is_dropped(
  page, served, networks, photograph, photograph_file
):
  page.goto(served)
  data = list(photograph_file.read_bytes())
  transfer = page.evaluate_handle(
    """data => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(data)], 'dropped.png'));
      return transfer;
    }""",
    data,
  )
  page.dispatch_event('#drop', 'drop', {'dataTransfer': transfer})
  page.wait_for_selector('#result:not(.stale) #times li')
  _check_result(page, networks[0], photograph)


def test_bad_files_have_one_message(
  page, served, photograph_file, png, tmp_path
):
  page.goto(served)
  text, huge = tmp_path / 'notes.txt', tmp_path / 'huge.png'
  text.write_text('no picture')
  huge.write_bytes(png(9000, 8000))
  for path, message in (
    (text, 'notes.txt is not a picture that this browser can read'),
    (huge, '9000 × 8000 pixels; at most 64 megapixels are allowed'),
  ):
    page.set_input_files('#file', path)
    page.wait_for_selector('#error:not([hidden])')
    page.wait_for_function(
      "text => document.querySelector('#error').textContent.includes(text)",
      arg=message,
    )
    assert page.is_hidden('#result')
  _upload(page, photograph_file)
  assert page.is_hidden('#error')


def test_the_static_page(static_page, networks, photograph, photograph_file):
  page = static_page
  _upload(page, photograph_file)
  _check_result(page, networks[0], photograph)
  assert page.locator('#times li').count() == 2
  assert 'in this browser' in page.inner_text('#times-note')
  page.select_option('#network', 'dense')
  page.wait_for_selector('#result:not(.stale) #times li')
  _check_result(page, networks[2], photograph)
  page.select_option('#network', 'high')
  page.wait_for_selector('#result:not(.stale) #times li')
  _check_result(page, networks[1], photograph)


def test_an_example_of_the_static_page(static_page, networks, photograph):
  static_page.get_by_title('club sandwich').click()
  static_page.wait_for_selector('#result:not(.stale) #times li')
  _check_result(static_page, networks[0], photograph)


def test_the_browser_prepares_images_as_python(static_page, photograph):
  """Enlarges, shrinks, and crops as Pillow does."""
  from PIL import Image

  image = Image.fromarray(photograph)
  rgba = np.asarray(image.convert('RGBA')).ravel().tolist()
  for box, size in (
    ((10.3, 5.8, 60.2, 55.1), 24),
    ((0.0, 0.0, 104.0, 72.0), 31),
    ((40.5, 20.25, 48.5, 28.0), 24),
  ):
    got = static_page.evaluate(
      """async ([data, box, size]) => {
        const {resample} = await import('./web.js');
        return Array.from(resample({data, width: 104, height: 72}, box, size));
      }""",
      [rgba, box, size],
    )
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(np.reshape(got, (size, size, 3)), resized)


def test_the_page_draws_as_python(page, served):
  """Boxes, ponder costs and colors equal the library's."""
  page.goto(served)
  rng = np.random.default_rng(0)
  sizes = [(640, 480), (333, 500), (24, 24), (1000, 37), (225, 224), (27, 54)]
  for size, ratio in ((24, 256 / 224), (192, 256 / 224), (32, 1.0)):
    got = page.evaluate(
      """async ([sizes, network]) => {
        const {seenBox} = await import('./draw.js');
        return sizes.map(([w, h]) => seenBox(w, h, network));
      }""",
      [sizes, {'image_size': size, 'short_side': round(size * ratio)}],
    )
    for box, (width, height) in zip(got, sizes, strict=True):
      expected = evaluation_box(width, height, size, ratio)
      limits = (width, height) * 2
      np.testing.assert_allclose(box, np.clip(expected, 0, limits), rtol=1e-12)
  maps = [rng.integers(0, 2, (1, *s)) for s in ((6, 6), (12, 12), (5, 7))]
  masks = [ExecutionMask((m,), str(i)) for i, m in enumerate(maps)]
  image = rng.integers(0, 256, (24, 24, 3), np.uint8)
  rgba = np.dstack([image, np.full((24, 24), 255, np.uint8)])
  cost, colors = page.evaluate(
    """async ([masks, data]) => {
      const {ponderCost, overlay} = await import('./draw.js');
      const cost = ponderCost(masks, 24);
      overlay({data, width: 24, height: 24}, cost, 24, [0, 0, 24, 24]);
      return [Array.from(cost), data];
    }""",
    [
      [
        {'size': m.shape[1:], 'values': ''.join(map(str, m.ravel().tolist()))}
        for m in maps
      ],
      rgba.ravel().tolist(),
    ],
  )
  expected = ponder_cost_map(masks, (24, 24))[0]
  np.testing.assert_allclose(np.reshape(cost, (24, 24)), expected, rtol=1e-6)
  colors = np.reshape(colors, (24, 24, 4))[..., :3]
  drawn = overlay_ponder_map(image, expected).astype(float)
  # The page interpolates between thirteen colors of the map.
  assert np.abs(colors - drawn).max() < 4


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_phone_needs_no_sideways_scrolling(
  browser, served, photograph_file, scheme
):
  with browser.new_context(
    viewport={'width': 360, 'height': 740}, color_scheme=scheme
  ) as context:
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(served)
    _upload(page, photograph_file)
    width = page.evaluate('document.documentElement.scrollWidth')
    background = page.evaluate(
      'getComputedStyle(document.documentElement).backgroundColor'
    )
  assert width <= 360
  level = sum(map(int, background[4:-1].split(','))) / 3
  assert level > 200 if scheme == 'light' else level < 50
