"""Tests of the ONNX front end of the MAC counter."""

import importlib
import pathlib
import subprocess
import sys
import warnings
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

onnx = pytest.importorskip('onnx', reason='onnx is not installed')

from onnx import TensorProto, helper  # noqa: E402
from onnx_models import (  # noqa: E402
  conv,
  graph_of,
  model_of,
  ones,
  scalar,
  value,
)

from dynconv_jax import macs  # noqa: E402
from dynconv_jax.macs import onnx_ops  # noqa: E402
from dynconv_jax.macs import report as report_lib  # noqa: E402
from dynconv_jax.macs.onnx import count_macs  # noqa: E402


class ControlFlowTest(parameterized.TestCase):
  def scan_model(self):
    step = graph_of(
      [
        helper.make_node('MatMul', ['h', 'w'], ['hw']),
        helper.make_node('Add', ['hw', 'x'], ['out'], 'sum'),
        helper.make_node('Identity', ['out'], ['seen']),
      ],
      [value('h', (2, 4)), value('x', (2, 4))],
      [value('out', (2, 4)), value('seen', (2, 4))],
    )
    node = helper.make_node(
      'Scan', ['start', 'xs'], ['y', 'ys'], 'loop', body=step, num_scan_inputs=1
    )
    return model_of(
      [node], {'start': (2, 4), 'xs': (7, 2, 4)}, [ones('w', 4, 4)]
    )

  def test_scan_counts_each_step(self):
    report = count_macs(self.scan_model(), convention='flops')
    macs = {name: layer.macs for name, layer in report.by_layer.items()}
    self.assertEqual(macs, {'loop.MatMul_0': 7 * 2 * 2 * 16, 'sum': 7 * 2 * 4})
    self.assertEqual(report.parameters, 16)

  def if_model(self):
    def branch(name, count):
      names = ['x', *(f'{name}{i}' for i in range(count))]
      nodes = [
        helper.make_node('MatMul', [a, 'w'], [b], b)
        for a, b in zip(names, names[1:], strict=False)
      ]
      return graph_of(nodes, [], [value(names[-1], (2, 4))])

    node = helper.make_node(
      'If',
      ['flag'],
      ['y'],
      'choice',
      then_branch=branch('then', 1),
      else_branch=branch('else', 2),
    )
    graph = helper.make_graph(
      [node],
      'graph',
      [value('flag', (), TensorProto.BOOL), value('x', (2, 4))],
      [value('y', (2, 4))],
      [ones('w', 4, 4)],
    )
    return helper.make_model(
      graph, opset_imports=[helper.make_opsetid('', 22)], ir_version=10
    )

  @parameterized.parameters(
    ('max', ['else0', 'else1']),
    ('min', ['then0']),
    ('then', ['then0']),
    ('else', ['else0', 'else1']),
  )
  def test_the_branch_of_an_if_that_counts(self, branch, layers):
    report = count_macs(
      self.if_model(), convention='conv+linear', branch=branch
    )
    self.assertEqual(list(report.by_layer), layers)
    self.assertEqual(report.total, len(layers) * 2 * 16)

  def loop_model(self, steps, stops=False):
    nodes = [helper.make_node('MatMul', ['h', 'w'], ['out'], 'product')]
    if stops:
      nodes += [
        helper.make_node('ReduceMax', ['out'], ['most_of_it'], keepdims=0),
        helper.make_node('Cast', ['most_of_it'], ['on'], to=TensorProto.BOOL),
      ]
    else:
      nodes.append(helper.make_node('Identity', ['was_on'], ['on']))
    step = graph_of(
      nodes,
      [
        value('i', (), TensorProto.INT64),
        value('was_on', (), TensorProto.BOOL),
        value('h', (2, 4)),
      ],
      [value('on', (), TensorProto.BOOL), value('out', (2, 4))],
    )
    node = helper.make_node(
      'Loop', ['most' if steps else '', '', 'x'], ['y'], 'loop', body=step
    )
    weights = [ones('w', 4, 4)] + ([scalar('most', steps)] if steps else [])
    return model_of([node], {'x': (2, 4)}, weights)

  def test_loop_of_a_fixed_number_of_steps(self):
    report = count_macs(self.loop_model(9), convention='conv+linear')
    self.assertEqual(report.total, 9 * 2 * 16)

  @parameterized.parameters((None, False), (9, True))
  def test_loop_of_unknown_length_needs_a_trip_count(self, steps, stops):
    model = self.loop_model(steps, stops)
    with self.assertWarnsRegex(
      report_lib.UncountedWarning,
      'Loop in loop is not counted: its trip count is not in the model',
    ):
      report = count_macs(model, convention='conv+linear')
    self.assertEqual(report.total, 0)
    self.assertEqual([tuple(e) for e in report.uncounted], [('Loop', 'loop')])
    for trip_counts in (3, {'loop': 3}):
      report = count_macs(
        model, convention='conv+linear', trip_counts=trip_counts
      )
      self.assertEqual(report.total, 3 * 2 * 16)
      self.assertEmpty(report.uncounted)
    self.assertEqual(count_macs(model, convention='conv').total, 0)

  def loop(self, nodes, inputs, start, weights, **options):
    """A loop whose state is `h`, and on which nothing else depends."""
    state = [
      value('i', (), TensorProto.INT64),
      value('was', (), TensorProto.BOOL),
    ]
    step = graph_of(
      nodes,
      [*state, *(value(name) for name in start)],
      [value('on', (), TensorProto.BOOL), *(value(f'{k}2') for k in start)],
    )
    names = [options.get('most', ''), '', *start.values()]
    outputs = ['y', *(f'{k}3' for k in list(start)[1:])]
    node = helper.make_node('Loop', names, outputs, 'loop', body=step)
    before = options.get('before', [])
    return model_of([*before, node], inputs, weights)

  def test_loop_over_the_length_of_its_input(self):
    nodes = [
      helper.make_node('MatMul', ['h', 'w'], ['h2'], 'product'),
      helper.make_node('Identity', ['was'], ['on']),
    ]
    before = [
      helper.make_node('Shape', ['x'], ['shape']),
      helper.make_node('Gather', ['shape', 'zero'], ['length']),
    ]
    weights = [ones('w', 4, 4), scalar('zero', 0)]
    model = self.loop(
      nodes, {'x': (7, 2, 4)}, {'h': 'x'}, weights, most='length', before=before
    )
    report = count_macs(model)
    self.assertEqual(report.total, 7 * 7 * 2 * 16)
    self.assertEqual(report.by_layer['product'].output_shape, (7, 2, 4))

  def test_loop_whose_state_grows(self):
    nodes = [
      helper.make_node('Concat', ['h', 'x'], ['h2'], axis=0),
      helper.make_node('MatMul', ['h2', 'w'], ['p'], 'product'),
      helper.make_node('Identity', ['was'], ['on']),
    ]
    weights = [ones('w', 4, 5), scalar('most', 3)]
    model = self.loop(nodes, {'x': (2, 4)}, {'h': 'x'}, weights, most='most')
    self.assertEqual(count_macs(model).total, (4 + 6 + 8) * 20)

  def test_loop_whose_state_grows_for_an_unknown_number_of_steps(self):
    nodes = [
      helper.make_node('Concat', ['h', 'x'], ['h2'], axis=0),
      helper.make_node('MatMul', ['h2', 'w'], ['p'], 'product'),
      helper.make_node('ReduceMax', ['p'], ['best'], keepdims=0),
      helper.make_node('Cast', ['best'], ['on'], to=TensorProto.BOOL),
    ]
    model = self.loop(nodes, {'x': (2, 4)}, {'h': 'x'}, [ones('w', 4, 5)])
    with self.assertWarnsRegex(
      report_lib.UncountedWarning, 'its trip count is not in the model'
    ):
      self.assertEqual(count_macs(model).total, 0)
    report = count_macs(model, trip_counts=3)
    self.assertEqual(report.total, (4 + 6 + 8) * 20)

  def test_loop_that_counts_to_a_constant(self):
    nodes = [
      helper.make_node('MatMul', ['h', 'w'], ['h2'], 'product'),
      helper.make_node('Add', ['n', 'two'], ['n2']),
      helper.make_node('Less', ['n2', 'ten'], ['on']),
    ]
    weights = [
      ones('w', 4, 4),
      scalar('two', 2),
      scalar('ten', 10),
      scalar('start', 1),
    ]
    model = self.loop(nodes, {'x': (2, 4)}, {'h': 'x', 'n': 'start'}, weights)
    # 1, 3, 5, 7, 9.
    self.assertEqual(count_macs(model).total, 5 * 2 * 16)

  def test_loop_that_reads_less_at_each_step(self):
    nodes = [
      helper.make_node('Unsqueeze', ['i', 'axis'], ['first']),
      helper.make_node('Slice', ['x', 'first', 'end'], ['rows']),
      helper.make_node('MatMul', ['rows', 'w'], ['p'], 'product'),
      helper.make_node('Identity', ['h'], ['h2']),
      helper.make_node('Identity', ['was'], ['on']),
    ]
    weights = [
      ones('w', 4, 4),
      scalar('axis', [0]),
      scalar('end', [9]),
      scalar('most', 3),
    ]
    model = self.loop(nodes, {'x': (5, 4)}, {'h': 'x'}, weights, most='most')
    self.assertEqual(count_macs(model).total, (5 + 4 + 3) * 16)

  def test_loop_on_constants_counts_however_it_is_counted(self):
    nodes = [
      helper.make_node('MatMul', ['h', 'w'], ['h2'], 'product'),
      helper.make_node('Add', ['n', 'one'], ['n2']),
      helper.make_node('Less', ['n2', 'five'], ['on']),
    ]
    weights = [
      ones('w', 4, 4),
      ones('first', 2, 4),
      scalar('one', 1),
      scalar('five', 5),
      scalar('zero', 0),
    ]
    model = self.loop(
      nodes, {'x': (2, 4)}, {'h': 'first', 'n': 'zero'}, weights
    )
    self.assertEqual(count_macs(model).total, 5 * 2 * 16)

  def test_loop_that_never_runs(self):
    nodes = [
      helper.make_node('MatMul', ['h', 'w'], ['h2'], 'product'),
      helper.make_node('Identity', ['was'], ['on']),
    ]
    weights = [ones('w', 4, 4), scalar('most', 0)]
    model = self.loop(nodes, {'x': (2, 4)}, {'h': 'x'}, weights, most='most')
    self.assertEqual(count_macs(model).total, 0)

  def test_scan_of_opset_8_has_a_batch(self):
    step = graph_of(
      [
        helper.make_node('MatMul', ['h', 'w'], ['hw'], 'product'),
        helper.make_node('Add', ['hw', 'x'], ['out'], 'sum'),
      ],
      [value('h', (2, 4)), value('x', (2, 4))],
      [value('out', (2, 4))],
    )
    node = helper.make_node(
      'Scan', ['', 'start', 'xs'], ['y'], 'loop', body=step, num_scan_inputs=1
    )
    model = model_of(
      [node],
      {'start': (3, 2, 4), 'xs': (3, 7, 2, 4)},
      [ones('w', 4, 4)],
      opset=8,
    )
    report = count_macs(model, convention='flops')
    macs = {name: layer.macs for name, layer in report.by_layer.items()}
    self.assertEqual(macs, {'product': 21 * 2 * 2 * 16, 'sum': 21 * 8})

  def test_trip_counts_name_loops(self):
    with self.assertRaisesRegex(
      ValueError,
      r"must name loops of the program; got \['decoder'\], and the loops are"
      r" \['loop'\]",
    ):
      count_macs(self.loop_model(None), trip_counts={'decoder': 3})


class ModelTest(absltest.TestCase):
  def symbolic(self):
    return conv('Conv', ('batch', 4, 'side', None), (6, 4, 3, 3))

  def test_dimensions_are_given_by_name(self):
    sizes = {'batch': 2, 'side': 7, 'x[3]': 9}
    report = count_macs(self.symbolic(), dimensions=sizes)
    self.assertEqual(report.total, 2 * 6 * 5 * 7 * 4 * 9)

  def test_noted_shapes_do_not_stand_in_the_way(self):
    nodes = [
      helper.make_node('Relu', ['x'], ['z']),
      helper.make_node('MatMul', ['z', 'w'], ['y']),
    ]
    model = model_of(nodes, {'x': ('n', 4)}, [ones('w', 4, 3)])
    model.graph.value_info.append(value('z', ('n', 4)))
    report = count_macs(model, dimensions={'n': 5}, convention='conv+linear')
    self.assertEqual(report.total, 5 * 12)
    self.assertEqual(
      model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, 'n'
    )

  def test_file_without_its_external_weights(self):
    model = conv('Conv', (1, 4, 7, 9), (64, 4, 3, 3))
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / 'model.onnx'
    onnx.save(
      model,
      path,
      save_as_external_data=True,
      location='weights.bin',
      size_threshold=0,
    )
    (folder / 'weights.bin').unlink()
    for name in (path, str(path)):
      self.assertEqual(count_macs(name).total, 64 * 35 * 36)

  def test_local_functions_count(self):
    function = helper.make_function(
      'local',
      'Twice',
      ['a', 'w'],
      ['c'],
      [
        helper.make_node('MatMul', ['a', 'w'], ['b']),
        helper.make_node('MatMul', ['b', 'w'], ['c']),
      ],
      [helper.make_opsetid('', 22)],
    )
    model = model_of(
      [helper.make_node('Twice', ['x', 'w'], ['y'], domain='local')],
      {'x': (2, 4)},
      [ones('w', 4, 4)],
    )
    model.opset_import.append(helper.make_opsetid('local', 1))
    model.functions.append(function)
    report = count_macs(model, convention='conv+linear')
    self.assertEqual(report.total, 2 * 2 * 16)
    # A sparse weight is not among the initializers.
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(
      helper.make_sparse_tensor(
        helper.make_tensor('w', TensorProto.FLOAT, [1], [1.0]),
        helper.make_tensor('indices', TensorProto.INT64, [1], [3]),
        [4, 4],
      )
    )
    report = count_macs(model, convention='conv+linear')
    self.assertEqual(report.total, 2 * 2 * 16)

  def test_names_of_exporters(self):
    nodes = [
      helper.make_node('Relu', ['x'], ['a'], '/layer1/layer1.0/relu/Relu'),
      helper.make_node('Relu', ['a'], ['b'], 'own name'),
      helper.make_node('Relu', ['b'], ['c'], 'node_relu_1'),
      helper.make_node('Relu', ['c'], ['d']),
      helper.make_node('Gemm', ['d', 'head.fc.weight'], ['y'], 'node_gemm'),
    ]
    # A node that no module recorded has only its own name.
    scopes = {2: ['', 'layer2', 'layer2.1', 'relu_1'], 3: ['relu_2']}
    for index, names in scopes.items():
      nodes[index].metadata_props.add(
        key='pkg.torch.onnx.name_scopes', value=str(names)
      )
    model = model_of(nodes, {'x': (2, 4)}, [ones('head.fc.weight', 4, 3)])
    self.assertEqual(
      list(count_macs(model, convention='flops').by_layer),
      ['layer1.0.relu', 'own name', 'layer2.1', 'Relu_3', 'head.fc'],
    )


class ExportedTest(absltest.TestCase):
  def test_by_tracing(self):
    self.check_exported_counts_as_in_pytorch(dynamo=False)

  @pytest.mark.slow
  def test_by_dynamo(self):
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    self.check_exported_counts_as_in_pytorch(dynamo=True)

  def check_exported_counts_as_in_pytorch(self, dynamo):
    torch = pytest.importorskip('torch', reason='PyTorch is not installed')
    from benchmarks import compare_counters
    from dynconv_jax.macs.torch import count_macs as count_torch_macs

    module = torch.nn.Sequential(
      compare_counters.Transformer(8, 2, 1), compare_counters.Recurrent(8, 6)
    ).eval()
    path = pathlib.Path(self.create_tempdir().full_path) / 'model.onnx'
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      torch.onnx.export(
        module, (torch.zeros(1, 5, 8),), path, dynamo=dynamo, verbose=False
      )
    self.assertEqual(
      count_macs(path, convention='conv+linear').total,
      count_torch_macs(module, (1, 5, 8), convention='conv+linear').total,
    )


class UncountedTest(absltest.TestCase):
  def test_unknown_operators_warn_and_are_noted(self):
    nodes = [
      helper.make_node('Fused', ['x'], ['f'], 'own', domain='com.example'),
      helper.make_node('NonZero', ['x'], ['n'], 'positions'),
      helper.make_node('Cast', ['n'], ['m'], to=TensorProto.FLOAT),
      helper.make_node('Neg', ['m'], ['y'], 'minus'),
    ]
    model = model_of(nodes, {'x': (2, 3, 3)}, domains=['com.example'])
    with pytest.warns(report_lib.UncountedWarning) as caught:
      report = count_macs(model, convention='flops')
    self.assertEqual(
      [str(warning.message) for warning in caught],
      [
        'Fused in own is not counted: it is unknown in the domain com.example',
        "Neg in minus is not counted: the shapes of ['m', 'y'] depend on"
        ' tensor values (NonZero in positions)',
      ],
    )
    self.assertEqual(
      [tuple(entry) for entry in report.uncounted],
      [('Fused', 'own'), ('Neg', 'minus')],
    )


class RegisterTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(onnx_ops._REGISTERED))

  def model(self):
    nodes = [
      helper.make_node(
        'Gram', ['x', ''], ['g'], 'gram', domain='com.example', scale=3
      ),
      helper.make_node('MatMul', ['g', 'w'], ['y'], 'product'),
    ]
    return model_of(
      nodes, {'x': (6, 5)}, [ones('w', 6, 2)], domains=['com.example']
    )

  def test_formula_of_a_user(self):
    seen = []

    @macs.register('com.example::Gram', 'onnx')
    def gram(operation):
      seen.append(operation)
      rows, inner = operation.inputs[0].shape
      return macs.formulas.matmul(rows, inner, rows)

    with pytest.warns(
      report_lib.UncountedWarning, match='MatMul in product .* Gram in gram'
    ):
      report = count_macs(self.model())
    self.assertEqual(report.total, 6 * 5 * 6)
    (operation,) = seen
    self.assertEqual(operation.name, 'com.example::Gram')
    self.assertEqual(operation.params, {'scale': 3})
    self.assertEqual(operation.inputs[0].dtype, 'float32')
    self.assertIsNone(operation.inputs[1])
    self.assertIsNone(operation.outputs[0].shape)
    del gram

  def test_shapes_of_a_user(self):
    @onnx_ops.register_onnx(
      'com.example::Gram', outputs=lambda op: [(op.inputs[0].shape[0],) * 2]
    )
    def gram(operation):
      rows, columns = operation.outputs[0].shape
      return macs.formulas.matmul(rows, operation.inputs[0].shape[1], columns)

    self.assertEqual(count_macs(self.model()).total, 6 * 5 * 6 + 6 * 6 * 2)
    del gram

  def test_a_formula_of_a_user_goes_before_ours(self):
    macs.register('Relu', 'onnx')(lambda op: macs.formulas.elementwise(1000))
    macs.register('com.microsoft::FusedMatMul', 'onnx')(
      lambda op: macs.formulas.matmul(1, 7, 1)
    )
    nodes = [
      helper.make_node('Relu', ['x'], ['z']),
      helper.make_node(
        'FusedMatMul', ['z', 'w'], ['y'], domain='com.microsoft'
      ),
      helper.make_node('Neg', ['y'], ['minus']),
    ]
    model = model_of(
      nodes, {'x': (2, 4)}, [ones('w', 4, 3)], domains=['com.microsoft']
    )
    self.assertEqual(count_macs(model, convention='flops').total, 1000 + 14 + 6)

  def test_names_and_results_are_checked(self):
    for name in ('', 'a::b::c', 'a:b', '::Relu'):
      with self.assertRaisesRegex(ValueError, 'name must be'):
        macs.register(name, 'onnx')
    macs.register('Relu', 'onnx')(lambda op: 3)
    model = model_of([helper.make_node('Relu', ['x'], ['y'])], {'x': (2,)})
    with self.assertRaisesRegex(TypeError, "'Relu' must return a macs.Work"):
      count_macs(model)


class ImportTest(absltest.TestCase):
  def test_counting_imports_neither_jax_nor_torch(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'model.onnx'
    onnx.save(conv('Conv', (1, 4, 7, 9), (6, 4, 3, 3)), path)
    code = (
      'import sys; from dynconv_jax.macs.onnx import count_macs;'
      f' print(count_macs({str(path)!r}).total);'
      " assert not {'jax', 'flax', 'torch'} & sys.modules.keys()"
    )
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True
    )
    self.assertEqual((done.returncode, done.stderr), (0, ''))
    self.assertEqual(int(done.stdout), 6 * 35 * 36)


class ErrorTest(parameterized.TestCase):
  def write(self, content):
    return self.create_tempfile('model.onnx', content).full_path

  def test_missing_file(self):
    with self.assertRaisesRegex(FileNotFoundError, 'nowhere.onnx does not'):
      count_macs('nowhere.onnx')

  def test_damaged_files(self):
    whole = conv('Conv', (1, 4, 7, 9), (6, 4, 3, 3)).SerializeToString()
    for content in (b'', b'not a model', whole[: len(whole) // 2]):
      path = self.write(content)
      with self.assertRaisesRegex(
        ValueError, r'model\.onnx is damaged or not an ONNX file'
      ):
        count_macs(path)

  def test_not_a_model(self):
    with self.assertRaisesRegex(ValueError, 'file name or an onnx.ModelProto'):
      count_macs(3)

  def test_model_that_does_not_fit_together(self):
    model = conv('Conv', (1, 4, 7, 9), (6, 5, 3, 3))
    model.graph.node[0].input[0] = 'absent'
    with self.assertRaisesRegex(ValueError, 'the model is damaged, or does'):
      count_macs(model)
    nodes = [helper.make_node('MatMul', ['x', 'w'], ['y'])]
    model = model_of(nodes, {'x': (2, 5)}, [ones('w', 4, 3)])
    with self.assertRaisesRegex(ValueError, 'the model is damaged, or does'):
      count_macs(model)

  def test_unknown_dimensions(self):
    model = conv('Conv', ('batch', 4, 7, None), (6, 4, 3, 3))
    with self.assertRaisesRegex(
      ValueError,
      r"unknown dimensions \['batch', 'x\[3\]'\]: .*"
      r"dimensions=\{'batch': \.\.\., 'x\[3\]': \.\.\.\}",
    ):
      count_macs(model)
    with self.assertRaisesRegex(ValueError, r"unknown dimensions \['x\[3\]'\]"):
      count_macs(model, dimensions={'batch': 1})
    with self.assertRaisesRegex(ValueError, r"no dimensions \['depth'\]"):
      count_macs(model, dimensions={'batch': 1, 'x[3]': 5, 'depth': 2})

  def test_input_without_a_shape(self):
    with self.assertRaisesRegex(ValueError, "the input 'x' has no shape"):
      count_macs(
        model_of([helper.make_node('Relu', ['x'], ['y'])], {'x': None})
      )

  @parameterized.parameters(0, -1, 2.5)
  def test_sizes_that_are_none(self, size):
    model = conv('Conv', ('batch', 4, 7, 9), (6, 4, 3, 3))
    with self.assertRaisesRegex(
      ValueError, f"'batch' must be a positive int; got {size}"
    ):
      count_macs(model, dimensions={'batch': size})

  def test_unknown_branch_and_trip_counts(self):
    model = conv('Conv', (1, 4, 7, 9), (6, 4, 3, 3))
    with self.assertRaisesRegex(ValueError, "'then' or 'else'; got 'first'"):
      count_macs(model, branch='first')
    for trips in (-1, {'loop': 2.5}):
      with self.assertRaisesRegex(ValueError, 'must be integers >= 0; got'):
        count_macs(model, trip_counts=trips)

  def test_unknown_convention(self):
    with self.assertRaisesRegex(ValueError, "one of .*'conv'.*; got 'macs'"):
      count_macs(conv('Conv', (1, 4, 7, 9), (6, 4, 3, 3)), convention='macs')

  def test_without_onnx(self):
    with (
      mock.patch.dict(sys.modules, {'onnx': None}),
      self.assertRaisesRegex(ImportError, r"pip install 'dynconv-jax\[onnx\]'"),
    ):
      sys.modules.pop('dynconv_jax.macs.onnx')
      importlib.import_module('dynconv_jax.macs.onnx')


if __name__ == '__main__':
  absltest.main()
