"""Tests of the sources of pretrained weights, online and offline."""

import re
import sys

import pytest

from dynconv_jax.interop import check_pretrained, find_pretrained

TIMM = 'hf:timm/resnet50.tv_in1k'


@pytest.fixture
def hub():
  """The real package; no test lets it access the network."""
  return pytest.importorskip(
    'huggingface_hub', reason='huggingface_hub is not installed'
  )


@pytest.mark.parametrize(
  'source',
  [TIMM, f'{TIMM}@a1b2', f'{TIMM}@refs/pr/1', 'a/b.pth', '~/w.safetensors'],
)
def test_sources(source):
  check_pretrained(source)


@pytest.mark.parametrize(
  'source', ['hf:resnet50', 'hf:a/b/c', 'hf:', 'hf:a/b@', 'hf:../../x y']
)
def test_what_is_no_repository(source, tmp_path):
  for check in (check_pretrained, lambda s: find_pretrained(s, tmp_path)):
    with pytest.raises(ValueError, match='must be hf:OWNER/NAME or') as error:
      check(source)
    assert str(error.value).endswith(f'got {source}')


def test_a_file(tmp_path):
  path = tmp_path / 'w.pth'
  with pytest.raises(
    FileNotFoundError, match=r'no file .*w\.pth of pretrained'
  ):
    find_pretrained(str(path))
  path.touch()
  assert find_pretrained(str(path)) == path
  with pytest.raises(ValueError, match='must end in'):
    find_pretrained('resnet50')


@pytest.mark.parametrize('revision', [None, 'a1b2'])
def test_downloads_through_the_hub(hub, tmp_path, monkeypatch, revision):
  calls = []

  def download(repo_id, filename, *, revision):
    calls.append((repo_id, filename, revision))
    return str(tmp_path / 'cached')

  monkeypatch.setattr(hub, 'hf_hub_download', download)
  source = f'{TIMM}@{revision}' if revision else TIMM
  assert find_pretrained(source, tmp_path) == tmp_path / 'cached'
  assert calls == [('timm/resnet50.tv_in1k', 'model.safetensors', revision)]


def test_a_file_put_by_hand_comes_first(hub, tmp_path, monkeypatch):
  monkeypatch.setattr(hub, 'hf_hub_download', pytest.fail)
  put = tmp_path / 'pretrained/timm/resnet50.tv_in1k/model.safetensors'
  put.parent.mkdir(parents=True)
  put.touch()
  assert find_pretrained(TIMM, tmp_path) == put


def _advice(folder, revision='main', name='resnet50.tv_in1k'):
  return re.escape(
    f'put https://huggingface.co/timm/resnet50.tv_in1k/resolve/{revision}/'
    f'model.safetensors at {folder}/pretrained/timm/{name}/model.safetensors'
  )


def test_without_a_network(hub, tmp_path, monkeypatch):
  """The package's own error for an address that does not respond."""
  real = hub.hf_hub_download

  def refused(*args, **kwargs):
    return real(
      *args,
      **kwargs,
      cache_dir=tmp_path / 'cache',
      local_files_only=True,
    )

  monkeypatch.setattr(hub, 'hf_hub_download', refused)
  with pytest.raises(FileNotFoundError, match=_advice(tmp_path)) as error:
    find_pretrained(TIMM, tmp_path)
  assert str(error.value).startswith(
    f'cannot download model.safetensors of {TIMM} ('
  )
  assert '\n' not in str(error.value)
  with pytest.raises(
    FileNotFoundError, match=_advice(tmp_path, 'v2', 'resnet50.tv_in1k@v2')
  ):
    find_pretrained(f'{TIMM}@v2', tmp_path)


@pytest.mark.parametrize('kind', ['ConnectionError', 'EntryNotFoundError'])
def test_other_failures_of_a_download(hub, tmp_path, monkeypatch, kind):
  from huggingface_hub import errors

  error = getattr(errors, kind, ConnectionError)('refused\nmore')

  def download(*args, **kwargs):
    raise error

  monkeypatch.setattr(hub, 'hf_hub_download', download)
  with pytest.raises(FileNotFoundError, match=r'\(refused\)\. Without a net'):
    find_pretrained(TIMM, tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(
    FileNotFoundError,
    match=rf"dynconv-jax\[hub\]' installs it\. Or {_advice(tmp_path)}$",
  ):
    find_pretrained(TIMM, tmp_path)
