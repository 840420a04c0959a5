"""The number of cores that this process may use. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from moespan.cgroups import quota_cores


def usable_cores(root: Path = Path("/"), allowed: Collection[int] | None = None) -> int:
    """CPUs of the affinity mask (or of `allowed`), capped by the CPU quotas above this process.

    Args:
        root: below which /proc and /sys lie.
    """
    cores = len(os.sched_getaffinity(0) if allowed is None else allowed)
    quota = quota_cores(root)
    return cores if quota is None else min(cores, quota)
