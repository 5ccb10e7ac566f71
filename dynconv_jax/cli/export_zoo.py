r"""Packs a trained network for the zoo: weights, index entry, and model card.

dynconv evaluate --workdir=workdir/NAME --split=test
dynconv export zoo --workdir=workdir/NAME --name=NAME \
  --output_dir=zoo [--url=https://.../NAME.safetensors]

Writes the weights and a model card in Markdown to --output_dir; upload both.
Also adds an entry to the index. `--pretrained=zoo:NAME` then finds the network
for training and prediction, in the folder DYNCONV_ZOO, in DATA_DIR/zoo, or at
its URL.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.cli.predictions import split_stem
from dynconv_jax.interop import zoo
from dynconv_jax.training.published import save_published
from dynconv_jax.training.workdir import Run, load_run

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Workdir of the run.', required=True
)
_NAME = flags.DEFINE_string(
  'name', None, 'Name of the network in the zoo.', required=True
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', 'zoo', 'Folder for the weights and the model card.'
)
_SPLIT = flags.DEFINE_string(
  'split', 'test', 'Split whose evaluation is reported.'
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to use.'
)
_URL = flags.DEFINE_string('url', '', 'URL of the uploaded weights.')
_INDEX = flags.DEFINE_string(
  'index', '', 'Index to add the entry to; empty: that of the package.'
)

# Flags of a network that its index entry contains.
_SHOWN = (
  *('model', 'method', 'image_size', 'padding', 'normalization'),
  *('scene_size', 'object_size'),
)


def main(argv: Sequence[str]) -> None:
  """Writes the file, the card, and the entry."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  name = _NAME.value
  if not re.fullmatch(r'[a-z0-9][a-z0-9._-]*', name):
    raise ValueError(
      'name must consist of lowercase letters, digits, dots, underscores, and '
      f'hyphens; got {name!r}'
    )
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  evaluation = _read_evaluation(workdir)
  run = load_run(workdir, best=_CHECKPOINT.value == 'best')
  if run.step != evaluation['step']:
    raise ValueError(
      f'the {_CHECKPOINT.value} checkpoint is of step {run.step}, but the '
      f'evaluation is of step {evaluation["step"]}. Set --checkpoint or '
      'evaluate again'
    )
  path = pathlib.Path(_OUTPUT_DIR.value).expanduser() / f'{name}.safetensors'
  texts = save_published(path, run, workdir)
  content = path.read_bytes()
  knob = run.network.method.record.knob
  entry = {
    'file': path.name,
    'sha256': hashlib.sha256(content).hexdigest(),
    'bytes': len(content),
    'url': _URL.value or None,
    'flags': {
      name: texts[name]
      for name in dict.fromkeys((*_SHOWN, knob, *_changed_options(run)))
      if texts.get(name)
    },
    'dataset': texts['dataset'],
    'classes': len(run.class_names),
    'split': _SPLIT.value,
    'accuracy': evaluation['accuracy'],
    'gmacs': evaluation['gmacs_mean'],
  }
  index = pathlib.Path(_INDEX.value or zoo.INDEX).expanduser()
  zoo.write_entry(name, entry, index)
  card = path.with_suffix('.md')
  card.write_text(
    model_card(name, entry, run, evaluation, texts), encoding='utf-8'
  )
  print(f'wrote {path} ({len(content) / 1e6:.1f} MB), {card}, {index}')


def _changed_options(run: Run) -> list[str]:
  """Returns the names of options of model and method that are not defaults."""
  parts = (run.network.model.options, run.network.method.options)
  return [
    field.name
    for part in parts
    for field in dataclasses.fields(part)
    if getattr(part, field.name) != field.default
  ]


def _read_evaluation(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / f'evaluation_{split_stem(_SPLIT.value)}.json'
  if not path.exists():
    raise FileNotFoundError(
      f'no file {path}: run dynconv evaluate --workdir={workdir} '
      f'--split={_SPLIT.value}'
    )
  evaluation = json.loads(path.read_text())
  if (convention := evaluation.get('convention', 'conv')) != 'conv':
    raise ValueError(
      f'networks of the zoo are compared by --convention=conv; {path} has '
      f'--convention={convention}. Evaluate again'
    )
  return evaluation


def model_card(
  name: str,
  entry: Mapping[str, Any],
  run: Run,
  evaluation: Mapping[str, Any],
  texts: Mapping[str, str],
) -> str:
  """Returns a model card in Markdown with front matter for model hubs.

  Args:
    name: name of the network.
    entry: its index entry.
    run: the network.
    evaluation: the evaluation written by `dynconv evaluate`.
    texts: flags of the run, as text by name.
  """
  model, method = run.network.model, run.network.method
  scenes = ''
  if texts.get('scene_size'):
    scenes = (
      ', as scenes: each photograph is shrunk to a side of '
      f'{_range(texts["object_size"])} pixels and placed on a blurred other '
      f'photograph of {_range(texts["scene_size"])} pixels'
    )
  low, high = evaluation['accuracy_low'], evaluation['accuracy_high']
  rows = {
    'Network': f'`{model.model}`, {method.method} gates'
    if method.record.gated
    else f'`{model.model}`, dense',
    'Options': ', '.join(
      f'`--{name}={texts[name]}`' for name in _changed_options(run)
    )
    or 'defaults',
    'Input': f'{model.image_size} x {model.image_size} pixels, '
    f'`{run.normalization}` normalization',
    'Classes': ', '.join(run.class_names)
    if len(run.class_names) <= 20
    else f'{len(run.class_names)}',
    'Trained on': f'`{texts["dataset"]}`{scenes}',
    'Evaluated on': f'{evaluation["num_examples"]} {entry["split"]} images',
    'Accuracy': f'{evaluation["accuracy"]:.3f} (95 % interval {low:.3f} to '
    f'{high:.3f})',
    'GMACs per image': f'{evaluation["gmacs_mean"]:.4f} on average, '
    f'{evaluation["gmacs_p50"]:.4f} median, {evaluation["gmacs_p95"]:.4f} 95th '
    'percentile',
  }
  if 'gmacs_dense' in evaluation:
    rows['GMACs without gates'] = f'{evaluation["gmacs_dense"]:.4f}'
  if 'executed_fraction' in evaluation:
    rows['Executed fraction'] = f'{evaluation["executed_fraction"]:.3f}'
  rows |= {
    'File': f'`{entry["file"]}`, {entry["bytes"] / 1e6:.1f} MB',
    'SHA-256': f'`{entry["sha256"]}`',
  }
  table = '\n'.join(f'| {title} | {value} |' for title, value in rows.items())
  recipe = '\n'.join(f'--{n}={text}' for n, text in texts.items())
  return f"""---
library_name: dynconv_jax
license: apache-2.0
pipeline_tag: image-classification
tags: [jax, flax, dynamic-convolution, {method.method}]
datasets: [{texts['dataset']}]
---

# {name}

| | |
|---|---|
{table}

MACs are multiply-accumulates of convolutions. Masked layers count their active
positions only.

## Use

```
dynconv predict --pretrained=zoo:{name} photo.jpg
dynconv train --pretrained=zoo:{name} --model={model.model} ...
```

If the index has no URL, put the file in `~/.cache/dynconv_jax/zoo/` or set
`DYNCONV_ZOO` to its folder. PyTorch can read the file too: weights have
PyTorch's names and layouts.

## Training

```
{recipe}
```

`init_from` and `distill_from` refer to other runs of the same sweep.

## Limits

The network only knows the classes above. It was evaluated on images similar to
its training images. Its license is that of the code; the images have their own.
"""


def _range(text: str) -> str:
  return text.replace(',', ' to ')


if __name__ == '__main__':
  program.run(main)
