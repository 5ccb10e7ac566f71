"""The timed processes of experiments.benchmark, one a framework."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import turns

Step = Callable[[], None]

_MASK_SEED = 1  # The same masks in every process.


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
    return turns.seconds(step, settings['steps'])

  turns.serve(answer)


def _images(settings, batch_size):
  size = settings['image_size']
  rng = np.random.default_rng(0)
  return rng.standard_normal((batch_size, size, size, 3)).astype(np.float32)


def _mask(rng, shape, density, side=1, per_image=False):
  """A clustered mask, of square patches where `side` is above 1."""
  from dynconv_jax.sparse.cost import clustered_masks

  n, h, w = shape
  patches = (n, -(-h // side), -(-w // side))
  mask = clustered_masks(rng, patches, density, per_image)
  return mask.repeat(side, 1).repeat(side, 2)[:, :h, :w]


def _output_shapes(model, images):
  """(N, h, w) of the output of each block."""
  import jax

  x, shapes = jax.eval_shape(model.stem, images), []
  for block in model.blocks:
    x = jax.eval_shape(block, x)
    shapes.append(x.shape[:3])
  return shapes


class _Jax:
  """Dense, masked dense and sparse execution by XLA."""

  def __init__(self, settings):
    from jax import numpy as jnp

    from dynconv_jax.training import workdir

    self.settings = settings
    self.dtype = jnp.dtype(settings['compute_dtype'])
    self.trained = None
    if settings['workdir']:
      self.trained = workdir.load_run(settings['workdir'])
      self.settings = {
        **settings,
        'model': self.trained.config.model,
        # A dense network is planned as a gated one of its shape would be.
        'method': (
          'dynconv'
          if self.trained.config.method == 'dense'
          else self.trained.config.method
        ),
        'num_classes': len(self.trained.class_names),
      }
      self.dtype = jnp.dtype(self.trained.config.compute_dtype)
    self.case = None

  def _model(self, method):
    from flax import nnx

    from dynconv_jax import create_model

    if self.trained and method == self.trained.config.method:
      return self.trained.model
    model = create_model(
      self.settings['model'],
      method=method,
      num_classes=self.settings['num_classes'],
      mask_granularity=tuple(map(int, self.settings['mask_granularity'])),
      width_multiplier=(
        self.trained.config.width_multiplier if self.trained else 1.0
      ),
      dtype=self.dtype,
      rngs=nnx.Rngs(0),
    )
    return nnx.view(model, deterministic=True, use_running_average=True)

  def _batches(self, batch_size):
    from dynconv_jax.training import inputs

    if not self.trained:
      return [_images(self.settings, batch_size)]
    config = dataclasses.replace(
      self.trained.config,
      eval_batch_size=batch_size,
      **(
        {'food101_dir': self.settings['food101_dir']}
        if self.settings['food101_dir']
        else {}
      ),
    )
    source = inputs.open_split(config, self.settings['split'])
    batches = iter(inputs.eval_batches(config, source))
    count = min(self.settings['num_batches'], len(source) // batch_size)
    return [np.asarray(next(batches)['image']) for _ in range(max(1, count))]

  def prepare(self, batch_size, density):
    """Makes the executors of a case; returns what they execute."""
    import jax
    from jax import numpy as jnp

    from dynconv_jax.macs import count_macs
    from dynconv_jax.sparse import BlockPlan, SparseExecutor

    if self.trained is None or self.case is None:
      self.model = self._model(self.settings['method'])
    batches = [jnp.asarray(b) for b in self._batches(batch_size)]
    shape = batches[0].shape
    self.masks = None
    if density is not None:
      abstract = jax.eval_shape(self.model, batches[0])[1]
      decided = {mask.name: mask.hard.shape for mask in abstract}
      rng = np.random.default_rng(_MASK_SEED)
      self.masks = [
        jnp.asarray(
          _mask(
            rng,
            # A block without a gate is executed everywhere.
            decided[block.name],
            density,
            side=getattr(block.masker, 'granularity', 1),
            per_image=block.masker.per_image,
          )
          if block.name in decided
          else np.ones(shape, np.float32)
        )
        for block, shape in zip(
          self.model.blocks, _output_shapes(self.model, batches[0]), strict=True
        )
      ]
    self.sparse = SparseExecutor(
      self.model, shape, mode=self.settings['mode'], density=density or 0.5
    )
    # Dense in the same forms as the network without gates, below.
    plans = [BlockPlan('dense', im2col=p.im2col) for p in self.sparse.plans]
    executors = {
      'masked_dense': SparseExecutor(self.model, shape, plans=plans),
      'sparse': self.sparse,
    }
    self.case = (batch_size, density)
    self.steps = {
      kind: _cycle(functools.partial(executor, masks=self.masks), batches)
      for kind, executor in executors.items()
    }
    self.steps['dense'] = _cycle(self._dense(), batches)
    self.batches = batches
    if self.trained and self.trained.config.method == 'dense':
      return {'density': 1.0, 'mac_ideal': 1.0}
    stats = [self.sparse(batch, self.masks)[1] for batch in batches]
    self.stats = stats[0]
    arguments = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    gated = count_macs(self.model, arguments)
    dense = count_macs(self._model('dense'), arguments)
    executed = np.concatenate([gated.executed(s.masks) for s in stats])
    density = np.mean(
      [np.mean(mask.hard) for s in stats for mask in s.masks], dtype=float
    )
    return {
      'density': density,
      'mac_ideal': float(executed.mean() / dense.total),
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

    from dynconv_jax.models.layers import max_pool
    from dynconv_jax.sparse.dense import convolve, run_dense
    from dynconv_jax.sparse.fold import fold_network

    model = self._model('dense')
    plans = self.sparse.plans

    @jax.jit
    def forward(network, images):
      x = convolve(images.astype(self.dtype), network.stem)
      x = jax.nn.relu(x).astype(self.dtype)
      if model.architecture.stem == 'imagenet':
        x = max_pool(x)
      for block, plan in zip(network.blocks, plans, strict=True):
        x = run_dense(block, x, im2col=plan.im2col)
      return model.head(x)

    return functools.partial(forward, fold_network(model))

  def step(self, kind, batch_size, density):
    assert self.case == (batch_size, density)
    return self.steps[kind]

  def blocks(self, batch_size, density):
    """Times each block by its plan and densely."""
    import jax
    from jax import numpy as jnp

    from dynconv_jax.sparse.fold import fold_block
    from dynconv_jax.sparse.plan import BlockPlan, run_block

    assert self.case == (batch_size, density)
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
      run = functools.partial(
        run_block,
        fold_block(block, self.dtype),
        features,
        mask.hard,
        mask.dilated,
        load,
      )
      forms = {
        'dense_ms': BlockPlan('dense', im2col=plan.im2col),
        'sparse_ms': plan,
      }
      times = {name: [] for name in forms}
      for repeat in range(8):
        for name, form in forms.items():
          taken = turns.seconds(
            lambda form=form, run=run: jax.block_until_ready(run(form)), 1
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
    self.settings = settings
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

  def step(self, kind, batch_size, density):
    key = (kind, batch_size, density if kind == 'torch_index' else None)
    if key not in self.steps:
      self.steps[key] = self._make(kind, batch_size, density)
    return self.steps[key]

  def _make(self, kind, batch_size, density):
    import torch

    images = torch.from_numpy(_images(self.settings, batch_size))
    images = images.to(self.dtype).permute(0, 3, 1, 2)  # Channels-last.
    masks = None
    if kind == 'torch_index':
      masks = self._masks(images, density)

    def step():
      with torch.no_grad():
        self.network(images, masks)

    return step

  def _masks(self, images, density):
    """The masks of the JAX process, as pairs of bool[N, h, w]."""
    import torch

    from dynconv_jax.gating.mask import dilate
    from dynconv_jax.models.create import stage_granularities
    from dynconv_jax.models.resnet import ARCHITECTURES

    sides = stage_granularities(
      self.settings['model'], tuple(map(int, self.settings['mask_granularity']))
    )
    depths = ARCHITECTURES[self.settings['model']].depths
    sides = np.repeat(sides, depths).tolist()
    rng, masks = np.random.default_rng(_MASK_SEED), []
    with torch.inference_mode():
      x = self.model.stem(images)
      for block, side in zip(self.model.blocks, sides, strict=True):
        height, width = x.shape[2:]
        x = block(x)
        n, _, h, w = x.shape
        hard = _mask(rng, (n, h, w), density, side)
        stride = block.stride if len(block.convs) == 3 else 1
        dilated = np.array(dilate(hard, stride)) > 0
        if len(block.convs) == 3:
          dilated = dilated[:, :height, :width]
        masks.append((torch.from_numpy(hard > 0), torch.from_numpy(dilated)))
    return masks


class _OnnxRuntime:
  """ONNX Runtime on PyTorch's network, exported."""

  def __init__(self, settings):
    self.settings = settings
    self.steps = {}

  def step(self, kind, batch_size, density):
    del kind, density
    if batch_size not in self.steps:
      self.steps[batch_size] = self._make(batch_size)
    return self.steps[batch_size]

  def _make(self, batch_size):
    import onnxruntime
    import torch

    from experiments import torch_resnet

    model = torch_resnet.ResNet(
      self.settings['model'], self.settings['num_classes']
    ).fold()
    images = _images(self.settings, batch_size).transpose(0, 3, 1, 2).copy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Its threads would go on spinning in the turns of the others.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'network.onnx'
      torch.onnx.export(
        model, (torch.from_numpy(images),), path, dynamo=True, verbose=False
      )
      session = onnxruntime.InferenceSession(path, options)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})


def _cycle(function, batches) -> Step:
  """A call with the next batch, which returns when the result is there."""
  import itertools

  import jax

  following = itertools.cycle(batches)
  return lambda: jax.block_until_ready(function(next(following)))
