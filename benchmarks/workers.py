"""The timed processes of experiments.benchmark, one a framework.

python -m benchmarks.workers NAME SETTINGS, with the settings in JSON.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks import turns
from benchmarks.forced import force_gates
from benchmarks.networks import Networks, masks_of
from dynconv_jax.macs import count_macs
from dynconv_jax.masks import execution_mask
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.sparse import SparseExecutor
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.fold import fold_block
from dynconv_jax.sparse.sparsify import choose_plans, trace_blocks
from experiments import program

Step = Callable[[], None]


def serve(name: str, settings: Mapping[str, Any]) -> None:
  """Answers requests for timings until there are no more.

  Args:
    name: a key of WORKERS.
    settings: flags of experiments.benchmark.
  """
  framework = WORKERS[name](settings)

  def answer(request):
    request = dict(request)
    kind = request.pop('kind')
    if kind in ('prepare', 'blocks'):
      return getattr(framework, kind)(**request)
    step = framework.step(kind, **request)
    step()  # Caches and thread pools are someone else's after a turn.
    calls = getattr(framework, 'calls', 1)
    times = turns.seconds(step, settings['steps'])
    return [seconds / calls for seconds in times]

  turns.serve(answer)


class Jax:
  """Dense, masked dense and sparse execution.

  Attributes:
    calls: of a step; on a GPU one waits in the queue while another is executed.
  """

  def __init__(self, settings):
    program.keep_memory()
    self.networks = Networks(settings)
    self.settings = self.networks.settings
    self.calls = 10 if jax.default_backend() == 'gpu' else 1

  def prepare(self, batch_size, mask_granularity, density):
    """Makes the executors of a case; returns what they execute."""
    self.case = (batch_size, mask_granularity, density)
    self.batches = [jnp.asarray(b) for b in self.networks.batches(batch_size)]
    shape = self.batches[0].shape
    dense = self.networks.model('dense')
    functions = {'dense': SparseExecutor(dense, shape, mode='dense')}
    backend = self._fast_backend(dense)
    if backend is not None:
      functions['native_dense'] = SparseExecutor(
        dense, shape, mode='sparse', backend=backend
      )
    info = {'density': 1.0, 'mac_ideal': 1.0}
    if self.networks.method != 'dense':
      model = self.networks.model(self.networks.method, mask_granularity)
      functions |= self._gated(model, shape, density)
      info = self._executed(model, dense, functions['sparse'])
    self.steps = {
      kind: _cycle(function, self.batches, self.calls)
      for kind, function in functions.items()
    }
    return {**info, 'kinds': list(functions)}

  def _fast_backend(self, dense):
    """What executes most blocks, if it is a match for XLA's dense form."""
    plans = choose_plans(gated_blocks(dense), self.settings['backend'])
    used = collections.Counter(plan.backend for plan in plans.values())
    backend = used.most_common(1)[0][0]
    if backend.calibrated or backend.name == 'dense':
      return None
    return backend

  def _gated(self, model, shape, density):
    """The executors of a gated network, which pay for its gates."""
    mode, backend = self.settings['mode'], self.settings['backend']
    self.model, masks = model, {}
    if density is not None:
      masks = masks_of(model, shape, density)
    sparse = SparseExecutor(
      model, shape, mode=mode, backend=backend, density=density or 0.5
    )
    self.plans = sparse.plans
    given = {
      name: jnp.asarray(mask)
      for name, mask in masks.items()
      if self.plans[name].backend.evaluates_given
    }
    if len(given) < len(masks):
      others = {k: mask for k, mask in masks.items() if k not in given}
      sparse = SparseExecutor(
        force_gates(model, others), shape, mode='sparse', plans=self.plans
      )
    functions = {'sparse': functools.partial(sparse, masks=given or None)}
    if self.settings['masked_dense']:
      functions['masked_dense'] = SparseExecutor(
        force_gates(model, masks), shape, mode='dense'
      )
    return functions

  def _executed(self, model, dense, sparse):
    """What a gated network computes of the batches."""
    stats = [sparse(batch)[1] for batch in self.batches]
    self.masks = {mask.name: mask for mask in stats[0].masks}
    image = jax.ShapeDtypeStruct((1, *self.batches[0].shape[1:]), jnp.float32)
    gated, everything = (
      count_macs(m, image, convention='conv') for m in (model, dense)
    )
    executed = np.concatenate([gated.executed(s.masks) for s in stats])
    densities = [np.mean(mask.hard) for s in stats for mask in s.masks]
    return {
      'density': np.mean(densities, dtype=float),
      'mac_ideal': float(executed.mean() / everything.total),
      'device': jax.devices()[0].device_kind,
      'overflows': int(sum(s.overflows.sum() for s in stats)),
      'plans': {name: plan.backend.name for name, plan in self.plans.items()},
    }

  def step(self, kind, **case):
    assert self.case == tuple(case.values())
    return self.steps[kind]

  def blocks(self, **case):
    """Times each block by its plan and densely."""
    assert self.case == tuple(case.values())
    blocks = {block.name: block for block in gated_blocks(self.model)}
    rng, rows = np.random.default_rng(2), []
    for trace in trace_blocks(self.model, self.batches[0].shape):
      block, mask = blocks[trace.name], self.masks.get(trace.name)
      if mask is None or not block.describable:
        continue
      x = np.maximum(rng.normal(size=trace.shape), 0)
      x, folded = jnp.asarray(x, block.dtype), fold_block(block)
      backend = self.plans[trace.name].backend
      timed = {}
      for form, its in ('dense', get_backend('dense')), ('sparse', backend):
        run = functools.partial(jax.jit(its.run), its.pack(folded), x)
        step = _cycle(run, [mask], self.calls)
        step()  # Compiles.
        timed[f'{form}_ms'] = functools.partial(turns.seconds, step, 1)
      times = {
        name: value / self.calls
        for name, value in turns.medians(timed, 7).items()
      }
      rows.append(
        {
          'name': trace.name,
          'plan': backend.name,
          'load': float(jnp.mean(mask.executed_macs())) / mask.dense_macs(),
          **times,
          'sparse_over_dense': times['sparse_ms'] / times['dense_ms'],
        }
      )
    return rows


class _Peer:
  """Another framework; subclasses make the steps.

  Attributes:
    masked: the kinds of steps that masks are for.
  """

  masked = ()

  def __init__(self, settings):
    self.networks = Networks(settings)
    self.settings = self.networks.settings
    self.steps = {}

  def step(self, kind, batch_size, mask_granularity, density):
    case = (mask_granularity, density) if kind in self.masked else ()
    key = (kind, batch_size, *case)
    if key not in self.steps:
      self.steps[key] = self.make(self.networks.batches(batch_size), *case)
    return self.steps[key]

  def make(self, batches, mask_granularity=None, density=None) -> Step:
    """Returns the step of a case; masked, if there is a granularity."""
    raise NotImplementedError


class Torch(_Peer):
  """PyTorch, channels-last, batch norm folded."""

  masked = ('torch_index',)

  def __init__(self, settings, compiled=False):
    import torch

    from benchmarks import torch_resnet

    super().__init__(settings)
    torch_resnet.use_all_cores()
    self.dtype = getattr(torch, self.settings['compute_dtype'])
    self.network = torch_resnet.ResNet(
      *(self.settings['model'], self.settings['num_classes']),
      self.settings['width_multiplier'],
    ).fold()
    self.network.to(dtype=self.dtype, memory_format=torch.channels_last)
    if compiled:
      import torch._inductor.config

      torch._inductor.config.freezing = True
      self.network = torch.compile(self.network)

  def make(self, batches, mask_granularity=None, density=None):
    import torch

    images = torch.from_numpy(batches[0])
    images = images.to(self.dtype).permute(0, 3, 1, 2)  # Channels-last.
    masks = None
    if mask_granularity is not None:
      masks = self._maps(batches[0].shape, mask_granularity, density)

    def step():
      with torch.no_grad():
        self.network(images, masks)

    return step

  def _maps(self, shape, mask_granularity, density):
    """The masks of the JAX process, bool[N, h, w] of each level."""
    import torch

    model = self.networks.model(self.networks.method, mask_granularity)
    masks, maps = masks_of(model, shape, density), {}
    blocks = {block.name: block for block in gated_blocks(model)}
    for trace in trace_blocks(model, shape):
      mask = execution_mask(
        blocks[trace.name].branch,
        jnp.asarray(masks[trace.name]),
        trace.shape[1:3],
        name=trace.name,
      )
      maps[trace.name] = [torch.from_numpy(np.array(m) > 0) for m in mask.maps]
    return maps


class OnnxRuntime(_Peer):
  """ONNX Runtime, on the dense network and on the sparse one."""

  masked = ('onnx_sparse',)

  def make(self, batches, mask_granularity=None, density=None):
    import onnxruntime

    from dynconv_jax.sparse.onnx import export_onnx

    model = self.networks.model('dense')
    if mask_granularity is not None:
      model = self.networks.model(self.networks.method, mask_granularity)
    feeds = [{'images': batch} for batch in batches]
    if density is not None:
      masks = masks_of(model, batches[0].shape, density)
      model = force_gates(model, masks)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Its threads would go on spinning in the turns of the others.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    exported = export_onnx(
      model, batches[0].shape[1:3], batch_size=len(batches[0])
    )
    session = onnxruntime.InferenceSession(
      exported.SerializeToString(), options
    )
    following = itertools.cycle(feeds)
    return lambda: session.run(None, next(following))


WORKERS = {
  'jax': Jax,
  'torch': Torch,
  'torch_compiled': functools.partial(Torch, compiled=True),
  'onnxruntime': OnnxRuntime,
}


def _cycle(function, batches, calls) -> Step:
  """Calls with the next batches, which return when the last result is there."""
  following = itertools.cycle(batches)

  def step():
    for _ in range(calls):
      result = function(next(following))
    jax.block_until_ready(result)

  return step


if __name__ == '__main__':
  serve(sys.argv[1], json.loads(sys.argv[2]))
