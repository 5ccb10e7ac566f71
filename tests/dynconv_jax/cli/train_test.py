"""Tests of the training program, its flags and its errors."""

import logging as stdlib_logging
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import absl_logging
import jax_processes
import pytest
from absl import flags, logging

import dynconv_jax
from dynconv_jax.cli import config_flags, program
from dynconv_jax.training import workdir
from dynconv_jax.training.checkpoints import CheckpointError
from dynconv_jax.training.config import Config, all_options


def _parse(*arguments):
  values = flags.FlagValues()
  config_flags.define(values)
  flags.DEFINE_string('flagfile', '', '', flag_values=values)
  values(['program', *arguments])
  return config_flags.read(values)


def test_every_field_is_a_flag_with_the_same_default():
  assert _parse() == Config()
  values = flags.FlagValues()
  config_flags.define(values)
  options = all_options()
  for name, option in options.items():
    assert values[name].help.startswith(option.help.removesuffix('.'))
  assert set(values) == set(options)


def test_options_from_outside_are_flags(tmp_path, monkeypatch):
  (tmp_path / 'mine.py').write_text(
    'import dataclasses\n'
    'from dynconv_jax.methods.method import Method\n'
    'from dynconv_jax.models.resnet import ARCHITECTURES\n'
    'from dynconv_jax.options import option\n'
    '@dataclasses.dataclass(frozen=True)\n'
    'class Options:\n'
    "  mine_share: float = option(0.5, 'A share.')\n"
    "METHOD = Method('mine', Options)\n"
    'def narrow(*, width_multiplier=1.0, narrow_by=0.5, **kwargs):\n'
    "  factory = ARCHITECTURES['cifar_resnet8']\n"
    '  width = narrow_by * width_multiplier\n'
    '  return factory(width_multiplier=width, **kwargs)\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  flagfile = tmp_path / 'mine.flags'
  flagfile.write_text(
    '--method=mine:METHOD\n--mine_share=0.25\n--model=mine:narrow\n'
  )
  argv = ['program', f'--flagfile={flagfile}', '--narrow_by=0.25']
  values = flags.FlagValues()
  config_flags.define(values, argv)
  flags.DEFINE_string('flagfile', '', '', flag_values=values)
  values(argv)
  config = config_flags.read(values)
  config.check()
  assert config.method.options.mine_share == 0.25
  assert config.model.options.narrow_by == 0.25
  assert Config.from_flags(config.to_flags()) == config
  for argument, message in (
    ('--method=mine:NONE', 'mine has no NONE'),
    ('--model=mine.other:narrow', 'no module mine.other'),
    ('--dataset=mine:METHOD', 'must be of type DataSource'),
  ):
    with pytest.raises(SystemExit, match=message):
      config_flags.define(flags.FlagValues(), ['program', argument])


@pytest.mark.parametrize(
  ('parameter', 'text', 'value'),
  [
    ('given: float = 0', '0.5', 0.5),
    ('given: float | None = None', '0.5', 0.5),
    ('given: Optional[int] = None', '3', 3),
    ('given: tuple[int, ...] = ()', '1,2', (1, 2)),
    ('given: Annotated[float, {"help": "A share."}] = 1', '0.5', 0.5),
    ('given: Sequence[str] = ("a",)', 'b,c', ('b', 'c')),
    ('given=None', 'big', 'big'),
    ('given=(1, 2)', '3', (3,)),
    ('given=(True, False)', 'false,true,false', (False, True, False)),
  ],
)
def test_options_of_a_network_have_their_annotated_type(
  tmp_path, monkeypatch, parameter, text, value
):
  (tmp_path / 'annotated.py').write_text(
    'from collections.abc import Sequence\n'
    'from typing import Annotated, Optional\n'
    f'def network(*, {parameter}, **kwargs):\n'
    '  return None\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'annotated', raising=False)
  argv = ['program', '--model=annotated:network', f'--given={text}']
  for given in (argv, argv[:2]):
    values = flags.FlagValues()
    config_flags.define(values, given)
    values(given)
    config = config_flags.read(values)
    assert (config.model.options.given == value) == (given is argv)
    assert Config.from_flags(config.to_flags()) == config


def test_a_flag_file_with_comments_and_a_later_flag_wins(tmp_path):
  path = tmp_path / 'some.flags'
  path.write_text(
    '# A comment.\n\n--model=resnet18\n--crop_scale=0.5,1\n--noflip\n'
    '// Another.\n--budget=0.3\n--classes=a,b\n--mask_bias=2\n'
  )
  expected = Config().replace(
    model='resnet18',
    crop_scale=(0.5, 1.0),
    flip=False,
    budget=0.7,
    classes=('a', 'b'),
    mask_bias=2.0,
  )
  assert _parse(f'--flagfile={path}', '--budget=0.7') == expected
  # The flags file in a workdir is such a file, too.
  path.write_text(expected.to_flags())
  assert _parse(f'--flagfile={path}') == expected


@pytest.mark.parametrize(
  'path',
  sorted(pathlib.Path(config_flags.__file__).parent.glob('flags/*.flags')),
  ids=lambda path: path.stem,
)
def test_the_flag_files_here_give_sound_configurations(path):
  config = _parse(f'--flagfile={path}')
  config.check(resumed=True)  # its pretrained weights may not be installed
  assert config != Config()
  assert path.read_text().startswith('# python -m experiments.train ')


def test_options_of_other_methods_are_found_on_the_command_line(tmp_path):
  file = tmp_path / 'base.flags'
  file.write_text('--skip_weight=0.5\n')
  arguments = [f'--flagfile={file}', '--method=act', '--budget=0.3', '--seed=1']
  arguments += ['--nomask_norm', '--ponder_weight', '0.1', '--budget=0.4']
  config = _parse(*arguments)
  found = config_flags.without_effect(config, arguments)
  assert found == ['budget', 'mask_norm']
  config = _parse('--method=dynconv', '--budget=0.3')
  assert not config_flags.without_effect(config, ['--budget=0.3'])


def test_what_is_no_number_is_an_error():
  with pytest.raises(ValueError, match='milestones must be numbers.*0.5.*x'):
    _parse('--milestones=0.5,x')
  with pytest.raises(ValueError, match='milestones must be numbers.*0.5,'):
    _parse('--milestones=0.5,')
  assert _parse('--classes=').data.classes == ()
  # Rejected later, when the classes of the data are known.
  assert _parse('--classes=,').data.classes == ('', '')
  with pytest.raises(flags.IllegalFlagValueError, match='flag --epochs=many'):
    _parse('--epochs=many')


def test_an_unknown_flag_is_an_error_with_a_hint():
  with pytest.raises(
    flags.UnrecognizedFlagError, match="'bugdet'.*Did you mean: budget"
  ):
    _parse('--bugdet=0.5')


def _guarded(main):
  """Returns what `program.run` passes to absl for a program."""
  with mock.patch.object(program.app, 'run') as run:
    program.run(main)
  return run.call_args.args[0]


@pytest.fixture
def absl_handler():
  """Restores absl's logging after the test."""
  with absl_logging.kept():
    yield logging.get_absl_handler()


@pytest.mark.parametrize(
  'error',
  [
    ValueError('budget must be in [0, 1]; got 2'),
    CheckpointError('no checkpoint in x'),
    FileNotFoundError('no folder x'),
    FloatingPointError('cross_entropy is not finite'),
  ],
)
def test_an_error_of_the_users_is_one_line(error, capsys, absl_handler):
  def main(argv):
    raise error

  with pytest.raises(SystemExit) as ended:
    _guarded(main)(['program'])
  assert ended.value.code == 1
  assert capsys.readouterr() == ('', f'error: {error}\n')


def test_a_bug_keeps_its_traceback(absl_handler):
  def main(argv):
    raise KeyError('a bug')

  with pytest.raises(KeyError, match='a bug'):
    _guarded(main)(['program'])

  def mistaken(argv):
    raise ValueError('a user error, looked into')

  logging.set_verbosity(logging.DEBUG)
  with pytest.raises(ValueError, match='looked into'):
    _guarded(mistaken)(['program'])


def test_programs_called_here_leave_logging_as_it_was(program, tmp_path):
  loggers = [stdlib_logging.getLogger(), logging.get_absl_logger()]
  before = [logger.level for logger in loggers]
  with pytest.raises(ValueError, match='budget'):
    program('train', '--budget=2', f'--workdir={tmp_path}/run')
  assert [logger.level for logger in loggers] == before


def test_only_our_own_progress_is_shown(absl_handler):
  _guarded(lambda argv: None)(['program'])
  ours = [
    pathlib.Path(dynconv_jax.__path__[0]) / 'training' / 'loop.py',
    program.__file__,
  ]
  theirs = ['/x/site-packages/tensorflow_datasets/core/writer.py']
  orbax = '/x/site-packages/orbax/checkpoint/checkpoint_manager.py'

  def shown(path, level):
    return bool(
      absl_handler.filter(
        stdlib_logging.LogRecord('absl', level, str(path), 1, '', (), None)
      )
    )

  logging.set_verbosity(logging.INFO)
  for path in [*ours, *theirs]:
    assert shown(path, stdlib_logging.WARNING)
    assert shown(path, stdlib_logging.INFO) == (path in ours)
  # Its errors are raised as well; its warnings concern intended behavior.
  assert not shown(orbax, stdlib_logging.ERROR)
  assert not shown('/lib/asyncio/base_events.py', stdlib_logging.ERROR)
  logging.set_verbosity(logging.DEBUG)
  assert shown(theirs[0], stdlib_logging.INFO)
  assert shown(orbax, stdlib_logging.ERROR)


def _command(folder, data_dir, *more):
  return [
    *(sys.executable, '-m', 'experiments.train'),
    f'--workdir={folder}',
    f'--data_dir={data_dir}',
    *('--spots_size=24', '--spots_train=64', '--spots_test=8'),
    *('--image_size=16', '--crop=none', '--cache=device'),
    *('--width_multiplier=0.25', '--batch_size=8', '--epochs=60'),
    *('--validation_split=none', '--checkpoint_every_epochs=60'),
    *more,
  ]


@pytest.mark.slow
def test_signals_end_it_and_the_same_command_goes_on(tmp_path):
  folder = tmp_path / 'run'
  command = _command(folder, tmp_path / 'data')
  root = pathlib.Path(program.__file__).parents[2]
  known = 0
  for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    with subprocess.Popen(
      command, cwd=root, stderr=subprocess.PIPE, text=True
    ) as process:
      while len(workdir.read_metrics(folder)) <= known:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
      process.send_signal(number)
      errors = process.communicate()[1]
    assert process.returncode == code, errors
    last = errors.splitlines()[-1]
    assert last.startswith(f'{number.name}: saved step '), errors
    assert last.endswith(f'{folder}; the same command resumes from there')
    known = len(workdir.read_metrics(folder))
    assert 0 < known < 60
  done = subprocess.run(
    command, cwd=root, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  summary, wrote = done.stdout.splitlines()
  assert summary.startswith('cifar_resnet8 dynconv, step 420, train accuracy ')
  assert wrote.startswith(f'wrote {folder / "learning_curves.png"} and ')
  assert (folder / 'learning_curves.svg').exists()
  assert [r['step'] for r in workdir.read_metrics(folder)] == list(
    range(7, 421, 7)
  )
  # No messages of other libraries.
  assert 'orbax' not in done.stderr
  assert 'checkpoint_manager.py' not in done.stderr
  assert 'loop.py' in done.stderr
  # A different configuration is a one-line error and leaves the folder
  # unchanged.
  before = sorted(folder.rglob('*'))
  done = subprocess.run(
    [*command, '--budget=0.25'],
    cwd=root,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stdout == ''
  assert done.stderr.splitlines()[-1].startswith(f'error: {folder} has a ')
  assert 'budget: 0.25, not 0.5' in done.stderr
  assert sorted(folder.rglob('*')) == before


@pytest.mark.parametrize(
  ('flags_given', 'message'),
  [
    (['--num_processes=2'], 'missing coordinator_address and process_id'),
    (
      ['--coordinator_address=a:1', '--num_processes=2', '--process_id=2'],
      r'process_id must be in \[0, 2\); got 2',
    ),
    (['--num_processes=0', '--distributed=auto'], 'must be >= 1; got 0'),
  ],
)
def test_processes_are_refused(program, tmp_path, flags_given, message):
  with pytest.raises(ValueError, match=message):
    program('train', *flags_given, f'--workdir={tmp_path}/run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_processes_by_flags(tmp_path):
  command = _command(tmp_path / 'run', tmp_path / 'data', '--epochs=2')
  address = jax_processes.free_address()
  command += [f'--coordinator_address={address}', '--num_processes=2']
  ended = jax_processes.run_all(
    [[*command, f'--process_id={number}'] for number in range(2)]
  )
  assert [status for status, *_ in ended] == [0, 0], ended
  assert 'cifar_resnet8 dynconv, step 14, train accuracy' in ended[0][1]
  assert 'train accuracy' not in ended[1][1]
  rows = workdir.read_metrics(tmp_path / 'run')
  assert [row['step'] for row in rows] == [7, 14]
