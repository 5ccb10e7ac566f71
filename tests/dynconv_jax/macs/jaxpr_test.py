"""Tests of `count_macs`: arguments, errors, and published networks."""

import functools
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import dynconv_jax
from dynconv_jax import macs

# The convention of the published figures.
conv = functools.partial(macs.count_macs, convention='conv')


@functools.cache
def abstract_model(name, method='dense', num_classes=1000):
  model = nnx.eval_shape(
    lambda: dynconv_jax.create_model(
      name, method=method, num_classes=num_classes, rngs=nnx.Rngs(0)
    )
  )
  return nnx.view(model, deterministic=True, use_running_average=True)


def images(batch, height, width=None):
  size = (batch, height, width or height, 3)
  return jax.ShapeDtypeStruct(size, jnp.float32)


@pytest.mark.parametrize(
  'name,size,total',
  [
    ('resnet50', (224,), 4_087_136_256),
    ('resnet101', (224,), 7_799_357_440),
    ('cifar_resnet32', (32,), 69_124_096),
    ('resnet50', (175, 200), 3_018_278_912),
    ('resnet50', (256, 300), 6_378_766_336),
    ('resnet50', (250, 450), 9_601_661_376),
  ],
)
def test_published_totals(name, size, total):
  model = abstract_model(name)
  assert conv(model, images(1, *size)).total == total


def test_the_whole_batch_counts():
  counted = conv(abstract_model('cifar_resnet32'), images(3, 32))
  assert counted.total == 3 * 69_124_096


def test_published_totals_with_the_head():
  """torchvision's: 4.09 GMAC and 25,557,032 parameters."""
  counted = macs.count_macs(
    abstract_model('resnet50'), images(1, 224), convention='conv+linear'
  )
  assert macs.count_macs(abstract_model('resnet50'), images(1, 224)) == counted
  assert counted.total == 4_087_136_256 + 2048 * 1000
  assert counted.parameters == 25_557_032
  norms = 2 * 26_560
  layers = counted.by_layer.values()
  assert sum(layer.parameters for layer in layers) == 25_557_032 - norms
  # fvcore's activation count.
  assert counted.activations == 11_114_984


def test_resnet152_counts_in_a_second():
  model = abstract_model('resnet152')
  seconds = []
  for _ in range(3):
    # CPU time of this process, because others may share the machine.
    start = time.process_time()
    conv(model, images(1, 224))
    seconds.append(time.process_time() - start)
    if seconds[-1] < 1:
      return
  pytest.fail(f'it took {seconds} seconds')


@pytest.fixture(scope='module')
def dynconv101():
  model = abstract_model('resnet101', 'dynconv')
  graphdef, state = nnx.split(model)
  _, masks = jax.eval_shape(
    lambda state, x: nnx.merge(graphdef, state)(x), state, images(1, 224)
  )
  return conv(model, images(1, 224)), masks


def unmasked(counted, kind):
  """Returns the MACs of the stem, the shortcuts or the mask units."""
  return sum(
    layer.macs
    for name, layer in counted.by_layer.items()
    if name == kind or f'.{kind}.' in name
  )


def filled(masks, value):
  return jax.tree.map(
    lambda mask: np.full(mask.shape, value, np.float32), masks
  )


def test_mask_units_cost_what_was_published(dynconv101):
  counted, _ = dynconv101
  assert unmasked(counted, 'masker') == 71_819_055
  assert counted.total == 7_799_357_440 + 71_819_055


def test_masks_of_ones_and_zeros(dynconv101):
  counted, masks = dynconv101
  np.testing.assert_array_equal(
    counted.executed(filled(masks, 1)), [counted.total]
  )
  always = sum(
    unmasked(counted, kind) for kind in ('conv1', 'downsample', 'masker')
  )
  np.testing.assert_array_equal(counted.executed(filled(masks, 0)), [always])


def test_masks_by_the_models_own_table(dynconv101):
  counted, masks = dynconv101
  rng = np.random.default_rng(0)
  masks = jax.tree.map(
    lambda mask: np.float32(rng.random((2, *mask.shape[1:])) < 0.4), masks
  )
  dense = sum(mask.dense_macs() for mask in masks)
  own = sum(np.float64(mask.executed_macs()) for mask in masks)
  np.testing.assert_allclose(
    counted.executed(masks), counted.total - dense + own, rtol=1e-6
  )


def test_published_macs_at_the_realised_fraction(dynconv101):
  """DynConv's ResNet-101: 2997.18 MMAC, with 0.334 of the masked layers."""
  counted, masks = dynconv101
  dense = sum(mask.dense_macs() for mask in masks)
  parts = [
    unmasked(counted, kind) for kind in ('conv1', 'downsample', 'masker')
  ]
  assert [round(part / 1e9, 3) for part in parts] == [0.118, 0.360, 0.072]
  assert round(dense / 1e9, 3) == 7.322
  # The fraction was published with three digits.
  low, high = (sum(parts) + share * dense for share in (0.3335, 0.3345))
  assert low < 2_997_180_000 < high
  assert round((2_997_180_000 - sum(parts)) / dense, 3) == 0.334


def test_training_step_costs_three_forward_passes_less_one_of_the_stem():
  """No gradient with respect to images is computed."""
  graphdef, params, rest = nnx.split(abstract_model('resnet50'), nnx.Param, ...)

  def loss(params, images):
    logits, _ = nnx.merge(graphdef, params, rest)(images)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

  # Make the statistics constants, which abstract arrays cannot be.
  rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
  step = conv(jax.grad(loss), params, images(2, 224))
  forward = conv(loss, params, images(2, 224))
  stem = forward.by_layer['conv1'].macs
  assert step.total == 3 * forward.total - stem
  assert round(step.total / forward.total, 4) == 2.9711
  for name, layer in forward.by_layer.items():
    times = 2 if name == 'conv1' else 3
    assert step.by_layer[name].macs == times * layer.macs
    assert step.by_layer[name].parameters == layer.parameters


def dense(x, w, scale=1.0, mode='plain'):
  assert mode in ('plain', 'other')
  return x @ w * scale


def test_arguments_that_are_no_arrays_reach_the_function_as_given():
  x, w = np.ones((2, 3), np.float32), jax.ShapeDtypeStruct((3, 4), jnp.float32)
  count = functools.partial(macs.count_macs, convention='conv+linear')
  assert count(dense, x, w, 2.0, 'other').total == 24
  assert count(dense, x, kwargs={'w': w, 'mode': 'other'}).total == 24
  assert count(lambda b: b['x'] @ b['w'], {'x': x, 'w': w}).total == 24
  assert count(functools.partial(dense, mode='other'), x, w).total == 24


def test_functions_without_work_or_arrays_cost_nothing():
  assert macs.count_macs(lambda: None).total == 0
  assert macs.count_macs(lambda x: 'done', np.ones(3)).by_layer == {}


def test_nothing_is_run_or_allocated():
  huge = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
  before = len(jax.live_arrays())
  counted = macs.count_macs(
    lambda x: x @ jnp.ones((10**6, 10**6)), huge, convention='conv+linear'
  )
  assert counted.total == 10**18
  assert len(jax.live_arrays()) == before


@pytest.mark.parametrize(
  'f,args,message',
  [
    (
      dense,
      (jax.ShapeDtypeStruct((2, 3), jnp.float32), np.ones((4, 5))),
      r'dense cannot be traced with the arguments \(float32\[2, 3\],'
      r' float64\[4, 5\]\): dot_general',
    ),
    (
      lambda x: x if x.sum() > 0 else -x,
      (np.ones(3),),
      r'<lambda> cannot be traced with the arguments \(float64\[3\]\):'
      ' Attempted boolean conversion',
    ),
    (dense, (np.ones((2, 3)),), 'missing 1 required positional argument'),
    (
      dense,
      (jax.ShapeDtypeStruct((-1, 4), jnp.float32), np.ones((4, 6))),
      r'^sizes of arguments must be integers >= 0; got float32\[-1, 4\]$',
    ),
    (
      lambda given: given['x'],
      (
        {
          'x': jax.ShapeDtypeStruct(export.symbolic_shape('b, 4'), jnp.bfloat16)
        },
      ),
      r'^sizes of arguments must be integers >= 0; got bfloat16\[b, 4\]$',
    ),
  ],
)
def test_functions_that_cannot_be_traced_are_refused(f, args, message):
  with pytest.raises(ValueError, match=message):
    macs.count_macs(f, *args)


def test_models_refuse_arguments_of_wrong_shape():
  message = r'ResNet cannot be traced with the arguments \(float32\[3, 64, 64\]'
  with pytest.raises(ValueError, match=message):
    macs.count_macs(
      abstract_model('resnet18'), jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)
    )


def test_models_that_change_are_passed_as_arguments():
  norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='pass an NNX model as an argument'):
    macs.count_macs(lambda x: norm(x), np.ones((2, 4)))
  assert macs.count_macs(norm, np.ones((2, 4)), convention='flops').total


def test_conventions_are_checked():
  with pytest.raises(ValueError, match="convention must be one of .*'gmacs'"):
    macs.count_macs(dense, np.ones((2, 3)), np.ones((3, 4)), convention='gmacs')
  with pytest.raises(
    ValueError, match="'ptflops' charges norm, activation and pooling modules"
  ):
    macs.count_macs(
      dense, np.ones((2, 3)), np.ones((3, 4)), convention='ptflops'
    )


def test_f_must_be_callable():
  with pytest.raises(TypeError, match='a function or model; got ndarray'):
    macs.count_macs(np.ones(3))


def in_a_process(program):
  """Returns the output of a program."""
  run = subprocess.run(
    [sys.executable, '-c', program], check=True, capture_output=True, text=True
  )
  return run.stdout.strip()


def test_importing_the_counter_imports_no_training_stack():
  found = in_a_process(
    'import sys, dynconv_jax.macs, dynconv_jax.macs.jaxpr\n'
    "stack = 'flax optax orbax grain tensorflow_datasets torch onnx'.split()\n"
    'print([name for name in stack if name in sys.modules])'
  )
  assert found == '[]'


_COUNTS = {
  'torch': 'from torch import nn; count_macs(nn.Linear(3, 4), (2, 3))',
  'onnx': (
    'from onnx import parser; count_macs(parser.parse_model('
    '\'<ir_version: 8, opset_import: ["" : 17]>'
    " g (float[2, 3] x, float[3, 4] w) => (float[2, 4] y) {y = MatMul(x, w)}'))"
  ),
}


@pytest.mark.parametrize('framework', ['torch', 'onnx'])
def test_counting_other_frameworks_imports_no_jax(framework):
  pytest.importorskip(framework, reason=f'{framework} is not installed')
  found = in_a_process(
    f'import sys\nfrom dynconv_jax.macs.{framework} import count_macs\n'
    f'{_COUNTS[framework]}\n'
    "stack = 'jax jaxlib flax'.split()\n"
    'print([name for name in stack if name in sys.modules])'
  )
  assert found == '[]'


def test_the_counter_is_imported_in_a_moment():
  """Measured relative to its framework, as the best of several attempts."""
  program = (
    'import time, jax\nstart = time.process_time()\n'
    'from dynconv_jax.macs import count_macs\n'
    'print(time.process_time() - start)'
  )
  seconds = []
  for _ in range(3):
    seconds.append(float(in_a_process(program)))
    if seconds[-1] < 0.2:
      return
  pytest.fail(f'it took {seconds} seconds')
