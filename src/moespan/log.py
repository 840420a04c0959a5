"""One line to whoever runs this: why something is slower, or other, than it could be."""

from __future__ import annotations

import os
import sys

_said: set[str] = set()


def notice(message: str, from_any_rank: bool = False) -> None:
    """Write `message` to stderr: once, and from rank 0 unless it may concern another rank only."""
    rank = os.environ.get("RANK", "0")
    if message not in _said and (from_any_rank or rank == "0"):
        where = f"rank {rank}: " if rank != "0" else ""
        print(f"moespan: {where}{message}", file=sys.stderr, flush=True)
    _said.add(message)
