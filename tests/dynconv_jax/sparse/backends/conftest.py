"""Stand-ins for a GPU: Triton's interpreter and the platform name."""

from unittest import mock

import jax
import pytest
import triton_cases

from dynconv_jax.sparse.backends import triton, triton_launch


@pytest.fixture(scope='session')
def interpreter():
  triton_cases.need('triton', 'torch')
  import triton_interpreter

  with triton_interpreter.Interpreter() as launch:
    yield launch


@pytest.fixture
def interpreted(interpreter):
  # Blocks that are too wide for a fused kernel are slow.
  widths = dict.fromkeys(triton.FUSED_WIDTH, 40)
  with (
    mock.patch.object(triton_launch, 'launch', interpreter),
    mock.patch.dict(triton.FUSED_WIDTH, widths),
  ):
    yield


@pytest.fixture
def as_on_gpu():
  """Decisions that depend on the kind of backend are made as on a GPU."""
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
    yield
