"""Networks as ONNX models that compute only where their masks are set.

ONNX has true dynamic shapes: the active positions are found by NonZero, their
rows gathered, and nothing is compiled for a capacity. The network's own
`__call__` is traced: any network of gated blocks and ordinary operations can be
exported, with any gate. Needs the package onnx.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from jax.extend import core

from dynconv_jax.checks import check_choice
from dynconv_jax.layers import MaxPool
from dynconv_jax.methods.dynconv import Squeeze
from dynconv_jax.models.gated import GatedBlock, decide, gated_blocks
from dynconv_jax.sparse.fold import (
  FoldedConv,
  check_evaluation,
  fold_block,
)
from dynconv_jax.sparse.sparsify import (
  check_descriptions,
  fold_pairs,
  replace_modules,
)

try:
  import onnx

  from dynconv_jax.sparse import onnx_blocks, onnx_ops
  from dynconv_jax.sparse.onnx_graph import Graph
  from dynconv_jax.sparse.onnx_values import NCHW, PLAIN, Operand, Value, Writer
except ModuleNotFoundError as error:
  raise ImportError(
    'dynconv_jax.sparse.onnx needs ONNX:'
    " pip install 'dynconv-jax[onnx]' installs it"
  ) from error

FORMS = ('sparse', 'dense')


def export_onnx(
  model: nnx.Module,
  image_size: tuple[int, int],
  *,
  form: str = 'sparse',
  batch_size: int | None = None,
) -> onnx.ModelProto:
  """Returns a network as an ONNX model, batch norm folded, in float32.

  Its input 'images' is float32[N, H, W, 3], normalized. Its outputs are
  'logits', what the network returns first, and for a gated network 'density',
  float32[N, blocks], the share of active positions of each block.

  Args:
    model: the evaluation view of any network,
      nnx.view(model, deterministic=True, use_running_average=True).
    image_size: (H, W).
    form: of gated blocks: 'sparse', at active positions; 'dense', everywhere,
      and multiplied by the mask.
    batch_size: N; None: any.

  Raises:
    ValueError: the model is not in evaluation, a block is not what its
      description says, or an operation of the network cannot be written.
  """
  check_choice('form', form, FORMS)
  check_evaluation(model)
  check_descriptions(gated_blocks(model))
  model = _with_leaves(model, form)
  n = batch_size or export.symbolic_shape('N')[0]
  images = jax.ShapeDtypeStruct((n, *image_size, 3), jnp.float32)

  def forward(images):
    logits, masks = model(images)
    if not masks:
      return (logits,)
    return logits, jnp.stack([mask.density() for mask in masks], axis=1)

  closed = jax.make_jaxpr(forward)(images)
  graph = Graph()
  writer = Writer(graph)
  shape = (batch_size or 'N', *image_size, 3)
  writer.images = graph.input('images', shape)
  inputs = [Value(images.shape, images.dtype, {PLAIN: writer.images})]
  results = _write_jaxpr(writer, closed.jaxpr, closed.consts, inputs)
  outputs = {}
  for name, value in zip(('logits', 'density'), results, strict=False):
    value = writer.as_value(value)
    dimensions = [d if isinstance(d, int) else 'N' for d in value.shape]
    outputs[name] = (writer.full(value), dimensions)
  return graph.model(outputs)


# A module whose nodes are written by a function of this package.
_leaf_p = core.Primitive('onnx_leaf')


@_leaf_p.def_abstract_eval
def _leaf_type(*inputs, write, shape, dtype):
  del inputs, write
  return jax.core.ShapedArray(shape, dtype)


Write = Callable[[Writer, list[Value], Any], Value]


def _bind(write: Write, like: Callable[..., jax.Array], *inputs) -> jax.Array:
  """Traces a module as one operation.

  Args:
    write: writes its nodes, given the writer, values and the result's type.
    like: what it computes, for the type of its result.
    *inputs: arrays.
  """
  out = jax.eval_shape(like, *inputs)
  return _leaf_p.bind(*inputs, write=write, shape=out.shape, dtype=out.dtype)


class _Leaf(nnx.Module):
  """Stands for a module of one input."""

  def __init__(self, module: nnx.Module | None, like: Callable, write: Write):
    self.module, self.like, self.write = module, like, write

  def __call__(self, x):
    return _bind(self.write, self.like, x)


class _BlockLeaf(nnx.Module):
  """Stands for a gated block, whose gate is traced as what it is."""

  def __init__(self, block: GatedBlock, form: str):
    self.branch, self.name = block.branch, block.name
    self.stage, self.masker = block.stage, block.masker
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
  """What `fold_pairs` asks of a backend."""

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
  """A copy of a network, some of whose modules are single operations."""
  model = nnx.clone(model)
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
  w: Writer, jaxpr: Any, consts: list[Any], inputs: list[Operand]
) -> list[Operand]:
  """Writes what a jaxpr's results depend on; returns them."""
  known: dict[Any, Operand] = dict(
    zip(jaxpr.constvars, map(np.asarray, consts), strict=True)
  )
  known |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    if isinstance(atom, core.Literal):
      return np.asarray(atom.val, atom.aval.dtype)
    return known[atom]

  for eqn in _needed(jaxpr):
    values = [read(atom) for atom in eqn.invars]
    results = _write_equation(w, eqn, values)
    known |= dict(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr):
  """The equations that the results depend on, in order."""
  needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
  kept = []
  for eqn in reversed(jaxpr.eqns):
    if any(v in needed for v in eqn.outvars):
      kept.append(eqn)
      needed |= {v for v in eqn.invars if not isinstance(v, core.Literal)}
  return kept[::-1]


def _write_equation(
  w: Writer, eqn: Any, values: list[Operand]
) -> list[Operand]:
  name, params = eqn.primitive.name, dict(eqn.params)
  outs = [v.aval for v in eqn.outvars]
  if name == 'onnx_leaf':
    return [params['write'](w, [w.as_value(v) for v in values], outs[0])]
  if name == 'platform_index':  # The last branch is for any platform.
    return [np.asarray(len(params['platforms']) - 1, np.int32)]
  if name == 'cond' and isinstance(values[0], np.ndarray):
    branch = params['branches'][int(values[0])]
    return _write_jaxpr(w, branch.jaxpr, branch.consts, values[1:])
  constant = all(isinstance(v, np.ndarray) for v in values)
  static = all(isinstance(d, int) for out in outs for d in out.shape)
  if constant and static:
    results = eqn.primitive.bind(*values, **params)
    results = results if eqn.primitive.multiple_results else [results]
    return [np.asarray(r) for r in results]
  if inner := _inner(params):
    return _write_jaxpr(w, *inner, values)
  op = onnx_ops.find_op(name)
  try:
    if op is None:
      raise NotImplementedError(f'the operation {name}')
    return op(w, values, outs, **params)
  except NotImplementedError as error:
    raise ValueError(
      f'ONNX export cannot write {error}{_place(eqn)}; it can write gated '
      'blocks, convolutions, pooling, matrix products and what works element '
      'by element'
    ) from error


def _inner(params: dict[str, Any]) -> tuple[Any, list[Any]] | None:
  """The jaxpr of a call, and its constants."""
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = params.get(key)
    if isinstance(inner, core.ClosedJaxpr):
      return inner.jaxpr, inner.consts
    if isinstance(inner, core.Jaxpr):
      return inner, []
  return None


def _place(eqn: Any) -> str:
  """Where in the user's code an equation comes from."""
  traceback = eqn.source_info.traceback
  for frame in traceback.frames if traceback else ():
    if 'site-packages' not in frame.file_name:
      return f' of {frame.file_name}:{frame.line_num}'
  return ''
