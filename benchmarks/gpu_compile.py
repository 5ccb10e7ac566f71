"""Compiles a network for an H200 without a GPU, and describes the result.

python -m benchmarks.gpu_compile --plugin_dir=DIR --mode=sparse --batch_size=128

Needs JAX's CUDA plugin in jaxlib's version, but none of NVIDIA's libraries:
pip install --no-deps --target DIR jax-cuda13-plugin==VERSION
jax-cuda13-pjrt==VERSION. The network uses bfloat16 and random weights.

The last line is JSON: `command_buffers`, the number of CUDA graphs that XLA
records; `recorded`, the number of operations in them; `outside`, the operations
that the host launches individually; `copies`, the shapes of copied arrays;
`kernels`, the number of launches of Triton kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from unittest import mock

from absl import flags

from benchmarks import hlo
from dynconv_jax.cli import program

_MODEL = flags.DEFINE_string('model', 'resnet50', 'Name of the network.')
_METHOD = flags.DEFINE_string('method', 'dynconv', 'Name of the method.')
_MODE = flags.DEFINE_string('mode', 'sparse', 'Mode of the executor.')
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 1, 'Number of images.', lower_bound=1
)
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 224, 'Side of the images, in pixels.', lower_bound=32
)
_WIDTH = flags.DEFINE_float(
  'width_multiplier', 1.0, 'Scale of the channels of the network.'
)
_PLUGIN_DIR = flags.DEFINE_string(
  'plugin_dir', '', "Folder of JAX's CUDA plugin, if it is not installed."
)
_GRAPHS = flags.DEFINE_bool(
  'convolution_graphs',
  True,
  'Whether to record cuDNN convolutions in CUDA graphs, as the library does, '
  "instead of using XLA's default.",
)
_INSIDE = flags.DEFINE_bool('inside', False, 'For internal use.')

_ENVIRONMENT = {
  'CUDA_VISIBLE_DEVICES': '-1',
  'JAX_PLATFORMS': '',
  'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
  'TF_CPP_MIN_LOG_LEVEL': '0',
  'TF_CPP_VMODULE': 'command_buffer_conversion_pass=2',
  'XLA_FLAGS': '--xla_gpu_autotune_level=0',
}
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200 141GB HBM3e"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""


def main(argv: Sequence[str]) -> None:
  """Compiles the network and prints the description."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  if _INSIDE.value:
    print(_compile())
    return
  path = [_PLUGIN_DIR.value, os.getcwd(), os.environ.get('PYTHONPATH', '')]
  command = [sys.executable, '-m', 'benchmarks.gpu_compile', '--inside']
  done = subprocess.run(
    command + sys.argv[1:],
    env=os.environ
    | _ENVIRONMENT
    | {'PYTHONPATH': ':'.join(filter(None, path))},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise OSError(f'compilation failed: {done.stderr[-2000:]}')
  print(json.dumps(hlo.describe(done.stdout, done.stderr)))


def _compile() -> str:
  """Returns the compiled module as text."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax._src import xla_bridge
  from jax.experimental import topologies

  from dynconv_jax import create_model
  from dynconv_jax.sparse import SparseExecutor

  known = xla_bridge.canonicalize_platform

  def canonicalize(name):
    # JAX looks up the platform of 'gpu', but there is no such device.
    return 'cuda' if name in ('gpu', 'cuda') else known(name)

  model = create_model(
    _MODEL.value,
    method=_METHOD.value,
    width_multiplier=_WIDTH.value,
    dtype=jnp.bfloat16,
    rngs=nnx.Rngs(0),
  )
  model = nnx.view(model, deterministic=True, use_running_average=True)
  size = _IMAGE_SIZE.value
  with (
    mock.patch.object(xla_bridge, 'canonicalize_platform', canonicalize),
    mock.patch.object(jax, 'default_backend', lambda: 'gpu'),
  ):
    devices = topologies.get_topology_desc(
      platform='cuda', target_config=_H200, topology='1x1x1'
    ).devices
    executor = SparseExecutor(
      model,
      (_BATCH_SIZE.value, size, size, 3),
      mode=_MODE.value,
      compiler_options=None if _GRAPHS.value else {},
    )
    return executor.lower(device=devices[0]).compile().as_text()


if __name__ == '__main__':
  program.run(main)
