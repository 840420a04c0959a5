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
    membership = tmp_path / "proc/self/cgroup"
    membership.parent.mkdir(parents=True)
    membership.write_text("0::/pod/container\n")
    container = tmp_path / "sys/fs/cgroup/pod/container"
    container.mkdir(parents=True)
    assert usable_cores(tmp_path) == 16

    (container / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == 16
    (container.parent / "cpu.max").write_text("450000 100000\n")
    assert usable_cores(tmp_path) == 4
    (container / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    assert usable_cores(tmp_path, allowed=[]) == 0


def test_without_cgroups_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path, allowed=range(7)) == 7
