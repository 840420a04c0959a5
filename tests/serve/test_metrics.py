"""Metrics say what happened, under our names and vLLM's, and hold nothing that clients sent."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from moespan.config import EngineConfig
from moespan.engine.info import StepFigures
from moespan.engine.request import OutputDelta, Timing
from moespan.errors import EngineDeadError
from moespan.serve.life import Life, Unavailable
from moespan.serve.metrics import Metrics, metrics_route
from moespan.serve.options import LifeOptions
from tests.serve.fake_ranks import FakeStart, metrics, pulse, request, token
from tests.serve.scene import Served, Wired, play_wired, post_bytes
from tests.serve.virtual_time import run, settle

VLLM = {
    # Names in vllm/v1/metrics/loggers.py of vLLM, without the ending that Prometheus adds.
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("num_preemptions", "prefix_cache_queries", "prefix_cache_hits"),
    *("spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
    "spec_decode_num_accepted_tokens",
    *("prompt_tokens", "generation_tokens", "request_success"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "request_params_n"),
    *("request_params_max_tokens", "iteration_tokens_total", "cache_config_info"),
}
OWN = {
    *("engine_up", "engine_restarts", "rank_beat_age_seconds", "step_seconds", "steps"),
    *("http_requests", "rejected", "disconnects", "open_streams", "event_loop_lag_seconds"),
    "build_info",
}


def samples(found: Metrics) -> dict[str, float]:
    """Every sample as `name{label=value,...}`, without `model_name` and `engine`."""
    values = {}
    for family in text_string_to_metric_families(found.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name")
            labels.pop("engine", None)
            words = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            values[f"{sample.name}{{{words}}}" if words else sample.name] = sample.value
    return values


def families(found: Metrics) -> set[str]:
    return {one.name for one in text_string_to_metric_families(found.render().decode())}


def told(script) -> dict[str, float]:
    """The samples after `script` has played with a life that runs."""
    start, found = FakeStart(), metrics()

    async def work() -> dict[str, float]:
        life = Life(start, LifeOptions(), found)
        running = asyncio.create_task(life.run())
        await settle()
        await script(life, start)
        values = samples(found)
        life.force()
        await asyncio.wait((running,))
        return values

    return run(work())


def test_all_names_are_there_and_those_of_vllm_twice():
    expected = {f"moespan_{name}" for name in VLLM | OWN}
    assert families(metrics()) == expected | {f"vllm:{name}" for name in VLLM}
    alone = Metrics("fake", EngineConfig("fake"), alias_vllm=False)
    assert families(alone) == expected


def test_a_request_leaves_its_times_and_tokens():
    async def script(life: Life, start: FakeStart) -> None:
        inbox = life.submit(request("a", n=2, num_tokens=5))
        for seconds, delta in (
            (1.0, OutputDelta(id="a")),  # a part of the prompt's log probabilities
            (1.0, msgspec.structs.replace(token("a", index=0), timing=Timing(0.5, 0.75))),
            (0.1, token("a", index=0)),
            (0.3, token("a", index=1)),
            (0.3, token("a", index=0, end="stop")),
            (0.3, token("a", index=1, end="length")),
        ):
            await asyncio.sleep(seconds)
            start.ranks.tell(delta)
        inbox.close()

    values = told(script)
    for prefix in ("moespan_", "vllm:"):
        expected = {
            "prompt_tokens_total": 5,
            "generation_tokens_total": 5,
            "request_success_total{finished_reason=stop}": 1,
            "request_success_total{finished_reason=length}": 1,
            "request_success_total{finished_reason=abort}": 0,
            "request_success_total{finished_reason=error}": 0,
            "request_success_total{finished_reason=timeout}": 0,
            "time_to_first_token_seconds_sum": 2.0,
            "time_to_first_token_seconds_count": 1,
            "inter_token_latency_seconds_sum": 0.1 + 0.6 + 0.6,
            "inter_token_latency_seconds_count": 3,
            "request_time_per_output_token_seconds_sum": 0.7 / 2 + 0.6,
            "e2e_request_latency_seconds_sum": 3.0,
            "request_queue_time_seconds_sum": 0.5,
            "request_prefill_time_seconds_sum": 0.75,
            "request_decode_time_seconds_sum": 1.0,
            "request_inference_time_seconds_sum": 1.75,
            "request_prompt_tokens_sum": 5,
            "request_generation_tokens_sum": 5,
            "request_generation_tokens_count": 2,
            "request_params_n_sum": 2,
            "request_params_max_tokens_sum": 9,
            "cache_config_info{block_size=4,cache_dtype=float32,enable_prefix_caching=True,"
            "kv_cache_size_tokens=32,num_gpu_blocks=8}": 1,
        }
        assert {name: values[prefix + name] for name in expected} == pytest.approx(expected)


def test_aborted_and_lost_requests_are_counted():
    async def script(life: Life, start: FakeStart) -> None:
        life.submit(request("a", n=2)).close()
        inbox = life.submit(request("b"))
        start.ranks.tell(token("b"))
        start.ranks.die()
        await settle()
        await inbox.next()
        with pytest.raises(EngineDeadError):
            await inbox.next()
        with pytest.raises(Unavailable):
            life.submit(request("c"))
        await asyncio.sleep(2)

    values = told(script)
    assert values["vllm:request_success_total{finished_reason=abort}"] == 2
    assert values["vllm:request_success_total{finished_reason=error}"] == 1
    assert values["moespan_e2e_request_latency_seconds_count"] == 2
    assert values["moespan_rejected_total{reason=engine_dead}"] == 1
    assert values["moespan_engine_restarts_total{reason=died}"] == 1
    assert values["moespan_engine_restarts_total{reason=silent}"] == 0


def test_the_pulse_sets_gauges_and_grows_counters_over_lives():
    seen: list[dict[str, float]] = []

    async def script(life: Life, start: FakeStart) -> None:
        steps = [StepFigures("prefill", 40, 0.25), StepFigures("decode", 2, 0.5)]
        start.ranks.tell(pulse=pulse(2, 1, steps, preemptions=1, queried=10, hit=4))
        start.ranks.tell(pulse=pulse(4, 0, preemptions=1, queried=30, hit=4))
        await asyncio.sleep(1)
        seen.append(samples(life.metrics))
        start.ranks.die()
        await settle()
        seen.append(samples(life.metrics))
        await asyncio.sleep(2)
        start.ranks.tell(pulse=pulse(1, 0, preemptions=2, queried=3, drafted=9, accepted=5))

    values = told(script)
    first, dead = seen
    assert first["vllm:num_requests_running"] == 4 and first["vllm:num_requests_waiting"] == 0
    assert first["vllm:kv_cache_usage_perc"] == 0.5
    assert first["moespan_engine_up"] == 1 and first["moespan_rank_beat_age_seconds{rank=0}"] == 0
    assert first["vllm:num_preemptions_total"] == 1
    assert first["vllm:prefix_cache_queries_total"] == 30
    assert first["moespan_steps_total{kind=prefill}"] == 1
    assert first["moespan_step_seconds_sum"] == 0.75
    assert first["vllm:iteration_tokens_total_sum"] == 42
    assert dead["moespan_engine_up"] == dead["vllm:num_requests_running"] == 0
    assert dead["vllm:kv_cache_usage_perc"] == 0
    assert "moespan_rank_beat_age_seconds{rank=0}" not in dead
    assert values["vllm:num_preemptions_total"] == 3
    assert values["vllm:prefix_cache_queries_total"] == 33
    assert values["vllm:prefix_cache_hits_total"] == 4
    assert values["vllm:spec_decode_num_drafts_total"] == 1
    assert values["vllm:spec_decode_num_draft_tokens_total"] == 9
    assert values["vllm:spec_decode_num_accepted_tokens_total"] == 5


def test_a_scrape_gets_text_that_prometheus_reads():
    async def work() -> httpx.Response:
        app = Starlette(routes=[metrics_route(metrics())])
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://s"
        ) as http:
            return await http.get("/metrics")

    answer = run(work())
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == metrics().render().decode()


def test_streams_and_clients_that_leave_are_counted():
    async def script(served: Served, wired: Wired) -> None:
        line = await wired.line()
        body = b'{"prompt": "12+30=", "stream": true}'
        await line.send(post_bytes("/v1/completions", body))
        while not (values := samples(served.life.metrics))["moespan_open_streams"]:
            await asyncio.sleep(0.01)
        assert values["moespan_disconnects_total"] == 0
        line.close()
        while not (values := samples(served.life.metrics))["moespan_disconnects_total"]:
            await asyncio.sleep(0.01)
        assert values["moespan_open_streams"] == 0
        assert values["vllm:request_success_total{finished_reason=abort}"] == 1
        name = "moespan_http_requests_total{route=/v1/completions,status=499}"
        assert values[name] == 1
        assert served.ranks.running == {}

    play_wired(script, holds=True)


def test_names_of_models_stay_as_they_are():
    name = 'a "b"\nmoespan_c{'
    found = Metrics(name, EngineConfig("fake"))
    labels = {
        sample.labels["model_name"]
        for family in text_string_to_metric_families(found.render().decode())
        for sample in family.samples
    }
    assert labels == {name}


def test_labels_hold_nothing_that_a_client_sent():
    async def script(life: Life, start: FakeStart) -> None:
        life.submit(request("secret-id"))
        start.ranks.tell(token("secret-id", end="secret-reason"))

    values = told(script)
    assert values["moespan_request_success_total{finished_reason=error}"] == 1
    assert not [name for name in values if "secret" in name]
