"""The operators that communicate and compute at once, as the engine calls them: correct results,
and planted bugs that must be noticed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor

from moespan.config import EngineOptions
from moespan.ops import ExpertBank, ReferenceOps
from moespan.ops.npu.ops import NpuOps
from moespan.parallel.counters import Traffic
from moespan.parallel.mesh import Axis
from tests.ascend.inside.ranks import run_ranks

TOKENS, HIDDEN, WIDTH, EXPERTS, CHOSEN = 5, 64, 32, 8, 3
DISPATCH, COMBINE = "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"
# Two roundings of outputs up to 8.
TOLERANCE = 0.06


def made(size: int) -> tuple[Tensor, ...]:
    """Tokens, weights and physical ids of every rank, and all experts, the same on all ranks."""
    torch.manual_seed(0)
    scores = torch.rand(size, TOKENS, EXPERTS).softmax(-1) * 4
    weights, physical_ids = scores.topk(CHOSEN)
    return (
        torch.randn(size, TOKENS, HIDDEN).bfloat16(),
        weights,
        physical_ids,
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).bfloat16() / 8,
        torch.randn(EXPERTS, HIDDEN, WIDTH).bfloat16() / 4,
    )


def make_axis(rank: int) -> Axis:
    """A line of all ranks, with a group of its own."""
    ranks = list(range(dist.get_world_size()))
    return Axis("tp", ranks, rank, dist.new_group(ranks, backend="hccl"), Traffic())


def experts_across(rank: int, bug: str) -> float:
    """The difference between a rank's result and the reference, with a bug in the arguments."""
    axis = make_axis(rank)
    x, weights, physical_ids, gate_up, down = made(2)
    chosen, whole = physical_ids[rank].clone(), ExpertBank(gate_up, down, 0, EXPERTS)
    want = ReferenceOps().experts(x[rank], weights[rank], chosen, whole)
    ops, share = NpuOps(), EXPERTS // 2
    mine = slice(rank * share, (rank + 1) * share)
    prepared = [
        ops.prepare(f"mlp.experts.{name}", w[mine].npu())
        for name, w in (("gate_up", gate_up), ("down", down))
    ]

    def call(name: str, change: Any) -> Any:
        operator = getattr(torch_npu, name)
        return mock.patch.object(
            torch_npu, name, lambda *a, **k: operator(*(change(i, v) for i, v in enumerate(a)), **k)
        )

    changes = {
        "scales": (COMBINE, lambda i, v: v.flip(1) if i == 4 else v),
        "ids": (DISPATCH, lambda i, v: (v + share) % EXPERTS if i == 1 else v),
        "order": (COMBINE, lambda i, v: v.flip(0) if i == 0 else v),
        "origins": (COMBINE, lambda i, v: torch.zeros_like(v) - 1 if i == 2 else v),
        "counts": (COMBINE, lambda i, v: torch.full_like(v, TOKENS * 2 * EXPERTS) if i == 3 else v),
    }
    if bug == "nobody":
        chosen[0, 0] = -1
    if bug == "offsets":
        chosen = (chosen + share) % EXPERTS
    if bug == "twice":
        chosen[0, 0] = chosen[0, 1]
    planted = changes.get(bug, (DISPATCH, lambda i, v: v))
    with call(*planted):
        bank = ExpertBank(prepared[0], prepared[1], mine.start, EXPERTS)
        got = ops.experts_across(x[rank].npu(), weights[rank].npu(), chosen.npu(), bank, axis)
    difference: Tensor = (got.cpu().float() - want.float()).abs().max()
    return float(difference.nan_to_num(torch.inf))


def test_experts_on_any_rank():
    results = run_ranks(2, experts_across, "")
    assert all(isinstance(off, float) and off < TOLERANCE for off in results), results


@pytest.mark.parametrize("bug", ["scales", "offsets", "order"])
def test_bug_of_dispatch_changes_what_comes_back(bug: str):
    results = run_ranks(2, experts_across, bug)
    assert all(isinstance(off, float) and off > 5 * TOLERANCE for off in results), results


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("ids", "error code 1"),  # dispatch and combine get different ids
        ("nobody", "an expert is not one of them"),
        ("twice", "one expert twice"),
        ("origins", "not what dispatch returned"),
        ("counts", "not what dispatch returned"),
    ],
)
def test_bug_of_dispatch_is_refused(bug: str, message: str):
    results = run_ranks(2, experts_across, bug, ASCEND_SIM_TIMEOUT="10")
    assert any(message in str(said) for said in results), results


def sums(rank: int, tiled: bool) -> float:
    """The difference between matmuls with a fused all-reduce and without."""
    axis = make_axis(rank)
    x, _, _, gate_up, down = made(2)
    options = EngineOptions(npu_fused_all_reduce=TOKENS, npu_weight_format="nz" if tiled else "nd")
    fused = NpuOps(options=options)
    plus = x[rank].npu()
    called = []
    operator = torch_npu.npu_mm_all_reduce_base

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        called.append(1)
        return operator(*args, **kwargs)

    with mock.patch.object(torch_npu, "npu_mm_all_reduce_base", noted):
        results = []
        for ops in (fused, NpuOps()):
            first = ops.prepare("g", gate_up[rank].npu())
            second = ops.prepare("d", down[rank].npu())
            hidden = x[0, :, :WIDTH].contiguous().npu()
            results += [
                ops.linear_sum(hidden, second, axis, "attention"),
                ops.mlp_sum(x[0].npu(), first, second, axis, "moe", plus),
                ops.mlp_sum(x[0, 1:].npu(), first, second, axis, "mlp"),  # too few rows
            ]
    assert len(called) == 2
    calls = axis._traffic.calls
    assert calls["tp", "all_reduce", "attention"] == calls["tp", "all_reduce", "moe"] == 2
    sent = axis._traffic.sent_bytes["tp", "all_reduce", "moe"]
    assert sent == 2 * 2 * TOKENS * HIDDEN * 2 // 2
    pairs = zip(results[:3], results[3:], strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
def test_a_matmul_with_its_all_reduce(tiled: bool):
    results = run_ranks(2, sums, tiled)
    assert all(isinstance(off, float) and off < TOLERANCE for off in results), results


def two_groups(rank: int) -> str:
    x, w = torch.ones(2, 32).bfloat16().npu(), torch.ones(32, 32).bfloat16().npu()
    axes = [make_axis(rank), make_axis(rank)]
    ops = NpuOps(options=EngineOptions(npu_fused_all_reduce=1))
    for axis in axes:
        ops.linear_sum(x, w, axis, "attention")
    return "nothing said"


def test_bug_two_groups_with_fused_matmuls():
    results = run_ranks(2, two_groups, ASCEND_SIM_TIMEOUT="10")
    assert all("share one group" in said for said in results), results


def tiles() -> None:
    torch_npu.npu.config.allow_internal_format = False
    w = torch.ones(4, 32, 32).bfloat16().npu()
    assert torch_npu.get_npu_format(torch_npu.npu_format_cast(w, 29)) != 29
    torch_npu.npu.config.allow_internal_format = True
    assert torch_npu.get_npu_format(torch_npu.npu_format_cast(w, 29)) == 29


def refusals_of_tiles(rank: int) -> list[str]:
    tiles()
    ops = NpuOps(options=EngineOptions(npu_weight_format="nz"))
    tiled = ops.prepare("head", torch.ones(32, 32).bfloat16().npu())
    said = []
    for use in (
        lambda: tiled[:16] @ tiled,
        lambda: tiled + 1,
        lambda: tiled[torch.tensor([1]).npu()],
    ):
        try:
            use()
            said.append("nothing said")
        except RuntimeError as error:
            said.append(str(error))
    assert torch.equal((tiled @ tiled.t()).cpu(), torch.full((32, 32), 32.0).bfloat16())
    return said


def test_bug_tiles_are_read_as_rows():
    (said,) = run_ranks(1, refusals_of_tiles)
    assert all("NZ is for whole matrices" in one for one in said), said
