import json

import pytest

from dynconv_jax.plotting.latency import add_latency, read_benchmark


def _row(run, method='dynconv', **values):
  network = {'model': 'resnet18', 'image_size': '64', 'accuracy': '0.7'}
  return {'run': run, 'method': method, **network, **values}


def _benchmark(workdir, sparse_ms=3.0, batch_size=1, **values):
  # The dense network takes 4 ms.
  return {
    'workdir': workdir,
    'model': 'resnet18',
    'image_size': 64,
    'cpu': 'a CPU',
    'batch_size': batch_size,
    'sparse_ms': sparse_ms,
    'sparse_over_fastest_dense': sparse_ms / 4,
    'runtimes': {'litert': 4.0, 'torch': 9.0},
    **values,
  }


def test_all_seeds_of_a_setting_have_its_latency_and_dense_networks_have_one():
  rows = [
    _row('dynconv_budget0.5_seed0'),
    _row('dynconv_budget0.5_seed1'),
    _row('dynconv_budget0.25_seed0'),
    _row('dense_seed0', 'dense'),
    _row('dense_width0.5_seed0', 'dense', width_multiplier='0.5'),
    _row('dense_image_size32_seed0', 'dense', image_size='32'),
  ]
  result = add_latency(rows, [_benchmark('dynconv_budget0.5_seed0')])
  assert [row['latency_ratio_batch_1'] for row in result] == [
    *(0.75, 0.75, ''),
    *(1, '', ''),
  ]
  assert result[0]['latency_machine'] == 'a CPU'
  assert 'latency_machine' not in rows[0]


def test_the_fastest_execution_that_skips_counts():
  runs = [
    _benchmark('drop_seed0', 5.0, 1, runtimes={'litert': 4.0}),
    _benchmark(
      'drop_seed0', 20.0, 8, runtimes={'torch': 1.0, 'openvino_sparse': 2.0}
    ),
  ]
  summary = _benchmark('drop_seed0') | {'runs': runs}
  (row,) = add_latency([_row('drop_seed0', 'drop')], [summary])
  assert row['latency_ratio_batch_1'] == 5 / 4
  assert row['latency_ratio_batch_8'] == 2 / 4


@pytest.mark.parametrize(
  ('rows', 'benchmarks', 'message'),
  [
    (['a_seed0'], [], 'one model and image size; got none'),
    (
      ['a_seed0'],
      [_benchmark('a_seed0'), _benchmark('a_seed0', image_size=32)],
      'got resnet18 at 32 pixels, resnet18 at 64 pixels',
    ),
    (['a_seed0', 'b'], [_benchmark('c_seed0')], "'c_seed0'.*: a, b$"),
    (['a_seed0'] * 2, [_benchmark('a_seed1')], 'have a_seed0 twice'),
    (
      ['a_seed0'],
      [_benchmark('a_seed0'), _benchmark('a_seed1')],
      'a was benchmarked twice with batch size 1',
    ),
  ],
)
def test_ambiguous_benchmarks_are_rejected(rows, benchmarks, message):
  with pytest.raises(ValueError, match=message):
    add_latency([_row(run) for run in rows], benchmarks)


def test_files_are_checked(tmp_path):
  file = tmp_path / 'benchmark.json'
  with pytest.raises(FileNotFoundError, match='no file'):
    read_benchmark(file)
  summary = _benchmark('a_seed0')
  file.write_text(json.dumps(summary))
  assert read_benchmark(file) == summary
  # Synthetic masks have no run, a dense network has no sparse execution.
  del summary['workdir'], summary['sparse_over_fastest_dense']
  for text, message in (
    (json.dumps(summary), 'missing: sparse_over_fastest_dense, workdir$'),
    ('{', 'is not a benchmark'),
    ('[1]', 'is not a benchmark'),
    ('{"runs": 3}', 'is not a benchmark'),
  ):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
      read_benchmark(file)
