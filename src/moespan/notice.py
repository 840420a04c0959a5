"""One line to whoever runs this: why something is slower, or other, than it could be."""

from __future__ import annotations

import os
import sys

_said: set[str] = set()


def notice(message: str) -> None:
    """Write `message` to stderr: once, and from one rank of many."""
    if message not in _said and os.environ.get("RANK", "0") == "0":
        print(f"moespan: {message}", file=sys.stderr, flush=True)
    _said.add(message)
