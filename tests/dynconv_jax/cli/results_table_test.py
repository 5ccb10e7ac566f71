"""Tests of tables of runs against csv.DictReader."""

import csv
import pathlib
import subprocess
import sys
from unittest import mock

import pytest

from dynconv_jax.cli import results_table

ROW = {'run': 'b', 'split': 'test', 'accuracy': 0.5, 'seed': 1, 'budget': ''}


def _read(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def test_makes_the_table_and_its_folder(tmp_path):
  path = tmp_path / 'new' / 'folder' / 'results.csv'
  results_table.check_table(path)
  results_table.write_result(path, ROW)
  assert path.read_text() == 'run,split,accuracy,seed,budget\nb,test,0.5,1,\n'
  assert list(path.parent.iterdir()) == [path]


def test_a_run_has_one_row_a_split_and_others_stay(tmp_path):
  path = tmp_path / 'results.csv'
  others = [
    {**ROW, 'run': 'a, "quoted"'},
    {**ROW, 'run': 'c'},
    {**ROW, 'split': 'validation'},
  ]
  for row in (others[1], ROW, others[2], others[0]):
    results_table.write_result(path, row)
  results_table.write_result(path, {**ROW, 'accuracy': 0.75})
  expected = [others[0], {**ROW, 'accuracy': 0.75}, others[2], others[1]]
  assert _read(path) == [
    {name: str(value) for name, value in row.items()} for row in expected
  ]


def test_columns_that_others_have_added_stay_in_their_place(tmp_path):
  path = tmp_path / 'results.csv'
  path.write_text(
    'recipe,run,split,latency,accuracy\nlong,b,test,3.5,0.1\nshort,c,test,4,0\n'
  )
  results_table.write_result(path, ROW)
  results_table.write_result(path, {**ROW, 'run': 'a'})
  assert path.read_text().splitlines() == [
    'recipe,run,split,latency,accuracy,seed,budget',
    ',a,test,,0.5,1,',
    'long,b,test,3.5,0.5,1,',
    'short,c,test,4,0,,',
  ]


def test_rows_of_processes_that_write_at_the_same_time_stay(tmp_path):
  path = tmp_path / 'results.csv'
  code = (
    'import sys\nfrom dynconv_jax.cli.results_table import write_result\n'
    'for i in range(20):\n'
    '  row = {"run": f"{sys.argv[2]}{i}", "split": "test"}\n'
    '  write_result(sys.argv[1], row)\n'
  )
  processes = [
    subprocess.Popen([sys.executable, '-c', code, path, name])
    for name in 'abcd'
  ]
  assert [process.wait() for process in processes] == [0] * 4
  expected = {f'{name}{i}' for name in 'abcd' for i in range(20)}
  assert {row['run'] for row in _read(path)} == expected


def test_rows_without_names_stay(tmp_path):
  path = tmp_path / 'results.csv'
  path.write_text('model,accuracy\nresnet18,0.6\nresnet50,0.7\n')
  results_table.write_result(path, ROW)
  accuracies = [row['accuracy'] for row in _read(path)]
  assert accuracies == ['0.6', '0.7', '0.5']


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'is empty: it has no header'),
    ('run,split\n1,2,3\n', 'row 1: 3 cells for 2 columns'),
    ('run,run\n1,2\n', 'has duplicate columns'),
  ],
)
def test_a_file_that_is_no_table_stays_as_it_is(tmp_path, text, message):
  path = tmp_path / 'results.csv'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    results_table.check_table(path)
  with pytest.raises(ValueError, match=message):
    results_table.write_result(path, ROW)
  assert path.read_text() == text


def test_a_full_disk_leaves_the_former_table(tmp_path):
  path = tmp_path / 'results.csv'
  results_table.write_result(path, ROW)
  before = path.read_text()
  writer = mock.Mock()
  writer.writerows.side_effect = OSError(28, 'No space left on device')
  with (
    mock.patch.object(csv, 'DictWriter', return_value=writer),
    pytest.raises(OSError, match='No space left'),
  ):
    results_table.write_result(path, {**ROW, 'accuracy': 1.0})
  assert path.read_text() == before
  assert list(pathlib.Path(tmp_path).iterdir()) == [path]


@pytest.mark.parametrize(
  'place, message',
  [
    ('', 'is a folder; specify a CSV file'),
    ('file/results.csv', 'cannot write to the folder .*file'),
    ('/proc/results.csv', 'cannot write to the folder /proc'),
  ],
)
def test_a_place_that_cannot_be_written_to_is_found_first(
  tmp_path, place, message
):
  (tmp_path / 'file').touch()
  with pytest.raises((OSError, ValueError), match=message):
    results_table.check_table(tmp_path / place)
