"""The number of cores that ranks may share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moespan.machine.cores import usable_cores


def test_the_smallest_quota_on_the_way_to_the_root_caps_the_affinity_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/container\n")
    cgroups = tmp_path / "cgroups"
    container = cgroups / "pod" / "container"
    container.mkdir(parents=True)
    assert usable_cores(cgroups, membership) == 16

    (container / "cpu.max").write_text("max 100000\n")
    assert usable_cores(cgroups, membership) == 16
    (container.parent / "cpu.max").write_text("450000 100000\n")
    assert usable_cores(cgroups, membership) == 4
    (container / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(cgroups, membership) == 1


def test_without_cgroups_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "missing") == len(os.sched_getaffinity(0))
