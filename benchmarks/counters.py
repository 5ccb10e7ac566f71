"""Counts public PyTorch models by this counter and by others.

  pip install -e '.[counters]'
  python -m benchmarks.counters [NAME...]

prints the table of docs/macs.md in Markdown: billions of multiply-accumulates
of one image or of one sequence of 128 tokens, by `conv+linear`. Nothing is
downloaded: the models have random weights.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

from dynconv_jax.macs.torch import count_macs

_TORCHVISION = """
  alexnet vgg16 googlenet inception_v3 resnet50 resnext50_32x4d
  wide_resnet50_2 densenet121 squeezenet1_0 mobilenet_v2 mobilenet_v3_large
  mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s
  regnet_y_400mf convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t
"""

_TIMM = """
  resnetv2_50 tf_efficientnet_lite0 mixer_b16_224 resmlp_12_224
  deit_tiny_patch16_224 xcit_nano_12_p16_224 edgenext_small coatnet_0_rw_224
  dm_nfnet_f0 pvt_v2_b0 levit_128s poolformer_s12 gmlp_s16_224
  mobilevit_xs eva02_tiny_patch14_224 hrnet_w18_small repvgg_a0
  beit_base_patch16_224
"""

_TRANSFORMERS = """
  Bert DistilBert GPT2 T5 Llama Mixtral Whisper
"""

_SMALL = {'hidden_size': 256, 'intermediate_size': 512, 'num_hidden_layers': 2}


def models() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
  """Returns {name: (what makes the model, its inputs by name)}."""
  import timm
  import torchvision

  image = torch.zeros(1, 3, 224, 224)
  found = {}
  for name in _TORCHVISION.split():
    make = getattr(torchvision.models, name)
    (size,) = _weights(name).transforms().crop_size
    options = (
      {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}
    )
    found[f'torchvision {name}'] = (
      lambda make=make, options=options: make(**options),
      torch.zeros(1, 3, size, size),
    )
  for name in _TIMM.split():
    found[f'timm {name}'] = (
      lambda name=name: timm.create_model(name, pretrained=False),
      image,
    )
  return found | _transformers()


def _transformers():
  import transformers

  tokens = torch.ones(1, 128, dtype=torch.int64)
  found = {}
  for name in _TRANSFORMERS.split():
    config = getattr(transformers, f'{name}Config')
    options = _SMALL if name in ('Llama', 'Mixtral') else {}
    inputs = {'input_ids': tokens}
    if name == 'T5':
      inputs = inputs | {'decoder_input_ids': tokens}
    if name == 'Whisper':
      inputs = {
        'input_features': torch.zeros(1, 80, 3000),
        'decoder_input_ids': tokens,
      }
    found[f'transformers {name}'] = (
      lambda name=name, config=config, options=options: getattr(
        transformers, f'{name}Model'
      )(config(**options)),
      inputs,
    )
  return found


def by_ours(model, inputs) -> float:
  args, kwargs = _split(inputs)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    report = count_macs(model, *args, kwargs=kwargs, convention='conv+linear')
  del caught
  return report.total


def by_torch(model, inputs) -> float:
  counter = flop_counter.FlopCounterMode(display=False)
  with torch.no_grad(), counter:
    _call(model, inputs)
  return counter.get_total_flops() / 2


def by_ptflops(model, inputs, backend='pytorch') -> float:
  import ptflops

  macs, _ = ptflops.get_model_complexity_info(
    model,
    (1,),
    input_constructor=lambda _: _named(model, inputs),
    as_strings=False,
    print_per_layer_stat=False,
    backend=backend,
    ost=io.StringIO(),
    verbose=False,
  )
  return macs


def by_fvcore(model, inputs) -> float:
  from fvcore.nn import FlopCountAnalysis

  args, kwargs = _split(inputs)
  wrapped = _Positional(model, list(kwargs)) if kwargs else model
  analysis = FlopCountAnalysis(wrapped, (*args, *kwargs.values()))
  analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
  return analysis.total()


def by_thop(model, inputs) -> float:
  import thop

  args, kwargs = _split(inputs)
  wrapped = _Positional(model, list(kwargs)) if kwargs else model
  macs, _ = thop.profile(
    wrapped, inputs=(*args, *kwargs.values()), verbose=False
  )
  return macs


def by_torchinfo(model, inputs) -> float:
  import torchinfo

  return torchinfo.summary(
    model, input_data=inputs, verbose=0, mode='eval'
  ).total_mult_adds


def by_calflops(model, inputs) -> float:
  import calflops

  args, kwargs = _split(inputs)
  _, macs, _ = calflops.calculate_flops(
    model,
    **({'kwargs': kwargs} if kwargs else {'args': list(args)}),
    output_as_string=False,
    print_results=False,
    print_detailed=False,
  )
  return macs


COUNTERS = {
  'ours': by_ours,
  'ptflops': by_ptflops,
  'fvcore': by_fvcore,
  'torch': by_torch,
  'thop': by_thop,
  'torchinfo': by_torchinfo,
  'calflops': by_calflops,
}


class _Positional(nn.Module):
  """A module whose arguments by name are positional, for tracers."""

  def __init__(self, module, names):
    super().__init__()
    self.module, self.names = module, names

  def forward(self, *values):
    named = dict(zip(self.names, values, strict=True))
    outputs = self.module(**named, use_cache=False, return_dict=False)
    return outputs[0]


def _split(inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
  return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def _call(model, inputs):
  args, kwargs = _split(inputs)
  return model(*args, **kwargs)


def _named(model, inputs):
  if isinstance(inputs, dict):
    return inputs
  (name, *_) = inspect.signature(model.forward).parameters
  return {name: inputs}


def _weights(name: str):
  """Returns torchvision's first weights of a model, which are not read."""
  import torchvision

  return next(iter(torchvision.models.get_model_weights(name)))


def published(name: str) -> float | None:
  """Returns what torchvision states for a model; other libraries do not."""
  library, _, model = name.partition(' ')
  return _weights(model).meta['_ops'] if library == 'torchvision' else None


def by_hand(name: str) -> float | None:
  """Returns the MACs of some transformers, from their sizes alone.

  A layer has its projections, two products of attention with all pairs of
  tokens, and what follows; Mixtral routes a token to two of eight experts.
  """
  n = 128

  def layers(number, size, projections, hidden, matrices):
    each = projections * size**2 + matrices * size * hidden
    return number * (n * each + 2 * n**2 * size)

  small = _SMALL['hidden_size'], _SMALL['intermediate_size']
  of_name = {
    'Bert': layers(12, 768, 4, 3072, 2) + 768**2,
    'DistilBert': layers(6, 768, 4, 3072, 2),
    'GPT2': layers(12, 768, 4, 3072, 2),
    'Llama': layers(2, small[0], 4, small[1], 3),
    # Eight of 32 heads for keys and values; the router.
    'Mixtral': layers(2, small[0], 2.5, small[1], 2 * 3) + 2 * n * small[0] * 8,
  }
  return of_name.get(name.split()[1])


def row(name: str) -> None:
  """Prints a model's row of the table."""
  logging.disable(logging.WARNING)
  make, inputs = models()[name]
  model = make().eval()
  cells, seconds = [], 0.0
  for counter, count in COUNTERS.items():
    start = time.process_time()
    try:
      silent = io.StringIO()
      with (
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
        warnings.catch_warnings(),
      ):
        warnings.simplefilter('ignore')
        macs = count(copy.deepcopy(model), copy.deepcopy(inputs))
      cells.append(f'{macs / 1e9:.3f}')
    except Exception as error:  # Any counter may fail in any way.
      cells.append('fails')
      print(f'{name}, {counter}: {error!r:.300}', file=sys.stderr)
    if counter == 'ours':
      seconds = time.process_time() - start
  known, hand = published(name), by_hand(name)
  if known is None and hand is not None:
    known = hand / 1e9
  cells = ['' if known is None else f'{known:.3f}', *cells]
  print(f'| {name} | ' + ' | '.join(cells) + f' | {seconds:.1f} |', flush=True)


def main(argv) -> None:
  """Prints the table of the models named, or of all."""
  chosen = [n for n in models() if not argv[1:] or n.split()[1] in argv[1:]]
  print('| model | known | ' + ' | '.join(COUNTERS) + ' | seconds |')
  print('|---|' + '---:|' * (len(COUNTERS) + 2), flush=True)
  # A process each: some counters leave PyTorch patched.
  processes = multiprocessing.get_context('fork')
  for name in chosen:
    process = processes.Process(target=row, args=(name,))
    process.start()
    process.join()


if __name__ == '__main__':
  main(sys.argv)
