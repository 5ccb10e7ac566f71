"""Makes links that leave docs/ work on the site, as they do on a Git host.

`results/` joins the site as it is. Any other file or folder of the repository
that a page links to gets a page of its own below `source/`.
"""

from __future__ import annotations

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
_LINK = re.compile(r'(\]\()(?!\w+:|/|#)([^)\s#]+)(#[^)\s]*)?(\))')
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
      linked |= {
        _resolve(match[2], file.src_uri)
        for match in _LINK.finditer(text)
        if _site_uri(_resolve(match[2], file.src_uri)).startswith('source/')
      }
  for name in sorted(linked):
    files.append(
      File.generated(config, _site_uri(name), content=_source_page(name))
    )
  return files


def on_page_markdown(markdown, page, config, files):
  """Rewrites links that leave docs/."""
  del config, files

  def rewrite(match):
    uri = _site_uri(_resolve(match[2], page.file.src_uri))
    uri = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')
    return f'{match[1]}{uri}{match[3] or ""}{match[4]}'

  return _LINK.sub(rewrite, markdown)


def _resolve(link: str, uri: str) -> str:
  """Returns the path in the repository of what a page of the site links to."""
  here = uri if uri.startswith('results/') else f'docs/{uri}'
  return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _site_uri(name: str) -> str:
  """Returns the path in the site of a path in the repository."""
  if name.startswith('docs/'):
    return name.removeprefix('docs/')
  path = ROOT / name
  if not path.exists():
    return name  # MkDocs warns of it.
  if name.startswith('results/') and path.suffix != '.flags' and path.is_file():
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
