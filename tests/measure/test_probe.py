"""A process of its own measures the limits of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moespan.errors import MoespanError
from moespan.measure.probe import Probe, last_level_cache_bytes, size_for


def test_all_caches_of_the_last_level_count_once(tmp_path: Path):
    def cache(cpu: int, index: int, level: int, kib: int, shared: str) -> None:
        folder = tmp_path / f"cpu{cpu}/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{kib}K\n")
        (folder / "shared_cpu_list").write_text(shared + "\n")

    assert last_level_cache_bytes(tmp_path) == 0
    for cpu in range(4):
        cache(cpu, 0, 1, 32, str(cpu))
        cache(cpu, 3, 3, 1024, "0-1" if cpu < 2 else "2-3")
    assert last_level_cache_bytes(tmp_path) == 2 << 20


def test_the_probe_measures_this_machine_and_reports_that_its_process_ended():
    with Probe("cpu", "float32", num_devices=2) as probe:
        limits = probe()
        assert limits.bytes_per_s > 0 and limits.operations_per_s > 0
        probe._process.kill()
        with pytest.raises(MoespanError, match="ended with code -9"):
            probe()
    assert subprocess.run(["kill", "-0", str(probe.pid)], capture_output=True).returncode != 0


def test_a_measuring_process_that_fails_ends_in_one_error(monkeypatch: pytest.MonkeyPatch):
    """Whatever it writes to stdout before."""
    program = ["-c", "import sys; sys.stdin.readline(); print('out of memory'); sys.exit(3)"]
    monkeypatch.setattr("moespan.measure.probe.module_arguments", lambda _: program)
    with pytest.raises(MoespanError, match="measures the machine ended with code 3"):
        Probe("cpu", "float32")


@pytest.mark.parametrize(
    ("operations_per_s", "size"), [(0.4e12, 1024), (4e12, 2048), (30e12, 4096), (700e12, 8192)]
)
def test_a_slow_device_multiplies_small_matrices_and_a_fast_one_large(operations_per_s, size):
    assert size_for(lambda rows: 2 * rows**3 / operations_per_s) == size
