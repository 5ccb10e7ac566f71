"""Other runtimes that dynconv_jax.cli.benchmark times, one per process."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.forced import force_gates
from benchmarks.networks import Networks, masks_of
from dynconv_jax.masks import execution_mask
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.sparse.sparsify import trace_blocks

_CORES = len(os.sched_getaffinity(0))

Run = Callable[[np.ndarray], np.ndarray]


class Runtime:
  """Another runtime; subclasses implement `make`.

  Attributes:
    masked: the kinds of steps that use masks.
  """

  masked: tuple[str, ...] = ()

  def __init__(self, settings):
    self.networks = Networks(settings)
    self.settings = self.networks.settings
    self._made = {}

  def step(self, kind, **case) -> Callable[[], None]:
    """Returns a function that runs the next batch."""
    run, batches = self._run(kind, **case)
    following = itertools.cycle(batches)
    return lambda: run(next(following))

  def logits(self, of, **case):
    """Returns the logits of the first batch."""
    run, batches = self._run(of, **case)
    return np.asarray(run(batches[0]), np.float32).tolist()

  def _run(self, kind, batch_size, mask_granularity, density):
    case = (mask_granularity, density) if kind in self.masked else ()
    key = (kind, batch_size, *case)
    if key not in self._made:
      batches = self.networks.batches(batch_size)
      run = self.make(batches[0].shape, *case)
      self._made[key] = run, list(map(self.convert, batches))
    return self._made[key]

  def make(
    self,
    shape: Sequence[int],
    mask_granularity: str | None = None,
    density: float | None = None,
  ) -> Run:
    """Returns a function from a batch to logits.

    Args:
      shape: shape of the batch, (N, H, W, C).
      mask_granularity: granularity of the masks; None for the dense network.
      density: density of the masks; None for those of a trained network.
    """
    raise NotImplementedError

  def convert(self, batch: np.ndarray):
    """Converts a batch for the function; not timed."""
    return batch


class Torch(Runtime):
  """PyTorch with channels-last memory and folded batch norm."""

  masked = ('torch_index',)

  def __init__(self, settings, compiled=False):
    import torch

    from benchmarks import torch_networks

    super().__init__(settings)
    torch_networks.use_all_cores()
    self.torch = torch
    self.dtype = getattr(torch, self.settings['compute_dtype'])
    dense = self.networks.model('dense')
    self.network = torch_networks.Network(dense).load(dense).fold()
    self.network.to(dtype=self.dtype, memory_format=torch.channels_last)
    if compiled:
      import torch._inductor.config

      torch._inductor.config.freezing = True
      self.network = torch.compile(self.network)

  def make(self, shape, mask_granularity=None, density=None):
    masks = None
    if mask_granularity is not None:
      masks = self._maps(shape, mask_granularity, density)

    def run(images):
      with self.torch.no_grad():
        return self.network(images, masks).float()

    return run

  def convert(self, batch):
    # This view is channels-last.
    return self.torch.from_numpy(batch).to(self.dtype).permute(0, 3, 1, 2)

  def _maps(self, shape, mask_granularity, density):
    """Returns the masks of the JAX process, bool[N, h, w] for each level."""
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
      maps[trace.name] = [
        self.torch.from_numpy(np.array(level) > 0) for level in mask.maps
      ]
    return maps


class TorchCudaGraph(Torch):
  """PyTorch on a GPU, with the network as one CUDA graph per batch.

  Batches are on the GPU in the compute dtype; JAX's are float32.

  Attributes:
    calls: number of calls per step, as in JAX.
    device: PyTorch device.
  """

  calls, device = 10, 'cuda'

  def __init__(self, settings):
    # Leave the GPU's memory to PyTorch.
    jax.config.update('jax_platforms', 'cpu')
    super().__init__(settings)
    self.torch.backends.cudnn.benchmark = True
    self.network.to(self.device)

  def make(self, shape, mask_granularity=None, density=None):
    graphs = {}

    def run(images):
      key = images.data_ptr()
      if key not in graphs:
        graphs[key] = self._record(images)
      graph, logits = graphs[key]
      graph.replay()
      return logits

    return run

  def _record(self, images):
    cuda = self.torch.cuda
    with self.torch.no_grad():
      # Warm up: initial allocations and algorithm choices must not be recorded.
      stream = cuda.Stream()
      stream.wait_stream(cuda.current_stream())
      with cuda.stream(stream):
        for _ in range(3):
          self.network(images, None)
      cuda.current_stream().wait_stream(stream)
      graph = cuda.CUDAGraph()
      with cuda.graph(graph):
        logits = self.network(images, None).float()
    return graph, logits

  def convert(self, batch):
    return super().convert(batch).to(self.device)

  def step(self, kind, **case):
    run, batches = self._run(kind, **case)
    following = itertools.cycle(batches)

    def step():
      for _ in range(self.calls):
        run(next(following))
      self.torch.cuda.synchronize()

    return step

  def logits(self, of, **case):
    run, batches = self._run(of, **case)
    return run(batches[0]).cpu().tolist()


class OnnxRuntime(Runtime):
  """ONNX Runtime with the dense or sparse network."""

  masked = ('onnx_sparse',)

  def make(self, shape, mask_granularity=None, density=None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _CORES
    # Spinning threads would slow down the other processes.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    file = _onnx(self.networks, shape, mask_granularity, density)
    session = onnxruntime.InferenceSession(file, options)
    return lambda images: session.run(['logits'], {'images': images})[0]


class OpenVino(Runtime):
  """OpenVINO with the dense or sparse network from ONNX."""

  masked = ('openvino_sparse',)

  def make(self, shape, mask_granularity=None, density=None):
    # Disable telemetry, which sends usage statistics from a separate process.
    # OpenVINO skips it if the module cannot be imported.
    sys.modules['openvino_telemetry'] = None
    import openvino

    compiled = openvino.compile_model(
      openvino.Core().read_model(
        _onnx(self.networks, shape, mask_granularity, density)
      ),
      'CPU',
      {
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': _CORES,
        'INFERENCE_PRECISION_HINT': 'f32',
      },
    )
    return lambda images: compiled(images, share_inputs=True)[0]


class LiteRt(Runtime):
  """LiteRT with XNNPACK, with the dense network from StableHLO."""

  def make(self, shape, mask_granularity=None, density=None):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(
      model_content=to_tflite(self.networks.model('dense'), shape),
      num_threads=_CORES,
    )
    interpreter.allocate_tensors()
    (images_at,) = (d['index'] for d in interpreter.get_input_details())
    (logits_at,) = (d['index'] for d in interpreter.get_output_details())

    def run(images):
      interpreter.set_tensor(images_at, images)
      interpreter.invoke()
      return interpreter.get_tensor(logits_at)

    return run


def to_tflite(model: nnx.Module, shape: Sequence[int]) -> bytes:
  """Returns a network as a LiteRT file. The converter folds batch norm.

  Args:
    model: the network, in evaluation, without gates.
    shape: shape of the images, (N, H, W, C).
  """
  from litert_converter import converter_api_ext as converter
  from litert_converter.mlir import ir, passmanager

  from dynconv_jax.sparse.stablehlo import export_stablehlo

  exported = export_stablehlo(
    model, shape[1:3], batch_size=shape[0], platforms=['cpu']
  )
  context = ir.Context()
  converter.prepare_mlir_context(context)
  with context:
    module = ir.Module.parse(exported.mlir_module())
    converter.set_signature(
      module.operation, 'serving_default', ['images'], ['logits']
    )
    converter.run_convert_to_tfl_passes(
      module, passmanager.PassManager(), converter.ConvertToTFLConfig()
    )
    return converter.export_flatbuffer_to_bytes(module.operation)


def _onnx(networks, shape, mask_granularity, density):
  """Returns an ONNX file; see `Runtime.make`."""
  from dynconv_jax.sparse.onnx import export_onnx

  model = networks.model('dense')
  if mask_granularity is not None:
    model = networks.model(networks.method, mask_granularity)
  if density is not None:
    model = force_gates(model, masks_of(model, shape, density))
  exported = export_onnx(model, shape[1:3], batch_size=shape[0])
  return exported.SerializeToString()
