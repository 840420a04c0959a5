"""The search: what it looks at, what it takes, and what it says of targets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.errors import ConfigError, MoespanError
from moespan.planner import profile
from moespan.planner.expert_load import Routing
from moespan.planner.load import drawn
from moespan.planner.memory import MachineMemory, memory_of_rank
from moespan.planner.outcome import Outcome, RequestTimes, Target, parse_target
from moespan.planner.work import RankWork
from moespan.search.candidates import (
    Memories,
    Space,
    candidate_of,
    engine_sizes,
    layouts,
    parse_axes,
)
from moespan.search.capacity import capacity
from moespan.search.document import document
from moespan.search.explore import Answer, Question, explore, simulated_one
from moespan.search.jobs import run_all
from moespan.search.report import text

MODEL = ModelConfig.from_dict(preset("16b", {}))
A2 = profile.load("910b3")


def question(devices: int = 8, *, rate: float | None = 8.0, **changes: Any) -> Question:
    base = EngineConfig("", device="npu", block_size=128)
    only = changes.pop("only", (("sp", 1), ("pp", 1)))
    space = Space(base, devices, max_num_seqs=(64,), max_num_batched_tokens=(2048,), only=only)
    given = {"num_requests": 120, "num_shown": 3, "jobs": 1, **changes}
    load = drawn("512", "32", given["num_requests"], rate=rate) if rate else None
    return Question(space, A2, MODEL, Routing(MODEL), load, ("512", "32"), **given)


@pytest.fixture(scope="module")
def answer() -> Answer:
    return explore(question(targets=(Target("tpot", "p99", 0.05), Target("ttft", "p90", 1.0))))


def test_engines_divide_a_node_or_have_whole_ones():
    assert engine_sizes(16, 8) == [1, 2, 4, 8, 16]
    assert engine_sizes(24, 8) == [1, 2, 4, 8, 24]
    assert engine_sizes(4, 8) == [1, 2, 4]


def test_tp_and_sp_stay_inside_a_node_unless_asked():
    space = Space(EngineConfig("", device="npu"), 16)
    assert max(one.tp * one.sp for _, one in layouts(space, MODEL, A2)) == 8
    asked = layouts(replace(space, only=(("tp", 16),)), MODEL, A2)
    assert {(engines, one.tp) for engines, one in asked} == {(1, 16)}


def test_axes_are_read_from_text():
    assert parse_axes("tp=2 ep=8,dp=4") == (("tp", 2), ("ep", 8), ("dp", 4))
    for wrong in ("", "tp", "tp=x", "xp=2", "tp=0"):
        with pytest.raises(ConfigError):
            parse_axes(wrong)


def test_what_does_not_fit_is_left_out():
    config = EngineConfig("", device="npu", block_size=128)
    assert candidate_of(1, config, MODEL, A2) is not None
    small = profile.load("910b4")
    assert candidate_of(1, config, MODEL, small) is None
    fits = candidate_of(1, replace(config, layout=Layout(tp=2)), MODEL, small)
    assert fits is not None and fits.memory.total_bytes < small.device.memory_bytes.value


def test_memory_is_counted_once_for_layouts_that_differ_in_replicas_only():
    memories: Memories = {}
    base = EngineConfig("", device="npu", block_size=128)
    for layout in (Layout(tp=2, dp=dp, ep=4) for dp in (2, 4, 8)):
        config = replace(base, layout=layout)
        found = candidate_of(2, config, MODEL, A2, memories)
        assert found == candidate_of(2, config, MODEL, A2)
        machine = MachineMemory.of("npu", A2.device)
        assert found is not None
        one = memory_of_rank(config, MODEL, config.layout.world_size - 1, machine)
        assert one.with_blocks(found.num_blocks) == found.memory
    assert len(memories) == 1


def test_the_best_ones_come_first_with_bands_around_them(answer: Answer):
    assert answer.met and 0 < answer.num_simulated <= 16
    assert answer.num_fitting == answer.num_combinations
    excess = [max(one.excess(answer.question.targets), 0) for one in answer.found]
    assert excess == sorted(excess)
    for one in answer.shown:
        assert one.fast and one.predicted and one.slow
        tpots = [each.outcome.tpot_s["p99"].value for each in (one.fast, one.predicted, one.slow)]
        assert tpots == sorted(tpots)


def test_each_shown_layout_is_another_one(answer: Answer):
    shown = [(one.candidate.engines, one.candidate.layout) for one in answer.shown]
    assert len(set(shown)) == len(shown) == 3


def test_the_same_question_gets_the_same_bytes_on_any_number_of_cores(answer: Answer):
    again = explore(replace(answer.question, jobs=2))
    first, second = (
        msgspec.json.encode([(one.candidate, one.predicted, one.slow) for one in each.found])
        for each in (answer, again)
    )
    assert first == second


def test_the_smallest_engines_stand_for_all_that_differ_in_replicas():
    asked = question(16, rate=16.0, fast=True, targets=(Target("tpot", "p99", 0.05),))
    every, some = (explore(replace(asked, smallest=one)) for one in (False, True))
    assert some.found[0] == every.found[0]
    assert some.num_combinations < every.num_combinations
    layouts_of = [(one.candidate.engines, one.candidate.layout) for one in every.screened]
    assert any(engines == 1 and layout.dp > 1 for engines, layout in layouts_of)


def test_no_engine_goes_without_a_request():
    load = drawn("512", "32", 120, concurrency=4)
    found = explore(replace(question(16, fast=True), load=load))
    assert max(one.candidate.engines for one in found.screened) == 4
    # Twelve devices of nodes of eight are three engines at least.
    one = drawn("512", "32", 120, concurrency=1)
    found = explore(replace(question(12, fast=True), load=one))
    assert {each.candidate.engines for each in found.screened} == {3}


def test_a_simulation_is_long_enough_for_what_it_holds():
    asked = question(64, rate=None, only=(("tp", 1), ("dp", 64), ("pp", 1), ("ep", 1)))
    one = explore(replace(asked, fast=True)).found[0]
    simulated = simulated_one(asked, one).predicted
    assert simulated is not None and one.estimate.sequences == 64
    assert simulated.num_replicas == 6  # 400 sequences and 64 in a replica
    assert simulated.concurrency == 64 * 64
    assert simulated.outcome.num_requests >= 2 * 6 * 64
    assert simulated.outcome.tokens_per_s == pytest.approx(one.estimate.tokens_per_s, rel=0.3)


def test_targets_that_nothing_meets_stay_as_they_are():
    asked = question(targets=(Target("tpot", "p99", 0.0005), Target("ttft", "p90", 1.0)))
    found = explore(asked)
    assert not found.met and found.shown
    said = document(found, "MODEL")
    assert said["targets"] == ["TPOT p99 ≤ 0.5 ms", "TTFT p90 ≤ 1.00 s"]
    for plan in said["plans"]:
        (miss,) = plan["misses"]
        assert miss["target"] == "TPOT p99 ≤ 0.5 ms" and miss["by"] > 1
        assert miss["by"] == pytest.approx(plan["tpot_s"]["p99"]["value"] / 0.0005 - 1)
    lines = list(text(said))
    assert any(line.startswith("missed     1: TPOT p99 ≤ 0.5 ms missed: ") for line in lines)


def test_too_many_requests_are_answered_with_how_many_are_possible():
    targets = (Target("ttft", "p90", 0.5),)
    asked = question(1, rate=200.0, targets=targets, num_requests=600)
    said = document(explore(asked), "MODEL")
    assert not said["met"] and said["plans"][0]["was_given_up"]
    assert any(one.startswith("fewer requests: about") for one in said["advice"])
    assert any(one.startswith("more devices:") for one in said["advice"])


def test_a_target_met_only_by_luck_is_at_risk(answer: Answer):
    best = answer.found[0]
    assert best.slow is not None
    between = (best.outcome.tpot_s["p99"].value + best.slow.outcome.tpot_s["p99"].value) / 2
    assert best.at_risk((Target("tpot", "p99", between),))
    assert not best.at_risk((Target("tpot", "p99", 10.0),))
    assert not best.at_risk((Target("tpot", "p99", 1e-5),))  # it is missed, not at risk


def test_as_much_as_possible_fills_the_engines():
    asked = question(rate=None, fast=True, targets=(Target("tpot", "p90", 0.03),))
    found = explore(asked)
    assert found.met
    rates = [one.tokens_per_s for one in found.found]
    assert rates[0] == max(rates)
    # Without the target more sequences go in, and more tokens come out.
    free = explore(replace(asked, targets=()))
    assert free.found[0].tokens_per_s > rates[0]


def test_dear_small_messages_change_the_answer():
    usual, worst = (explore(question(rate=40.0, fast=True, worst=one)) for one in (False, True))
    assert usual.found[0].candidate.layout.tp > 1
    assert worst.found[0].candidate.layout.tp == 1


def test_more_devices_carry_more_requests():
    targets = (Target("tpot", "p90", 0.03),)
    small, large = (
        capacity(asked, [one.candidate for one in explore(asked).screened])
        for asked in (question(n, fast=True, targets=targets) for n in (8, 16))
    )
    assert large == pytest.approx(2 * small, rel=0.1)


def test_what_if_compares_the_same_settings():
    base = question(16, fast=True, targets=(Target("tpot", "p90", 0.03),))
    space = replace(base.space, max_num_seqs=(16, 64), max_num_batched_tokens=(512, 4096))
    asked = replace(base, space=space)
    found = document(explore(asked), "MODEL", nodes=[1, -1])["what_if"]
    ratios = [one["requests_ratio"] for one in found]
    assert ratios == pytest.approx([1.5, 0.5], rel=0.02)


def test_what_if_names_nodes_or_the_devices_of_a_part_of_one():
    for devices, words in ((8, "1 → 2 nodes"), (4, "4 → 12 devices")):
        found = document(explore(question(devices, fast=True)), "MODEL", nodes=[1])
        assert found["what_if"][0]["change"] == words
        assert any(words in line for line in text(found))


def test_a_profile_of_a_single_node_says_nothing_of_more_nodes():
    """Such as one that `moespan calibrate` wrote."""
    node = msgspec.structs.replace(A2, levels=A2.levels[:1])
    asked = replace(question(8, fast=True), profile=node)
    assert document(explore(asked), "MODEL", nodes=[1, -1])["what_if"] == [None, None]


def test_a_layout_counts_as_calibrated_only_where_its_own_parts_were_measured():
    """A device over a base knows its operations, and no collectives."""
    small = replace(MODEL, num_hidden_layers=2)
    curves = [one for tp in (1, 2) for one in curves_of(small, Layout(tp=tp))]
    host = profile.HostFigures(step_us=profile.Figure(value=50.0, origin="measured"))
    made = msgspec.structs.replace(A2, made=profile.Made(), operations=curves, host=host)
    for tp, error in ((1, 0.15), (2, 0.4)):
        only = (("tp", tp), ("ep", 1), ("pp", 1), ("sp", 1), ("dp", 1))
        asked = replace(question(fast=True, only=only), model=small, profile=made)
        found = document(explore(asked), "MODEL")
        assert found["hardware"]["error"] == found["plans"][0]["error"] == error
        (first, *_) = text(found)
        if tp == 1:
            assert "calibrated; ±15% is expected, not promised" in first
        else:
            assert "PARTLY CALIBRATED (±40%), no curve of tp all_reduce" in first


def curves_of(model: ModelConfig, layout: Layout) -> Iterator[profile.Operation]:
    """A curve for each operation of a layout."""
    work = RankWork(model, EngineConfig("", layout, "npu"))
    experts = work.expert_task(6, 6)
    assert experts is not None
    for task in (*work.dense_tasks(1, 1), work.attention_task(1, 10, ()), experts):
        phases = ("_decode", "_prefill") if task.op == "attention" else ("",)
        for phase in phases:
            shape: dict[str, Any] = dict(task.shape)
            yield profile.Operation(
                op=task.op + phase, rows=[1, 4096], us=[5.0, 50.0], met=6, **shape
            )


def test_a_placement_is_proposed_where_counts_say_that_it_pays():
    skewed = [1000] * 8 + [10] * 56  # all busy experts on the first ep rank
    short, lines = replace(MODEL, num_hidden_layers=2), {}
    for name, row in (("skewed", skewed), ("even", [100] * 64)):
        routing = Routing(short, {1: row}, name=f"{name}.json")
        only = (("tp", 1), ("ep", 8), ("dp", 8), ("sp", 1), ("pp", 1))
        asked = replace(question(fast=True, only=only), model=short, routing=routing)
        found = document(explore(asked), "MODEL")
        lines[name] = [line for line in text(found) if line.startswith("placement")]
        if name == "skewed":
            assert found["placement"]["placed_s"] < 0.95 * found["placement"]["now_s"]
    assert "--counts skewed.json -ep 8 -dp 8 --out" in lines["skewed"][0]
    assert not lines["even"]


def test_targets_are_read_from_text():
    assert parse_target("tpot", "40ms@p99") == Target("tpot", "p99", 0.04)
    assert parse_target("ttft", "2s") == Target("ttft", "p90", 2.0)
    for wrong in ("40", "ms", "-1s", "40ms@p42", "0s", "nans"):
        with pytest.raises(ConfigError, match="is not a time with its statistic"):
            parse_target("ttft", wrong)


def test_figures_of_an_outcome():
    # 100 requests, one each second: 0.5 s to the first token, then nine more in 0.9 s.
    times = [RequestTimes(at, at + 0.5, at + 1.4, 10) for at in range(100)]
    outcome = Outcome.of(times)
    assert outcome.num_requests == 90
    assert outcome.ttft_s["p99"].value == pytest.approx(0.5)
    assert outcome.tpot_s["mean"].value == pytest.approx(0.1)
    assert outcome.tokens_per_s == pytest.approx(10, rel=0.03)
    assert outcome.ttft_s["p50"].half_width == pytest.approx(0, abs=1e-9)
    few = Outcome.of(times[:3])
    assert few.ttft_s["p50"].half_width is None  # three requests have no ten batches
    with pytest.raises(ConfigError, match="no request has ended"):
        Outcome.of([])


def test_requests_count_once_the_engine_has_filled():
    # Each takes ten seconds, and one comes each second: ten fill the engine.
    times = [RequestTimes(at, at + 1.0, at + 10.0, 10) for at in map(float, range(60))]
    assert Outcome.of(times).num_requests == 50
    # All at once: there is nothing to fill.
    assert Outcome.of([RequestTimes(0.0, 1.0, 10.0, 10)] * 60).num_requests == 54


def test_who_waits_for_a_search_is_told_what_it_does():
    told: list[str] = []
    explore(question(fast=True, tell=told.append))
    assert set(told) == {"estimating 16 layouts"}
    calls: list[int] = []
    run_all(lambda index: time.sleep(1.5), 2, None, jobs=2, waiting=lambda: calls.append(1))
    assert calls  # also while other processes work


def test_work_is_done_in_order_on_many_cores():
    assert run_all(lambda index: index**2, 7, int, jobs=3) == [0, 1, 4, 9, 16, 25, 36]
    assert run_all(lambda index: index, 0, int) == []


def test_a_refusal_in_a_process_of_the_search_comes_back_as_itself(
    capfd: pytest.CaptureFixture[str],
):
    def refuse(index: int) -> int:
        raise ConfigError(f"number {index}")

    with pytest.raises(ConfigError, match=r"^number 0$"):
        run_all(refuse, 2, int, jobs=2)
    assert not capfd.readouterr().err


def test_a_process_of_the_search_that_dies_is_an_error(capfd: pytest.CaptureFixture[str]):
    def fail(index: int) -> int:
        raise ValueError(f"number {index}")

    with pytest.raises(MoespanError, match="a process of the search died"):
        run_all(fail, 2, int, jobs=2)
    assert "number 1" in capfd.readouterr().err
