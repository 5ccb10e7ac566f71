r"""Times sparse execution against dense execution.

dynconv benchmark --model=resnet50 --method=dynconv \
  --density=0.5 --batch_size=8 --image_size=224

Uses synthetic clustered masks of one or more densities; the gates are evaluated
too, but their masks are replaced. With --workdir and --split, uses a trained
network's own masks on real images. Several values of --density, --batch_size,
and --mask_granularity are combined.

Each framework runs in its own process. Timing is interleaved and medians are
reported. PyTorch, ONNX Runtime, OpenVINO, and LiteRT are timed if installed
(pip install -e .[benchmark]), after a check that their logits match those of
JAX. One that crashes is left out; "failed" in the JSON says why. Options of the
network are flags, such as --gated_blocks=all. The last line is JSON.
--output=DIR also writes it to a file, with a figure. Requires a checkout,
because benchmarks/ is not installed.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags
from flax import nnx

from dynconv_jax.checks import check_choice
from dynconv_jax.cli import program
from dynconv_jax.files import write_atomic
from dynconv_jax.methods.method import METHODS
from dynconv_jax.models import registry
from dynconv_jax.models.create import create_model
from dynconv_jax.options import options_of
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.executor import MODES
from dynconv_jax.training.workdir import read_config

program.require_checkout('dynconv benchmark')

from benchmarks import cases  # noqa: E402

_MODEL = flags.DEFINE_string(
  'model', 'resnet50', 'Network, such as resnet50 or efficientnet_lite0.'
)
_METHOD = flags.DEFINE_string('method', 'dynconv', 'Gated method.')
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 224, 'Side of the images in pixels.'
)
_BATCH_SIZE = flags.DEFINE_list('batch_size', '8', 'One or more batch sizes.')
_DENSITY = flags.DEFINE_list(
  'density', '0.5', 'One or more fractions of active positions, in (0, 1].'
)
_GRANULARITY = flags.DEFINE_string(
  'mask_granularity',
  '1',
  "Side of DynConv's mask patches in positions: one for all stages, or one per "
  "stage (4,4,2,1). Separate several settings by ';'.",
)
_OPTIONS = {
  name: option
  for factory in registry.architectures().values()
  for name, option in options_of(registry.options_type(factory)).items()
}
for _name in _OPTIONS:
  flags.DEFINE_string(
    _name, None, 'Option of the network, for networks that have it.'
  )
flags.DEFINE_integer('num_classes', 1000, 'Number of classes.')
_DTYPE = flags.DEFINE_string('compute_dtype', 'float32', 'float32 or bfloat16.')
_MODE = flags.DEFINE_string('mode', 'auto', 'Mode of the executor.')
_BACKEND = flags.DEFINE_string(
  'backend',
  'auto',
  'Backend of the executor: auto, a name, or package.module:CLASS.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Workdir of a trained run whose network and masks are timed.'
)
flags.DEFINE_string('split', 'validation', 'Split of the run, for --workdir.')
flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use from --workdir.'
)
flags.DEFINE_integer(
  'num_batches', 8, 'Number of different batches of the split.', lower_bound=1
)
flags.DEFINE_string(
  'food101_dir', None, 'Overrides the food101_dir used in training.'
)
_RUNTIMES = flags.DEFINE_list(
  'runtimes',
  'auto',
  'Other frameworks to time. auto: all that are installed; none; or names.',
)
flags.DEFINE_bool(
  'masked_dense',
  True,
  'Time masked dense execution of the gated network. On a GPU, XLA takes '
  'minutes to compile it.',
)
flags.DEFINE_bool(
  'launched', False, 'On a GPU, also time JAX without CUDA graphs.'
)
_PER_BLOCK = flags.DEFINE_bool('per_block', False, 'Also time each block.')
_ROUNDS = flags.DEFINE_integer(
  'rounds', 7, 'Rounds of interleaved timing.', lower_bound=1
)
flags.DEFINE_integer('steps', 2, 'Timed calls per round.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder for JSON and figure.')

# Flags that the timed processes read. The first ones are in the summary.
_SUMMARY = (
  *('model', 'method', 'image_size', 'num_classes', 'compute_dtype'),
  *('mode', 'backend'),
)
_OF_RUNS = ('checkpoint', 'split')
_SETTINGS = (
  *(*_SUMMARY, *_OF_RUNS, 'workdir', 'num_batches', 'food101_dir'),
  *('masked_dense', 'launched', 'steps'),
)


def main(argv: Sequence[str]) -> None:
  """Times all cases and prints a table and JSON."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  all_cases, runtimes = _check()
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value).expanduser()
  if output:
    output.mkdir(parents=True, exist_ok=True)
  results = []
  settings = {**_values(_SETTINGS), 'options': _options()}
  with cases.start_workers(runtimes, settings) as workers:
    for case in all_cases:
      results.append(
        cases.time_case(
          case,
          workers,
          runtimes,
          rounds=_ROUNDS.value,
          per_block=_PER_BLOCK.value,
        )
      )
      _print(results[-1])
      if output:
        _write(output, results)
  if output:
    print(f'wrote {output}')
  print(json.dumps(_summary(results)))


def _check() -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the cases and the available runtimes.

  Raises:
    ValueError: flags are invalid. The message names each.
  """
  errors = []

  def check(function, *args):
    try:
      return function(*args)
    except ValueError as error:
      errors.append(str(error))

  def numbers(flag, kind, valid, allowed):
    try:
      values = [kind(text) for text in flag.value]
      if values and all(map(valid, values)):
        return values
    except ValueError:
      pass
    got = ','.join(flag.value)
    raise ValueError(f'{flag.name} must be {allowed}; got {got}')

  def image_size(factory):
    least = getattr(factory, 'min_image_size', 1)
    if _IMAGE_SIZE.value < least:
      raise ValueError(
        f'image_size must be at least {least}; got {_IMAGE_SIZE.value}'
      )

  def sides(text):
    if not all(side.strip().isdigit() for side in text.split(',')):
      raise ValueError(f'mask_granularity must be integers; got {text!r}')
    sizes = tuple(int(side) for side in text.split(','))
    nnx.eval_shape(
      lambda: create_model(
        _MODEL.value,
        mask_granularity=sizes,
        method='dynconv',
        rngs=nnx.Rngs(0),
        **_options(),
      )
    )

  models = registry.architectures()
  gated = [method for method in METHODS if method != 'dense']
  for name, value, allowed in (
    ('model', _MODEL.value, models),
    ('method', _METHOD.value, gated),
    ('compute_dtype', _DTYPE.value, ('float32', 'bfloat16')),
    ('mode', _MODE.value, MODES),
  ):
    check(check_choice, name, value, allowed)
  if _BACKEND.value != 'auto':
    check(get_backend, _BACKEND.value)
    if _MODE.value == 'dense':
      errors.append(f"mode 'dense' has no backend; got {_BACKEND.value!r}")
  granularities = _GRANULARITY.value.split(';')
  if _MODEL.value in models:
    check(image_size, models[_MODEL.value])
    for text in granularities:
      check(sides, text)
  batch_sizes = check(
    numbers, _BATCH_SIZE, int, lambda n: n > 0, 'one or more > 0'
  )
  densities = check(
    numbers, _DENSITY, float, lambda d: 0 < d <= 1, 'one or more in (0, 1]'
  )
  known = cases.RUNTIMES
  runtimes = {'auto': list(known), 'none': []}.get(
    ','.join(_RUNTIMES.value), _RUNTIMES.value
  )
  if unknown := [runtime for runtime in runtimes if runtime not in known]:
    errors.append(
      f'runtimes must be auto, none, or some of {", ".join(known)}; got '
      f'{", ".join(unknown)}'
    )
  if errors:
    raise ValueError('; '.join(errors))
  if _WORKDIR.value:  # A trained network has its own masks.
    granularities, densities = [''], [None]
  product = itertools.product(batch_sizes, granularities, densities)
  return [
    {'batch_size': n, 'mask_granularity': g, 'density': d}
    for n, g, d in product
  ], cases.available_runtimes(runtimes, bool(_WORKDIR.value))


def _print(result) -> None:
  print(
    f'batch {result["batch_size"]}, density {result["density"]:.3f}, '
    f'patches {result["mask_granularity"] or "of the run"}, '
    f'MAC-proportional ideal {result["mac_ideal"]:.3f}'
  )
  own = {
    key.removesuffix('_ms').replace('_', ' '): value
    for key, value in result.items()
    if key.endswith('_ms')
  }
  for name, value in (own | result['runtimes']).items():
    print(
      f'  {name:16} {value:9.2f} ms   {value / result["dense_ms"]:.3f} of dense'
    )
  if 'sparse_ms' in result:
    print(
      f'  sparse is {result["sparse_over_fastest_dense"]:.3f} of the fastest '
      f'dense, {result["fastest_dense"]}; over (that * executed MACs): '
      f'{result["sparse_over_proportional"]:.3f}'
    )
  for block in result.get('blocks', ()):
    print(
      f'  {block["name"]:12} executed {block["executed_fraction"]:.3f}  dense '
      f'{block["dense_ms"]:8.3f} ms  {block["plan"]:10} '
      f'{block["sparse_ms"]:8.3f} ms   {block["sparse_over_dense"]:.3f}'
    )


def _values(names) -> dict[str, Any]:
  return {name: flags.FLAGS[name].value for name in names}


def _options() -> dict[str, Any]:
  """Returns the options of the network that are set."""
  values = {k: flags.FLAGS[k].value for k in _OPTIONS}
  return {k: _OPTIONS[k].parse(v) for k, v in values.items() if v is not None}


def _config():
  return read_config(pathlib.Path(_WORKDIR.value).expanduser())


def _summary(results) -> dict[str, Any]:
  """Returns settings, machine, and times."""
  settings = _values(_SUMMARY) | _options()
  if _WORKDIR.value:
    settings |= _values(_OF_RUNS)
    settings['workdir'] = pathlib.Path(_WORKDIR.value).name
    del settings['num_classes']
    config = _config()
    settings['method'] = config.method.method
    for name in ('model', 'image_size', 'compute_dtype'):
      settings[name] = getattr(config.model, name)
  settings |= cases.describe_machine()
  if len(results) == 1:
    return {**settings, **results[0]}
  return {**settings, 'runs': results}


def _write(output: pathlib.Path, results) -> None:
  """Writes the JSON file and the figure."""
  text = json.dumps(_summary(results), indent=2) + '\n'
  write_atomic(output / 'benchmark.json', text)
  if not _WORKDIR.value:
    from dynconv_jax.plotting.speedup import plot_speedup

    title = f'{_MODEL.value}, {_METHOD.value}, {_IMAGE_SIZE.value} pixels'
    plot_speedup(results, output / 'speedup.png', title=title)


if __name__ == '__main__':
  program.run(main)
