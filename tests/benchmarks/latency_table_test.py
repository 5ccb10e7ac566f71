"""Tests of latency tables."""

import json
import pathlib

from benchmarks.latency_table import fill, latency_table

_RUN = {
  'batch_size': 8,
  'density': 0.3,
  'mac_ideal': 0.45,
  'dense_ms': 20.0,
  'sparse_ms': 6.0,
  'runtimes': {'openvino': 10.0, 'onnx_sparse': 7.0},
  'fastest_dense': 'openvino',
  'sparse_over_fastest_dense': 0.6,
  'sparse_over_proportional': 1.333,
}
_SUMMARY = {'cpu': '2 cores', 'versions': {'jax': '0.10'}, 'runs': [_RUN]}


def test_a_row():
  heads, _, row, _, machine = latency_table(_SUMMARY).splitlines()
  cells = dict(zip(heads.split('|'), row.split('|'), strict=True))
  cells = {k.strip(): v.strip() for k, v in cells.items()}
  assert cells | {'': ''} == {
    '': '',
    'batch': '8',
    'density': '0.30',
    'executed MACs': '0.450',
    'sparse': '6.00',
    'XLA': '20.00',
    'openvino': '10.00',
    'onnx_sparse': '7.00',
    'fastest dense': 'openvino',
    'sparse / fastest': '0.60',
    'sparse / (fastest * MACs)': '1.33',
  }
  assert machine == 'Milliseconds. 2 cores; jax 0.10.'
  assert latency_table({**_SUMMARY, **_RUN, 'runs': [_RUN]}) == latency_table(
    {'cpu': '2 cores', 'versions': {'jax': '0.10'}, **_RUN}
  )


def test_only_what_is_measured_is_replaced(tmp_path):
  readme = tmp_path / 'README.md'
  readme.write_text(
    'a\n<!-- table: one.json -->\nold\n<!-- end -->\nb\n'
    '<!-- table: two.json -->\nkept\n<!-- end -->\nc\n'
  )
  (tmp_path / 'one.json').write_text(json.dumps(_SUMMARY))
  table = latency_table(_SUMMARY)
  filled = fill(readme)
  assert filled == readme.read_text().replace('old\n', table)
  readme.write_text(filled)
  assert fill(readme) == filled


def test_committed_tables_are_those_of_the_files():
  root = pathlib.Path(__file__).parents[2]
  readme = root / 'results' / 'lite0_latency' / 'README.md'
  assert fill(readme) == readme.read_text()
