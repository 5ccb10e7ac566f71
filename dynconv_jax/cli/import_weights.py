r"""Creates a workdir from weights trained in PyTorch.

dynconv import --from_torch=resnet50.pth \
  --model=resnet50 --method=dense --image_size=224 --workdir=workdir/resnet50

evaluate, predict, and --init_from accept it like the workdir of a run. Set the
flags of a run that describe how the network was trained; for example, --method,
--budget, and --target_rates determine which blocks have gates. The file must
contain all weights of the network. To train from dense weights or with another
classifier, use `train --pretrained=FILE` instead.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Sequence

from absl import flags

from dynconv_jax import interop
from dynconv_jax.cli import config_flags, program
from dynconv_jax.training import inputs
from dynconv_jax.training.config import Config
from dynconv_jax.training.workdir import build_model, write_network

_FROM_TORCH = flags.DEFINE_string(
  'from_torch',
  None,
  'File of weights: .pth, .pt, .pth.tar, or .safetensors.',
  required=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder to create.', required=True
)
_NUM_CLASSES = flags.DEFINE_integer(
  'num_classes', None, 'Expected number of classes in the file.'
)
_CLASS_NAMES = flags.DEFINE_string(
  'class_names',
  None,
  'File with one class name per line, in label order. By default, the names of '
  '--dataset if it is set, or else numbers.',
)
config_flags.define()


def main(argv: Sequence[str]) -> None:
  """Reads the weights, checks that they fit, and writes the workdir."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  config = config_flags.read()
  if config.optimization.init_from or config.optimization.pretrained:
    raise ValueError(
      'the weights come from --from_torch; do not set --init_from or '
      '--pretrained'
    )
  config.check()
  state_dict = interop.read_state_dict(_FROM_TORCH.value)
  num_classes = interop.num_classes(state_dict)
  if _NUM_CLASSES.value not in (None, num_classes):
    raise ValueError(
      f'num_classes must be {num_classes}, as in {_FROM_TORCH.value}; got '
      f'{_NUM_CLASSES.value}'
    )
  class_names = _class_names(config, num_classes)
  model = build_model(config, num_classes, abstract=True)
  interop.load_torch_state_dict(model, state_dict)
  folder = pathlib.Path(_WORKDIR.value).expanduser()
  write_network(folder, config, model, class_names, _FROM_TORCH.value)
  model, method = config.model.model, config.method.method
  print(f'{model} {method}, {num_classes} classes: {folder}')


def _class_names(config: Config, num_classes: int) -> tuple[str, ...]:
  if _CLASS_NAMES.value:
    source = _CLASS_NAMES.value
    try:
      text = pathlib.Path(source).expanduser().read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{source} is not UTF-8 text: {error}') from None
    names = tuple(filter(None, map(str.strip, text.splitlines())))
  elif flags.FLAGS['dataset'].present:
    source = config.data.dataset
    names = inputs.open_split(config.data, 'train').class_names
  else:
    return tuple(map(str, range(num_classes)))
  if twice := [name for name, n in Counter(names).items() if n > 1]:
    raise ValueError(f'{source} lists classes twice: {", ".join(twice)}')
  if len(names) != num_classes:
    raise ValueError(
      f'{source} has {len(names)} classes; {_FROM_TORCH.value} has '
      f'{num_classes}'
    )
  return names


if __name__ == '__main__':
  program.run(main)
