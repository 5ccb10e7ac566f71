"""Tests of networks as StableHLO, run with JAX only in another process."""

import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from jax import lax

from dynconv_jax import create_model
from dynconv_jax.sparse.stablehlo import export_stablehlo

pytest.importorskip('flatbuffers', reason='pip install dynconv_jax[stablehlo]')
pytest.importorskip('onnxruntime', reason='pip install dynconv_jax[test]')

from onnx_export import randomize, run  # noqa: E402

# Needed by the file: neither this package nor Flax.
_RUN = """
import sys, jax, jax.export, numpy as np
with open(sys.argv[1], 'rb') as f:
  network = jax.export.deserialize(bytearray(f.read()))
images = np.load(sys.argv[2])
np.savez(sys.argv[3], *network.call(images))
assert not {'flax', 'dynconv_jax'} & set(sys.modules)
"""


@pytest.mark.parametrize(
  'name, method, batch_size',
  [
    ('cifar_resnet8', 'dynconv', None),
    ('cifar_resnet8', 'dense', 2),
    pytest.param('efficientnet_lite0', 'dynconv', None, marks=pytest.mark.slow),
  ],
)
def test_jax_alone_gives_the_same_logits(name, method, batch_size, tmp_path):
  model = randomize(
    create_model(
      name,
      method=method,
      num_classes=5,
      width_multiplier=0.5,
      rngs=nnx.Rngs(0),
    )
  )
  size = (64, 70)
  exported = export_stablehlo(model, size, batch_size=batch_size)
  assert exported.platforms == ('cpu', 'cuda')
  file, images, out = (
    tmp_path / name for name in ('network', 'images.npy', 'out.npz')
  )
  file.write_bytes(exported.serialize())
  x = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
  np.save(images, x)
  command = [sys.executable, '-c', _RUN, file, images, out]
  subprocess.run(command, check=True, cwd=tmp_path)
  logits, *density = np.load(out).values()
  expected, masks = run(model, x)
  scale = np.abs(expected).max()
  assert np.ptp(expected) > 1e-3
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
  assert len(density) == bool(masks)
  for got in density:
    shares = np.stack([mask.density() for mask in masks], 1)
    assert 0 < shares.mean() < 1
    np.testing.assert_allclose(got, shares, rtol=1e-6)


def test_a_convolution_of_your_own_is_kept():
  def halved(x, kernel, *args, **kwargs):
    return lax.conv_general_dilated(x, kernel / 2, *args, **kwargs)

  model = nnx.Conv(3, 4, (3, 3), conv_general_dilated=halved, rngs=nnx.Rngs(0))
  (got,) = export_stablehlo(model, (5, 6)).call(np.ones((2, 5, 6, 3), 'f4'))
  np.testing.assert_allclose(
    got, model(np.ones((2, 5, 6, 3), 'f4')), rtol=1e-6, atol=1e-6
  )


def test_what_is_refused():
  training = create_model('cifar_resnet8', rngs=nnx.Rngs(0))
  model = nnx.view(training, deterministic=True, use_running_average=True)
  allowed = "unknown platform 'gpu' .*allowed: cpu, cuda, rocm, tpu"
  with pytest.raises(ValueError, match=allowed):
    export_stablehlo(model, (32, 32), platforms=['gpu'])
  with pytest.raises(ValueError, match='platforms must be one or more'):
    export_stablehlo(model, (32, 32), platforms=())
  with pytest.raises(ValueError, match='image_size .*height, width.* got 32'):
    export_stablehlo(model, 32)
  with pytest.raises(ValueError, match='batch_size must be .* got 0'):
    export_stablehlo(model, (32, 32), batch_size=0)
  with pytest.raises(ValueError, match='evaluation view'):
    export_stablehlo(training, (32, 32))
