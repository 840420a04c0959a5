"""The ledger of operations that a 910B runs on its AI CPU, and what a decode step adds to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ascend_sim import ai_cpu

from moespan.engine.step import StepPlans
from tests.ascend.inside.test_decode import FUSED, INTEGERS, decode, npu_worker
from tests.support import execute


@pytest.mark.parametrize(
    ("name", "is_on_ai_cpu"),
    [
        ("not int32", True),
        ("not bool", False),
        ("minus one minus int32", False),
        ("cumsum float64", True),
        ("cumsum int64", True),
        ("cumsum int32 in int64", True),
        ("cumsum int32", False),
        ("cumsum float32", False),
        ("searchsorted", True),
        ("fill int64", True),
        ("fill int32", False),
        ("remainder float64", True),
        ("sort int32", True),
        ("sort one", True),
        ("sort", False),
        ("copy of float64", False),
    ],
)
def test_the_ledger(name: str, is_on_ai_cpu: bool) -> None:
    x, ids = torch.rand(2, 5).npu(), torch.arange(5, dtype=torch.int32).npu()
    # `.double()` gives float32 there: torch_npu says so.
    double, mask = torch.zeros(2, 5, dtype=torch.float64, device="npu"), ids > 2
    calls = {
        "not int32": lambda: ~ids,
        "not bool": lambda: ~mask,
        "minus one minus int32": lambda: -1 - ids,
        "cumsum float64": lambda: double.cumsum(-1),
        "cumsum int64": lambda: ids.long().cumsum(-1),
        "cumsum int32 in int64": lambda: ids.cumsum(-1),
        "cumsum int32": lambda: ids.cumsum(-1, dtype=torch.int32),
        "cumsum float32": lambda: x.cumsum(-1),
        "searchsorted": lambda: torch.searchsorted(x, x),
        "fill int64": lambda: ids.long().masked_fill_(mask, 0),
        "fill int32": lambda: ids.clone().masked_fill_(mask, 0),
        "remainder float64": lambda: double.remainder(2),
        "sort int32": lambda: ids.sort(),
        "sort one": lambda: x[:, :1].contiguous().sort(),
        "sort": lambda: x.sort(),
        "copy of float64": lambda: double.clone(),
    }
    ai_cpu.calls.clear()
    calls[name]()
    assert bool(ai_cpu.calls) == is_on_ai_cpu, ai_cpu.calls
    assert all("test_ai_cpu.py" in call for call in ai_cpu.calls)


def calls_of_decode(enforce_eager: bool, integers: dict[str, str], **settings: Any) -> list[str]:
    """What two decode steps add, of which the second takes the tokens of the first."""
    worker = npu_worker(
        FUSED, block_size=32, dtype="bfloat16", enforce_eager=enforce_eager, **integers
    )
    for pair in worker.caches:
        for cache in pair.tensors:
            cache.zero_()
    for length in range(3):
        execute(worker, decode([length, length + 20, length]))
    steps = [decode([3, 23, 3], **settings), decode([4, 24, 4], **settings)]
    steps[1].token_ids[:] = [~0, ~1, ~2]
    ai_cpu.calls.clear()
    started = [worker.execute(StepPlans.of([step])) for step in steps]
    for one in started:
        assert one is not None
        one.wait()
    return ai_cpu.calls.copy()


@pytest.mark.parametrize("integers", [{}, *INTEGERS], ids=str)
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_greedy_decode_step_has_none(enforce_eager: bool, integers: dict[str, str]) -> None:
    assert calls_of_decode(enforce_eager, integers) == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}],
    ids=str,
)
def test_a_decode_step_with_a_temperature_has_none(settings: dict[str, float]) -> None:
    assert calls_of_decode(False, {}, temperature=0.7, **settings) == []
