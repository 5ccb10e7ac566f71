"""Tests of weight files: hostile, damaged, half precision, partly written."""

import argparse
import json
import os
import pickle
import struct
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from dynconv_jax import files
from dynconv_jax.interop import read_state_dict, write_safetensors

_ARRAYS = {
  'fc.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'bn1.num_batches_tracked': np.array(3),
}


def _safetensors(path, dtype, shape, data):
  """Writes a file according to the published layout, without the package."""
  header = {
    'x': {'dtype': dtype, 'shape': shape, 'data_offsets': [0, len(data)]}
  }
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
  return path


@pytest.fixture
def torch():
  return pytest.importorskip('torch', reason='PyTorch is not installed')


def test_safetensors_are_written_whole_and_read_back(tmp_path):
  path = tmp_path / 'a' / 'w.safetensors'
  write_safetensors(
    path, {**_ARRAYS, 't': _ARRAYS['fc.weight'].T}, {'by': 'me'}
  )
  assert [p.name for p in path.parent.iterdir()] == ['w.safetensors']
  data = path.read_bytes()
  size = struct.unpack('<Q', data[:8])[0]
  header = json.loads(data[8 : 8 + size])
  assert header['__metadata__'] == {'format': 'pt', 'by': 'me'}
  assert all(
    (8 + size + array['data_offsets'][0]) % 4 == 0
    for name, array in header.items()
    if name != '__metadata__'
  )
  assert size % 8 == 0
  # A transposed array is stored in memory in its original order.
  begin, end = header['t']['data_offsets']
  transposed = np.frombuffer(data[8 + size :][begin:end], np.float32)
  np.testing.assert_array_equal(transposed, [0, 3, 1, 4, 2, 5])
  loaded = read_state_dict(path)
  assert loaded.keys() == {*_ARRAYS, 't'}
  for name, array in _ARRAYS.items():
    assert loaded[name].dtype == array.dtype
    np.testing.assert_array_equal(loaded[name], array)


def test_pytorch_reads_what_is_written(tmp_path, torch):
  from safetensors.torch import load_file

  path = tmp_path / 'w.safetensors'
  write_safetensors(path, _ARRAYS)
  loaded = load_file(path)
  for name, array in _ARRAYS.items():
    np.testing.assert_array_equal(loaded[name].numpy(), array)


def test_half_precision_in_safetensors(tmp_path):
  # 1.5 and -2 as bits of bfloat16 and IEEE half.
  bits = struct.pack('<HH', 0x3FC0, 0xC000)
  loaded = read_state_dict(
    _safetensors(tmp_path / 'b.safetensors', 'BF16', [2], bits)
  )
  assert loaded['x'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(loaded['x'].astype(np.float32), [1.5, -2])
  bits = struct.pack('<HH', 0x3E00, 0xC000)
  loaded = read_state_dict(
    _safetensors(tmp_path / 'h.safetensors', 'F16', [2], bits)
  )
  np.testing.assert_array_equal(loaded['x'], np.array([1.5, -2], np.float16))


def test_a_type_that_numpy_has_not(tmp_path):
  path = _safetensors(tmp_path / 'f.safetensors', 'F8_E4M3', [2], b'\0\0')
  with pytest.raises(
    ValueError, match=r'f\.safetensors contains entries of an unsup'
  ):
    read_state_dict(path)


@pytest.mark.parametrize('suffix', ['safetensors', 'pth', 'pt'])
@pytest.mark.parametrize(
  'content', [b'', b'no weights', b'\x80\x02garbage', b'PK\x03\x04']
)
def test_damaged_files(tmp_path, suffix, content):
  if suffix != 'safetensors':
    pytest.importorskip('torch', reason='PyTorch is not installed')
  path = tmp_path / f'w.{suffix}'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=rf'w\.{suffix}'):
    read_state_dict(path)


@pytest.mark.parametrize(
  ('content', 'message'),
  [(b'', 'it is empty$'), (b'no weights', "it starts with b'no'$")],
)
def test_files_that_pytorch_did_not_write(tmp_path, torch, content, message):
  path = tmp_path / 'w.pth'
  path.write_bytes(content)
  with pytest.raises(
    ValueError, match=f'torch.save did not write it; {message}'
  ):
    read_state_dict(path)


def test_a_truncated_file_of_pytorchs(tmp_path, torch):
  path = tmp_path / 'w.pth'
  torch.save({'x': torch.zeros(1000)}, path)
  path.write_bytes(path.read_bytes()[:-600])
  with pytest.raises(ValueError, match=r'cannot read .*w\.pth'):
    read_state_dict(path)


def test_a_flipped_bit_in_a_file_of_pytorchs(tmp_path, torch):
  path = tmp_path / 'w.pth'
  weights = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  torch.save({'x': torch.from_numpy(weights)}, path)
  content = bytearray(path.read_bytes())
  content[content.index(weights.tobytes()) + 402] ^= 1
  path.write_bytes(content)
  # PyTorch does not notice the damage.
  assert (torch.load(path)['x'].numpy() != weights).sum() == 1
  with pytest.raises(ValueError, match=r'w\.pth is damaged: w/data/0 does not'):
    read_state_dict(path)


@pytest.mark.parametrize('suffix', ['pth', 'pt', 'pth.tar'])
@pytest.mark.parametrize('legacy', [False, True])
def test_checkpoints_of_pytorch(tmp_path, torch, suffix, legacy):
  path = tmp_path / f'w.{suffix}'
  checkpoint = {
    'epoch': 3,
    'args': argparse.Namespace(lr=0.1),
    'state_dict': {n: torch.from_numpy(a) for n, a in _ARRAYS.items()},
  }
  torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
  loaded = read_state_dict(path)
  assert loaded['epoch'] == 3
  for name, array in _ARRAYS.items():
    np.testing.assert_array_equal(loaded['state_dict'][name], array)


class _Hostile:
  """Runs a command when a pickle of it is loaded."""

  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
def test_a_hostile_pickle_runs_no_code(tmp_path, torch, form):
  path, witness = tmp_path / 'w.pth', tmp_path / 'ran'
  hostile = {'fc.bias': torch.zeros(2), 'x': _Hostile(f'touch {witness}')}
  if form == 'pickle':
    path.write_bytes(pickle.dumps({'x': hostile['x']}, protocol=2))
  else:
    zipped = form == 'zip'
    torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
  with pytest.raises(
    ValueError, match=r'w\.pth contains more than weights.*save its state_dict'
  ):
    read_state_dict(path)
  assert not witness.exists()
  # The file does run its code if loaded the unsafe way.
  torch.load(path, weights_only=False) if form != 'pickle' else pickle.loads(
    path.read_bytes()
  )
  assert witness.exists()


def test_what_is_no_mapping(tmp_path, torch):
  torch.save([torch.zeros(2)], tmp_path / 'w.pt')
  with pytest.raises(ValueError, match='must contain a mapping .*; got list'):
    read_state_dict(tmp_path / 'w.pt')


def test_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'w.pth').write_bytes(b'')
  with pytest.raises(ValueError, match=r'needs PyTorch.*dynconv-jax\[torch\]'):
    read_state_dict(tmp_path / 'w.pth')
  write_safetensors(tmp_path / 'w.safetensors', _ARRAYS)
  assert read_state_dict(tmp_path / 'w.safetensors').keys() == _ARRAYS.keys()


def test_files_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no file .*w\.pth'):
    read_state_dict(tmp_path / 'w.pth')
  (tmp_path / 'w.npz').touch()
  with pytest.raises(ValueError, match=r'must end in \.safetensors, \.pth'):
    read_state_dict(tmp_path / 'w.npz')
  with pytest.raises(ValueError, match=r'must end in \.safetensors; got'):
    write_safetensors(tmp_path / 'w.pth', _ARRAYS)


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'w.safetensors'
  write_safetensors(path, _ARRAYS)
  before = path.read_bytes()
  with (
    mock.patch.object(files.os, 'replace', side_effect=OSError(28, 'full')),
    pytest.raises(OSError, match='full'),
  ):
    write_safetensors(path, {'x': np.zeros(3)})
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]
