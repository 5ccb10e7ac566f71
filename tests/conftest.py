"""Shared setup: keeps compiled programs and parses absl flags."""

import os
import shutil
import sys
import tempfile

import pytest
from absl import flags

# Folders whose tests compile a lot and compute little.
_COMPILING = (
  *('backends', 'benchmarks', 'cli', 'examples', 'interop', 'layers'),
  *('methods', 'models', 'sparse', 'training'),
)

# Selects XLA's older code generation for CPUs and does not split programs,
# which nearly halves the time to compile. `make train` and the programs that
# helpers/jax_processes starts use the defaults.
_QUICK = (
  '--xla_cpu_use_fusion_emitters=false',
  '--xla_cpu_parallel_codegen_split_count=1',
)


def pytest_configure(config):
  if not hasattr(config, 'workerinput'):
    _keep_compiled_programs(config)
    # Flags that are already there come last and win.
    os.environ['XLA_FLAGS'] = ' '.join(
      (*_QUICK, os.environ.get('XLA_FLAGS', ''))
    )
  # Needed once, by grain's workers and by the programs.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


def pytest_collection_modifyitems(items):
  """Runs files with slow tests first, so no process waits at the end."""
  slow = {item.path for item in items if item.get_closest_marker('slow')}
  items.sort(key=lambda item: item.path not in slow)


def _keep_compiled_programs(config):
  """Caches compiled programs for all tests and the programs they start."""
  folder = tempfile.mkdtemp(prefix='dynconv_jax_compiled_')
  config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
  os.environ |= {
    'JAX_COMPILATION_CACHE_DIR': folder,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Reduces XLA's optimization where compiling dominates the time.

  Fixtures of a module and the programs that its tests start do the same.
  """
  quick = item.path.parent.name in _COMPILING
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(int(quick))
  if 'jax' in sys.modules:
    sys.modules['jax'].config.update('jax_disable_most_optimizations', quick)
