"""Tests that the documentation matches the code."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'dynconv_jax'
HELPERS = {'checks', 'distributed', 'extras', 'files', 'native', 'options'}
HELPERS |= {'references'}
PAGES = [*ROOT.glob('docs/**/*.md'), *ROOT.glob('results/**/*.md')]


def _allowed():
  """Returns the imports that architecture.md allows for each part."""
  page = (ROOT / 'docs/architecture.md').read_text()
  rows = re.findall(r'^\| `(\w+)` \|.*\|(.*)\|$', page, re.MULTILINE)
  return {part: set(re.findall(r'`(\w+)`', cell)) for part, cell in rows}


def _part(path):
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


def _imports(path):
  """Returns the parts of the package that a file imports."""
  modules = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      modules += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: a relative import'
      modules += [f'{node.module}.{alias.name}' for alias in node.names]
  return {m.split('.')[1] for m in modules if m.startswith('dynconv_jax.')}


def test_imports_point_where_the_architecture_says():
  allowed = _allowed()
  files = [p for p in PACKAGE.rglob('*.py') if p.parent != PACKAGE]
  files += [p for p in PACKAGE.glob('*.py') if p.stem != '__init__']
  # Every part needs a row, so that none goes unchecked.
  assert set(map(_part, files)) == set(allowed) | HELPERS
  wrong = []
  for path in files:
    part = _part(path)
    found = _imports(path) - {part} - HELPERS - allowed.get(part, set())
    if found:
      wrong.append(f'{path.relative_to(ROOT)} imports {", ".join(found)}')
  assert not wrong


def test_no_two_parts_may_import_each_other():
  allowed, order = _allowed(), []
  while left := set(allowed) - set(order):
    ready = [part for part in left if allowed[part] <= set(order)]
    assert ready, f'a cycle among {", ".join(sorted(left))}'
    order += ready


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  targets = re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text())
  assert [t for t in targets if not (page.parent / t).exists()] == []


def test_commands_name_programs_that_exist():
  missing = []
  for page in PAGES:
    for module in re.findall(r'python -m ([\w.]+)', page.read_text()):
      path = ROOT / f'{module.replace(".", "/")}.py'
      if module.split('.')[0] in ('experiments', 'benchmarks', 'examples'):
        missing += [] if path.exists() else [f'{page.name}: {module}']
  assert not missing


def test_the_site_has_every_page():
  settings = (ROOT / 'mkdocs.yml').read_text()
  navigation = settings.split('\nnav:\n')[1].split('\n\n')[0]
  listed = re.findall(r'([\w/]+\.(?:md|py))$', navigation, re.MULTILINE)
  docs = ROOT / 'docs'
  pages = [*docs.rglob('*.md'), *(docs / 'tutorials').glob('*.py')]
  expected = [p.relative_to(docs).as_posix() for p in pages]
  expected += [
    p.relative_to(ROOT).as_posix() for p in ROOT.glob('results/**/README.md')
  ]
  assert sorted(listed) == sorted(expected)


def test_the_reference_names_what_exists():
  for page in ROOT.glob('docs/reference/*.md'):
    for name in re.findall(r'^::: ([\w.]+)$', page.read_text(), re.MULTILINE):
      *parents, last = name.split('.')
      path = ROOT / '/'.join(name.split('.'))
      if not (path.with_suffix('.py').exists() or path.is_dir()):
        module = ROOT / '/'.join(parents)
        file = module.with_suffix('.py')
        file = file if file.exists() else module / '__init__.py'
        assert re.search(rf'\b{last}\b', file.read_text()), name
