"""The engine inside the user's process: its threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moespan.config import EngineConfig
from moespan.launch import local


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "variable", "expected"), [(4, None, 1), (1, None, 1), (4, "4", 4)]
)
def test_a_quota_of_one_core_gets_one_thread(
    monkeypatch: pytest.MonkeyPatch, threads: int, variable: str | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(local, "usable_cores", lambda: 1)
    torch.set_num_threads(threads)
    assert local._bind(EngineConfig("model")) == []
    assert torch.get_num_threads() == expected
