r"""Counts the multiply-accumulates (MACs) of a network, layer by layer.

  dynconv count --model=resnet50 --image_size=224
  dynconv count --model=resnet101 --method=dynconv --depth=2
  dynconv count --jax=package.module:function --input_shape=1,224,224,3
  dynconv count --torch=package.module:factory --input_shape=1,3,224,224
  dynconv count --torch=package.module:bert \
    --input_shape=input_ids=1,128:int64 --input_shape=attention_mask=1,128:int64
  dynconv count --onnx=FILE --dimension=batch=1

Prints a table for one image, one batch, or the given input shapes. The last
line is JSON with the total and the MACs of each layer.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.macs import CONVENTIONS, Report

_MODEL = flags.DEFINE_string(
  'model', None, 'Network of this package, such as resnet50.'
)
_METHOD = flags.DEFINE_string(
  'method', 'dense', 'Method of --model, such as dense or dynconv.'
)
_NUM_CLASSES = flags.DEFINE_integer(
  'num_classes', 1000, 'Number of classes of --model.'
)
_WIDTH = flags.DEFINE_float(
  'width_multiplier', 1.0, 'Scale of the channel counts of --model.'
)
_IMAGE_SIZE = flags.DEFINE_list(
  'image_size', ['224'], 'Input size of --model: SIDE or HEIGHT,WIDTH.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 1, 'Batch size of --model.', lower_bound=1
)
_JAX = flags.DEFINE_string('jax', None, 'package.module:function to count.')
_TORCH = flags.DEFINE_string(
  'torch',
  None,
  'package.module:factory to count; a function that returns an nn.Module.',
)
_ONNX = flags.DEFINE_string('onnx', None, 'ONNX file to count.')
_INPUT_SHAPE = flags.DEFINE_multi_string(
  'input_shape',
  [],
  'Shape of an argument for --jax and --torch, such as 1,224,224,3; repeat it '
  'for each argument. A dtype may follow (1,128:int32) and the name of a '
  'keyword argument may precede (input_ids=1,128:int64). The default dtype is '
  'float32 or, for --torch, that of the module.',
)
_DIMENSION = flags.DEFINE_multi_string(
  'dimension', [], 'Size of a symbolic dimension for --onnx, as NAME=SIZE.'
)
_CONVENTION = flags.DEFINE_enum(
  'convention',
  'conv+linear',
  sorted(CONVENTIONS),
  "Counting convention; see docs/macs.md. This project reports 'conv'.",
)
_PADDING = flags.DEFINE_bool(
  'padding', True, 'Count positions of input padding.'
)
_TRIP_COUNT = flags.DEFINE_integer(
  'trip_count', None, 'Iterations of while loops (--jax, --torch, --onnx).'
)
_BRANCH = flags.DEFINE_string(
  'branch', 'max', 'Branch of a condition to count: max, min, or its name.'
)
_DEPTH = flags.DEFINE_integer(
  'depth', None, 'Merge layers by the first DEPTH parts of their names.'
)
_TREE = flags.DEFINE_bool(
  'tree', False, 'Show the modules as a tree, up to DEPTH.'
)
_SORT = flags.DEFINE_enum(
  'sort', 'order', ['order', 'name', 'macs', 'parameters'], 'Row order.'
)
_CSV = flags.DEFINE_string('csv', None, 'Write the rows to this file.')
_JSON = flags.DEFINE_string('json', None, 'Write the report to this file.')
_PLOT = flags.DEFINE_string(
  'plot', None, 'Write a bar chart to this file, as .png and .svg.'
)


def main(argv: Sequence[str]) -> None:
  """Counts the network set by the flags, and prints and writes the report."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  sources = {
    'model': _count_ours,
    'jax': _count_jax,
    'torch': _count_torch,
    'onnx': _count_onnx,
  }
  present = [name for name in sources if flags.FLAGS[name].value is not None]
  if len(present) != 1:
    raise ValueError(
      'set one of --model, --jax, --torch, and --onnx; got'
      f' {" and ".join(f"--{name}" for name in present) or "none"}'
    )
  if _DEPTH.value is not None and _DEPTH.value < 1:
    raise ValueError(f'depth must be at least 1; got {_DEPTH.value}')
  if _PLOT.value:
    from dynconv_jax.plotting import macs as plots
    from dynconv_jax.plotting import style

    style.figure_paths(_PLOT.value)
  report = sources[present[0]](
    {'convention': _CONVENTION.value, 'padding': _PADDING.value}
  )
  shown = report.grouped(_DEPTH.value) if _DEPTH.value else report

  if _TREE.value:
    print(report.to_tree(_DEPTH.value))
  else:
    print(shown.to_table(_SORT.value))
  if _CSV.value:
    _write(_CSV.value, shown.to_csv(_SORT.value))
  if _JSON.value:
    _write(_JSON.value, report.to_json(indent=2) + '\n')
  if _PLOT.value:
    png, svg = plots.plot_layers(shown, _PLOT.value, _SORT.value)
    print(f'wrote {png} and {svg}')
  line = {
    'total': report.total,
    'by_layer': {name: row.macs for name, row in report.by_layer.items()},
    'convention': report.convention.name,
    'unit': report.convention.unit,
    'unpriced': report.unpriced,
    'parameters': report.parameters,
    'uncounted': [list(entry) for entry in report.uncounted],
  }
  print(json.dumps(line))


def _count_ours(options: dict[str, Any]) -> Report:
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from dynconv_jax.macs import count_macs
  from dynconv_jax.models.create import create_model

  try:
    height, width = map(int, _IMAGE_SIZE.value * (3 - len(_IMAGE_SIZE.value)))
  except ValueError:
    height = width = 0
  if min(height, width) < 1:
    raise ValueError(
      'image_size must be one or two numbers, at least 1; got'
      f' {",".join(_IMAGE_SIZE.value)!r}'
    )
  model = nnx.eval_shape(
    lambda: create_model(
      _MODEL.value,
      method=_METHOD.value,
      num_classes=_NUM_CLASSES.value,
      width_multiplier=_WIDTH.value,
      rngs=nnx.Rngs(0),
    )
  )
  model = nnx.view(model, deterministic=True, use_running_average=True)
  size = (_BATCH_SIZE.value, height, width, 3)
  return count_macs(model, jax.ShapeDtypeStruct(size, jnp.float32), **options)


def _count_jax(options: dict[str, Any]) -> Report:
  import jax
  import jax.numpy as jnp

  from dynconv_jax.macs import count_macs

  f = _load('jax', _JAX.value)
  args, kwargs = [], {}
  for name, shape, dtype in map(_shape, _INPUT_SHAPE.value):
    try:
      argument = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or 'float32'))
    except TypeError as error:
      raise ValueError(
        f'the dtype of input_shape must be a JAX dtype; got {dtype!r}'
      ) from error
    _add_argument(args, kwargs, name, argument)
  branch = _BRANCH.value
  return count_macs(
    f,
    *args,
    kwargs=kwargs,
    trip_counts=_TRIP_COUNT.value,
    branch=int(branch) if branch.isdigit() else branch,
    **options,
  )


def _count_torch(options: dict[str, Any]) -> Report:
  try:
    from dynconv_jax.macs.torch import count_macs
  except ImportError as error:
    raise ValueError(str(error)) from error
  import torch

  factory = _load('torch', _TORCH.value)
  args, kwargs = [], {}
  for name, shape, dtype in map(_shape, _INPUT_SHAPE.value):
    torch_dtype = getattr(torch, dtype, None)
    if dtype and not isinstance(torch_dtype, torch.dtype):
      raise ValueError(
        f'the dtype of input_shape must be a PyTorch dtype; got {dtype!r}'
      )
    # A plain shape means a tensor with the module's dtype and device.
    argument = torch.zeros(shape, dtype=torch_dtype) if dtype else shape
    _add_argument(args, kwargs, name, argument)
  try:
    return count_macs(
      factory(),
      *args,
      kwargs=kwargs,
      trip_counts=_TRIP_COUNT.value,
      branch=_BRANCH.value,
      **options,
    )
  except TypeError as error:
    raise ValueError(f'--torch={_TORCH.value}: {error}') from error


def _add_argument(args: list, kwargs: dict, name: str, value: Any) -> None:
  if not name:
    args.append(value)
  elif name in kwargs:
    raise ValueError(f'input_shape names the argument {name!r} twice')
  else:
    kwargs[name] = value


def _count_onnx(options: dict[str, Any]) -> Report:
  try:
    from dynconv_jax.macs.onnx import count_macs
  except ImportError as error:
    raise ValueError(str(error)) from error

  dimensions = {}
  for text in _DIMENSION.value:
    name, equals, size = text.rpartition('=')
    if not equals or not size.isdigit():
      raise ValueError(f'dimension must be NAME=SIZE; got {text!r}')
    dimensions[name] = int(size)
  return count_macs(
    _ONNX.value,
    dimensions=dimensions,
    trip_counts=_TRIP_COUNT.value,
    branch=_BRANCH.value,
    **options,
  )


def _load(flag: str, path: str) -> Callable:
  """Returns the callable at 'package.module:name'."""
  module, _, name = path.partition(':')
  if not module or not name:
    raise ValueError(f'--{flag} must be package.module:name; got {path!r}')
  if (folder := os.getcwd()) not in sys.path:
    sys.path.insert(0, folder)
  try:
    value = importlib.import_module(module)
    for part in name.split('.'):
      value = getattr(value, part)
  except (ImportError, AttributeError) as error:
    raise ValueError(f'--{flag}={path}: {error}') from error
  if not callable(value):
    raise ValueError(
      f'--{flag}={path} must be callable; got {type(value).__name__}'
    )
  return value


def _shape(text: str) -> tuple[str, tuple[int, ...], str]:
  """Returns (name, shape, dtype) of 'name=1,224,224,3:dtype'."""
  name, _, rest = text.rpartition('=')
  sizes, _, dtype = rest.partition(':')
  try:
    shape = tuple(int(size) for size in sizes.split(',') if size)
  except ValueError:
    shape = (-1,)
  if min(shape, default=0) < 0:
    raise ValueError(
      f'input_shape must be integers >= 0 separated by commas; got {text!r}'
    )
  return name, shape, dtype


def _write(path: str, text: str) -> None:
  pathlib.Path(path).write_text(text)
  print(f'wrote {path}')


if __name__ == '__main__':
  program.run(main)
