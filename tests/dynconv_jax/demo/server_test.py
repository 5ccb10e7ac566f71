"""Tests of the page's server: its responses and errors."""

import http.client
import json
import threading
import urllib.parse

import pytest

from dynconv_jax.demo import networks as networks_lib
from dynconv_jax.demo import server as server_lib
from dynconv_jax.demo.server import Server, page_files


@pytest.fixture(scope='module')
def server(networks, photograph_file):
  with Server(port=0) as server:
    examples = [('club_sandwich', photograph_file.read_bytes())]
    thread = threading.Thread(
      target=server.start, args=(networks, examples), kwargs={'warm_up': False}
    )
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def ask(server):
  """Returns the status, type and body of the response to a request."""
  host = urllib.parse.urlsplit(server.url).netloc
  connection = http.client.HTTPConnection(host, timeout=300)

  def send(method, path, body=None, headers=None):
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    kind, data = response.getheader('Content-Type'), response.read()
    if kind == 'application/json':
      data = json.loads(data)
    return response.status, kind, data

  yield send
  connection.close()


def test_the_page_and_its_files(ask):
  status, kind, page = ask('GET', '/')
  assert (status, kind) == (200, 'text/html')
  for name, content in page_files().items():
    status, kind, data = ask('GET', f'/{name}?any')
    assert (status, data) == (200, content)
    # Browsers reject modules of any other type.
    if name.endswith('.js'):
      assert kind == 'text/javascript'
  assert b'page.js' in page


def test_networks_and_examples(ask, networks, photograph_file):
  status, _, description = ask('GET', '/networks.json')
  assert status == 200
  assert description['networks'] == [n.description for n in networks]
  assert description['backend'] == 'server'
  (example,) = description['examples']
  assert example['name'] == 'club_sandwich'
  status, kind, data = ask('GET', f'/{example["path"]}')
  assert (status, kind) == (200, 'image/png')
  assert data == photograph_file.read_bytes()


def test_a_photograph_is_classified(ask, networks, photograph, photograph_file):
  data = photograph_file.read_bytes()
  status, _, result = ask('POST', '/predict?network=low', data)
  assert status == 200
  expected = networks[0].predict(photograph)
  for name in ('probabilities', 'macs', 'masks'):
    assert result[name] == expected[name]


def test_one_connection_takes_several_requests(ask, png):
  for _ in range(2):
    status, _, answer = ask('POST', '/predict?network=low', b'no picture')
    assert status == 400
    assert answer == {
      'error': 'cannot use the photograph: not a JPEG, PNG, or WebP image'
    }
  assert ask('GET', '/page.css')[0] == 200


@pytest.mark.parametrize(
  ('path', 'status', 'message'),
  [
    ('/predict?network=low', 400, 'cannot use the photograph: the file is emp'),
    ('/predict?network=x', 404, "unknown network 'x'; allowed: low, high, den"),
    ('/predict', 404, "unknown network ''; allowed: low, high, dense"),
    ('/other', 404, 'there is no /other'),
  ],
)
def test_errors(ask, path, status, message):
  got, _, answer = ask('POST', path, b'')
  assert got == status and answer['error'].startswith(message)


def test_no_other_files(ask):
  for path in ('/none', '/../server.py', '/%2e%2e/server.py', '//etc/passwd'):
    status, _, answer = ask('GET', path)
    assert status == 404 and answer['error'].startswith('there is no ')


def test_a_huge_picture(ask, png):
  status, _, answer = ask('POST', '/predict?network=low', png(10000, 8000))
  assert status == 400
  assert answer['error'] == (
    'cannot use the photograph: 10000 x 8000 pixels; at most 64 megapixels are '
    'allowed'
  )


def test_a_huge_file(ask, monkeypatch):
  monkeypatch.setattr(server_lib, 'MAX_BYTES', 2_000_000)
  status, _, answer = ask('POST', '/predict?network=low', bytes(3_000_000))
  assert status == 413
  assert answer['error'] == (
    'the photograph has 3 MB; at most 2 MB are allowed'
  )


def test_a_request_of_unknown_length(ask):
  headers = {'Content-Length': 'many'}
  status, _, answer = ask('POST', '/predict?network=low', b'', headers)
  assert status == 411 and 'Content-Length' in answer['error']


def test_a_network_that_is_broken(ask, monkeypatch, photograph_file):
  def predict(self, image):
    raise FloatingPointError('the logits of low are not finite')

  monkeypatch.setattr(networks_lib.DemoNetwork, 'predict', predict)
  data = photograph_file.read_bytes()
  status, _, answer = ask('POST', '/predict?network=low', data)
  assert status == 500
  assert answer == {'error': 'the logits of low are not finite'}


def test_a_busy_port(server):
  port = server.server_address[1]
  with pytest.raises(OSError, match=f'port {port} of 127.0.0.1: it is in use'):
    Server(port)


def test_an_address_of_another_machine():
  with pytest.raises(OSError, match='cannot listen on port 0 of 192.0.2.1: '):
    Server(0, '192.0.2.1')
