"""Compiles GPU kernels without a GPU, with the tools that Triton ships."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton

from dynconv_jax.sparse.backends import triton_launch

_PTXAS = pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/ptxas'
_KERNELS = triton_launch.import_kernels()


class Used(NamedTuple):
  """Resources of a program.

  Attributes:
    registers: per thread.
    spilled: bytes that a thread spills from registers to memory.
    shared: bytes of shared memory.
    tensor_cores: whether it uses tensor cores.
  """

  registers: int
  spilled: int
  shared: int
  tensor_cores: bool


def record(launches: list):
  """Returns a stand-in for `triton_launch.launch` that records its calls.

  Args:
    launches: list to which a (kernel, pointer dtypes, constants) is appended.
  """

  def launch(kernel, *args, out_shape, **options):
    dtypes = (v.dtype.name for v in (*args, *jax.tree.leaves(out_shape)))
    for name in ('grid', 'input_output_aliases', 'zeroed_outputs'):
      options.pop(name, None)
    launches.append((kernel, tuple(dtypes), tuple(options.items())))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out_shape)

  return launch


def variants(launches: list) -> list:
  """Returns one launch for each kind of program, regardless of map size."""
  sizes = ('SIZE', 'HEIGHT', 'WIDTH', 'STRIDES', 'DEPTH', 'FEATURES')
  kinds = {}
  for launch in launches:
    constants = [item for item in launch[2] if item[0] not in sizes]
    kinds.setdefault((launch[0], tuple(constants)), launch)
  return list(kinds.values())


def compile_launch(
  kernel: str,
  dtypes: tuple[str, ...],
  options: tuple[tuple[str, int], ...],
  capability: int,
) -> Used:
  """Compiles a recorded launch.

  Args:
    kernel: its name.
    dtypes: dtypes of its pointers.
    options: its constants, and options of the compiler.
    capability: 80 for an A100, 90 for an H100.
  """
  compiled = triton_launch.compile_kernel(
    _KERNELS[kernel], dtypes, dict(options), capability
  )
  ptx = compiled.asm['ptx']
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'kernel.ptx')
    path.write_text(ptx)
    gpu = re.search(r'\.target (\w+)', ptx)[1]
    said = subprocess.run(
      [_PTXAS, '-v', f'--gpu-name={gpu}', path, '-o', f'{path}.cubin'],
      capture_output=True,
      text=True,
      check=True,
    ).stderr
  return Used(
    registers=int(re.search(r'Used (\d+) registers', said)[1]),
    spilled=int(re.search(r'(\d+) bytes spill stores', said)[1]),
    shared=compiled.metadata.shared,
    tensor_cores='mma' in ptx,
  )
