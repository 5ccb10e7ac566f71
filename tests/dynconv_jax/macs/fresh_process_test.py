"""Tests that the count of a model is the same in every process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]

# Each defines `report`, with layers, notes or uncounted operations.
JAX = """
import jax
import jax.numpy as jnp
from flax import nnx
from dynconv_jax import create_model
from dynconv_jax.macs import count_macs

def network():
  return create_model('cifar_resnet8', num_classes=5, rngs=nnx.Rngs(0))

def run(model, images, x):
  model = nnx.view(model, deterministic=True, use_running_average=True)
  logits, _ = model(images)
  x = jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
  x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)
  return logits, jnp.einsum('ij,kl->il', x, x)

images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
matrix = jax.ShapeDtypeStruct((4, 4), jnp.float32)
report = count_macs(run, nnx.eval_shape(network), images, matrix)
"""
TORCH = """
import torch
from torch import nn
from dynconv_jax.macs.torch import count_macs

class Network(nn.Module):
  def __init__(self):
    super().__init__()
    self.stem = nn.Conv2d(3, 8, 3, 2)
    self.blocks = nn.ModuleDict({x: nn.Linear(8, 8) for x in 'abcdefgh'})
    self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    self.recurrent = nn.LSTM(8, 4, bidirectional=True)

  def forward(self, x):
    x = self.stem(x).flatten(2).transpose(1, 2)
    for block in self.blocks.values():
      x = block(x)
    x = self.recurrent(self.attention(x, x, x)[0])[0]
    return torch.linalg.eigvals(x[:, :8].float()), x[x > 0]

torch.manual_seed(0)
report = count_macs(Network(), torch.ones(1, 3, 15, 15))
"""
ONNX = """
import sys
from onnx import helper
sys.path.insert(0, sys.argv[1])
from onnx_models import model_of, ones
from dynconv_jax.macs.onnx import count_macs

weights = [ones(f'{name}.weight', 4, 4) for name in 'abcdefgh']
nodes = [
  helper.make_node('MatMul', [x, f'{x}.weight'], [f'{x}1'], name=x)
  for x in 'abcdefgh'
]
nodes += [
  helper.make_node('MatMul', ['a.weight', 'b.weight'], ['ab'], name='fixed'),
  helper.make_node('Sum', ['ab', *(f'{x}1' for x in 'abcdefgh')], ['sum']),
  helper.make_node('Own', ['sum'], ['own'], domain='own'),
  helper.make_node('MatMul', ['own', 'a.weight'], ['y']),
]
inputs = {name: (4, 4) for name in 'abcdefgh'}
report = count_macs(model_of(nodes, inputs, weights, domains=('own',)))
"""
PROGRAMS = {'flax': JAX, 'torch': TORCH, 'onnx': ONNX}


def counted(program, seed):
  """Returns the report of a fresh process, as JSON and as text."""
  program += '\nprint(report.to_json(), report, sep="\\n")'
  threads = {'PYTHONHASHSEED': str(seed), 'OMP_NUM_THREADS': str(seed)}
  return subprocess.run(
    [
      sys.executable,
      '-W',
      'ignore',
      '-c',
      program,
      str(ROOT / 'tests/helpers'),
    ],
    check=True,
    cwd=ROOT,
    env=os.environ | threads,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout


@pytest.mark.parametrize('framework', PROGRAMS)
def test_fresh_processes_agree(framework):
  pytest.importorskip(framework)
  first, second = (counted(PROGRAMS[framework], seed) for seed in (1, 2))
  document = json.loads(first.splitlines()[0])
  assert document['total'] > 0 and len(document['by_layer']) > 3
  assert document['uncounted'] or document['notes']
  assert first == second
