"""Makes the site show what a Git host shows: links that leave docs/, formulas.

`results/` joins the site as it is. Any other file or folder of the repository
that a page links to gets a page of its own below `source/`. Formulas become
MathML, which needs no script and no server but the site's own.
"""

from __future__ import annotations

import html
import logging
import pathlib
import posixpath
import re

from latex2mathml import converter
from mkdocs.structure.files import File

_log = logging.getLogger('mkdocs.hooks')
ROOT = pathlib.Path(__file__).parents[1]
_LINK = re.compile(r'(\]\()(?!\w+:|/|#)([^)\s#]+)(#[^)\s]*)?(\))')
_FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
_LANGUAGES = {'.py': 'python', '.cc': 'cpp', '.h': 'cpp', '.sh': 'bash'}


def on_files(files, config):
  """Adds results/ and a page for each source file that a page links to."""
  for path in sorted((ROOT / 'results').rglob('*')):
    if path.suffix in ('.md', '.png', '.svg', '.json', '.csv'):
      name = path.relative_to(ROOT).as_posix()
      files.append(File.generated(config, name, abs_src_path=str(path)))
  linked = set()
  for file in files.documentation_pages():
    if file.src_uri.endswith('.md'):
      text = pathlib.Path(file.abs_src_path).read_text()
      linked |= {_resolve(m[2], file.src_uri) for m in _LINK.finditer(text)}
  for name in sorted(linked):
    uri = _site_uri(name)
    if (ROOT / name).exists() and uri.startswith('source/'):
      files.append(File.generated(config, uri, content=_source_page(name)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Rewrites links that leave docs/."""
  del config, files

  def rewrite(match):
    name = _resolve(match[2], page.file.src_uri)
    if not (ROOT / name).exists():
      return match[0]  # MkDocs warns of it, or it is code.
    uri = _site_uri(name)
    uri = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')
    return f'{match[1]}{uri}{match[3] or ""}{match[4]}'

  return _LINK.sub(rewrite, markdown)


def on_page_content(content, page, config, files):
  """Replaces LaTeX by MathML."""
  del config, files

  def convert(match):
    display = 'block' if match[1] == 'div' else 'inline'
    formula = converter.convert(html.unescape(match[2]), display=display)
    if '\\' in formula:  # A command that the converter does not know.
      _log.warning('%s: cannot convert %s', page.file.src_uri, match[2])
    return formula

  return _FORMULA.sub(convert, content)


def _resolve(link: str, uri: str) -> str:
  """Returns the path in the repository of what a page of the site links to."""
  here = uri if uri.startswith('results/') else f'docs/{uri}'
  return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _site_uri(name: str) -> str:
  """Returns the path in the site of a path in the repository."""
  if name.startswith('docs/'):
    return name.removeprefix('docs/')
  path = ROOT / name
  shown = path.suffix in ('.flags', '.sh') or not path.is_file()
  if name.startswith('results/') and not shown:
    return name
  return f'source/{name}.md'


def _source_page(name: str) -> str:
  """Returns a page that shows a file, or lists a folder."""
  path = ROOT / name
  head = f'---\nsearch:\n  exclude: true\n---\n# `{name}`\n\n'
  if path.is_dir():
    return head + '\n'.join(f'- `{p.name}`' for p in sorted(path.iterdir()))
  language = _LANGUAGES.get(path.suffix, 'text')
  return f'{head}````{language}\n{path.read_text()}\n````\n'
