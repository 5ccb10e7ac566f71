"""Compilation of GPU kernels by Triton, and their launch from XLA.

JAX's own foreign function for Triton kernels launches them. XLA records it into
CUDA graphs, so a single host launch starts a whole network.
"""

from __future__ import annotations

import functools
import importlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jaxlib.version

# A handler of jaxlib's CUDA plugin that can be recorded into CUDA graphs, and
# the first version that has it.
_TARGET, _SINCE = 'triton_kernel_call_ffi', (0, 10, 1)
_TYPES = {'float32': '*fp32', 'bfloat16': '*bf16', 'int32': '*i32'}
_ALIGNMENT = 16
KERNEL_MODULES = (
  *('triton_kernels', 'triton_mask_kernels', 'triton_stem_kernels'),
  *('triton_depthwise_kernels', 'gluon_kernels'),
)


def capability() -> int:
  """Returns ten times the GPU's compute capability.

  An A100 has 80, an H100 has 90. Returns 90 if there is no such GPU.
  """
  version = getattr(jax.local_devices()[0], 'compute_capability', '')
  return int(version.replace('.', '')) if '.' in version else 90


def generation() -> int:
  """Returns the major version of the GPU's compute capability."""
  return capability() // 10


def import_kernels() -> dict[str, Any]:
  """Returns the kernels by name; needs Triton."""
  kernels = {}
  for name in KERNEL_MODULES:
    kernels |= vars(importlib.import_module(f'{__package__}.{name}'))
  return kernels


@functools.cache
def load() -> tuple[Any, Mapping[str, Any]]:
  """Returns `jaxlib.gpu_triton` and the kernels by name.

  Raises:
    ImportError: Triton is not installed, JAX has no CUDA support, or jaxlib is
      too old.
  """
  version = jaxlib.version.__version__
  try:
    from jaxlib import gpu_triton

    kernels = import_kernels()
  except ImportError as error:
    raise ImportError(
      f"GPU kernels need Triton ({error}): pip install 'dynconv-jax[gpu]'"
      ' installs it'
    ) from error
  if jaxlib.version.__version_info__ < _SINCE:
    raise ImportError(
      'GPU kernels need jaxlib 0.10.1 or newer, which lets XLA record them '
      f"into CUDA graphs; got {version}: pip install -U 'jax[cuda12]'"
    )
  if not hasattr(gpu_triton, 'TritonKernelCall'):
    raise ImportError(
      "GPU kernels need JAX's CUDA support, which this jaxlib "
      f"{version} lacks: pip install 'jax[cuda12]' installs it"
    )
  return gpu_triton, kernels


def launch(
  kernel: str,
  *args: jax.Array,
  out_shape: Any,
  grid: int,
  input_output_aliases: Mapping[int, int] | None = None,
  zeroed_outputs: Sequence[int] = (),
  **options: int,
) -> Any:
  """Returns the outputs of a kernel.

  Args:
    kernel: name of the kernel in one of the files `*_kernels.py`.
    *args: inputs of the kernel.
    out_shape: tree of shapes and dtypes of the outputs.
    grid: number of programs.
    input_output_aliases: input index -> index of the output that shares its
      memory.
    zeroed_outputs: indices of outputs to fill with zeros before the launch.
    **options: the kernel's constants, and Triton's `num_warps` and
      `num_stages`.
  """
  gpu_triton, kernels = load()
  outputs = jax.tree.leaves(out_shape)
  compiled = _kernel(
    kernels[kernel],
    tuple(x.dtype.name for x in (*args, *outputs)),
    tuple(sorted(options.items())),
    capability(),
  )
  zeroed = [0] * len(args) + [
    out.size * out.dtype.itemsize if i in zeroed_outputs else 0
    for i, out in enumerate(outputs)
  ]
  call = gpu_triton.TritonKernelCall(
    compiled,
    *(grid, 1, 1),
    [gpu_triton.create_array_parameter(n, _ALIGNMENT) for n in zeroed],
  )
  run = jax.ffi.ffi_call(
    _TARGET, out_shape, input_output_aliases=dict(input_output_aliases or {})
  )
  return run(*args, opaque=zlib.compress(call.to_proto(kernel, b'')))


@functools.cache
def _kernel(function, dtypes, options, capability):
  """Compiles a kernel and returns it in the form that jaxlib launches."""
  compiled = compile_kernel(function, dtypes, dict(options), capability)
  metadata = compiled.metadata
  return load()[0].TritonKernel(
    metadata.name,
    metadata.num_warps,  # Warp specialization changes the requested number.
    metadata.num_ctas,
    metadata.shared,
    compiled.asm['ptx'],
    '',
    capability,
  )


def compile_kernel(
  function: Any,
  dtypes: Sequence[str],
  options: Mapping[str, int],
  capability: int,
) -> Any:
  """Compiles a kernel with Triton, which caches the result.

  Args:
    function: a Triton or Gluon kernel.
    dtypes: dtypes of the kernel's arrays, outputs last.
    options: see `launch`.
    capability: ten times the compute capability.
  """
  import triton
  from triton.backends.compiler import GPUTarget
  from triton.compiler import ASTSource

  source = ASTSource
  if function.is_gluon():
    from triton.experimental.gluon._runtime import GluonASTSource as source
  constants = {k: v for k, v in options.items() if k.isupper()}
  signature = dict(
    zip(function.arg_names, (_TYPES[name] for name in dtypes), strict=False)
  ) | dict.fromkeys(constants, 'constexpr')
  if set(signature) != set(function.arg_names):
    raise ValueError(
      f'{function.__name__} takes {", ".join(function.arg_names)}; '
      f'got {", ".join(signature)}'
    )
  aligned = [['tt.divisibility', _ALIGNMENT]]
  return triton.compile(
    source(
      function,
      signature,
      constants,
      {(i,): aligned for i in range(len(dtypes))},
    ),
    target=GPUTarget('cuda', capability, 32),
    options={k: v for k, v in options.items() if not k.isupper()},
  )


def cdiv(a: int, b: int) -> int:
  """Returns a / b rounded up."""
  return -(-a // b)


def ceil_power(n: int) -> int:
  """Returns the smallest power of two >= n."""
  return 1 << (n - 1).bit_length()


def tile_side(n: int) -> int:
  """Returns the side of a tile for n: the next power of two, at least 16."""
  return max(16, ceil_power(n))
