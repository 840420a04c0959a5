"""Makes a virtual environment that was copied or moved with its folder point to the new folder.

python scripts/relocate.py FOLDER

The old folder stands in the second line of FOLDER/moespan-*. Packages are found by where the
interpreter is; only the programs in bin/ and the link to our sources name a folder. No network.
"""

from __future__ import annotations

import sys
from pathlib import Path

# As pip writes it for folders that a `#!` line cannot name (spaces, more than 127 bytes).
_HEADER = "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"


def main(folder: Path) -> None:
    """Rewrite every file that names the old folder."""
    old = next(folder.glob("moespan-*")).read_text().splitlines()[1]
    new = str(folder.absolute().parent)
    site = next(folder.glob("lib/python*/site-packages"))
    for path in [*folder.glob("bin/*"), *site.glob("*.pth"), *site.glob("moespan-*.dist-info/*")]:
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if old.encode() not in data or b"\0" in data:
            continue
        text = data.decode()
        path.write_text(_rewritten(text, old, new, folder.name), encoding="utf-8")


def _rewritten(text: str, old: str, new: str, name: str) -> str:
    first, _, rest = text.partition("\n")
    header = f"{old}/{name}/bin/"
    if first.startswith("#!") and header in first:
        python = f"{new}/{name}/bin/{first.rpartition('/')[2]}"
        return _HEADER.format(python=python) + rest.replace(old, new)
    return text.replace(old, new)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
