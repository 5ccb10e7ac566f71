"""Tests of the demo programs: their errors, and one export."""

import json
import socket

import pytest


def test_a_busy_port_is_told_before_networks_are_loaded(program, tmp_path):
  with socket.create_server(('127.0.0.1', 0)) as busy:
    port = busy.getsockname()[1]
    with pytest.raises(OSError, match=f'port {port} of 127.0.0.1: it is in'):
      program('demo', f'--workdir={tmp_path}', f'--port={port}')


def test_errors_of_the_demo(program, tmp_path):
  with pytest.raises(FileNotFoundError, match='is not the workdir of a run'):
    program('demo', f'--workdir={tmp_path}', '--port=0')
  with pytest.raises(ValueError, match='unknown arguments: photo.jpg'):
    program('demo', 'photo.jpg', f'--workdir={tmp_path}')


def test_errors_of_the_export(program, tmp_path):
  pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
  given = (f'--workdir={tmp_path}', f'--output={tmp_path}')
  (tmp_path / 'thesis.tex').touch()
  with pytest.raises(ValueError, match='contains other files'):
    program('export_web', *given)
  given = (f'--workdir={tmp_path}', f'--output={tmp_path / "site"}')
  with pytest.raises(FileNotFoundError, match='onnxruntime-web@'):
    program('export_web', *given, f'--runtime={tmp_path}')
  with pytest.raises(FileNotFoundError, match='is not the workdir of a run'):
    program('export_web', *given)
  assert not (tmp_path / 'site').exists()


def test_a_trained_network_becomes_a_page(program, dynconv_run, tmp_path):
  pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
  site = tmp_path / 'site'
  printed = program(
    'export_web', f'--workdir={dynconv_run}', f'--output={site}', '--examples=3'
  )
  files = [path for path in site.rglob('*') if path.is_file()]
  size = sum(path.stat().st_size for path in files)
  assert printed == f'wrote {site}: {len(files)} files, {size / 1e6:.1f} MB\n'
  description = json.loads((site / 'networks.json').read_text())
  assert [n['name'] for n in description['networks']] == ['dynconv']
  assert len(description['examples']) == 3
