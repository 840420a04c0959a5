"""Requests of a load come when they are due, and their times are those of their tokens."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator

import pytest

from moespan import LLM, SamplingParams
from moespan.checkpoint.presets import preset
from moespan.cli import main
from moespan.cli.show import load_table
from moespan.measure.under_load import LoadRun, bench_load
from moespan.planner import load
from tests.support import QUICKSTART


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(preset("tiny", {"num_hidden_layers": 2})))
    with LLM(str(folder), device="cpu", load_format="dummy", num_blocks=64) as llm:
        yield llm


def test_an_open_loop_waits_for_arrivals_and_not_for_answers(llm: LLM) -> None:
    asked = load.drawn("uniform:4:20", "24", 20, rate=200)
    started = time.perf_counter()
    times = LoadRun(llm, asked).run()
    assert len(times) == 20 and {one.output_tokens for one in times} == {24}
    assert times == sorted(times)
    for one, request in zip(times, asked.requests, strict=True):
        assert one.arrival_s - times[0].arrival_s == pytest.approx(request.arrival_s)
        assert started <= one.arrival_s < one.first_s <= one.last_s
    # No request waits for the end of all before it.
    assert any(a.last_s > b.first_s for a, b in itertools.pairwise(times))


def test_a_closed_loop_has_so_many_requests_open(llm: LLM) -> None:
    run = LoadRun(llm, load.drawn("8", "5", 12, concurrency=3))
    most = 0
    paced = run._paced()

    def counted() -> Iterator[object]:
        nonlocal most
        for one in paced:
            most = max(most, run._num_open)
            yield one

    run._paced = counted  # type: ignore[method-assign, assignment]
    times = run.run()
    assert len(times) == 12 and most == 3


def test_a_report_has_the_figures_of_a_plan(llm: LLM) -> None:
    report = bench_load(llm, load.drawn("8", "4", 30, rate=100))
    assert 15 <= report["num_requests"] <= 27  # a tenth at least warms up
    for latency in ("ttft_s", "tpot_s"):
        assert report[latency].keys() == {"mean", "p50", "p90", "p95", "p99"}
        assert 0 < report[latency]["p50"]["value"] <= report[latency]["p99"]["value"]
    assert report["tokens_per_s"] > 0 and report["memory"][0]["weight_bytes"] > 0
    assert report["prefix_hits"] == 0


def test_too_few_requests_have_no_interval(llm: LLM) -> None:
    report = bench_load(llm, load.drawn("8", "4", 3, rate=100))
    assert report["ttft_s"]["p50"]["half_width"] is None
    assert "±" not in "\n".join(load_table(report))


def test_a_stream_waits_as_long_as_its_source_says(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    yielded = []

    def source() -> Iterator[object]:
        for number in range(2):
            due = time.monotonic() + 0.2
            while (wait_s := due - time.monotonic()) > 0:
                yield wait_s
            yielded.append(number)
            yield llm.request([1, 2, 3], params)

    started = time.monotonic()
    outputs = list(llm.stream(source()))  # type: ignore[arg-type]
    assert len(outputs) == 2 and yielded == [0, 1]
    assert 0.4 <= time.monotonic() - started < 20


def test_a_share_is_at_least_one_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(QUICKSTART), "--input", "8", "--share", "0"])
    assert ended.value.code == 2 and "--share 0 must be at least 1" in capsys.readouterr().err
