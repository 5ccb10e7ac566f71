"""Times a training step: dense, DynConv, and an equivalent PyTorch network.

python -m benchmarks.training --model=resnet18 --image_size=64 \
  --batch_size=64
python -m benchmarks.training --model=efficientnet_lite0 --image_size=160 \
  --batch_size=32

Each runs in a separate process, because the thread pools of two frameworks in
one process slow each other down. Timing is interleaved. Prints medians and
their ratios; the last line is JSON. JAX divides the CPU into two devices, as
`dynconv train` does, and is also timed with one device. Skips PyTorch, with a
message, if it is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from benchmarks import interleaved
from dynconv_jax.checks import check_choice
from dynconv_jax.cli import program
from dynconv_jax.models import registry

_MODEL = flags.DEFINE_string(
  'model', 'resnet18', f'One of {", ".join(registry.architectures())}.'
)
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 64, 'Side of the images, in pixels.', lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 64, 'Number of images.', lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 7, 'Number of rounds of interleaved timing.', lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  'steps', 3, 'Number of timed steps per round.', lower_bound=1
)
_WORKER = flags.DEFINE_string('worker', None, 'For internal use.')

_CLASSES = 6


def main(argv: Sequence[str]) -> None:
  """Times the steps; prints a table and JSON."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  check_choice('model', _MODEL.value, registry.architectures())
  if _WORKER.value:
    step = _WORKERS[_WORKER.value]()
    interleaved.serve(lambda _: interleaved.seconds(step, _STEPS.value))
    return
  names = list(_WORKERS)
  if importlib.util.find_spec('torch') is None:
    print('skipping PyTorch: not installed (pip install -e .[torch])')
    names = [name for name in names if not name.startswith('torch')]
  with contextlib.ExitStack() as stack:
    timed = {name: _start(name, stack) for name in names}
    milliseconds = interleaved.medians(timed, _ROUNDS.value)
  base = milliseconds['jax_dense']
  for name, value in milliseconds.items():
    print(f'{name:22} {value:8.1f} ms   {value / base:.3f} of jax_dense')
  result = {
    'model': _MODEL.value,
    'image_size': _IMAGE_SIZE.value,
    'batch_size': _BATCH_SIZE.value,
    'milliseconds': milliseconds,
    'dynconv_over_dense': milliseconds['jax_dynconv'] / base,
    'two_devices_over_one': base / milliseconds['jax_dense_one_device'],
    'python': platform.python_version(),
  }
  if 'torch' in milliseconds:
    result['jax_over_torch'] = base / milliseconds['torch']
    result['jax_over_torch_channels_last'] = (
      base / milliseconds['torch_channels_last']
    )
  print(json.dumps(result))


def _start(name: str, stack: contextlib.ExitStack) -> Callable[[], list[float]]:
  own = ('model', 'image_size', 'batch_size', 'steps')
  arguments = [f'--{flag}={flags.FLAGS[flag].value}' for flag in own]
  worker = interleaved.Worker(
    'benchmarks.training', [f'--worker={name}', *arguments]
  )
  stack.callback(worker.stop)
  worker.ask()  # Compiles and warms up.
  return worker.ask


def _inputs() -> tuple[np.ndarray, np.ndarray]:
  n, size = _BATCH_SIZE.value, _IMAGE_SIZE.value
  images = np.random.default_rng(0).standard_normal((n, size, size, 3))
  return images.astype(np.float32), np.arange(n) % _CLASSES


def _jax_step(method: str, devices: int = 0) -> Callable[[], None]:
  import jax
  import jax.numpy as jnp
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  from dynconv_jax.training import schedules, state, workdir
  from dynconv_jax.training.config import Config

  program.keep_memory()  # As in training.
  program.share_cpu(devices, _BATCH_SIZE.value)
  mesh = jax.make_mesh(
    (jax.local_device_count(),), ('data',), axis_types=(AxisType.Auto,)
  )
  config = Config.make(
    model=_MODEL.value,
    method=method,
    image_size=_IMAGE_SIZE.value,
    batch_size=_BATCH_SIZE.value,
  )
  images, labels = _inputs()
  batch = {
    'image': jnp.asarray(images),
    'label': jax.nn.one_hot(labels, _CLASSES),
  }
  batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))
  model = workdir.build_model(config, _CLASSES)
  tx = schedules.optimizer(
    config.optimization, schedules.learning_rate(config.optimization, 100)
  )
  train_step = state.make_train_step(state.split(model)[0], tx, config, 100)
  current = jax.device_put(
    state.create_state(model, tx, config), NamedSharding(mesh, PartitionSpec())
  )

  def step():
    nonlocal current
    current = jax.block_until_ready(train_step(current, batch))

  return step


def _torch_step(channels_last: bool) -> Callable[[], None]:
  import torch
  from torch.nn import functional

  from benchmarks import torch_networks

  torch_networks.use_all_cores()
  model = torch_networks.create(_MODEL.value, _CLASSES)
  images, labels = _inputs()
  images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  if channels_last:
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
  labels = torch.from_numpy(labels)
  optimizer = torch.optim.SGD(
    model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4
  )

  def step():
    optimizer.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

  return step


_WORKERS = {
  'jax_dense': lambda: _jax_step('dense'),
  'jax_dynconv': lambda: _jax_step('dynconv'),
  'jax_dense_one_device': lambda: _jax_step('dense', 1),
  'torch': lambda: _torch_step(False),
  'torch_channels_last': lambda: _torch_step(True),
}


if __name__ == '__main__':
  program.run(main)
