"""Runs GPU kernels on a CPU, with Triton's interpreter in a separate process.

An environment variable selects the interpreter when Triton is imported, and
would replace the compiler for all other tests.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import multiprocessing
import os
import pathlib

import jax
import numpy as np

from dynconv_jax.sparse import backends
from dynconv_jax.sparse.backends import triton_launch

_FOLDER = pathlib.Path(backends.__file__).parent
# Triton does not interpret Gluon.
_KERNELS = [k for k in triton_launch.KERNEL_MODULES if k.startswith('triton')]


class Interpreter:
  """Stands in for `triton_launch.launch`, as a context manager."""

  def __enter__(self):
    context = multiprocessing.get_context('spawn')
    self._pool = concurrent.futures.ProcessPoolExecutor(1, context)
    return self.launch

  def __exit__(self, *_):
    self._pool.shutdown()

  def launch(self, kernel, *args, out_shape, **options):
    """Returns the outputs of a kernel; unwritten values are NaN or -7."""

    def run(*args):
      outputs = [_unwritten(s) for s in jax.tree.leaves(out_shape)]
      for i, j in options.get('input_output_aliases', {}).items():
        outputs[j] = np.array(args[i])
      for i in options.get('zeroed_outputs', ()):
        outputs[i][...] = 0
      inputs = [np.asarray(a) for a in args]
      outputs = self._pool.submit(
        _interpret, kernel, inputs, outputs, options
      ).result()
      return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)

    return jax.pure_callback(run, out_shape, *args)


def _unwritten(shape):
  fill = np.nan if jax.numpy.issubdtype(shape.dtype, np.floating) else -7
  return np.full(shape.shape, fill, shape.dtype)


def _interpret(kernel, inputs, outputs, options):
  """Runs a kernel in the other process; returns its outputs."""
  import torch

  def tensor(array):
    if array.dtype.name == 'bfloat16':
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  outputs = [np.ascontiguousarray(a) for a in outputs]
  constants = {k: v for k, v in options.items() if k.isupper()}
  tensors = [tensor(np.array(a)) for a in inputs]
  tensors += [tensor(a) for a in outputs]  # they share memory
  for i, j in options.get('input_output_aliases', {}).items():
    tensors[i] = tensors[len(inputs) + j]
  function = _interpreted_kernels()[kernel]
  function[(options['grid'],)](*tensors, **constants)
  return outputs


@functools.cache
def _interpreted_kernels():
  os.environ['TRITON_INTERPRET'] = '1'
  import ml_dtypes
  import triton.language as tl
  from triton.runtime import interpreter

  builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
  cast, dot = builder.cast_impl, builder.create_dot

  # The interpreter stores bfloat16 as integer bits, to which it truncates and
  # which it multiplies. A GPU rounds to nearest and multiplies the numbers.
  def cast_impl(self, value, dtype):
    kinds = (value.dtype.scalar, dtype.scalar)
    if kinds == (tl.float32, tl.bfloat16):
      data = value.data.astype(ml_dtypes.bfloat16).view(np.uint16)
      return Handle(data, tl.bfloat16)
    return cast(self, value, dtype)

  def create_dot(self, a, b, *args):
    a, b = (
      self.cast_impl(v, tl.float32) if v.dtype == tl.bfloat16 else v
      for v in (a, b)
    )
    return dot(self, a, b, *args)

  builder.cast_impl, builder.create_dot = cast_impl, create_dot
  kernels = {}
  for name in _KERNELS:
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels |= vars(module)
  return kernels
