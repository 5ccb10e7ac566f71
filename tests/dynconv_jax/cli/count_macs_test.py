"""Tests of the program's table, files and errors."""

import csv
import json
import textwrap

import pytest


@pytest.fixture
def modules(tmp_path, monkeypatch):
  """A user's module in the folder where the program is started."""
  (tmp_path / 'mine_for_macs.py').write_text(
    textwrap.dedent(
      """
      import jax

      def f(x, w):
        with jax.named_scope('head'):
          return x @ w

      def branching(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.T, lambda x: x, x)

      def looping(x):
        body = lambda c: (c[0] + 1, c[1] @ c[1])
        return jax.lax.while_loop(lambda c: c[0] < c[1].sum(), body, (0, x))

      constant = 3

      def linear():
        from torch import nn
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())

      def embedding():
        from torch import nn
        class Model(nn.Module):
          def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 5)
          def forward(self, tokens, weights):
            return self.fc(self.embed(tokens) * weights[..., None])
        return Model()

      def number():
        return 3

      def needs(width):
        return width
      """
    )
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))


def last_line(stdout):
  return json.loads(stdout.splitlines()[-1])


def test_counts_a_network_of_ours(program, tmp_path):
  files = {kind: tmp_path / f'macs.{kind}' for kind in ('csv', 'json', 'png')}
  stdout = program(
    'count_macs',
    '--convention=conv',
    '--model=cifar_resnet32',
    '--num_classes=10',
    '--image_size=32',
    '--sort=macs',
    f'--csv={files["csv"]}',
    f'--json={files["json"]}',
    f'--plot={files["png"]}',
  )
  lines = stdout.splitlines()
  assert lines[0].split()[:2] == ['name', 'kind']
  result = last_line(stdout)
  assert result['total'] == 69_124_096 == sum(result['by_layer'].values())
  assert result['convention'] == 'conv' and result['uncounted'] == []
  document = json.loads(files['json'].read_text())
  assert document['total'] == result['total']
  layers = document['by_layer'].items()
  assert {name: row['macs'] for name, row in layers} == result['by_layer']
  with files['csv'].open() as file:
    macs = [int(row['macs']) for row in csv.DictReader(file)]
  assert macs == sorted(result['by_layer'].values(), reverse=True)
  assert files['png'].stat().st_size
  assert files['png'].with_suffix('.svg').stat().st_size


def test_merges_layers_and_takes_sizes(program):
  arguments = ('count_macs', '--model=resnet18', '--method=dynconv')
  arguments += ('--convention=conv',)
  stdout = program(
    *arguments, '--image_size=64,96', '--batch_size=2', '--depth=1'
  )
  names = [line.split()[0] for line in stdout.splitlines()[2:7]]
  assert names == ['conv1', 'layer1', 'layer2', 'layer3', 'layer4']
  result = last_line(stdout)
  assert 'layer4.1.masker.maskconv.conv' in result['by_layer']
  assert result['by_layer']['conv1'] == 2 * 32 * 48 * 49 * 3 * 64


def test_shows_modules_as_a_tree(program):
  stdout = program(
    *('count_macs', '--model=resnet18', '--image_size=32'),
    *('--tree', '--depth=2', '--num_classes=5'),
  )
  lines = stdout.splitlines()
  assert lines[0].split()[0] == 'module'
  names = [line[:6].rstrip() for line in lines[2:6]]
  assert names == ['conv1', 'layer1', '  0', '  1']
  assert last_line(stdout)['convention'] == 'conv+linear'
  assert last_line(stdout)['parameters'] == 11_689_512 - 512 * 995 - 995


def test_counts_functions_and_files(program, modules):
  del modules
  jax_arguments = ('count_macs', '--convention=conv+linear')
  stdout = program(
    *jax_arguments,
    '--jax=mine_for_macs:f',
    '--input_shape=2,3',
    '--input_shape=3,5:bfloat16',
  )
  assert last_line(stdout)['by_layer'] == {'head': 30}
  stdout = program(
    *jax_arguments,
    '--jax=mine_for_macs:f',
    '--input_shape=w=3,5',
    '--input_shape=2,3',
  )
  assert last_line(stdout)['total'] == 30
  branching = (*jax_arguments, '--jax=mine_for_macs:branching')
  stdout = program(*branching, '--input_shape=4,4', '--branch=0')
  assert last_line(stdout)['total'] == 0
  assert last_line(program(*branching, '--input_shape=4,4'))['total'] == 64
  looping = (*jax_arguments, '--jax=mine_for_macs:looping', '--trip_count=3')
  stdout = program(*looping, '--input_shape=4,4')
  assert last_line(stdout)['total'] == 3 * 64


def test_counts_torch_modules(program, modules):
  pytest.importorskip('torch', reason='PyTorch is not installed')
  del modules
  stdout = program(
    'count_macs', '--torch=mine_for_macs:linear', '--input_shape=1,3,5,5'
  )
  assert last_line(stdout)['total'] == 9 * 4 * 27
  named = ('--input_shape=weights=2,7', '--input_shape=tokens=2,7:int64')
  stdout = program('count_macs', '--torch=mine_for_macs:embedding', *named)
  assert last_line(stdout)['total'] == 2 * 7 * 4 * 5
  with pytest.raises(ValueError, match="must be a PyTorch dtype; got 'nn'"):
    program('count_macs', '--torch=mine_for_macs:linear', '--input_shape=1:nn')
  with pytest.raises(ValueError, match='--torch=mine_for_macs:number: '):
    program('count_macs', '--torch=mine_for_macs:number')
  with pytest.raises(ValueError, match="needs: .* argument: 'width'"):
    program('count_macs', '--torch=mine_for_macs:needs')


def test_counts_onnx_files(program, tmp_path):
  onnx = pytest.importorskip('onnx', reason='onnx is not installed')
  helper, number = onnx.helper, onnx.TensorProto.FLOAT
  graph = helper.make_graph(
    [helper.make_node('MatMul', ['x', 'w'], ['y'], name='head')],
    'graph',
    [helper.make_tensor_value_info('x', number, ['batch', 3])],
    [helper.make_tensor_value_info('y', number, ['batch', 5])],
    [helper.make_tensor('w', number, [3, 5], [0.0] * 15)],
  )
  file = tmp_path / 'model.onnx'
  onnx.save(helper.make_model(graph), file)
  arguments = ('count_macs', f'--onnx={file}', '--convention=conv+linear')
  stdout = program(*arguments, '--dimension=batch=7')
  assert last_line(stdout)['total'] == 7 * 3 * 5
  with pytest.raises(ValueError, match='batch'):
    program(*arguments)
  with pytest.raises(ValueError, match="NAME=SIZE; got 'batch=x'"):
    program(*arguments, '--dimension=batch=x')
  with pytest.raises(FileNotFoundError, match='none.onnx'):
    program('count_macs', f'--onnx={tmp_path}/none.onnx')


@pytest.mark.parametrize(
  'arguments,message',
  [
    ([], 'set one of --model, --jax, --torch, and --onnx; got none'),
    (['--model=resnet50', '--onnx=x'], 'got --model and --onnx'),
    (['--model=resnet51'], 'resnet51'),
    (['--model=resnet50', '--method=magic'], 'magic'),
    (['--model=resnet50', '--image_size=big'], "image_size .* got 'big'"),
    (['--model=resnet50', '--image_size=1,2,3'], "got '1,2,3'"),
    (['--model=resnet50', '--depth=0'], 'depth must be at least 1; got 0'),
    (['--model=resnet50', '--plot=x.gif.pdf'], 'written as .png and .svg'),
    (['--model=resnet50', 'x'], 'unknown arguments: x'),
    (['--jax=f'], "--jax must be package.module:name; got 'f'"),
    (['--jax=no_such_module:f'], 'no_such_module'),
    (['--jax=mine_for_macs:g'], "has no attribute 'g'"),
    (['--jax=mine_for_macs:constant'], 'must be callable; got int'),
    (
      ['--jax=mine_for_macs:f', '--input_shape=a,b'],
      "input_shape must be integers >= 0 separated by commas; got 'a,b'",
    ),
    (['--jax=mine_for_macs:f', '--input_shape=2,-4'], ">= 0 .* got '2,-4'"),
    (
      ['--jax=mine_for_macs:f', '--input_shape=2,3:floaty'],
      "dtype of input_shape .* got 'floaty'",
    ),
    (['--jax=mine_for_macs:f', '--input_shape=2'], 'f cannot be traced'),
    (
      ['--jax=mine_for_macs:f', '--input_shape=x=2', '--input_shape=x=3'],
      "input_shape names the argument 'x' twice",
    ),
    (
      ['--model=resnet18', '--image_size=64', '--convention=ptflops'],
      'charges norm, activation and pooling modules',
    ),
  ],
)
def test_errors(program, modules, arguments, message):
  del modules
  with pytest.raises(ValueError, match=message):
    program('count_macs', *arguments)
