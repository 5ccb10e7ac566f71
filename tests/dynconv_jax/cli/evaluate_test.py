"""Tests of the program's numbers against loops over the network's outputs."""

import json
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx

from dynconv_jax.data import spots
from dynconv_jax.plotting.results import read_results
from dynconv_jax.sparse import executor as sparse_executor
from dynconv_jax.training import checkpoints, inputs, workdir

# MACs of a CIFAR ResNet-8 with 4, 8 and 16 channels on 24 x 24 pixels.
_STEM = 24**2 * 4 * 27
_SHORTCUTS = 12**2 * 8 * 4 + 6**2 * 16 * 8
_BLOCKS = 24**2 * (144 + 144) + 12**2 * (288 + 576) + 6**2 * (1152 + 2304)
# A mask unit's convolution at its block's output positions, without bias.
_UNITS = 24**2 * 36 + 12**2 * 36 + 6**2 * 72
_UNIT_BIASES = 24**2 + 12**2 + 6**2
_LINEAR = 4 + 4 + 8 + 16 * 6

_OLD_ROWS = (
  'run,split,accuracy,model,method,recipe\n'
  'moved,test,0.99,cifar_resnet8,dynconv,mine\n'
  'other,test,0.125,resnet18,dense,theirs\n'
)
_KEYS = {
  'accuracy',
  'accuracy_low',
  'accuracy_high',
  'gmacs_mean',
  'gmacs_p50',
  'gmacs_p95',
  'executed_fraction',
  'num_examples',
  'block_density',
  'budget',
  'object_recall',
  'background_density',
}


def _copy(run, folder, **changed):
  """Returns a writable copy of a run with changed options."""
  shutil.copytree(run, folder)
  config = workdir.read_config(folder).replace(**changed)
  workdir.write_flags(folder, config)
  return folder


@pytest.fixture(scope='module')
def evaluated(program, dynconv_run, tmp_path_factory):
  """Returns the folder and the printed lines of one evaluation on test."""
  root = tmp_path_factory.mktemp('evaluated')
  folder = _copy(dynconv_run, root / 'moved')
  (root / 'results.csv').write_text(_OLD_ROWS)
  stdout = program(
    'evaluate',
    f'--workdir={folder}',
    '--split=test',
    '--num_maps=3',
    f'--results={root / "results.csv"}',
  )
  return folder, stdout.splitlines()


@pytest.fixture(scope='module')
def summary(evaluated):
  return json.loads(evaluated[1][-1])


@pytest.fixture(scope='module')
def outputs(dynconv_run):
  """logits, masks, labels and objects of the test images, in one batch."""
  drawn = [spots.draw(spots.Options(24), 'test', i) for i in range(20)]
  images, objects, labels = map(np.stack, zip(*drawn, strict=True))
  images = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  model = workdir.load_run(dynconv_run).model
  logits, masks = nnx.jit(lambda m, x: m(x))(model, np.float32(images))
  return np.asarray(logits, np.float64), masks, labels, objects


def test_last_line_is_the_contract(evaluated, summary):
  assert summary.keys() >= _KEYS
  assert summary['split'] == 'test'
  assert summary['step'] == 3
  assert summary['budget'] == 0.5
  assert summary['convention'] == 'conv'
  table = dict(line.split(maxsplit=1) for line in evaluated[1][:-1])
  assert table['num_examples'] == '20'
  assert table['accuracy'] == f'{summary["accuracy"]:.4f}'


def test_accuracy_and_its_interval(summary, outputs):
  logits, _, labels, _ = outputs
  hits = int((logits.argmax(1) == labels).sum())
  assert summary['num_examples'] == 20
  assert summary['accuracy'] == hits / 20
  # Wilson's limits are the values p for which |hits / n - p| is 1.96 standard
  # deviations of p.
  for p in (summary['accuracy_low'], summary['accuracy_high']):
    deviation = np.sqrt(p * (1 - p) / 20)
    assert abs(hits / 20 - p) == pytest.approx(1.959964 * deviation, abs=1e-6)
  assert summary['accuracy_low'] <= hits / 20 <= summary['accuracy_high']
  shifted = logits - logits.max(1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
  loss = -log_p[np.arange(20), labels].mean()
  assert summary['loss'] == pytest.approx(loss, rel=1e-4)


def test_macs_by_hand(summary, outputs):
  _, masks, _, _ = outputs
  always = _STEM + _SHORTCUTS + _UNITS + _UNIT_BIASES
  per_position = [(144, 144), (288, 576), (1152, 2304)]
  masked = np.zeros(20)
  for mask, (first, second), size in zip(
    masks, per_position, (24, 12, 6), strict=True
  ):
    assert [(m.macs_per_position, m.level) for m in mask.layers] == [
      (first, 1),
      (second, 0),
    ]
    hard = np.asarray(mask.hard)
    assert hard.shape == (20, size, size)
    for i in range(20):
      for y, x in np.ndindex(size, size):
        around = hard[i, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        masked[i] += first * around.max() + second * hard[i, y, x]
  gmacs = (always + masked) / 1e9
  assert 0 < masked.min() < masked.max() < _BLOCKS
  assert summary['gmacs_dense'] == (always + _BLOCKS) / 1e9
  assert summary['gmacs_mean'] == pytest.approx(gmacs.mean(), rel=1e-9)
  ordered = np.sort(gmacs)
  assert summary['gmacs_p50'] == pytest.approx(ordered[9:11].mean(), rel=1e-9)
  # At 0.95 * 19 = 18.05, between the two largest of 20.
  p95 = 0.95 * ordered[18] + 0.05 * ordered[19]
  assert summary['gmacs_p95'] == pytest.approx(p95, rel=1e-9)
  fraction = masked.mean() / _BLOCKS
  assert summary['executed_fraction'] == pytest.approx(fraction, rel=1e-6)


def test_density_of_blocks_objects_and_background(summary, outputs):
  _, masks, _, objects = outputs
  density, recall, background = {}, [], []
  for mask in masks:
    hard = np.asarray(mask.hard)
    density[mask.name] = hard.mean()
    # 24 is a multiple of every mask's size.
    side = 24 // hard.shape[1]
    for image, inside in zip(hard, objects, strict=True):
      active = np.kron(image, np.ones((side, side)))
      recall.append(active[inside].mean())
      background.append(active[~inside].mean())
  assert list(summary['block_density']) == ['layer1.0', 'layer2.0', 'layer3.0']
  assert summary['block_density'] == pytest.approx(density, rel=1e-5)
  assert summary['object_recall'] == pytest.approx(np.mean(recall), rel=1e-5)
  assert summary['background_density'] == pytest.approx(
    np.mean(background), rel=1e-5
  )


def test_gates_that_sample(program, dynconv_run, summary, tmp_path):
  folder = _copy(dynconv_run, tmp_path / 'run')
  before = {path.name for path in folder.iterdir()}

  def evaluate():
    arguments = ('--split=test', '--num_maps=0', '--stochastic_gates')
    lines = program('evaluate', f'--workdir={folder}', *arguments)
    return json.loads(lines.splitlines()[-1])

  sampled = evaluate()
  assert evaluate() == sampled
  assert sampled['stochastic_gates'] and not summary['stochastic_gates']
  stem = 'test_stochastic'
  assert {path.name for path in folder.iterdir()} - before == {
    f'evaluation_{stem}.json',
    f'predictions_{stem}.csv',
    f'block_density_{stem}.png',
    f'block_density_{stem}.svg',
  }
  # Batches of 8, each with the run's seed folded with its index.
  model = workdir.load_run(dynconv_run).model
  view = nnx.view(model, deterministic=False)
  call = nnx.jit(lambda m, x, key: m(x, rngs=nnx.Rngs(gumbel=key))[1])
  config = workdir.read_config(dynconv_run)
  batches = inputs.eval_batches(
    config.data,
    inputs.open_split(config.data, 'test'),
    image_size=24,
    batch_size=8,
  )
  densities = []
  for number, batch in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(0), number)
    masks = call(view, batch['image'], key)
    densities += [
      [float(mask.hard[i].mean()) for mask in masks]
      for i in np.flatnonzero(batch['weight'])
    ]
  assert len(densities) == 20
  expected = dict(
    zip(summary['block_density'], np.mean(densities, 0), strict=True)
  )
  assert sampled['block_density'] == pytest.approx(expected, rel=1e-5)
  assert sampled['block_density'] != pytest.approx(
    summary['block_density'], abs=1e-2
  )


@pytest.mark.parametrize('method', ['dense', 'sact', 'act'])
def test_methods_that_cannot_sample(
  program, dense_run, method, monkeypatch, tmp_path
):
  folder = _copy(dense_run, tmp_path / 'run', method=method)
  monkeypatch.setattr(workdir, 'build_model', None)
  with pytest.raises(
    ValueError, match=f'needs gates that sample, .*; the run uses {method}$'
  ):
    program('evaluate', f'--workdir={folder}', '--stochastic_gates')


@pytest.mark.parametrize('execution', ['sparse', 'auto'])
def test_sparse_execution_gives_the_same(
  program, dynconv_run, summary, tmp_path, execution
):
  folder = _copy(dynconv_run, tmp_path / 'run')
  asked = []
  executor = sparse_executor.SparseExecutor
  make, call = executor.__init__, executor.__call__

  def made(self, *args, mode='auto', **kwargs):
    self.asked = mode
    make(self, *args, mode=mode, **kwargs)

  def called(self, images, **kwargs):
    asked.append((self.asked, images.shape))
    return call(self, images, **kwargs)

  with (
    mock.patch.object(executor, '__init__', made),
    mock.patch.object(executor, '__call__', called),
  ):
    lines = program(
      'evaluate',
      f'--workdir={folder}',
      '--split=test',
      '--num_maps=0',
      f'--execution={execution}',
    )
  # All 20 images, in padded batches of 8.
  assert asked == [(execution, (8, 24, 24, 3))] * 3
  sparse = json.loads(lines.splitlines()[-1])
  assert sparse.pop('execution') == execution
  assert sparse.pop('fallbacks') >= 0
  assert sparse.pop('loss') == pytest.approx(summary['loss'], rel=1e-5)
  assert sparse == {k: v for k, v in summary.items() if k != 'loss'}


def test_sparse_execution_of_what_has_no_decisions(
  program, dense_run, dynconv_run, monkeypatch
):
  monkeypatch.setattr(workdir, 'build_model', None)
  for run, flag, message in (
    (dense_run, '--nostochastic_gates', 'needs a gated network'),
    (dynconv_run, '--stochastic_gates', 'cannot be combined with'),
  ):
    with pytest.raises(ValueError, match=f'--execution=sparse {message}'):
      program('evaluate', f'--workdir={run}', '--execution=sparse', flag)


def test_files_that_are_written(evaluated, summary, dynconv_run):
  folder, lines = evaluated
  assert json.loads((folder / 'evaluation_test.json').read_text()) == summary
  figures = [folder / f'{n}_test' for n in ('block_density', 'ponder_maps')]
  written = {'evaluation_test.json', 'predictions_test.csv'}
  for figure in figures:
    png, svg = figure.with_suffix('.png'), figure.with_suffix('.svg')
    assert f'wrote {png} and {svg}' in lines
    assert png.read_bytes()[:4] == b'\x89PNG'
    assert '<svg' in svg.read_text()
    written |= {png.name, svg.name}
  before = {path.name for path in dynconv_run.iterdir()}
  assert {path.name for path in folder.iterdir()} == before | written
  # One GMAC value per image of the grid.
  assert figures[1].with_suffix('.svg').read_text().count(' GMAC') == 3


def test_predictions_of_each_example(evaluated, summary, outputs):
  logits, _, labels, objects = outputs
  rows = read_results(evaluated[0] / 'predictions_test.csv')
  rows.sort(key=lambda row: row['name'])
  assert [row['name'] for row in rows] == [f'test/{i:06d}' for i in range(20)]
  for column, classes in (('label', labels), ('prediction', logits.argmax(1))):
    expected = [spots.CLASS_NAMES[i] for i in classes]
    assert [row[column] for row in rows] == expected
  right = (logits.argmax(1) == labels).astype(int)
  loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels]
  for column, values, rel in (
    ('correct', right, 0),
    ('cross_entropy', loss, 1e-4),
    ('object_share', objects.mean((1, 2)), 1e-5),
  ):
    got = [float(row[column]) for row in rows]
    assert got == pytest.approx(list(values), rel=rel), column
  for column, name in (
    ('macs', 'gmacs_mean'),
    ('object_recall', 'object_recall'),
    ('background_density', 'background_density'),
  ):
    mean = np.mean([float(row[column]) for row in rows])
    mean /= 1e9 if column == 'macs' else 1
    assert mean == pytest.approx(summary[name], rel=1e-5), column


def test_row_of_the_table_of_runs(evaluated, summary):
  other, row = sorted(
    read_results(evaluated[0].parent / 'results.csv'),
    key=lambda row: row['recipe'],
    reverse=True,
  )
  assert (other['run'], other['accuracy']) == ('other', '0.125')
  assert (other['recipe'], other['gmacs_mean']) == ('theirs', '')
  assert row['recipe'] == 'mine'
  names = ('run', 'split', 'model', 'method', 'budget', 'seed', 'image_size')
  names += ('checkpoint', 'convention', 'stochastic_gates')
  assert [row[name] for name in names] == [
    *('moved', 'test', 'cifar_resnet8', 'dynconv', '0.5', '0', '24'),
    *('best', 'conv', 'false'),
  ]
  for name in ('accuracy', 'gmacs_mean', 'executed_fraction', 'gmacs_p95'):
    assert float(row[name]) == pytest.approx(summary[name], abs=1e-6)


def test_from_the_workdir_itself_with_another_data_dir(
  program, dynconv_run, trained, tmp_path, monkeypatch
):
  folder = _copy(dynconv_run, tmp_path / 'run', data_dir='/dev/null/data')
  monkeypatch.chdir(folder)
  lines = program(
    'evaluate',
    '--workdir=.',
    '--results=results.csv',
    '--split=train[:3]+test[:2]',
    '--num_maps=0',
    '--convention=conv+linear',
    f'--data_dir={trained / "data"}',
  ).splitlines()
  summary = json.loads(lines[-1])
  assert summary['num_examples'] == 5
  assert summary['convention'] == 'conv+linear'
  expected = _STEM + _SHORTCUTS + _UNITS + _BLOCKS + _LINEAR
  assert summary['gmacs_dense'] == expected / 1e9
  (row,) = read_results('results.csv')
  assert (row['run'], row['split']) == ('run', 'train[:3]+test[:2]')
  written = {path.name for path in folder.glob('*train*')}
  stem = 'train_..3+test_..2'
  assert written == {
    f'evaluation_{stem}.json',
    f'predictions_{stem}.csv',
    f'block_density_{stem}.png',
    f'block_density_{stem}.svg',
  }


# It is read as a whole, on the single CPU that saved it.
@pytest.mark.filterwarnings('ignore:Sharding info not provided:UserWarning')
def test_dense_run_and_choice_of_checkpoint(program, dense_run, tmp_path):
  folder = _copy(dense_run, tmp_path / 'dense')
  # A later and worse checkpoint, whose head always predicts class 2.
  with checkpoints.open_manager(folder) as manager:
    saved = manager.restore(3)
    state = saved['state']
    state['params']['fc']['kernel'] *= 0
    state['params']['fc']['bias'] = np.float32([0, 0, 1, 0, 0, 0])
    checkpoints.save(manager, 4, state, saved['info'], -1.0)
    manager.wait_until_finished()

  def evaluate(*arguments):
    lines = program(
      'evaluate', f'--workdir={folder}', '--split=test', *arguments
    )
    return json.loads(lines.splitlines()[-1])

  best, latest = evaluate(), evaluate('--checkpoint=latest')
  assert (best['step'], latest['step']) == (3, 4)
  # Labels cycle through the classes: 3 of 20 spots have class 2.
  assert latest['accuracy'] == 3 / 20
  expected = np.log(5 + np.e) - 3 / 20
  assert latest['loss'] == pytest.approx(expected, rel=1e-5)
  assert best['loss'] != pytest.approx(expected, rel=1e-3)
  gmacs = (_STEM + _SHORTCUTS + _BLOCKS) / 1e9
  for name in ('gmacs_mean', 'gmacs_p50', 'gmacs_p95', 'gmacs_dense'):
    assert best[name] == pytest.approx(gmacs, rel=1e-12)
  assert not {'executed_fraction', 'budget', 'block_density'} & best.keys()
  assert not list(folder.glob('*.png'))


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--split=trian'], "split 'trian': .*the dataset has train: 64 .*test"),
    (['--split=train[64:]'], 'is empty'),
    (['extra.jpg'], '^unknown arguments: extra.jpg$'),
    (['--results={}/flags.txt'], 'row .*: 2 cells for 1 columns'),
    (['--results={}'], 'is a folder; specify a CSV file'),
    (['--results=/proc/results.csv'], 'cannot write to the folder /proc:'),
    (['--checkpoint=first'], 'value should be one of <best|latest>'),
    (['--convention=flops'], r'value should be one of <conv|conv\+linear>'),
    (['--num_maps=-1'], 'num_maps'),
    (['--stochastic_gates=often'], 'stochastic_gates'),
  ],
)
def test_bad_arguments_end_it_before_any_compute(
  program, dynconv_run, monkeypatch, arguments, message
):
  monkeypatch.setattr(workdir, 'build_model', None)
  with pytest.raises((ValueError, OSError, flags.Error), match=message):
    program(
      'evaluate',
      f'--workdir={dynconv_run}',
      '--split=test',
      *(argument.format(dynconv_run) for argument in arguments),
    )


def test_the_row_of_another_run_or_kind_of_evaluation_stays(
  program, dynconv_run, monkeypatch, tmp_path
):
  monkeypatch.setattr(workdir, 'build_model', None)
  table = tmp_path / 'results.csv'
  text = (
    'run,split,seed,width_multiplier,checkpoint,convention,stochastic_gates\n'
    'dynconv,test,1,.25,best,,\ndynconv,train,0,1,latest,conv+linear,true\n'
  )
  table.write_text(text)
  for split, message in {
    'test': 'the split test; given, not in the table: seed: 0, not 1. Choose',
    'train': 'table: width_multiplier: 0.25, not 1; checkpoint: best, not '
    'latest; convention: conv, not conv.linear; stochastic_gates: false, not '
    'true. Choose another table, or rename the folder',
  }.items():
    with pytest.raises(ValueError, match=message):
      program(
        *('evaluate', f'--workdir={dynconv_run}', f'--split={split}'),
        f'--results={table}',
      )
  assert table.read_text() == text


def test_runs_that_cannot_be_evaluated(
  program, dynconv_run, monkeypatch, tmp_path
):
  monkeypatch.setattr(workdir, 'build_model', None)
  with pytest.raises(FileNotFoundError, match='is not the workdir of a run'):
    program('evaluate', f'--workdir={tmp_path / "none"}')
  folder = _copy(dynconv_run, tmp_path / 'cut')
  flags_ = folder / 'flags.txt'
  lines = flags_.read_text().splitlines(keepends=True)
  flags_.write_text(''.join(x for x in lines if '--cutmix' not in x))
  with pytest.raises(
    ValueError, match=f'^flags.txt of {folder}: cutmix is mis'
  ):
    program('evaluate', f'--workdir={folder}')
  folder = _copy(dynconv_run, tmp_path / 'run', validation_split='none')
  with pytest.raises(ValueError, match='^this run has no validation split'):
    program('evaluate', f'--workdir={folder}')
  shutil.rmtree(folder / 'checkpoints')
  for _ in range(2):
    with pytest.raises(
      checkpoints.CheckpointError, match=f'^no checkpoint in {folder}'
    ):
      program('evaluate', f'--workdir={folder}', '--split=test')
    (folder / 'checkpoints').mkdir(exist_ok=True)


def test_data_of_other_classes(program, dynconv_run, tmp_path):
  folder = _copy(dynconv_run, tmp_path / 'run', classes='ring,disc')
  with pytest.raises(
    ValueError,
    match='the data has the classes ring, disc; the run was trained on disc, '
    'ring, square',
  ):
    program('evaluate', f'--workdir={folder}')


@pytest.mark.slow
def test_in_a_process_of_its_own(dynconv_run, tmp_path):
  command = [sys.executable, '-m', 'experiments.evaluate', '--num_maps=0']
  folder = _copy(dynconv_run, tmp_path / 'run')
  done = subprocess.run(
    [*command, f'--workdir={folder}'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert json.loads(done.stdout.splitlines()[-1])['num_examples'] == 6

  done = subprocess.run(
    [*command, f'--workdir={tmp_path}'], capture_output=True, text=True
  )
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr == (
    f'error: {tmp_path} is not the workdir of a run: there is no flags.txt\n'
  )
