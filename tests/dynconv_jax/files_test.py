import errno
import os
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest
from absl.testing import absltest

from dynconv_jax import files


@pytest.mark.parametrize('content', ['naïve\n', b'\xff\0'])
def test_writes_and_replaces(tmp_path, content):
  path = tmp_path / 'new' / 'file'
  for _ in range(2):
    files.write_atomic(path, content)
    expected = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == expected
    path.write_bytes(b'old')
  assert os.listdir(path.parent) == ['file']


def test_an_error_leaves_the_old_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('old')
  with pytest.raises(OSError, match='full'), files.replacing(path) as partial:
    partial.write_text('ne')
    raise OSError('full')
  # A write failure, which has no file name.
  with (
    pytest.raises(OSError, match=f"full: '{path}'"),
    files.replacing(path),
  ):
    raise OSError(28, 'full')
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['file']


def test_nobody_sees_half_a_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('old')
  with files.replacing(path) as partial:
    partial.write_text('new')
    assert path.read_text() == 'old'
  assert path.read_text() == 'new'


def test_a_folder_is_held_by_one_and_its_children(tmp_path):
  folder = tmp_path / 'new'
  holder = f'{folder} is in use by process {os.getpid()} on '
  with files.locked(folder, 'one') as descriptor:
    with (
      pytest.raises(OSError, match=f'^{holder}.* \\(one\\), or by a process'),
      files.locked(folder, 'two'),
    ):
      pass
    child = subprocess.Popen(['sleep', '60'], pass_fds=[descriptor])
  try:
    with (
      pytest.raises(OSError, match='a process that it started$'),
      files.locked(folder, 'two'),
    ):
      pass
  finally:
    child.kill()
    child.wait()
  with files.locked(folder, 'three'):
    assert [path.name for path in folder.iterdir()] == ['.lock']
    assert (folder / '.lock').read_text().endswith('(three)\n')


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
  code = (
    'import sys, time\n'
    'from dynconv_jax.files import locked\n'
    'with locked(sys.argv[1], "theirs"):\n'
    '  print(flush=True)\n'
    '  time.sleep(60)\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE
  ) as process:
    process.stdout.readline()
    with (
      pytest.raises(OSError, match=f'process {process.pid} on .*theirs'),
      files.locked(tmp_path, 'ours'),
    ):
      pass
    waiting = threading.Timer(0.3, process.kill)
    waiting.start()
    with files.locked(tmp_path, 'ours', wait=True):
      assert process.wait() == -signal.SIGKILL
    waiting.join()


def test_a_file_system_without_locks_is_used_without(tmp_path):
  error = OSError(errno.ENOLCK, 'No locks available')
  with (
    mock.patch('fcntl.flock', side_effect=error),
    absltest.TestCase().assertLogs(level='WARNING') as logs,
    files.locked(tmp_path, 'work'),
  ):
    pass
  assert 'is not locked: No locks available' in logs.output[0]


@pytest.mark.parametrize('place', ['file', 'file/below', '/proc/run'])
def test_a_folder_that_cannot_be_written_to(tmp_path, place):
  (tmp_path / 'file').write_text('kept')
  with (
    pytest.raises(OSError, match=f'^cannot write to the folder .*{place}: '),
    files.locked(tmp_path / place, 'work'),
  ):
    pass
