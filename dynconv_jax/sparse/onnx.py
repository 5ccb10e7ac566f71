"""Export to ONNX models that compute only where their masks are set.

ONNX supports dynamic shapes: NonZero finds the active positions and Gather
reads their rows, without a fixed capacity. The export traces the network's own
`__call__`, so it supports any network of gated blocks and ordinary operations,
with any gate. Requires the package onnx.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from dynconv_jax.checks import check_choice
from dynconv_jax.layers import MaxPool
from dynconv_jax.methods.mask_unit import Squeeze
from dynconv_jax.models.gated import GatedBlock, decide, gated_blocks
from dynconv_jax.sparse.descriptions import check_descriptions
from dynconv_jax.sparse.fold import (
  FoldedConv,
  check_evaluation,
  fold_block,
)
from dynconv_jax.sparse.sparsify import (
  Replacement,
  fold_pairs,
  replace_modules,
)
from dynconv_jax.sparse.stablehlo import (
  for_any_batch,
  image_type,
  inference_function,
)

try:
  import onnx

  from dynconv_jax.sparse import (
    onnx_blocks,
    onnx_ops,
    onnx_shapes,
    onnx_sums,
  )
  from dynconv_jax.sparse.onnx_graph import Graph
  from dynconv_jax.sparse.onnx_values import (
    NCHW,
    PLAIN,
    Operand,
    Value,
    Writer,
  )
except ModuleNotFoundError as error:
  raise ImportError(
    'dynconv_jax.sparse.onnx needs ONNX;'
    " pip install 'dynconv-jax[onnx]' installs it"
  ) from error

FORMS = ('sparse', 'dense')
_OPS = {**onnx_ops.OPS, **onnx_shapes.OPS, **onnx_sums.OPS}
# Primitives that call a jaxpr in their parameters.
_CALLS = (
  *('checkpoint', 'closed_call', 'core_call', 'jit', 'pjit', 'remat2'),
  *('custom_jvp_call', 'custom_vjp_call'),
)


def export_onnx(
  model: nnx.Module,
  image_size: tuple[int, int],
  *,
  form: str = 'sparse',
  batch_size: int | None = None,
  channels: int = 3,
  masks: bool = False,
) -> onnx.ModelProto:
  """Returns a network as a float32 ONNX model, with batch norm folded.

  The input 'images' is normalized float32[N, H, W, channels]. The outputs are
  'logits', the network's first output, and for a gated network 'density',
  float32[N, blocks], the fraction of active positions of each block.

  Args:
    model: the evaluation view of any network,
      nnx.view(model, deterministic=True, use_running_average=True).
    image_size: (H, W).
    form: 'sparse' to run gated blocks at active positions; 'dense' to run them
      everywhere and multiply by the mask.
    batch_size: N, or None for any.
    channels: channels of the images.
    masks: whether to also output 'executed_macs', float32[N], the MACs of the
      masked layers at active positions, and each block's mask in network order:
      'mask_0', 'mask_1', and so on, float32[N, h, w] of {0, 1}.

  Raises:
    ValueError: an argument is out of range, the model is not in evaluation, a
      block does not match its description, or an operation of the network is
      not supported.
  """
  check_choice('form', form, FORMS)
  images = image_type(image_size, batch_size, channels)
  check_evaluation(model)
  check_descriptions(gated_blocks(model))
  model = _with_leaves(model, form)
  batch = None if batch_size else images.shape[0]
  function = inference_function(model, masks=masks)
  closed = for_any_batch(jax.make_jaxpr(function), images)
  graph = Graph()
  name = graph.input('images', _dimensions(images.shape))
  writer = Writer(graph, name, batch)
  inputs = [Value(images.shape, images.dtype, {PLAIN: name})]
  results = _write_jaxpr(writer, closed.jaxpr, closed.consts, inputs)
  outputs = {}
  names = ('logits', 'density', 'executed_macs')
  names += tuple(f'mask_{i}' for i in range(len(results) - len(names)))
  for name, value in zip(names, results, strict=False):
    value = onnx_ops.cast(writer, value, np.float32)
    outputs[name] = (writer.full(value), _dimensions(value.shape))
  return graph.model(outputs)


def _dimensions(shape):
  return [n if isinstance(n, int) else str(n) for n in shape]


# A module whose nodes a function of this package writes.
_leaf_p = core.Primitive('onnx_leaf')


@_leaf_p.def_abstract_eval
def _leaf_type(*inputs, write, shape, dtype):
  del inputs, write
  return jax.core.ShapedArray(shape, dtype)


Write = Callable[[Writer, list[Value], Any], Value]


def _bind(write: Write, like: Callable[..., jax.Array], *inputs) -> jax.Array:
  """Traces a module as one operation.

  Args:
    write: writes the nodes, given the writer, values, and the result's type.
    like: a function of the inputs with the same result type.
    *inputs: arrays.
  """
  out = jax.eval_shape(like, *inputs)
  return _leaf_p.bind(*inputs, write=write, shape=out.shape, dtype=out.dtype)


class _Leaf(nnx.Module):
  """Replaces a module of one input."""

  def __init__(self, module: nnx.Module | None, like: Callable, write: Write):
    self.module, self.like, self.write = module, like, write

  def __call__(self, x):
    return _bind(self.write, self.like, x)


class _BlockLeaf(Replacement):
  """Replaces a gated block. The block's gate is traced normally."""

  def __init__(self, block: GatedBlock, form: str):
    super().__init__(block)
    self.masker = block.masker
    folded, self.form = fold_block(block, jnp.float32), form

    def write(w, values, out):
      w.graph.scope = block.name
      x, *hard = values
      if hard and form == 'sparse':
        written = onnx_blocks.sparse_block(w, folded, x, hard[0], out)
      else:
        hard = hard[0] if hard else None
        written = onnx_blocks.dense_block(w, folded, x, hard, out)
      w.graph.scope = 'network'
      return written

    self.write = write
    self.like = lambda x, *hard: block.execute(x)

  def __call__(self, x, gating=None):
    mask = None if gating is None else decide(self, x, gating)
    if mask is None:
      return _bind(self.write, self.like, x)
    gating.add(mask)
    return _bind(self.write, self.like, x, mask.hard)


class _Folding:
  """Implements the part of a backend that `fold_pairs` uses."""

  def convolution(self, conv: FoldedConv) -> nnx.Module:
    what = conv.conv

    def like(x):
      shape = (x.shape[0], *map(what.output_size, x.shape[1:3]), what.features)
      return jnp.zeros(shape, conv.kernel.dtype)

    def write(w, values, out):
      y = onnx_blocks.convolve(w, w.nchw(values[0]), conv, values[0].shape[1:3])
      return Value(out.shape, out.dtype, {NCHW: y})

    return _Leaf(None, like, write)


def _with_leaves(model: nnx.Module, form: str) -> nnx.Module:
  """Returns a float32 copy of a network with some modules as one operation."""
  model = nnx.clone(model)
  for _, module in nnx.iter_modules(model):
    dtype = getattr(module, 'dtype', None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
      with contextlib.suppress(AttributeError):  # A property.
        module.dtype = jnp.float32
  fold_pairs(model, _Folding())

  def replace(module):
    if type(module) is MaxPool:
      return _Leaf(module, module, _write_max_pool)
    if type(module) is Squeeze:
      return _Leaf(
        module,
        module,
        lambda w, values, out: onnx_blocks.mask_logits(
          w, module, values[0], out
        ),
      )
    return None

  replace_modules(model, replace)
  replace_modules(
    model,
    lambda m: (
      _BlockLeaf(m, form)
      if isinstance(m, GatedBlock) and m.describable
      else None
    ),
  )
  return model


def _write_max_pool(w, values, out):
  y = w.graph(
    'MaxPool',
    w.nchw(values[0]),
    kernel_shape=[3, 3],
    strides=[2, 2],
    pads=[1, 1, 1, 1],
  )
  return Value(out.shape, out.dtype, {NCHW: y})


def _write_jaxpr(
  w: Writer,
  jaxpr: Any,
  consts: list[Any],
  inputs: list[Operand],
  place: str = '',
) -> list[Operand]:
  """Writes the equations that a jaxpr's results depend on; returns the results.

  Args:
    w: the writer.
    jaxpr: an open jaxpr.
    consts: constants of the jaxpr.
    inputs: inputs of the jaxpr.
    place: the call's place in the user's code, for messages.
  """
  known: dict[Any, Operand] = dict(
    zip(jaxpr.constvars, map(_constant, consts), strict=True)
  )
  known |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    if isinstance(atom, core.Literal):
      return np.asarray(atom.val, atom.aval.dtype)
    return known[atom]

  for eqn in _needed(jaxpr):
    values = [read(atom) for atom in eqn.invars]
    results = _write_equation(w, eqn, values, _place(eqn) or place)
    known |= dict(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr):
  """Returns the equations that the results depend on, in order."""
  needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
  kept = []
  for eqn in reversed(jaxpr.eqns):
    if any(v in needed for v in eqn.outvars):
      kept.append(eqn)
      needed |= {v for v in eqn.invars if not isinstance(v, core.Literal)}
  return kept[::-1]


def _constant(array: Any) -> Any:
  """Returns a NumPy constant; arrays of extended dtypes are left unchanged."""
  if jnp.issubdtype(array.dtype, jax.dtypes.extended):
    return array
  return np.asarray(array)


def _write_equation(
  w: Writer, eqn: Any, values: list[Operand], place: str
) -> list[Operand]:
  name, params = eqn.primitive.name, dict(eqn.params)
  outs = [v.aval for v in eqn.outvars]
  if name == 'onnx_leaf':
    return [params['write'](w, [w.as_value(v) for v in values], outs[0])]
  if name == 'platform_index':  # The last branch is the default.
    return [np.asarray(len(params['platforms']) - 1, np.int32)]
  if name == 'cond' and isinstance(values[0], np.ndarray):
    branch = params['branches'][int(values[0])]
    return _write_jaxpr(w, branch.jaxpr, branch.consts, values[1:], place)
  constant = name != 'dim_as_value' and all(
    isinstance(v, np.ndarray) for v in values
  )
  static = all(isinstance(d, int) for out in outs for d in out.shape)
  if constant and static:
    results = eqn.primitive.bind(*values, **params)
    results = results if eqn.primitive.multiple_results else [results]
    return [_constant(r) for r in results]
  if name in _CALLS:
    return _write_jaxpr(w, *_inner(params), values, place)
  try:
    if name not in _OPS:
      raise NotImplementedError(f'the operation {name}')
    return _OPS[name](w, values, outs, **params)
  except NotImplementedError as error:
    raise ValueError(
      f'ONNX export cannot write {error}{place}; it supports gated blocks, '
      'convolutions, pooling, matrix products, and element-wise operations'
    ) from error


def _inner(params: dict[str, Any]) -> tuple[Any, list[Any]]:
  """Returns the jaxpr of a call and its constants."""
  inner = params.get('jaxpr') or params['call_jaxpr']
  if isinstance(inner, core.ClosedJaxpr):
    return inner.jaxpr, inner.consts
  return inner, []


_LIBRARIES = (f'site-packages{os.sep}', os.path.dirname(os.__file__), '<')


def _place(eqn: Any) -> str:
  """Returns the place of an equation in the user's code, for messages."""
  traceback = eqn.source_info.traceback
  for frame in traceback.frames if traceback else ():
    if not any(library in frame.file_name for library in _LIBRARIES):
      return f' of {frame.file_name}:{frame.line_num}'
  return ''
