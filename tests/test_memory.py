"""Zeros take no memory before they are written; free memory is not overestimated."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from moespan import memory
from moespan.memory import available_bytes, zeros

CPU = torch.device("cpu")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 5), (7, 0)])
def test_zeros_have_the_shape_and_dtype_asked_for(shape: tuple[int, ...], dtype: torch.dtype):
    made = zeros(shape, dtype, CPU)
    assert made.shape == shape
    assert made.dtype is dtype
    assert not made.any()
    made.fill_(1)
    assert made.float().sum() == made.numel()


def test_zeros_take_no_memory_before_they_are_written():
    before = resident_bytes()
    made = zeros((1 << 30,), torch.float32, CPU)  # 4 GiB
    assert resident_bytes() - before < 64 << 20
    made[-1] = 1
    assert made[-1] == 1


def test_large_zeros_begin_at_a_page_and_ask_for_huge_ones():
    made = zeros((3 << 20,), torch.bfloat16, CPU)
    assert made.data_ptr() % resource.getpagesize() == 0
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages to give")
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            start, stop = (int(part, 16) for part in key.split("-"))
            inside = start <= made.data_ptr() < stop
        elif inside and key == "VmFlags:":
            assert "hg" in values
            return
    raise AssertionError("no mapping contains the tensor")


def set_memory(
    monkeypatch: pytest.MonkeyPatch, *, machine: int, within_limits: int | None = None
) -> None:
    """Set the available memory of the machine and within its cgroups."""
    monkeypatch.setattr(memory, "_meminfo_bytes", lambda key: machine)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: within_limits)


def test_without_a_limit_the_machines_memory_counts(monkeypatch: pytest.MonkeyPatch):
    set_memory(monkeypatch, machine=1000)
    assert available_bytes(CPU) == 1000


def test_the_tighter_of_machine_and_cgroups_counts(monkeypatch: pytest.MonkeyPatch):
    set_memory(monkeypatch, machine=1000, within_limits=300)
    assert available_bytes(CPU) == 300
    set_memory(monkeypatch, machine=100, within_limits=300)
    assert available_bytes(CPU) == 100
    set_memory(monkeypatch, machine=100, within_limits=0)
    assert available_bytes(CPU) == 0


def test_this_machine_has_memory():
    assert available_bytes(CPU) > 1 << 20
