"""Compiles the launches of GPU kernels where there is no GPU."""

import pathlib
import re
import subprocess
import tempfile

import jax
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynconv_jax.sparse import triton_kernels

_TYPES = {'float32': '*fp32', 'bfloat16': '*bf16', 'int32': '*i32'}
_PTXAS = (
  pathlib.Path(triton.__file__).with_name('backends') / 'nvidia/bin/ptxas'
)


def record(launches):
  """Returns a stand-in of `gpu.launch` that notes what would be launched."""

  def launch(kernel, *args, out_shape, grid, **options):
    shapes = jax.tree.leaves(out_shape)
    dtypes = tuple(str(a.dtype) for a in (*args, *shapes))
    for name in ('input_output_aliases', 'zeroed_outputs'):
      options.pop(name, None)
    launches.append((kernel, dtypes, tuple(options.items())))
    return jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), out_shape)

  return launch


def compile_launch(kernel, dtypes, options, capability):
  """Returns registers, bytes spilled and bytes of shared memory."""
  function, constants = getattr(triton_kernels, kernel), dict(options)
  limits = {
    name: constants.pop(name)
    for name in ('num_warps', 'num_stages')
    if name in constants
  }
  types = [_TYPES[dtype] for dtype in dtypes]
  types += ['constexpr'] * len(constants)
  source = ASTSource(
    function,
    dict(zip(function.arg_names, types, strict=True)),
    constants,
    {(i,): [['tt.divisibility', 16]] for i in range(len(dtypes))},
  )
  target = GPUTarget('cuda', capability, 32)
  compiled = triton.compile(source, target=target, options=limits)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'kernel.ptx')
    path.write_text(compiled.asm['ptx'])
    arch = re.search(r'\.target (\w+)', compiled.asm['ptx'])[1]
    text = subprocess.run(
      [_PTXAS, '-v', f'--gpu-name={arch}', path, '-o', '/dev/null'],
      capture_output=True,
      text=True,
      check=True,
    ).stderr
  return {
    'registers': int(re.search(r'Used (\d+) registers', text)[1]),
    'spills': int(re.search(r'(\d+) bytes spill stores', text)[1]),
    'shared': compiled.metadata.shared,
    'ptx': compiled.asm['ptx'],
  }
