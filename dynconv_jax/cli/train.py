r"""Trains a network.

dynconv train --flagfile=spots_dynconv \
  --workdir=workdir/spots_dynconv [any flag again, later wins]

With an existing workdir, training resumes from the last checkpoint. If --epochs
has changed, schedules follow the new total. For training with several
processes, see docs/scaling.md.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags, logging

from dynconv_jax import distributed
from dynconv_jax.cli import config_flags, program
from dynconv_jax.training import loop, workdir

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, for all its files.', required=True
)
_CPU_DEVICES = flags.DEFINE_integer(
  'cpu_devices',
  0,
  'Number of JAX devices that the CPU is split into, each with a part of the '
  'batch. XLA runs much of the work of a device on one core. 0: one device per '
  'core, at most 2, or 1 with several processes.',
  lower_bound=0,
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address', None, 'host:port of process 0, for several processes.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes that train together.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Index of this process, from 0.'
)
_DISTRIBUTED = flags.DEFINE_string(
  'distributed',
  None,
  'How to find coordinator_address, num_processes, and process_id in the '
  'environment: auto (detects SLURM, Open MPI, and Kubernetes), slurm, ompi, '
  'mpi4py, or k8s.',
)
_START_TIMEOUT = flags.DEFINE_integer(
  'start_timeout', 300, 'Seconds to wait for other processes to start.'
)
config_flags.define()


def main(argv: Sequence[str]) -> None:
  """Trains, plots the learning curves, and prints a summary line."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  folder = pathlib.Path(_WORKDIR.value).expanduser()
  config = config_flags.read()
  if unused := config_flags.without_effect(config, sys.argv[1:]):
    logging.warning(
      'no effect with --dataset=%s --model=%s --method=%s: --%s',
      config.data.dataset,
      config.model.model,
      config.method.method,
      ', --'.join(unused),
    )
  several = distributed.start(
    _COORDINATOR_ADDRESS.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    cluster=_DISTRIBUTED.value,
    timeout=_START_TIMEOUT.value,
  )
  program.share_cpu(
    _CPU_DEVICES.value or int(several), config.optimization.batch_size
  )
  program.keep_memory()
  try:
    summary = loop.train(config, folder)
  except loop.Interrupted as interrupted:
    print(interrupted, file=sys.stderr)
    sys.exit(128 + interrupted.signal)
  if not distributed.is_main():
    return
  # Imported here because Matplotlib is slow to import.
  from dynconv_jax.plotting.curves import plot_learning_curves

  figure = folder / 'learning_curves.png'
  plot_learning_curves(workdir.read_metrics(folder), figure)
  print(_line(summary, config))
  print(f'wrote {figure} and {figure.with_suffix(".svg")}')


def _line(summary, config) -> str:
  model, method = config.model.model, config.method.method
  parts = [f'{model} {method}, step {summary["step"]}']
  for split in ('train', 'validation'):
    if split in summary:
      parts.append(f'{split} accuracy {summary[split]["accuracy"]:.4f}')
  last = summary.get('validation', summary['train'])
  if 'executed_fraction' in last:
    text = f'executed fraction {last["executed_fraction"]:.3f}'
    target = config.method.target()
    if target is not None:
      text += f' (budget {target:g})'
    parts.append(text)
  if summary['skipped']:
    parts.append(f'{summary["skipped"]} corrupt images skipped')
  parts.append(f'{summary["seconds"]:.0f} s')
  return ', '.join(parts)


if __name__ == '__main__':
  program.run(main)
