"""Injects faults into runs: kills, full disks, double starts, damaged files.

python tests/campaign/campaign.py [--kills=20] [--flips=20] [--seed=0] [PART...]

Each row of the table is a kind of fault, how often it was injected, and how
often it ended as it should: with the same bits, or with one line of error.
Exits with status 1 unless all did. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
_DATA = ('--spots_size=24', '--spots_train=64', '--spots_test=20')
_RUN = (
  *('--dataset=spots', *_DATA, '--image_size=16', '--crop=none'),
  *('--model=cifar_resnet8', '--width_multiplier=0.25', '--batch_size=8'),
  *('--epochs=6', '--eval_batch_size=8'),
)
_STEPS = 6 * 7


class Campaign:
  """A folder for runs, and the table of their outcomes."""

  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder, self.random = folder, random.Random(seed)
    self.rows: dict[str, list[str]] = {}
    self.environment = {**os.environ, 'XDG_CACHE_HOME': str(folder / 'cache')}

  def note(self, fault: str, problem: str) -> None:
    """Adds an outcome; '' means that all is as it should be."""
    self.rows.setdefault(fault, []).append(problem)
    print(f'{fault}: {problem or "as it should be"}', flush=True)

  def start(self, *command, limit: int = 0) -> subprocess.Popen:
    """Starts a program; `limit` is the maximum file size in KiB, 0 for none."""
    command = [sys.executable, '-m', *map(str, command)]
    if limit:
      shell = f'ulimit -f {limit} && exec "$@"'
      command = ['bash', '-c', shell, 'bash', *command]
    return subprocess.Popen(
      command,
      cwd=ROOT,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def call(self, *command, limit: int = 0) -> tuple[int, str]:
    """Returns the status and output of a program."""
    process = self.start(*command, limit=limit)
    output = process.communicate()[0]
    return process.returncode, output

  def train(self, workdir, data=None, **options):
    data = data or self.folder / 'data'
    return self.call(*_train(workdir, data), **options)

  def refused(self, outcome: tuple[int, str], text: str) -> str:
    """Returns '' if the output is one line of error that contains a text."""
    status, output = outcome
    last = output.strip().split('\n')[-1]
    if status != 1 or 'Traceback' in output or not last.startswith('error: '):
      return f'status {status}: {output[-500:]}'
    return '' if text in last else f'another error: {last}'

  def table(self) -> str:
    lines = ['| Fault | Times | As it should be |', '|---|---|---|']
    for fault, problems in self.rows.items():
      lines.append(f'| {fault} | {len(problems)} | {problems.count("")} |')
    return '\n'.join(lines)


def _train(workdir, data):
  places = f'--workdir={workdir}', f'--data_dir={data}'
  return 'experiments.train', *_RUN, *places


def result(workdir: pathlib.Path, step: int = _STEPS):
  """Returns what two runs with the same bits have in common."""
  info = workdir / 'checkpoints' / str(step) / 'info' / 'metadata'
  sums = json.loads(info.read_text())['checksums']
  sums.pop('info')  # The info contains elapsed seconds.
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return sums, [{**row, 'seconds': 0} for row in rows]


def kills(campaign: Campaign, number: int, reference, seconds: float) -> None:
  """Kills a training run, including data preparation, at random moments."""
  runs = max(1, number // 5)
  for i in range(runs):
    workdir, data = campaign.folder / f'kill{i}', campaign.folder / f'data{i}'
    for _ in range(number // runs):
      process = campaign.start(*_train(workdir, data))
      time.sleep(campaign.random.uniform(0, 1.2 * seconds))
      process.kill()
      process.communicate()
    status, output = campaign.train(workdir, data)
    same = status == 0 and result(workdir) == reference
    problem = '' if same else f'status {status}: {output[-500:]}'
    for _ in range(number // runs):
      campaign.note('kill -9 in preparation or training', problem)


def kernels(campaign: Campaign, number: int) -> None:
  """Kills compilations and damages their outputs."""
  code = (
    'from dynconv_jax import native\n'
    'from dynconv_jax.sparse.backends import cpu\n'
    'print(native.build(cpu._SOURCE))'
  )
  command = [sys.executable, '-c', code]
  shared = dict(cwd=ROOT, env=campaign.environment, text=True)

  def build():
    done = subprocess.run(command, **shared, capture_output=True)
    if done.returncode:
      sys.exit(done.stderr)
    path = pathlib.Path(done.stdout.strip())
    left = [p.name for p in path.parent.glob('tmp*')]
    return path, f'{done.stderr[-300:]} {left}' if left else ''

  for _ in range(number):
    process = subprocess.Popen(command, **shared, stdout=subprocess.DEVNULL)
    time.sleep(campaign.random.uniform(1, 8))
    process.kill()
    process.wait()
    path, problem = build()
    campaign.note('kill -9 in the compilation of kernels', problem)
    path.unlink()
  path, _ = build()
  content = path.read_bytes()
  for damaged in (b'', content[:100_000], b'garbage' * 1000):
    path.write_bytes(damaged)
    again, problem = build()
    sound = again == path and path.stat().st_size > 100_000
    campaign.note(
      'damaged library of kernels',
      problem or ('' if sound else f'{again} {path}'),
    )


def sweep(campaign: Campaign) -> None:
  """Kills a sweep, whose child continues, and starts it again."""
  results = campaign.folder / 'results'
  command = (
    *('experiments.sweep', *_RUN, '--grid=method=dense,dynconv'),
    *(f'--data_dir={campaign.folder / "data"}', '--latency_batch_size=0'),
    *(f'--results={results}', f'--workdir={campaign.folder / "sweep"}'),
  )
  process = campaign.start(*command)
  time.sleep(25)
  process.kill()
  refused = campaign.call(*command)
  if refused[0]:
    campaign.note(
      'sweep whose child lives', campaign.refused(refused, 'in use')
    )
  while refused[0]:
    time.sleep(5)
    refused = campaign.call(*command)
    if 'in use' not in refused[1]:
      break
  with (results / 'results.csv').open() as file:
    rows = [row['run'] for row in csv.DictReader(file)]
  complete = rows == ['dense', 'dynconv'] and refused[0] == 0
  campaign.note('kill -9 of a sweep', '' if complete else refused[1][-500:])


def full_disk(campaign: Campaign, reference) -> None:
  """Limits the file size in each program that writes."""
  for limit in (1, 8, 24):
    workdir = campaign.folder / f'full{limit}'
    outcome = campaign.train(workdir, limit=limit)
    campaign.note(
      'full disk in training', campaign.refused(outcome, workdir.name)
    )
    status, output = campaign.train(workdir)
    same = status == 0 and result(workdir) == reference
    campaign.note('training after a full disk', '' if same else output[-500:])
  outcome = campaign.train(
    campaign.folder / 'unprepared', campaign.folder / 'small', limit=4
  )
  campaign.note('full disk in preparation', campaign.refused(outcome, 'small'))
  reference_run = campaign.folder / 'reference'
  run = f'--workdir={reference_run}'
  weights = campaign.folder / 'weights.safetensors'
  for command, limit in (
    (('export_weights', run, f'--output={weights}'), 1),
    (('export_weights', run, f'--output={weights}'), 0),
    (('export_onnx', run, f'--output={weights}.onnx'), 1),
    (('export_stablehlo', run, f'--output={weights}.stablehlo'), 1),
    (('evaluate', run, '--num_maps=4'), 1),
    (('plot', run), 1),
    (('predict', run, photograph(campaign), f'--output_dir={weights}_'), 1),
    (
      (
        *('import_weights', f'--from_torch={weights}'),
        *('--model=cifar_resnet8', '--method=dynconv', '--image_size=16'),
        *('--width_multiplier=0.25', f'--workdir={weights}_run'),
      ),
      1,
    ),
  ):
    outcome = campaign.call(
      f'experiments.{command[0]}', *command[1:], limit=limit
    )
    if limit:
      problem = campaign.refused(outcome, str(campaign.folder))
      campaign.note(f'full disk in {command[0]}', problem)
    elif outcome[0]:
      sys.exit(outcome[1])
  same = result(reference_run) == reference
  campaign.note('run that programs read on a full disk', '' if same else 'lost')


def photograph(campaign: Campaign) -> pathlib.Path:
  """Returns a small image file."""
  path = campaign.folder / 'photograph.png'
  Image.effect_noise((200, 150), 64).convert('RGB').save(path)
  return path


def double_start(campaign: Campaign) -> None:
  """Starts training in a workdir in use, and where no run is possible."""
  workdir = campaign.folder / 'twice'
  first = campaign.start(*_train(workdir, campaign.folder / 'data'))
  while not (workdir / '.lock').exists():
    time.sleep(0.1)
  outcome = campaign.train(workdir)
  text = f'in use by process {first.pid} on '
  campaign.note('two trainings in one workdir', campaign.refused(outcome, text))
  first.send_signal(signal.SIGHUP)
  first.communicate()
  for place in ('/proc/run', __file__):
    outcome = campaign.train(place)
    campaign.note(
      'workdir that cannot be written to',
      campaign.refused(outcome, f'cannot write to the folder {place}'),
    )


def flips(campaign: Campaign, number: int) -> None:
  """Flips bits in checkpoints; the same or the older weights must load."""
  code = (
    'import sys\n'
    'from dynconv_jax import interop\n'
    'from dynconv_jax.training import checkpoints, workdir\n'
    'import zlib\n'
    'for path in sys.argv[1:]:\n'
    '  try:\n'
    '    run = workdir.load_run(path, best=False)\n'
    '  except checkpoints.CheckpointError:\n'
    '    print("none")\n'
    '    continue\n'
    '  arrays = interop.to_torch_state_dict(run.model).items()\n'
    '  text = b"".join(k.encode() + v.tobytes() for k, v in sorted(arrays))\n'
    '  print(run.step, zlib.crc32(text), *run.class_names)\n'
  )
  original = campaign.folder / 'reference'
  older = campaign.folder / 'older'
  shutil.copytree(original, older)
  shutil.rmtree(older / 'checkpoints' / str(_STEPS))
  copies = [original, older]
  for i in range(number):
    copies.append(campaign.folder / f'flip{i}')
    shutil.copytree(original, copies[-1])
    newest = copies[-1] / 'checkpoints' / str(_STEPS)
    path = campaign.random.choice(
      [p for p in newest.rglob('*') if p.is_file() and p.stat().st_size]
    )
    content = bytearray(path.read_bytes())
    bit = campaign.random.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
  done = subprocess.run(
    [sys.executable, '-c', code, *map(str, copies)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  newest, older, *outcomes = done.stdout.splitlines()
  for outcome in outcomes:
    sound = outcome in (newest, older)
    campaign.note('flipped bit in a checkpoint', '' if sound else outcome)


def damaged_files(campaign: Campaign) -> None:
  """Damages each file of a workdir that programs read."""
  original = campaign.folder / 'reference'
  cut = (original / 'flags.txt').read_text()[:300].rpartition('\n')[0]
  cases = {
    'flags.txt': (b'', b'\xff\xfe\0', cut.encode(), b'no flags'),
    'metrics.jsonl': (b'5\n{}\n[1, 2]\n', b'\xff\xfe\0'),
    'results.csv': (b'', b'run\na,b\n', b'\xff\xfe\0'),
  }
  programs = {
    'flags.txt': ('evaluate', '--num_maps=0'),
    'metrics.jsonl': ('plot',),
    'results.csv': ('evaluate', '--num_maps=0', '--results={}/results.csv'),
  }
  for name, contents in cases.items():
    for i, content in enumerate(contents):
      workdir = campaign.folder / f'{name}{i}'
      shutil.copytree(original, workdir)
      (workdir / name).write_bytes(content)
      program, *arguments = (a.format(workdir) for a in programs[name])
      outcome = campaign.call(
        f'experiments.{program}', f'--workdir={workdir}', *arguments
      )
      campaign.note(f'damaged {name}', campaign.refused(outcome, name))


def damaged_data(campaign: Campaign) -> None:
  """Damages each file of a prepared data set, and images to classify."""
  original = campaign.folder / 'data'
  files = sorted(p for p in original.rglob('*') if p.is_file())
  for number, path in enumerate(files):
    content = path.read_bytes()
    half = len(content) // 2
    flipped = (
      content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :]
    )
    cases = {'': b'', 'cut': content[:half], 'other': b'garbage' * 100}
    if path.suffix not in ('.txt', '.json'):  # Those may be sound text again.
      cases['flipped'] = flipped
    for case, damaged in cases.items():
      data = campaign.folder / f'damaged{number}{case}'
      shutil.copytree(original, data)
      (data / path.relative_to(original)).write_bytes(damaged)
      outcome = campaign.train(
        campaign.folder / f'on_damaged{number}{case}', data
      )
      name = path.name.split('-0')[0]
      campaign.note(f'damaged {name}', campaign.refused(outcome, str(data)))
  run = f'--workdir={campaign.folder / "reference"}'
  path = photograph(campaign)
  for damaged in (b'', path.read_bytes()[:50], b'garbage'):
    path.write_bytes(damaged)
    status, output = campaign.call('experiments.predict', run, path)
    told = f"error: cannot decode the image '{path}'" in output
    sound = status == 1 and told and 'Traceback' not in output
    campaign.note('damaged photograph', '' if sound else output[-500:])


def main() -> None:
  """Runs the campaign and prints its table."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name, default in (('kills', 20), ('flips', 20), ('seed', 0)):
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('parts', nargs='*', help='checkpoints, ...; all of them')
  given = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='campaign_') as folder:
    campaign = Campaign(pathlib.Path(folder), given.seed)
    reference = campaign.folder / 'reference'
    campaign.train(campaign.folder / 'warm')  # Also prepares the data.
    start = time.monotonic()
    status, output = campaign.train(reference)
    seconds = time.monotonic() - start
    if status:
      sys.exit(output)
    expected = result(reference)
    parts = {
      'checkpoints': lambda: flips(campaign, given.flips),
      'files': lambda: damaged_files(campaign),
      'data': lambda: damaged_data(campaign),
      'starts': lambda: double_start(campaign),
      'disk': lambda: full_disk(campaign, expected),
      'kernels': lambda: kernels(campaign, max(1, given.kills // 4)),
      'sweep': lambda: sweep(campaign),
      'kills': lambda: kills(campaign, given.kills, expected, seconds),
    }
    for name in given.parts or parts:
      parts[name]()
  print(campaign.table())
  sys.exit(any(any(problems) for problems in campaign.rows.values()))


if __name__ == '__main__':
  main()
