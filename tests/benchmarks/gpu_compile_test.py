"""Tests of compiling for a GPU that is not present."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import hlo

HLO = """HloModule jit_forward

%fused (p: f32[2]) -> f32[2] {
  ROOT %copy.9 = f32[2]{0} copy(%p)
}

ENTRY %main (x: f32[2]) -> (f32[2], f32[2]) {
  %x = f32[2]{0} parameter(0)
  %call.1 = (f32[2]{0}, s32[1]{0}) custom-call(%x), \
custom_call_target="triton_kernel_call_ffi", output={{}}
  %get = f32[2]{0} get-tuple-element(%call.1), index=0
  %copy.1 = f32[2]{0} copy(%get)
  %copy.2 = s32[0,3]{1,0} copy(%empty)
  %fusion = f32[2]{0} fusion(%copy.1), kind=kLoop, calls=%fused
  ROOT %tuple = (f32[2]{0}, f32[2]{0}) tuple(%fusion, %copy.1)
}
"""
LOG = (
  'Creating command buffer thunk with the following thunks: call.1, copy.2, '
  'fusion\n'
)


def test_what_is_launched_outside_of_graphs_is_told():
  assert hlo.describe(HLO, LOG) == {
    'command_buffers': 1,
    'recorded': 3,
    'outside': ['copy.1'],
    'copies': ['f32[2]{0}'],
    'kernels': 1,
  }
  nothing = hlo.describe(HLO, '')
  assert nothing['outside'] == ['call.1', 'copy.1', 'copy.2', 'fusion']


PLUGIN = os.environ.get('DYNCONV_CUDA_PLUGIN', '')
# Blocks of every kind, with few channels.
SMALL = ('--width_multiplier=0.25', '--image_size=64', '--batch_size=2')


@pytest.mark.slow
@pytest.mark.skipif(
  not PLUGIN, reason="DYNCONV_CUDA_PLUGIN does not name JAX's CUDA plugin"
)
@pytest.mark.parametrize(
  'arguments,graphs,kernels',
  (
    # The stem; per block (16), one for the mask unit and two for the branch.
    (('--mode=sparse',), 1, 1 + 16 * 3),
    # Per gated block (10), one for the mask unit and two for the branch. Triton
    # has no kernels for the 8 channels of a narrower network.
    (
      ('--mode=sparse', '--model=mobilenet_v2', '--width_multiplier=1'),
      *(1, 10 * 3),
    ),
    (('--mode=dense', '--method=dense'), 1, 0),
    (('--mode=dense', '--method=dense', '--noconvolution_graphs'), 0, 0),
  ),
)
def test_a_network_is_one_cuda_graph(arguments, graphs, kernels):
  """XLA compiles it for an H200; a dense network only if told to."""
  if '--mode=sparse' in arguments:
    pytest.importorskip('triton', reason='needs triton')
  command = [sys.executable, '-m', 'benchmarks.gpu_compile']
  command += [f'--plugin_dir={PLUGIN}', *SMALL, *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  assert not done.returncode, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['command_buffers'] == graphs
  assert not found['copies']
  if graphs:
    assert not found['outside']
    assert found['kernels'] >= kernels
  else:  # The default, like PyTorch without graphs.
    assert sum('conv' in name for name in found['outside']) > 50
