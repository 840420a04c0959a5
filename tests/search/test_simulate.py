"""The simulation: against a closed form, against a recorded run, and its own promises."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from moespan import LLM, SamplingParams
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.engine.engine import Engine
from moespan.engine.info import EngineInfo
from moespan.engine.replicas import Replicas
from moespan.engine.request import Request
from moespan.engine.step import Sampled, StepResult
from moespan.engine.worker import Worker
from moespan.planner.cost import ReplicaStep
from moespan.planner.load import Load, LoadRequest, drawn
from moespan.planner.outcome import Outcome
from moespan.planner.work import Chunk
from moespan.search.predict import predict
from moespan.search.simulate import Plans, Run, shape, simulate
from tests.support import QUICKSTART

VOCABULARY = 64


class Fixed:
    """Steps of a fixed time, and a leader that costs nothing."""

    def __init__(self, stage_s: float, stages: int = 1, before_s: float = 0, after_s: float = 0):
        self.stage_s, self.stages = stage_s, stages
        self._before_s, self._after_s = before_s, after_s

    def stages_s(self, step: Sequence[ReplicaStep]) -> list[float]:
        return [self.stage_s] * self.stages

    def launch_s(self, step: Sequence[ReplicaStep]) -> float:
        return 0.0

    def before_s(self, step: Sequence[ReplicaStep]) -> float:
        return self._before_s

    def after_s(self, step: Sequence[ReplicaStep]) -> float:
        return self._after_s


def engine(device: str = "cpu", **options: Any) -> EngineConfig:
    given = {"max_model_len": 256, "max_num_seqs": 8, "block_size": 8, **options}
    return EngineConfig("", device=device, enable_prefix_caching=False, **given)


def run(config: EngineConfig, timer: Any, load: Load, blocks: int = 512, **more: Any) -> Run:
    return simulate(config, blocks, VOCABULARY, timer, load, **more)


@pytest.mark.parametrize("use", [0.5, 0.8])
def test_one_sequence_at_a_time_waits_as_m_d_1_says(use: float):
    # One step of 1 s a request: the mean wait is use / (2 · (1 - use)) steps.
    load = drawn("4", "1", 20_000, rate=use)
    # Arrivals get exactly the wanted rate, which takes most of the chance out of the mean.
    stretch = (load.rate or 0) / use
    requests = [replace(one, arrival_s=one.arrival_s * stretch) for one in load.requests]
    found = run(engine(max_num_seqs=1), Fixed(1.0), Load(tuple(requests)))
    waits = [one.ttft_s - 1 for one in found.times]
    assert sum(waits) / len(waits) == pytest.approx(use / (2 * (1 - use)), rel=0.03)
    # Lindley's recursion says when each of them waits how long.
    wait = 0.0
    for one, before, measured in zip(requests[1:], requests, waits[1:], strict=False):
        wait = max(0.0, wait + 1.0 - (one.arrival_s - before.arrival_s))
        assert measured == pytest.approx(wait, abs=1e-6)


def test_every_request_gets_its_tokens_and_all_blocks_come_back():
    load = drawn("uniform:1:90", "uniform:1:60", 300, rate=30, seed=2)
    # So few blocks that sequences are preempted.
    found = run(engine(max_num_batched_tokens=64), Fixed(0.01), load, blocks=40)
    assert [one.output_tokens for one in found.times] == [
        one.output_tokens for one in load.requests
    ]
    assert found.num_preemptions > 0 and found.blocks_held == 0
    assert all(one.arrival_s <= one.first_s <= one.last_s for one in found.times)


def test_the_same_load_gets_the_same_bytes():
    load = drawn("lognormal:40:0.5", "20", 200, rate=20, seed=9)
    config = engine(layout=Layout(dp=2))
    first, again = (run(config, Fixed(0.01), load) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(again)
    assert msgspec.json.encode(Outcome.of(first.times)) == msgspec.json.encode(
        Outcome.of(again.times)
    )


def test_a_closed_loop_keeps_its_requests_going():
    load = drawn("8", "10", 60, concurrency=4)
    found = run(engine(), Fixed(0.5), load)
    # Each request takes 10 steps of 0.5 s; four run together.
    assert [one.last_s - one.arrival_s for one in found.times] == pytest.approx([5.0] * 60)
    outcome = Outcome.of(found.times, cut_end=True)
    assert outcome.tokens_per_s == pytest.approx(8.0, rel=0.05)
    assert outcome.tpot_s["p99"].value == pytest.approx(0.5)


def test_a_plan_ahead_hides_the_leader_and_without_it_the_leader_adds():
    load = drawn("8", "50", 1)
    for device, each in (("cpu", 1.4), ("npu", 1.0)):
        times = run(engine(device), Fixed(1.0, 1, 0.2, 0.2), load).times[0]
        assert times.tpot_s == pytest.approx(each, rel=0.02)
    # A leader slower than the device sets the pace.
    slow = run(engine("npu"), Fixed(0.1, 1, 0.2, 0.2), load).times[0]
    assert slow.tpot_s == pytest.approx(0.4, rel=0.05)


def test_stages_work_on_different_sequences_at_the_same_time():
    config = engine("npu", layout=Layout(pp=2))
    one, two = (run(config, Fixed(1.0, 2), drawn("8", "40", n)).times for n in (1, 2))
    # A lone sequence passes both stages for each token; two share the stages without loss.
    assert one[0].tpot_s == pytest.approx(2.0, rel=0.03)
    assert max(time.tpot_s for time in two) == pytest.approx(2.0, rel=0.03)


def test_the_real_prefix_cache_finds_equal_blocks():
    blocks = [LoadRequest(at, 1100, 2, (7, 8, 9)) for at in (0.0, 100.0)]
    config = EngineConfig("", max_model_len=2048, block_size=32, max_num_batched_tokens=512)
    found = run(config, Fixed(1.0), Load(tuple(blocks)), blocks=512)
    assert found.hit_share == pytest.approx(0.5, abs=0.02)
    first, again = found.times
    assert again.ttft_s < first.ttft_s


def test_prompts_without_known_tokens_are_not_taken_for_equal_ones():
    load = drawn("100", "3", 20, rate=2, seed=1)
    config = engine()
    assert run(replace(config, enable_prefix_caching=True), Fixed(0.1), load) == run(
        config, Fixed(0.1), load
    )


def test_a_hopeless_run_ends_early():
    load = drawn("4", "1", 5000, rate=100)
    found = run(engine(max_num_seqs=1), Fixed(1.0), load, give_up=lambda times: len(times) > 100)
    assert found.is_cut and len(found.times) < 300


def test_the_simulations_own_time_is_not_in_its_clock(monkeypatch: pytest.MonkeyPatch):
    load = drawn("8", "5", 5, rate=10)
    slow = Fixed(0.01)
    quick = run(engine(), slow, load)

    def stages_s(step: Sequence[ReplicaStep]) -> list[float]:
        time.sleep(0.01)
        return [0.01]

    monkeypatch.setattr(slow, "stages_s", stages_s)
    assert run(engine(), slow, load) == quick


class ByTokens(Fixed):
    """Steps that take longer with more tokens in the fullest replica."""

    def stages_s(self, step: Sequence[ReplicaStep]) -> list[float]:
        return [0.01 + 1e-4 * max(one.tokens for one in step)]


@pytest.mark.parametrize("often", [{"rate": 60.0}, {"concurrency": 64}], ids=str)
def test_some_replicas_stand_for_all(often: dict[str, Any]):
    load = drawn("lognormal:100:0.6", "uniform:2:60", 1500, **often)
    config = engine(layout=Layout(dp=8), max_model_len=1024)
    model = ModelConfig.from_dict(preset("tiny", {}))
    whole = predict(ByTokens(0), model, config, 512, load)
    some = predict(ByTokens(0), model, config, 512, load.share(4), num_replicas=2)
    assert (whole.num_replicas, some.num_replicas) == (8, 2)
    assert some.concurrency == whole.concurrency == often.get("concurrency")
    assert some.outcome.tokens_per_s == pytest.approx(whole.outcome.tokens_per_s, rel=0.05)
    for statistic in ("mean", "p90"):
        tpots = (one.outcome.tpot_s[statistic].value for one in (some, whole))
        assert next(tpots) == pytest.approx(next(tpots), rel=0.1)
    # Two replicas alone wait for each other only.
    alone = predict(ByTokens(0), model, replace(config, layout=Layout(dp=2)), 512, load.share(4))
    assert alone.outcome.tpot_s["mean"].value < 0.95 * some.outcome.tpot_s["mean"].value


class Recorded:
    """The steps of a real run: their plans, and how many were in flight."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, on_plans: Callable[[Plans], None] | None = None
    ) -> None:
        self.plans: list[Plans] = []
        self.most_in_flight = 0
        schedule = Replicas.schedule

        def noted_schedule(replicas: Replicas) -> Plans | None:
            plans = schedule(replicas)
            if plans is not None:
                self.plans.append(plans)
                self.most_in_flight = max(self.most_in_flight, replicas.num_in_flight)
                if on_plans:
                    on_plans(plans)
            return plans

        monkeypatch.setattr(Replicas, "schedule", noted_schedule)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_recorded_run_replays_to_the_same_plans(monkeypatch: pytest.MonkeyPatch, ahead: bool):
    prompts = [[1 + number] * (3 + 17 * number % 90) for number in range(12)]
    lengths = [2 + number % 7 for number in range(12)]
    options: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "num_blocks": 24}
    options |= {"max_model_len": 128, "block_size": 8, "enable_prefix_caching": False}
    options["async_scheduling"] = ahead
    with LLM(str(QUICKSTART), device="cpu", **options) as llm:
        recorded = Recorded(monkeypatch)
        params = [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths
        ]
        llm.generate(prompts, params, use_tqdm=False)
        config = llm.config
    monkeypatch.undo()
    requests = tuple(
        LoadRequest(0.0, len(prompt), length)
        for prompt, length in zip(prompts, lengths, strict=True)
    )
    replayed: list[Plans] = []
    simulate(config, 24, VOCABULARY, Fixed(0.01), Load(requests), on_step=replayed.append)
    assert len(replayed) == len(recorded.plans) > 10
    assert list(map(shapes, replayed)) == list(map(shapes, recorded.plans))


class OtherRanks:
    """Ranks of another machine, as the leader's control has them: each replica's speaker answers
    its plans in their order, with as many tokens as they sample."""

    def __init__(self, dp: int) -> None:
        self.rank, self.at, self.control = 0, SimpleNamespace(dp=0), self
        self.mesh = self
        self.speakers = list(range(1, dp + 1))
        self._due: dict[int, deque[bytes]] = {speaker: deque() for speaker in self.speakers}

    def broadcast(self, message: bytes, kind: str) -> None:
        pass

    def answer(self, plans: Plans) -> None:
        for speaker, plan in zip(self.speakers, plans, strict=True):
            if plan is not None:
                result = StepResult([Sampled(1)] * len(plan.samples), [])
                self._due[speaker].append(msgspec.msgpack.encode(result))

    def receive(self, speaker: int) -> bytes:
        return self._due[speaker].popleft()

    def execute(self, message: Any, own: Any) -> None:
        return None


@pytest.mark.parametrize("at_once", [30, 4], ids=["all at once", "a closed loop"])
@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=3), Layout(dp=2), Layout(pp=2, dp=2)])
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_the_loop_is_that_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, device: str, layout: Layout, at_once: int
):
    # Prompts of up to three chunks flow through the stages; blocks are so few that some wait.
    config = engine(device, layout=layout, max_num_batched_tokens=48, max_model_len=160)
    model = ModelConfig.from_dict(preset("tiny", {"vocab_size": VOCABULARY}))
    requests = tuple(
        LoadRequest(0.0, 3 + 17 * number % 120, 1 + number % 9) for number in range(30)
    )
    ranks = OtherRanks(layout.dp)
    info = EngineInfo(
        model="",
        layout=layout,
        device=device,
        dtype="float32",
        cache_dtype="float32",
        max_model_len=160,
        num_blocks=40,
        block_size=8,
        load_s=0.0,
        read_bytes=0,
        weight_bytes=0,
    )
    real = Engine(config, model, cast(Worker, ranks), None, info)
    recorded = Recorded(monkeypatch, ranks.answer)
    waiting = deque(
        Request(
            id=str(number),
            prompt_token_ids=[1] * one.prompt_tokens,
            params=SamplingParams(temperature=0, max_tokens=one.output_tokens, ignore_eos=True),
        )
        for number, one in enumerate(requests)
    )
    for _ in range(at_once):
        real.add(waiting.popleft())
    while real.has_unfinished:
        for delta in real.step():
            if delta.finish_reason is not None and waiting:
                real.add(waiting.popleft())
    monkeypatch.undo()
    replayed: list[Plans] = []
    load = Load(requests, concurrency=at_once)
    timer = Fixed(0.01, layout.pp)
    simulate(config, 40, VOCABULARY, timer, load, on_step=replayed.append)
    assert len(recorded.plans) > 20
    assert list(map(shapes, replayed)) == list(map(shapes, recorded.plans))
    if layout.pp > 1:
        assert recorded.most_in_flight == layout.pp


def shapes(plans: Plans) -> list[Any]:
    """Everything of plans that does not depend on the tokens' ids."""
    return [
        None
        if plan is None
        else (plan.query_lens, plan.context_lens, plan.block_tables, len(plan.samples))
        for plan in plans
    ]


def test_a_plan_has_the_shape_that_costs():
    plans: list[Plans] = []
    load = Load((LoadRequest(0.0, 20, 3), LoadRequest(0.0, 1, 3)))
    run(engine(max_num_batched_tokens=16), Fixed(0.1), load, on_step=plans.append)
    made = [shape(plan) for step in plans for plan in step if plan is not None]
    assert made[0] == ReplicaStep(16, 0, 0, 0, (Chunk(16, 0),))
    assert made[1] == ReplicaStep(5, 2, 1, 1, (Chunk(4, 16),))
    assert made[2] == ReplicaStep(2, 2, 2, 21 + 2)


def test_simulating_needs_no_torch():
    code = "import moespan.search.simulate, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
