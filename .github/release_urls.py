"""Gives a release its address, which the checkout does not know.

  python .github/release_urls.py https://github.com/OWNER/NAME v1.0

PyPI shows README.md away from the repository. This rewrites its relative links
to files of the release, and adds project URLs to setup.cfg, both in the current
folder.
"""

import configparser
import pathlib
import re
import sys

_LINK = re.compile(r'(!?)\[((?:[^][]|\[[^]]*\])*)\]\((?!\w+:|#)([^)\s]+)\)')


def absolute_links(markdown: str, address: str, tag: str) -> str:
  """Returns the text with links to files of a release, and images as files."""

  def rewrite(match):
    image, text, path = match.groups()
    kind = 'raw' if image else 'blob'
    return f'{image}[{text}]({address}/{kind}/{tag}/{path})'

  return _LINK.sub(rewrite, markdown)


def main(address: str, tag: str) -> None:
  address = address.rstrip('/')
  readme = pathlib.Path('README.md')
  readme.write_text(absolute_links(readme.read_text(), address, tag))
  setup = configparser.ConfigParser(comment_prefixes=('#',))
  setup.read('setup.cfg')
  setup['metadata']['project_urls'] = '\n' + '\n'.join(
    [
      f'Source = {address}',
      f'Documentation = {address}/tree/{tag}/docs',
      f'Changelog = {address}/blob/{tag}/CHANGELOG.md',
      f'Issues = {address}/issues',
    ]
  )
  with open('setup.cfg', 'w') as file:
    setup.write(file)


if __name__ == '__main__':
  if len(sys.argv) != 3 or not sys.argv[1].startswith('https://'):
    sys.exit('usage: release_urls.py https://HOST/OWNER/NAME TAG')
  main(*sys.argv[1:])
