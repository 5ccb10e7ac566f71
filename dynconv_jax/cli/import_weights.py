r"""Makes a workdir of weights that were trained in PyTorch.

dynconv import --from_torch=resnet50.pth \
  --model=resnet50 --method=dense --image_size=224 --workdir=workdir/resnet50

evaluate, predict and --init_from accept it like that of a run. Any flag of a
run may be given, and says what the network was trained for: --method, --budget
and --target_rates decide which blocks have gates. The file must hold all
weights of the network; to train from dense weights, or with another
classifier, use `train --pretrained=FILE`.
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
  'File of weights: .pth, .pt, .pth.tar or .safetensors.',
  required=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder that is made.', required=True
)
_NUM_CLASSES = flags.DEFINE_integer(
  'num_classes', None, 'Outputs of the classifier, if not as in the file.'
)
_CLASS_NAMES = flags.DEFINE_string(
  'class_names',
  None,
  'File with the name of a class a line, in label order. By default the names '
  'of --dataset where that is given, and numbers otherwise.',
)
config_flags.define()


def main(argv: Sequence[str]) -> None:
  """Reads the weights, checks that they fit, and writes the workdir."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  config = config_flags.read()
  if config.optimization.init_from or config.optimization.pretrained:
    raise ValueError(
      'the weights come from --from_torch alone; leave out --init_from and '
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
      raise ValueError(f'{source} is no text in UTF-8: {error}') from None
    names = tuple(filter(None, map(str.strip, text.splitlines())))
  elif flags.FLAGS['dataset'].present:
    source = config.data.dataset
    names = inputs.open_split(config.data, 'train').class_names
  else:
    return tuple(map(str, range(num_classes)))
  if twice := [name for name, n in Counter(names).items() if n > 1]:
    raise ValueError(f'{source} names classes twice: {", ".join(twice)}')
  if len(names) != num_classes:
    raise ValueError(
      f'{source} has {len(names)} classes; {_FROM_TORCH.value} has '
      f'{num_classes}'
    )
  return names


if __name__ == '__main__':
  program.run(main)
