"""The counters of real ranks equal the formulas for every rank, axis, collective and module."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.presets import PRESETS
from moespan.config import Layout, ModelConfig, all_layouts
from moespan.engine.step import PromptRow, StepPlan
from moespan.parallel.counters import sent_bytes
from moespan.parallel.tokens import choose_dispatch, mean_ranks_met
from moespan.planner.traffic import StepSize, step_traffic
from tests import tiers
from tests.support import geometry, sampling_of

RANKS = 8
# Grouped keys, and sizes that no number of ranks divides: vocabulary, widths, experts.
MODEL = geometry(
    hidden_size=48,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=5,
    n_routed_experts=11,
    num_experts_per_tok=3,
)
CONFIG = ModelConfig.from_dict(MODEL)
SIXTEEN_B = ModelConfig.from_dict(PRESETS["16b"])
# Query lengths of each replica's sequences; each sequence has up to three tokens of context.
STEPS = [
    [[13, 1, 1, 6], [5], [], [1, 1]],
    [[1], [], [7, 2], [1, 9, 1]],
    [[1, 1, 1, 1, 1, 1, 1, 1], [1], [16], [3]],
]


@dataclass(frozen=True)
class Case:
    """One layout, and how tokens meet experts in it."""

    layout: Layout
    dispatch: str = "auto"
    placement: Any = "contiguous"
    dtype: str = "float32"

    def __str__(self) -> str:
        placement = self.placement if isinstance(self.placement, str) else "table"
        return f"{self.layout},{self.dispatch},{placement},{self.dtype}"


# Some experts on two or three ranks.
REPLICAS = {"default": [[0, 1, 2], [2, 3, 4], [4, 5, 0], [6, 7, 2, 8, 9, 10]]}
CASES = [
    Case(Layout(tp=8)),
    Case(Layout(tp=8, ep=8), dtype="bfloat16"),
    Case(Layout(tp=8, ep=2), "replicated", "round_robin"),
    Case(Layout(sp=8)),
    Case(Layout(dp=8)),
    Case(Layout(pp=4, tp=2)),
    Case(Layout(pp=2, sp=4, pipeline_layers=(1, 4)), dtype="float16"),
    Case(Layout(dp=8, ep=8), "all_gather"),
    Case(Layout(dp=8, ep=8), "all_to_all"),
    Case(Layout(dp=4, tp=2, ep=8), "all_gather", dtype="bfloat16"),
    Case(Layout(dp=4, tp=2, ep=8), "all_to_all", dtype="bfloat16"),
    Case(Layout(dp=4, tp=2, ep=4), "all_to_all", "round_robin"),
    Case(Layout(sp=4, tp=2, ep=8), "all_gather"),
    Case(Layout(sp=4, tp=2, ep=8), "all_to_all"),
    Case(Layout(sp=2, dp=4, ep=4), "all_to_all", REPLICAS),
    Case(Layout(pp=2, dp=2, tp=2, ep=4), "all_gather"),
    Case(Layout(pp=2, dp=2, tp=2, ep=4), "all_to_all", REPLICAS),
    Case(Layout(pp=2, dp=2, sp=2, ep=2), "all_gather"),
    Case(Layout(pp=2, dp=2, sp=2, ep=4), "auto"),
    Case(Layout(dp=2, sp=2, tp=2, ep=8), "all_to_all"),
]
if tiers.ALL:
    CASES = [Case(one, way) for one in all_layouts(RANKS, CONFIG) for way in one.dispatches]

Results = list[list[list[dict[str, Any]]]]
"""rank → case → step → the result of `step_rank.py`."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    cases = [
        {
            "layout": msgspec.to_builtins(case.layout),
            "dispatch": case.dispatch,
            "placement": case.placement,
            "dtype": case.dtype,
            "steps": msgspec.to_builtins(list(plans(case.layout))),
        }
        for case in CASES
    ]
    (folder / "cases.json").write_text(json.dumps({"model": MODEL, "cases": cases}))
    program = [sys.executable, str(Path(__file__).with_name("step_rank.py"))]
    ran = subprocess.run([*program, str(folder), str(RANKS)], stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def plans(layout: Layout) -> Iterator[list[StepPlan | None]]:
    """The steps, with a plan for each replica. If there is one stage, a replica's first token is
    one that its previous plan samples."""
    rng = random.Random(str(layout))
    last: list[StepPlan | None] = [None] * layout.dp
    for step, lengths in enumerate(STEPS):
        made = [_plan(step, lengths[replica % len(lengths)], rng) for replica in range(layout.dp)]
        for plan, before in zip(made, last, strict=True):
            if plan is not None and before is not None and layout.pp == 1:
                plan.token_ids[0] = ~0
        last = [plan or before for plan, before in zip(made, last, strict=True)]
        yield made


def num_sampled(layout: Layout, step: int) -> list[int]:
    """Tokens that each replica's previous plan sampled, if the plan names one of them; else 0."""
    made = list(plans(layout))
    return (
        [
            len([before for before in earlier if before is not None][-1].samples)
            if plan is not None and plan.is_ahead
            else 0
            for plan, earlier in zip(made[step], zip(*made[:step], strict=True), strict=True)
        ]
        if step
        else []
    )


def _plan(step: int, query_lens: list[int], rng: random.Random) -> StepPlan | None:
    if not query_lens:
        return None
    num_sequences, num_tokens = len(query_lens), sum(query_lens)
    blocks = rng.sample(range(64), 5 * num_sequences)
    return StepPlan(
        step=step,
        token_ids=[rng.randrange(CONFIG.vocab_size) for _ in range(num_tokens)],
        query_lens=query_lens,
        context_lens=[rng.randrange(4) for _ in query_lens],
        block_tables=[blocks[5 * i : 5 * i + 5] for i in range(num_sequences)],
        prompts=[PromptRow(sequence=i, targets=[], logprobs=None, logits=True) for i in (0,)],
        **sampling_of(i for i in range(num_sequences) if i % 3 != 1),
    )


def size_of(case: int, step: int, results: Results) -> StepSize:
    """The argument of the formulas, with the choices of all routers put together."""
    layout = CASES[case].layout
    chosen = list(plans(layout))[step]
    num_rows = [0 if plan is None else len(plan.samples) + plan.query_lens[0] for plan in chosen]
    num_tokens = [0 if plan is None else len(plan.token_ids) for plan in chosen]
    choices: dict[int, list[list[list[int]]]] = {}
    for rank in range(RANKS):
        at = layout.coordinates(rank)
        if at.tp:
            continue
        for layer, rows in results[rank][case][step]["chosen"].items():
            choices.setdefault(int(layer), [[] for _ in chosen])[at.dp].extend(rows)
    return StepSize(
        num_tokens,
        num_rows,
        {layer: [np.array(rows) for rows in replicas] for layer, replicas in choices.items()},
        num_sampled(layout, step),
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_counters_equal_formulas(number: int, results: Results) -> None:
    case = CASES[number]
    experts = ExpertPlacement.make(case.placement, CONFIG, case.layout)
    total: Counter[str] = Counter()
    for step in range(len(STEPS)):
        size = size_of(number, step, results)
        for rank in range(RANKS):
            expected = step_traffic(
                CONFIG, case.layout, rank, case.dtype, size, case.dispatch, experts
            )
            counted = [tuple(row) for row in results[rank][number][step]["traffic"]]
            assert counted == expected.rows(), f"step {step}, rank {rank}"
            total.update({row[0]: row[-1] for row in counted})
    # Bytes were sent over every axis in use, and over no other.
    used = {axis for axis in ("tp", "sp", "pp") if case.layout.sizes[axis] > 1}
    if case.layout.ep_tp_groups > 1:
        used.add("ep" if case.dispatch == "all_to_all" else "ep_tp_groups")
    assert {axis for axis, sent in total.items() if sent} == used


PAIRS = [
    (ours, theirs)
    for ours, one in enumerate(CASES)
    for theirs, other in enumerate(CASES)
    if (one.layout, one.placement, one.dtype) == (other.layout, other.placement, other.dtype)
    and (one.dispatch, other.dispatch) == ("all_to_all", "all_gather")
]


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[str(CASES[a].layout) for a, _ in PAIRS])
def test_all_to_all_never_sends_more_than_all_gather(
    ours: int, theirs: int, results: Results
) -> None:
    """Tokens and router choices are compared; the message with the row counts comes on top."""
    layout = CASES[ours].layout
    for step in range(len(STEPS)):
        sent: Counter[str] = Counter()
        calls = 0
        for rank in range(RANKS):
            for axis, _, module, count, num_bytes in results[rank][ours][step]["traffic"]:
                if axis == "ep":
                    sent[module] += num_bytes
                    calls += count if module == "counts" else 0
            for axis, _, _, _, num_bytes in results[rank][theirs][step]["traffic"]:
                sent["all_gather"] += num_bytes if axis == "ep_tp_groups" else 0
        assert 0 < sent["moe"] + sent["router"] <= sent["all_gather"]
        assert sent["counts"] == calls * 8 * (layout.ep - 1)


def test_ranks_that_a_token_meets() -> None:
    """Top 6 of 64, uniform."""
    met = {ep: round(mean_ranks_met(SIXTEEN_B, Layout(tp=ep, ep=ep)), 2) for ep in (4, 8, 16)}
    assert met == {4: 3.35, 8: 4.54, 16: 5.32}


def test_ranks_met_of_unequal_shares_are_counted_one_by_one() -> None:
    rng = random.Random(0)
    layout = Layout(tp=4, ep=4)
    held = ExpertPlacement.make("contiguous", CONFIG, layout).default
    trials = 20_000
    met = 0
    for _ in range(trials):
        chosen = set(rng.sample(range(11), 3))
        met += sum(not chosen.isdisjoint(experts) for experts in held)
    assert met / trials == pytest.approx(mean_ranks_met(CONFIG, layout), rel=0.01)


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=8, ep=8), Layout(tp=2, dp=4, ep=8), Layout(tp=4, sp=2, ep=8), Layout(dp=4, ep=4)],
    ids=str,
)
def test_all_to_all_is_below_all_gather_by_the_expected_share(layout: Layout) -> None:
    def over_ep(dispatch: str, choices: Any) -> int:
        step = StepSize([1024 // layout.dp] * layout.dp, [0] * layout.dp, choices)
        return sum(
            sent
            for rank in range(layout.world_size)
            for axis, _, module, _, sent in step_traffic(
                SIXTEEN_B, layout, rank, "bfloat16", step, dispatch
            ).rows()
            if axis in ("ep", "ep_tp_groups") and module != "counts"
        )

    rng = np.random.default_rng(0)
    drawn = [rng.random((1024 // layout.dp, 64)).argsort(-1)[:, :6] for _ in range(layout.dp)]
    moe_layers = filter(SIXTEEN_B.is_moe, range(SIXTEEN_B.num_hidden_layers))
    all_gather = over_ep("all_gather", None)
    share = mean_ranks_met(SIXTEEN_B, layout) / layout.ep
    assert over_ep("all_to_all", None) / all_gather == pytest.approx(share, rel=1e-5)
    exact = over_ep("all_to_all", dict.fromkeys(moe_layers, drawn))
    assert exact / all_gather == pytest.approx(share, rel=0.02)
    if layout.ep == 8:
        assert round(share, 2) == 0.57


def test_expectation_with_replicas_is_the_mean_over_random_choices() -> None:
    layout = Layout(sp=2, dp=4, ep=4)
    experts = ExpertPlacement.make(REPLICAS, CONFIG, layout)
    rng = np.random.default_rng(0)

    def sent(rank: int, choices: Any) -> int:
        step = StepSize([600] * 4, [1] * 4, choices)
        rows = step_traffic(CONFIG, layout, rank, "float32", step, "all_to_all", experts).rows()
        return sum(row[-1] for row in rows if row[0] == "ep")

    drawn = [rng.random((600, 11)).argsort(-1)[:, :3] for _ in range(4)]
    for rank in range(4):
        exact = sent(rank, dict.fromkeys(range(CONFIG.num_hidden_layers), drawn))
        assert sent(rank, None) == pytest.approx(exact, rel=0.05)


def test_auto_takes_all_to_all_once_it_saves_enough() -> None:
    layout = Layout(dp=8, ep=8)
    # (8 - 1) · (1 - 4.54/8) ranks spared, in both directions, 4096 bytes a token.
    least = -(-(1 << 20) // round(2 * 4096 * 7 * (1 - mean_ranks_met(SIXTEEN_B, layout) / 8)))
    assert least == 43
    assert choose_dispatch(SIXTEEN_B, layout, 2, [0, least - 1]) == "all_gather"
    assert choose_dispatch(SIXTEEN_B, layout, 2, [0, least]) == "all_to_all"
    assert choose_dispatch(SIXTEEN_B, Layout(tp=8, ep=8), 2, [10_000]) == "replicated"
    # With two tp groups nearly every token goes to both: nothing is worth a second call.
    assert choose_dispatch(SIXTEEN_B, Layout(dp=2, ep=2), 2, [2048]) == "all_gather"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_as_many_bytes_are_sent_as_received(ranks: int) -> None:
    num_bytes = 24 * ranks
    part = num_bytes // ranks
    # All ranks but the owner send their share of each part; the owner sends the sum to the others.
    reduced = ranks * (ranks - 1) * part
    assert ranks * sent_bytes("reduce_scatter", ranks, num_bytes) == reduced
    assert ranks * sent_bytes("all_gather", ranks, part) == reduced
    assert ranks * sent_bytes("all_reduce", ranks, num_bytes) == 2 * reduced
    assert sent_bytes("broadcast", ranks, num_bytes) == (ranks - 1) * num_bytes
    assert sent_bytes("send", ranks, num_bytes) == sent_bytes("all_to_all", ranks, num_bytes)


def test_formulas_need_no_torch() -> None:
    code = "import moespan.planner.traffic, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
