"""Whether a package index has a wheel of torch for this Python and machine: exit code 0 if so.

python scripts/index_has.py URL VERSION
"""

from __future__ import annotations

import platform
import sys
import urllib.parse
import urllib.request

_TIMEOUT_S = 4


def main(url: str, version: str) -> bool:
    """Ask the index for its page of torch."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/torch/", timeout=_TIMEOUT_S) as page:
        text = urllib.parse.unquote(page.read().decode())
    python = "cp{}{}".format(*sys.version_info)
    start = f"torch-{version}-{python}-{python}-"
    # Each link names its file, in which hyphens part version, Python and platform.
    files = [part.partition(".whl")[0] for part in text.split(start)[1:]]
    return any(name.endswith(platform.machine()) for name in files)


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:3]))
