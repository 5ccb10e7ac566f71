import sys

import pytest

from dynconv_jax import references


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package `its` on the path, with good and bad modules."""
  root = tmp_path / 'its'
  root.mkdir()
  (root / '__init__.py').touch()
  (root / 'good.py').write_text('VALUE = 3\nOTHER = "text"\n')
  (root / 'bad.py').write_text('import no_such_thing\n')
  (root / 'worse.py').write_text('1 / 0\n')
  monkeypatch.syspath_prepend(tmp_path)
  yield
  for name in [n for n in sys.modules if n.split('.')[0] == 'its']:
    del sys.modules[name]


def test_loads(package):
  assert references.load('its.good:VALUE', int, 'flag') == 3


@pytest.mark.parametrize(
  ('reference', 'message'),
  [
    ('its.good:', 'flag=its.good:: write package.module:NAME'),
    (':VALUE', 'flag=:VALUE: write package.module:NAME'),
    ('its/good.py:VALUE', 'its/good.py:VALUE: write package.module:NAME'),
    ('it.good:VALUE', 'there is no module it in the current folder'),
    ('its.god:VALUE', 'there is no module its.god in'),
    (
      'its.bad:VALUE',
      'importing its.bad fails: ModuleNotFoundError: No module named '
      "'no_such_thing'",
    ),
    ('its.worse:VALUE', 'importing its.worse fails: ZeroDivisionError: divis'),
    ('its.good:VALEU', 'its.good has no VALEU; of type int it has VALUE'),
    (
      'its.good:OTHER',
      'flag=its.good:OTHER must be of type int; got str; of type int it has '
      'VALUE',
    ),
  ],
)
def test_errors(package, reference, message):
  with pytest.raises(ValueError) as raised:
    references.load(reference, int, 'flag')
  assert message in str(raised.value)
