"""Uploads networks of the zoo to a release, and adds their URLs to the index.

  python .github/upload_zoo.py FOLDER [TAG]

FOLDER contains what `dynconv export zoo` wrote. Needs the GitHub CLI, `gh`,
with access to the repository. Commit the changed index afterwards.
"""

import json
import pathlib
import subprocess
import sys

from dynconv_jax.interop import zoo


def upload(
  folder: pathlib.Path, tag: str = 'zoo', index: pathlib.Path = zoo.INDEX
) -> list[str]:
  """Uploads every network of the index that the folder contains.

  Args:
    folder: folder of NAME.safetensors and NAME.md.
    tag: tag of the release, which is created if it does not exist.
    index: index to add the URLs to.

  Returns:
    The names of the networks.

  Raises:
    ValueError, FileNotFoundError: nothing to upload, a file differs from its
      entry, or a card is missing. Nothing has been uploaded.
    subprocess.CalledProcessError: gh failed; its error is on stderr. The index
      does not change.
  """
  entries = json.loads(index.read_text(encoding='utf-8'))
  found = {n: e for n, e in entries.items() if (folder / e['file']).exists()}
  if not found:
    raise ValueError(f'{folder} contains none of {", ".join(entries)}')
  files = []
  for name, entry in found.items():
    zoo.check_hash(folder / entry['file'], entry['sha256'])
    card = folder / f'{name}.md'
    if not card.exists():
      raise FileNotFoundError(f'no model card {card}')
    files += [str(folder / entry['file']), str(card)]
  address = json.loads(_gh('repo', 'view', '--json=url'))['url']
  tags = json.loads(_gh('release', 'list', '--json=tagName', '--limit=1000'))
  if tag not in [release['tagName'] for release in tags]:
    _gh('release', 'create', tag, '--title=Model zoo', '--notes=Weights.')
  _gh('release', 'upload', tag, '--clobber', *files)
  for name, entry in found.items():
    url = f'{address}/releases/download/{tag}/{entry["file"]}'
    zoo.write_entry(name, {**entry, 'url': url}, index)
  return list(found)


def _gh(*arguments: str) -> str:
  done = subprocess.run(
    ['gh', *arguments], stdout=subprocess.PIPE, text=True, check=True
  )
  return done.stdout


if __name__ == '__main__':
  if not 2 <= len(sys.argv) <= 3:
    sys.exit('usage: upload_zoo.py FOLDER [TAG]')
  try:
    names = upload(pathlib.Path(sys.argv[1]), *sys.argv[2:])
  except (OSError, ValueError, subprocess.CalledProcessError) as error:
    sys.exit(f'error: {error}')
  print(f'uploaded {", ".join(names)}; commit {zoo.INDEX}')
