"""The timed processes of experiments.benchmark, one a framework."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import turns
from experiments.benchmark_networks import (
  Networks,
  masks_of_sides,
  parse_sides,
  random_images,
)

Step = Callable[[], None]


def serve(name: str, settings: Mapping[str, Any]) -> None:
  """Answers requests for timings until there are no more.

  Args:
    name: 'jax', 'torch', 'torch_compiled' or 'onnxruntime'.
    settings: flags of experiments.benchmark.
  """
  make = {
    'jax': _Jax,
    'torch': _Torch,
    'torch_compiled': functools.partial(_Torch, compiled=True),
    'onnxruntime': _OnnxRuntime,
  }[name]
  framework = make(settings)

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


class _Jax:
  """Dense, masked dense and sparse execution by XLA.

  Attributes:
    calls: of a step; on a GPU one waits in the queue while another is executed.
  """

  def __init__(self, settings):
    import jax

    from experiments import program

    program.keep_memory()
    self.networks = Networks(settings)
    self.dtype = self.networks.dtype
    self.case = self.made = None
    self.calls = 10 if jax.default_backend() == 'gpu' else 1

  def prepare(self, batch_size, mask_granularity, density):
    """Makes the executors of a case; returns what they execute."""
    import jax
    from jax import numpy as jnp

    from dynconv_jax.macs import count_macs
    from dynconv_jax.sparse import BlockPlan, SparseExecutor

    self.model = self.networks.model(self.networks.method, mask_granularity)
    batches = [jnp.asarray(b) for b in self.networks.batches(batch_size)]
    shape = batches[0].shape
    self.masks = None
    if density is not None:
      masks = self.networks.masks(self.model, batches[0], density)
      self.masks = [jnp.asarray(mask) for mask in masks]
    mode = self.networks.settings['mode']
    made = (batch_size, mask_granularity, density if mode == 'auto' else None)
    if made != self.made:
      self.made = made
      self.sparse = SparseExecutor(
        self.model,
        shape,
        mode=mode,
        density=density or 0.5,
        native=self.networks.settings['native'],
      )
      # Dense in the same forms as the network without gates.
      plans = [BlockPlan('dense', im2col=p.im2col) for p in self.sparse.plans]
      self.masked_dense = None
      if self.networks.settings['masked_dense']:
        self.masked_dense = SparseExecutor(
          self.model, shape, plans=plans, native=False
        )
      self.dense = self._dense()
      self.native_dense = None
      if self.sparse.kernels == 'native':
        self.native_dense = self._native_dense()
    self.case = (batch_size, mask_granularity, density)
    functions = {
      'dense': self.dense,
      'masked_dense': self.masked_dense
      and functools.partial(self.masked_dense, masks=self.masks),
      'sparse': functools.partial(self.sparse, masks=self.masks),
      'native_dense': self.native_dense,
    }
    self.steps = {
      kind: _cycle(function, batches, self.calls)
      for kind, function in functions.items()
      if function
    }
    native = self.native_dense is not None
    self.batches = batches
    if not self.networks.is_gated:
      return {'density': 1.0, 'mac_ideal': 1.0, 'native': native}
    stats = [self.sparse(batch, self.masks)[1] for batch in batches]
    self.stats = stats[0]
    arguments = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    gated, dense = (
      count_macs(model, arguments, convention='conv')
      for model in (self.model, self.networks.model('dense'))
    )
    executed = np.concatenate([gated.executed(s.masks) for s in stats])
    density = np.mean(
      [np.mean(mask.hard) for s in stats for mask in s.masks], dtype=float
    )
    return {
      'density': density,
      'mac_ideal': float(executed.mean() / dense.total),
      'native': native,
      'kernels': self.sparse.kernels,
      'device': jax.devices()[0].device_kind,
      'overflows': int(sum(s.overflows.sum() for s in stats)),
      'plans': {
        block.name: plan.form
        for block, plan in zip(
          self.model.blocks, self.sparse.plans, strict=True
        )
      },
    }

  def _dense(self):
    """The network without gates, folded, in XLA's best form for each block."""
    import jax

    from dynconv_jax.layers import max_pool
    from dynconv_jax.sparse import cudnn
    from dynconv_jax.sparse.dense import convolve, run_dense
    from dynconv_jax.sparse.fold import fold_network

    model, plans = self.networks.model('dense'), self.sparse.plans

    def forward(network, images):
      x = convolve(images.astype(self.dtype), network.stem)
      x = jax.nn.relu(x).astype(self.dtype)
      if model.architecture.stem == 'imagenet':
        x = max_pool(x)
      for block, plan in zip(network.blocks, plans, strict=True):
        x = run_dense(block, x, im2col=plan.im2col)
      return model.head(x)

    network = fold_network(model)
    if jax.default_backend() == 'gpu':
      network = cudnn.lay_out(network)
    return functools.partial(jax.jit(forward), network)

  def _native_dense(self):
    """The network without gates by the kernels that execute sparsely."""
    import jax
    from jax import numpy as jnp

    from dynconv_jax.sparse import native
    from dynconv_jax.sparse.fold import fold_network

    model = self.networks.model('dense')

    def forward(network, images):
      x = native.convolve(images, network.stem, relu=True)
      if model.architecture.stem == 'imagenet':
        x = native.max_pool(x)
      for block in network.blocks:
        x = native.run_native(block, x)
      x = jnp.mean(x, (1, 2), keepdims=True)
      return native.convolve(x, network.head, relu=False)

    return functools.partial(jax.jit(forward), native.pack(fold_network(model)))

  def step(self, kind, **case):
    assert self.case == tuple(case.values())
    return self.steps[kind]

  def blocks(self, **case):
    """Times each block by its plan and densely."""
    import jax
    from jax import numpy as jnp

    from dynconv_jax.sparse import native
    from dynconv_jax.sparse.fold import fold_block
    from dynconv_jax.sparse.plan import BlockPlan, run_block

    assert self.case == tuple(case.values())
    x = jax.eval_shape(self.model.stem, self.batches[0])
    rng, rows = np.random.default_rng(2), []
    decided = {mask.name: mask for mask in self.stats.masks}
    for block, plan in zip(self.model.blocks, self.sparse.plans, strict=True):
      shape, x = x.shape, jax.eval_shape(block, x)
      if block.name not in decided:
        continue
      mask = decided[block.name]
      features = jnp.asarray(np.maximum(rng.normal(size=shape), 0), self.dtype)
      load = jnp.mean(mask.executed_macs()) / float(mask.dense_macs())
      folded = fold_block(block, self.dtype)
      if self.sparse.kernels == 'native':
        folded = native.pack(folded)
      run = functools.partial(
        run_block, folded, features, mask.hard, mask.dilated, load
      )
      forms = {
        'dense_ms': BlockPlan('dense', im2col=plan.im2col),
        'sparse_ms': plan,
      }
      times = {name: [] for name in forms}
      for repeat in range(8):
        for name, form in forms.items():
          taken = turns.seconds(
            lambda form=form, run=run: jax.block_until_ready(run(plan=form)), 1
          )
          times[name] += taken if repeat else []  # The first compiles.
      row = {k: 1e3 * float(np.median(v)) for k, v in times.items()}
      rows.append(
        {
          'name': block.name,
          'plan': plan.form,
          'load': float(load),
          **row,
          'sparse_over_dense': row['sparse_ms'] / row['dense_ms'],
        }
      )
    return rows


class _Torch:
  """PyTorch, channels-last, batch norm folded."""

  def __init__(self, settings, compiled=False):
    import torch

    from experiments import torch_resnet

    torch_resnet.use_all_cores()
    # Those of the trained run, if there is one.
    self.settings = settings = Networks(settings).settings
    self.dtype = getattr(torch, settings['compute_dtype'])
    self.model = torch_resnet.ResNet(
      settings['model'], settings['num_classes']
    ).fold()
    self.model = self.model.to(
      dtype=self.dtype, memory_format=torch.channels_last
    )
    self.network = self.model
    if compiled:
      import torch._inductor.config

      torch._inductor.config.freezing = True
      self.network = torch.compile(self.model)
    self.steps = {}

  def step(self, kind, batch_size, mask_granularity, density):
    masked = (mask_granularity, density) if kind == 'torch_index' else ()
    key = (kind, batch_size, *masked)
    if key not in self.steps:
      self.steps[key] = self._make(batch_size, *masked)
    return self.steps[key]

  def _make(self, batch_size, *masked):
    import torch

    images = torch.from_numpy(random_images(self.settings, batch_size))
    images = images.to(self.dtype).permute(0, 3, 1, 2)  # Channels-last.
    masks = None
    if masked:
      masks = self._masks(images, *masked)

    def step():
      with torch.no_grad():
        self.network(images, masks)

    return step

  def _masks(self, images, mask_granularity, density):
    """The masks of the JAX process, as pairs of bool[N, h, w]."""
    import torch

    from dynconv_jax.masks import dilate
    from dynconv_jax.models.create import stage_granularities
    from dynconv_jax.models.resnet import ARCHITECTURES

    sides = stage_granularities(
      self.settings['model'], parse_sides(mask_granularity)
    )
    depths = ARCHITECTURES[self.settings['model']].depths
    sides = np.repeat(sides, depths).tolist()
    with torch.inference_mode():
      maps = [self.model.stem(images)]
      for block in self.model.blocks:
        maps.append(block(maps[-1]))
    shapes = [(len(x), *x.shape[2:]) for x in maps]
    masks = []
    for block, (_, height, width), hard in zip(
      self.model.blocks,
      shapes,
      masks_of_sides(shapes[1:], density, sides),
      strict=False,
    ):
      stride = block.stride if len(block.convs) == 3 else 1
      dilated = np.array(dilate(hard, stride)) > 0
      if len(block.convs) == 3:
        dilated = dilated[:, :height, :width]
      masks.append((torch.from_numpy(hard > 0), torch.from_numpy(dilated)))
    return masks


class _OnnxRuntime:
  """ONNX Runtime, on the dense network and on the sparse one."""

  def __init__(self, settings):
    self.settings = settings
    self.networks = Networks(settings)
    self.steps = {}

  def step(self, kind, batch_size, mask_granularity, density):
    masked = (mask_granularity, density) if kind == 'onnx_sparse' else ()
    key = (kind, batch_size, *masked)
    if key not in self.steps:
      self.steps[key] = self._make(batch_size, *masked)
    return self.steps[key]

  def _make(self, batch_size, mask_granularity=None, density=None):
    import onnxruntime

    from dynconv_jax.sparse.onnx import export_onnx

    sparse = mask_granularity is not None
    model = self.networks.model('dense')
    if sparse:
      model = self.networks.model(self.networks.method, mask_granularity)
    feeds = [{'images': batch} for batch in self.networks.batches(batch_size)]
    given = sparse and density is not None
    if given:
      masks = self.networks.masks(model, feeds[0]['images'], density)
      feeds[0] |= {f'mask_{i}': mask[:, None] for i, mask in enumerate(masks)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Its threads would go on spinning in the turns of the others.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    exported = export_onnx(
      model, feeds[0]['images'].shape[1:3], given_masks=given
    )
    session = onnxruntime.InferenceSession(
      exported.SerializeToString(), options
    )
    following = itertools.cycle(feeds)
    return lambda: session.run(None, next(following))


def _cycle(function, batches, calls) -> Step:
  """Calls with the next batches, which return when the last result is there."""
  import jax

  following = itertools.cycle(batches)

  def step():
    for _ in range(calls):
      result = function(next(following))
    jax.block_until_ready(result)

  return step
