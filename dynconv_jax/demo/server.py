"""Local server of the demo page, which runs networks in JAX.

It uses Python's http.server, because the page is for one user at a time. It
shares its files with the static page and needs no other packages.
"""

from __future__ import annotations

import errno
import importlib.resources
import json
import mimetypes
import threading
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from absl import logging

from dynconv_jax.data.decode import CorruptImageError, decode_image
from dynconv_jax.demo.networks import (
  MAX_BYTES,
  MAX_PIXELS,
  TIMED_CALLS,
  DemoNetwork,
  check_size,
)

Example = tuple[str, bytes]

_SIGNATURES = {b'\x89PNG': '.png', b'RIFF': '.webp'}
_CHUNK = 2**16


def page_files() -> dict[str, bytes]:
  """Returns the files of the page by name."""
  folder = importlib.resources.files(__package__) / 'page'
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def describe(
  networks: Sequence[dict[str, Any]],
  examples: Sequence[Example],
  **backend: Any,
) -> tuple[dict[str, Any], dict[str, bytes]]:
  """Returns the content of networks.json, and the example images by path.

  Args:
    networks: descriptions of the networks.
    examples: name and content of each image.
    **backend: additional entries for the page's backend.
  """
  files, shown = {}, []
  for i, (name, data) in enumerate(examples):
    path = f'examples/{i}{_SIGNATURES.get(data[:4], ".jpg")}'
    files[path] = data
    shown.append({'name': name, 'path': path})
  return {
    'networks': list(networks),
    'examples': shown,
    'max_bytes': MAX_BYTES,
    'max_pixels': MAX_PIXELS,
    'timed_calls': TIMED_CALLS,
    **backend,
  }, files


class Server(ThreadingHTTPServer):
  """Server of the demo page.

  The constructor opens the port, so that a port in use is an error before the
  networks are loaded. `start` serves the page.

  Args:
    port: port to listen on; 0: any free port.
    host: address to listen on. The default accepts connections from this
      machine only.

  Attributes:
    url: URL of the page.
    networks: networks by name.
    files: contents of the served files by path.
    lock: held while a network runs.

  Raises:
    OSError: the port is in use or not allowed, or the address does not exist.
  """

  daemon_threads = True

  def __init__(self, port: int = 8000, host: str = '127.0.0.1'):
    try:
      super().__init__((host, port), _Handler)
    except OSError as error:
      reason = error.strerror or error
      if error.errno == errno.EADDRINUSE:
        reason = 'it is in use; choose another, or 0 for any free port'
      raise OSError(f'cannot listen on port {port} of {host}: {reason}') from (
        error
      )
    self.url = f'http://{host}:{self.server_address[1]}/'
    self.networks: dict[str, DemoNetwork] = {}
    self.files: dict[str, bytes] = {}
    # Only one network runs at a time, so that timing is meaningful.
    self.lock = threading.Lock()

  def start(
    self,
    networks: Sequence[DemoNetwork],
    examples: Sequence[Example] = (),
    *,
    warm_up: bool = True,
  ) -> None:
    """Serves until `shutdown` is called.

    Args:
      networks: the networks on the page.
      examples: name and content of each example image.
      warm_up: whether to compile the networks in the background.
    """
    self.networks = {network.name: network for network in networks}
    description, pictures = describe(
      [network.description for network in networks], examples, backend='server'
    )
    self.files = {**page_files(), **pictures}
    self.files['networks.json'] = json.dumps(description).encode()
    if warm_up:
      threading.Thread(target=self._warm_up, daemon=True).start()
    self.serve_forever()

  def _warm_up(self) -> None:
    for network in self.networks.values():
      with self.lock:
        network.warm_up()


class _RequestError(Exception):
  """An invalid request, with its HTTP status."""

  def __init__(self, status: HTTPStatus, message: str):
    super().__init__(message)
    self.status = status


class _Handler(BaseHTTPRequestHandler):
  server: Server
  protocol_version = 'HTTP/1.1'
  timeout = 60

  def do_GET(self):
    path = urllib.parse.urlsplit(self.path).path.lstrip('/') or 'index.html'
    if path not in self.server.files:
      self._reply_error(HTTPStatus.NOT_FOUND, f'there is no {path}')
      return
    kind, _ = mimetypes.guess_type(path)
    self._reply(HTTPStatus.OK, self.server.files[path], kind)

  def do_POST(self):
    try:
      result = self._predict()
    except _RequestError as error:
      self._reply_error(error.status, str(error))
    except Exception as error:
      logging.exception('a prediction failed')
      self._reply_error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
    else:
      self._reply(
        HTTPStatus.OK, json.dumps(result).encode(), 'application/json'
      )

  def _predict(self) -> dict[str, Any]:
    data = self._body()
    url = urllib.parse.urlsplit(self.path)
    if url.path != '/predict':
      raise _RequestError(HTTPStatus.NOT_FOUND, f'there is no {url.path}')
    (name,) = urllib.parse.parse_qs(url.query).get('network', [''])[:1]
    if name not in self.server.networks:
      raise _RequestError(
        HTTPStatus.NOT_FOUND,
        f'unknown network {name!r}; allowed: {", ".join(self.server.networks)}',
      )
    try:
      check_size(data, 'photograph')
      image = decode_image(data, 'photograph')
    except CorruptImageError as error:
      raise _RequestError(
        HTTPStatus.BAD_REQUEST, f'cannot use the photograph: {error.reason}'
      ) from error
    with self.server.lock:
      return self.server.networks[name].predict(image)

  def _body(self) -> bytes:
    """Returns the body of the request.

    Raises:
      _RequestError: the body is too long or has no Content-Length.
    """
    length = self.headers.get('Content-Length', '')
    if not length.isdigit():
      self.close_connection = True
      raise _RequestError(
        HTTPStatus.LENGTH_REQUIRED, 'the request must have a Content-Length'
      )
    left = int(length)
    if left <= MAX_BYTES:
      return self.rfile.read(left)
    self.close_connection = True
    # Read the whole body, because clients ignore replies while they send.
    while left > 0 and (chunk := self.rfile.read(min(left, _CHUNK))):
      left -= len(chunk)
    raise _RequestError(
      HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
      f'the photograph has {int(length) / 1e6:.0f} MB; at most '
      f'{MAX_BYTES // 10**6} MB are allowed',
    )

  def _reply_error(self, status: HTTPStatus, message: str) -> None:
    body = json.dumps({'error': message}).encode()
    self._reply(status, body, 'application/json')

  def _reply(self, status: HTTPStatus, body: bytes, kind: str | None) -> None:
    self.send_response(status)
    self.send_header('Content-Type', kind or 'application/octet-stream')
    self.send_header('Content-Length', str(len(body)))
    self.send_header('Cache-Control', 'no-cache')
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, format, *args):
    logging.debug(format, *args)
