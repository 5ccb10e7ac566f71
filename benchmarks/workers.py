"""The timed processes of dynconv_jax.cli.benchmark, one per framework.

python -m benchmarks.workers NAME SETTINGS, where SETTINGS are JSON.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks import interleaved, runtimes
from benchmarks.forced import force_gates
from benchmarks.networks import Networks, masks_of
from dynconv_jax.cli import program
from dynconv_jax.macs import count_macs
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.sparse import SparseExecutor
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.fold import fold_block
from dynconv_jax.sparse.plan import choose_plans
from dynconv_jax.sparse.sparsify import trace_blocks

Step = Callable[[], None]
# Disables CUDA graphs: the host launches each kernel.
_LAUNCHED = {'xla_gpu_enable_command_buffer': ''}


def serve(name: str, settings: Mapping[str, Any]) -> None:
  """Answers requests for timings until stdin is closed.

  Args:
    name: a key of WORKERS.
    settings: flags of dynconv_jax.cli.benchmark.
  """
  framework = WORKERS[name](settings)

  def answer(request):
    request = dict(request)
    kind = request.pop('kind')
    if kind in ('prepare', 'blocks', 'logits'):
      return getattr(framework, kind)(**request)
    step = framework.step(kind, **request)
    step()  # Warms up caches and thread pools, which other processes used.
    calls = getattr(framework, 'calls', 1)
    times = interleaved.seconds(step, settings['steps'])
    return [seconds / calls for seconds in times]

  interleaved.serve(answer)


class Jax:
  """Dense, masked dense, and sparse execution.

  Attributes:
    calls: number of calls per step. On a GPU, calls queue up while others run.
  """

  def __init__(self, settings):
    program.keep_memory()
    self.networks = Networks(settings)
    self.settings = self.networks.settings
    self.calls = 10 if jax.default_backend() == 'gpu' else 1

  def prepare(self, batch_size, mask_granularity, density):
    """Creates the executors of a case; returns a description."""
    self.case = (batch_size, mask_granularity, density)
    self.batches = [jnp.asarray(b) for b in self.networks.batches(batch_size)]
    shape = self.batches[0].shape
    dense = self.networks.model('dense')
    functions = {'dense': SparseExecutor(dense, shape, mode='dense')}
    if self.settings['launched']:
      functions['dense_launched'] = SparseExecutor(
        dense, shape, mode='dense', compiler_options=_LAUNCHED
      )
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
    self.functions = functions
    self.steps = {
      kind: _cycle(function, self.batches, self.calls)
      for kind, function in functions.items()
    }
    info['compute_dtype'] = self.settings['compute_dtype']
    return {**info, 'kinds': list(functions)}

  def logits(self, of, **case):
    """Returns the logits of the first batch."""
    assert self.case == tuple(case.values())
    logits, _ = self.functions[of](self.batches[0])
    return np.asarray(logits, np.float32).tolist()

  def _fast_backend(self, dense):
    """Returns the most used backend, if it is as fast as XLA's dense form."""
    plans = choose_plans(gated_blocks(dense), self.settings['backend'])
    used = collections.Counter(plan.backend for plan in plans.values())
    backend = used.most_common(1)[0][0]
    if backend.calibrated or backend.name == 'dense':
      return None
    return backend

  def _gated(self, model, shape, density):
    """Returns the executors of a gated network, including its gates."""
    mode, backend = self.settings['mode'], self.settings['backend']
    self.model, masks = model, {}
    if density is not None:
      masks = masks_of(model, shape, density)
    sparse = SparseExecutor(
      *(model, shape),
      mode=mode,
      backend=backend,
      density=density or 0.5,
      budget=self.networks.budget,
    )
    self.plans = sparse.plans
    given = {
      name: jnp.asarray(mask)
      for name, mask in masks.items()
      if self.plans[name].backend.evaluates_given
    }
    if len(given) < len(masks):
      others = {k: mask for k, mask in masks.items() if k not in given}
      model = force_gates(model, others)
      sparse = SparseExecutor(model, shape, mode='sparse', plans=self.plans)
    functions = {'sparse': functools.partial(sparse, masks=given or None)}
    if self.settings['launched']:
      launched = SparseExecutor(
        *(model, shape),
        mode='sparse',
        plans=self.plans,
        compiler_options=_LAUNCHED,
      )
      functions['sparse_launched'] = functools.partial(
        launched, masks=given or None
      )
    if self.settings['masked_dense']:
      functions['masked_dense'] = SparseExecutor(
        force_gates(self.model, masks), shape, mode='dense'
      )
    return functions

  def _executed(self, model, dense, sparse):
    """Returns statistics of a gated network on the batches."""
    stats = [sparse(batch, return_masks=True)[1] for batch in self.batches]
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
      'fallbacks': int(sum(s.fallbacks.sum() for s in stats)),
      'plans': {name: plan.backend.name for name, plan in self.plans.items()},
    }

  def step(self, kind, **case):
    assert self.case == tuple(case.values())
    return self.steps[kind]

  def blocks(self, **case):
    """Times each block with its plan and densely."""
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
        timed[f'{form}_ms'] = functools.partial(interleaved.seconds, step, 1)
      times = {
        name: value / self.calls
        for name, value in interleaved.medians(timed, 7).items()
      }
      rows.append(
        {
          'name': trace.name,
          'plan': backend.name,
          'executed_fraction': float(jnp.mean(mask.executed_macs()))
          / mask.dense_macs(),
          **times,
          'sparse_over_dense': times['sparse_ms'] / times['dense_ms'],
        }
      )
    return rows


WORKERS = {
  'jax': Jax,
  'torch': runtimes.Torch,
  'torch_compiled': functools.partial(runtimes.Torch, compiled=True),
  'torch_cuda_graph': runtimes.TorchCudaGraph,
  'onnxruntime': runtimes.OnnxRuntime,
  'openvino': runtimes.OpenVino,
  'litert': runtimes.LiteRt,
}


def _cycle(function, batches, calls) -> Step:
  """Returns a function that runs the next batches and waits for the result."""
  following = itertools.cycle(batches)

  def step():
    for _ in range(calls):
      result = function(next(following))
    jax.block_until_ready(result)

  return step


if __name__ == '__main__':
  serve(sys.argv[1], json.loads(sys.argv[2]))
