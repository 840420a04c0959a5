"""How many cores this process may use. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path


def usable_cores(
    cgroups: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
    allowed: Collection[int] | None = None,
) -> int:
    """Cores of the affinity mask (or `allowed`), capped by every CPU quota (cgroup v2 `cpu.max`)
    above us."""
    cores = len(os.sched_getaffinity(0) if allowed is None else allowed)
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return cores
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    group = cgroups / own.lstrip("/")
    for directory in (group, *group.parents):
        if not directory.is_relative_to(cgroups):
            break
        try:
            quota_us, period_us = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota_us != "max":
            cores = min(cores, max(1, int(quota_us) // int(period_us)))
    return cores
