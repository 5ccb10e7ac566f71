"""Tests of the benchmark of sparse execution."""

import json
from unittest import mock

import jax
import numpy as np
import pytest

from benchmarks import cases, workers
from benchmarks.forced import force_gates
from benchmarks.networks import Networks, masks_of
from dynconv_jax.training.workdir import load_run, read_config

_SMALL = (
  '--model=cifar_resnet8',
  '--image_size=32',
  '--num_classes=3',
  '--rounds=1',
  '--steps=1',
  '--runtimes=none',
  '--mode=sparse',
)


@pytest.mark.slow
def test_two_densities(program, tmp_path):
  output = tmp_path / 'output'
  printed = program(
    'benchmark',
    *_SMALL,
    '--density=0.25,1',
    '--batch_size=2',
    '--per_block',
    f'--output={output}',
  )
  summary = json.loads(printed.splitlines()[-1])
  assert json.loads((output / 'benchmark.json').read_text()) == summary
  assert (output / 'speedup.png').exists()
  assert (output / 'speedup.svg').exists()
  sparse, full = summary['runs']
  assert summary['model'] == 'cifar_resnet8' and 'core' in summary['cpu']
  assert full['density'] == 1.0
  assert sparse['density'] == pytest.approx(0.25, abs=0.02)
  # If the network executes nowhere, only the mask units remain: (16 + 16 + 32)
  # * 9 + 1 products, at 32 x 32, 16 x 16 and 8 x 8 positions.
  units = 32**2 * (16 * 9 + 1) + 16**2 * (16 * 9 + 1) + 8**2 * (32 * 9 + 1)
  blocks = 32**2 * (3 * 16 * 9 + 2 * 16 * 16 * 9)
  blocks += 16**2 * (16 * 32 * 10 + 32 * 32 * 9)
  blocks += 8**2 * (32 * 64 * 10 + 64 * 64 * 9)
  assert full['mac_ideal'] == pytest.approx(1 + units / blocks, rel=1e-6)
  assert 0.25 < sparse['mac_ideal'] < 0.7
  for run in sparse, full:
    assert run['sparse_over_dense'] == pytest.approx(
      run['sparse_ms'] / run['dense_ms']
    )
    if 'native_dense_ms' in run:
      assert run['sparse_over_native_dense'] == pytest.approx(
        run['sparse_ms'] / run['native_dense_ms']
      )
    assert run['fastest_dense'] == 'jax' and run['runtimes'] == {}
    assert [b['name'] for b in run['blocks']] == [
      'layer1.0',
      'layer2.0',
      'layer3.0',
    ]
    assert all(b['dense_ms'] > 0 and b['sparse_ms'] > 0 for b in run['blocks'])
  assert all(b['executed_fraction'] == 1 for b in full['blocks'])


@pytest.mark.slow
def test_masks_of_positions_and_of_patches(program):
  printed = program(
    'benchmark', *_SMALL, '--batch_size=1', '--mask_granularity=1;4,2,1'
  )
  positions, patches = json.loads(printed.splitlines()[-1])['runs']
  assert positions['mask_granularity'] == '1'
  assert patches['mask_granularity'] == '4,2,1'
  # Dilation adds fewer positions around patches, and mask units are smaller.
  assert positions['density'] == pytest.approx(patches['density'], abs=0.02)
  assert patches['mac_ideal'] < positions['mac_ideal']


@pytest.mark.slow
def test_a_trained_network_on_its_own_masks(program, dynconv_run):
  printed = program(
    'benchmark',
    *_SMALL,
    f'--workdir={dynconv_run}',
    '--split=validation',
    '--num_batches=2',
    '--batch_size=3',
  )
  summary = json.loads(printed.splitlines()[-1])
  assert summary['workdir'] == dynconv_run.name
  assert 0 < summary['density'] < 1
  assert summary['sparse_ms'] > 0
  config = read_config(dynconv_run).model
  assert summary['model'] == config.model != 'resnet50'
  assert summary['image_size'] == config.image_size
  assert summary['checkpoint'] == 'best'


def test_a_trained_network_and_its_images_are_read(dynconv_run):
  settings = {
    'workdir': str(dynconv_run),
    'checkpoint': 'latest',
    'split': 'validation',
    'num_batches': 2,
    'food101_dir': None,
  }
  networks = Networks(settings)
  run = load_run(dynconv_run, best=False)
  batches = networks.batches(3)
  assert [b.shape for b in batches] == [(3, *[run.image_size] * 2, 3)] * 2
  expected, _ = run.model(batches[0])
  np.testing.assert_array_equal(
    networks.model(networks.method)(batches[0])[0], expected
  )
  dense = networks.model('dense')
  assert dense.fc.out_features == len(run.class_names)


def test_other_runtimes_that_are_not_installed_are_left_out(capsys):
  missing = cases.Runtime('torch', ('json', 'no_such_package'))
  with mock.patch.dict(
    cases.RUNTIMES, torch=missing, litert=cases.Runtime('', ())
  ):
    assert cases.available_runtimes(['torch', 'litert'], False) == ['litert']
  assert 'skipping torch: no_such_package' in capsys.readouterr().out


def test_other_runtimes_that_need_a_gpu_are_left_out(capsys):
  with mock.patch.object(cases, '_torch_sees_gpu', lambda: False):
    assert cases.available_runtimes(['torch_cuda_graph'], False) == []
  pytest.importorskip('torch', reason='pip install -e .[torch]')
  assert 'PyTorch finds no GPU' in capsys.readouterr().out


def test_other_runtimes_that_compute_something_else_are_errors():
  expected = [[1.0, -2.0], [3.0, 4.0]]
  cases.check_equal('own', [[1.0, -2.0], [3.0, 4.0003]], expected, 1e-4)
  with pytest.raises(ValueError, match='result of own differs .* 0.005'):
    cases.check_equal('own', [[1.0, -2.02], [3.0, 4.0]], expected, 1e-4)
  with pytest.raises(ValueError, match='differs from JAX'):
    cases.check_equal('own', [[1.0, np.nan], [3.0, 4.0]], expected, 1e-4)
  with pytest.raises(ValueError, match=r'\(2,\), JAX returns \(2, 2\)'):
    cases.check_equal('own', [1.0, 2.0], expected, 1e-4)


class _Worker:
  """Answers as a timed process does; ends early on the given kinds."""

  def __init__(self, times, crashes=()):
    self.times, self.crashes = times, crashes

  def ask(self, kind, of=None, **case):
    if kind == 'prepare':
      info = {'density': 0.4, 'mac_ideal': 0.5, 'compute_dtype': 'float32'}
      return {**info, 'kinds': ['dense', 'sparse']}
    if (of or kind) in self.crashes:
      raise OSError(f'{of or kind} was killed')
    return [[1.0, 2.0]] if kind == 'logits' else [self.times[kind]]


def _time_case(crashes):
  timed = {
    'jax': _Worker({'dense': 0.008, 'sparse': 0.003}, crashes),
    'openvino': _Worker({'openvino': 0.006, 'openvino_sparse': 0.1}, crashes),
    'litert': _Worker({'litert': 0.005}, crashes),
  }
  case = {'batch_size': 1, 'mask_granularity': '1', 'density': None}
  runtimes = ['openvino', 'litert', 'openvino_sparse']
  return cases.time_case(case, timed, runtimes, rounds=1)


def test_other_runtimes_that_crash_are_left_out(capsys):
  result = _time_case(crashes=['litert', 'openvino_sparse'])
  assert result['runtimes'] == {'openvino': 6}
  assert result['failed'] == {
    'litert': 'litert was killed',
    'openvino_sparse': 'openvino_sparse was killed',
  }
  assert result['fastest_dense'] == 'openvino'
  assert result['sparse_over_fastest_dense'] == 0.5
  assert 'skipping litert: litert was killed' in capsys.readouterr().out
  complete = _time_case(crashes=[])
  assert complete['fastest_dense'] == 'litert' and 'failed' not in complete
  with pytest.raises(OSError, match='dense was killed'):
    _time_case(crashes=['dense'])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['openvino', 'litert', 'openvino_sparse'])
def test_other_runtimes_compute_the_same(name):
  runtime = cases.RUNTIMES[name]
  for package in runtime.packages:
    pytest.importorskip(package, reason='pip install -e .[benchmark]')
  settings = {
    'workdir': None,
    'model': 'mobilenet_v2',
    'method': 'dynconv',
    'num_classes': 5,
    'image_size': 64,
    'compute_dtype': 'float32',
    'options': {'padding': 'same', 'gated_blocks': 'all'},
  }
  timed = workers.WORKERS[runtime.worker](settings)
  case = {'batch_size': 2, 'mask_granularity': '1', 'density': 0.3}
  model, images = timed.networks.model('dense'), timed.networks.batches(2)[0]
  if not runtime.dense:
    model = timed.networks.model('dynconv')
    model = force_gates(model, masks_of(model, images.shape, 0.3))
  expected, _ = jax.jit(model)(images)
  assert np.ptp(expected) > 0.1 * np.abs(expected).max()
  cases.check_equal(name, timed.logits(of=name, **case), expected, 1e-4)


@pytest.mark.slow
def test_pytorch_in_a_cuda_graph_computes_the_same():
  """Recording and replaying are replaced; a CPU computes at once."""
  torch = pytest.importorskip('torch', reason='pip install -e .[torch]')
  graph = mock.Mock()
  stand_ins = {
    'Stream': mock.Mock(),
    'current_stream': mock.Mock(),
    'stream': mock.MagicMock(),
    'CUDAGraph': mock.Mock(return_value=graph),
    'graph': mock.MagicMock(),
    'synchronize': mock.Mock(),
  }
  settings = {
    **{'workdir': None, 'model': 'resnet50', 'method': 'dynconv'},
    **{'num_classes': 5, 'image_size': 64, 'compute_dtype': 'float32'},
    'options': {},
  }
  case = {'batch_size': 2, 'mask_granularity': '1', 'density': 0.3}
  with (
    mock.patch.multiple(torch.cuda, **stand_ins),
    mock.patch.object(workers.runtimes.TorchCudaGraph, 'device', 'cpu'),
  ):
    timed = workers.WORKERS['torch_cuda_graph'](settings)
    networks = timed.networks
    expected, _ = jax.jit(networks.model('dense'))(networks.batches(2)[0])
    logits = timed.logits(of='torch_cuda_graph', **case)
    cases.check_equal('torch_cuda_graph', logits, expected, 1e-4)
    timed.step('torch_cuda_graph', **case)()
  # Recorded once, replayed at each call.
  assert stand_ins['CUDAGraph'].call_count == 1
  assert graph.replay.call_count == 1 + timed.calls
  stand_ins['synchronize'].assert_called_once()


@pytest.mark.slow
def test_other_runtimes(program):
  torch = pytest.importorskip('torch', reason='pip install -e .[torch]')
  del torch
  arguments = _SMALL
  printed = program(
    'benchmark',
    *arguments,
    '--batch_size=1',
    '--runtimes=torch,torch_index',
    '--nomasked_dense',
  )
  summary = json.loads(printed.splitlines()[-1])
  assert 'masked_dense_ms' not in summary
  assert list(summary['runtimes']) == ['torch', 'torch_index']
  times = {'jax': summary['dense_ms'], 'torch': summary['runtimes']['torch']}
  assert summary['fastest_dense'] == min(times, key=times.get)
  assert summary['sparse_over_fastest_dense'] == pytest.approx(
    summary['sparse_ms'] / min(times.values())
  )


@pytest.mark.slow
def test_the_exported_network_is_timed_too(program, tmp_path):
  pytest.importorskip('onnxruntime', reason='pip install -e .[benchmark]')
  arguments = (*_SMALL, '--batch_size=1', '--runtimes=onnxruntime,onnx_sparse')
  printed = program('benchmark', *arguments, f'--output={tmp_path}')
  summary = json.loads(printed.splitlines()[-1])
  runtimes = summary['runtimes']
  assert list(runtimes) == ['onnxruntime', 'onnx_sparse']
  times = {'jax': summary['dense_ms'], 'onnxruntime': runtimes['onnxruntime']}
  assert summary['fastest_dense'] == min(times, key=times.get)
  assert summary['onnx_sparse_over_fastest_dense'] == pytest.approx(
    runtimes['onnx_sparse'] / min(times.values())
  )


@pytest.mark.parametrize(
  'arguments, messages',
  [
    (
      ['--model=resnet5', '--method=dense', '--density=0', '--batch_size=x'],
      [
        "unknown model 'resnet5'",
        "unknown method 'dense'",
        'density must be one or more in (0, 1]; got 0',
        'batch_size must be one or more > 0; got x',
      ],
    ),
    (
      ['--runtimes=tensorflow'],
      ['runtimes must be auto, none, or some of torch'],
    ),
    (['--model=efficientnet_lite0', '--gated_blocks=some'], ['gated_blocks']),
    (['--image_size=16'], ['image_size must be at least']),
    (['--mask_granularity=4,2'], ['mask_granularity must be 1 or 4 integers']),
    (['--mask_granularity=1;x'], ["must be integers; got 'x'"]),
    (['--mode=fast'], ["unknown mode 'fast'; allowed: auto, sparse, dense"]),
    (['--backend=fast'], ['backend must be auto, cpu, triton', "got 'fast'"]),
    (['--backend=xla', '--mode=dense'], ["mode 'dense' has no backend"]),
    (['surplus'], ['unknown arguments: surplus']),
  ],
)
def test_errors(program, arguments, messages):
  with pytest.raises(ValueError) as caught:
    program('benchmark', *arguments)
  for message in messages:
    assert message in str(caught.value)
