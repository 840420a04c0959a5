"""The script for machines with NPUs says how it is used and goes on after what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

# The scripts find each other where they lie, as when they are run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import endurance
import engine_overhead
import operations
import pipeline_idle

from moespan.measure.overhead import PARTS
from moespan.planner.work import Limits

BENCHMARKS = Path(engine_overhead.__file__).parent


def test_the_engines_own_cost_is_told_by_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "engine.json"
    sizes = (
        "--batch-sizes 1 3 --replicas 2 --context 8 --steps 4 --warmup 1 --vocab-size 400 "
        "--repetitions 2"
    )
    engine_overhead.main([*sizes.split(), "--json", str(file)])
    report = json.loads(file.read_text())
    results, sampling = report["results"], report["sampling"]
    assert [(row["sampling"], row["replicas"], row["batch"]) for row in results] == [
        *((sampling, 1, batch) for sampling in ("greedy", "drawn", "penalty") for batch in (1, 3)),
        ("greedy", 2, 3),
    ]
    for row in results:
        assert sum(row["parts_us"].values()) == pytest.approx(row["total_us"])
        assert min(row["front_us"], row["leader_us_per_sequence"], *row["parts_us"].values()) > 0
    assert [(row["way"], row["logits"], row["batch"]) for row in sampling] == [
        *((way, "zipf", batch) for way in engine_overhead.WAYS for batch in (1, 3)),
        *(("top_p 0.95", "flat", batch) for batch in (1, 3)),
    ]
    assert min(row["ms"] for row in sampling) > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == [
        *("sampling", "dp", "batch", *PARTS, "rest", "total", "front", "each")
    ]
    masks = report["masks"]
    assert [(row["form"], row["batch"]) for row in masks] == [
        (form, batch) for form in engine_overhead.FORMS for batch in (1, 3)
    ]
    assert len(lines) == 12 + len(results) + len(sampling) + len(masks)


@pytest.mark.parametrize(("pp", "chunk", "chunks"), [(1, 40, 8), (4, 40, 8), (4, 20, 16)])
def test_chunks_of_a_prompt_follow_each_other_through_the_stages(pp: int, chunk: int, chunks: int):
    row = pipeline_idle.measure(pp, 1, 320, chunk)
    assert (row.plans, row.first_token) == (chunks, pp + chunks - 1)
    assert row.idle == pytest.approx((pp - 1) / (pp + chunks - 1))


def test_idle_stages_are_told_for_each_size(capsys: pytest.CaptureFixture[str]):
    sizes = "--pp 4 --prompts 1 2 --prompt-tokens 64 --chunks 8 16"
    pipeline_idle.main(sizes.split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["4", prompts, chunk] for prompts in ("1", "2") for chunk in ("8", "16")
    ]


def test_many_requests_leave_memory_and_descriptors_flat(capsys: pytest.CaptureFixture[str]):
    model = str(BENCHMARKS.parent / "models/quickstart")
    few = "-tp 1 --device cpu --requests 90 --lines 2 --slack 500"
    assert endurance.main([model, *few.split()]) == 0
    *_, table, last = capsys.readouterr().out.splitlines()
    assert table.split()[:2] == ["90", "requests"] and " front " in table
    assert last == "memory and descriptors are flat, and every request was answered"


def test_growth_is_named():
    first = {1: endurance.Process("front", 100, 5), 2: endurance.Process("rank", 100, 5)}
    last = {1: endurance.Process("front", 300, 5), 2: endurance.Process("rank", 100, 6)}
    assert endurance.grown(first, last, slack_bytes=250) == ["rank 2 has 6 descriptors after 5"]
    more, _ = endurance.grown(first, last, slack_bytes=0)
    assert more == "front 1 has grown by 0.0 MiB"
    assert "has come or gone" in endurance.grown(first, {1: first[1]}, 0)[0]


class FixedProbe:
    """A machine that reads 1 kB and computes 1000 operations in a microsecond."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> FixedProbe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self) -> Limits:
        return Limits(1e9, 1e9)


@pytest.mark.parametrize("quantization", ["none", "w8a8"])
def test_each_operation_is_told_beside_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
):
    monkeypatch.setattr(operations, "Probe", FixedProbe)
    monkeypatch.setattr(operations, "TURN_BYTES", 1)
    file = tmp_path / "operations.json"
    sizes = "--preset tiny --tokens 1,130 --contexts 8 --seconds 0.001"
    operations.main([*sizes.split(), "--quantization", quantization, "--json", str(file)])
    lines = json.loads(file.read_text())["lines"]
    names = ["qkv", "out", "shared", "dense", "route", "experts", "attention after 8", "head"]
    assert {line["operation"] for line in lines} == {*names, "attention, prefill"}
    for line in lines:
        least_us = max(line["bytes"], line["operations"]) / 1e3
        assert line["limit_share"] == pytest.approx(least_us / line["us"])


# The script for machines with NPUs


def accept(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    script = BENCHMARKS / "ascend_acceptance.sh"
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_acceptance_says_how_it_is_used(tmp_path: Path) -> None:
    asked = accept()
    assert asked.returncode == 2 and "ascend_acceptance.sh OUT" in asked.stderr
    assert accept(tmp_path).returncode == 2  # the folder exists
    nothing = accept(tmp_path / "out", DEVICE="npu", NPUS="0")
    assert nothing.returncode == 2 and "NPUS=N" in nothing.stderr


def test_acceptance_goes_on_after_what_fails_and_packs_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken\nexit 3\n")
    python.chmod(0o755)
    ran = accept(tmp_path / "out", DEVICE="cpu", NPUS="1", PYTHON=str(python))
    assert ran.returncode == 1
    lines = (tmp_path / "out/summary.jsonl").read_text().splitlines()
    steps = {one["step"]: one["exit_code"] for one in map(json.loads, lines)}
    assert set(steps.values()) == {3} and {"doctor", "verify-tiny-one-rank-float32"} <= set(steps)
    with tarfile.open(tmp_path / "out.tar.gz") as packed:
        assert {"out/summary.txt", "out/doctor.json"} <= set(packed.getnames())


# Answers like moespan on a server with 8 NPUs. Some options help there, some harm, and some fail.
SERVER = """#!/bin/bash
case "$*" in
    *acceptance_options.py*) exec {python} "$@" ;;
    *--help*)
        echo "--enforce-eager --npu-weight-format --npu-aiv --npu-update-first"
        echo "--quantization --moe-dispatch" ;;
    *verify*"--moe-dispatch fused"*) echo "refused"; exit 1 ;;
    *bench*)
        decode=100 prefill=1000 spread=0.01
        case "$*" in
            *--enforce-eager*) decode=50 ;;
            *--npu-weight-format*) decode=101 prefill=1010 ;;
            *--npu-aiv*) decode=120 ;;
            *--npu-update-first*) decode=105 spread=0.2 ;;
            *--quantization\\ w8a8*) decode=150 prefill=800 ;;
            *--quantization\\ int8*) echo "crashed"; exit 1 ;;
        esac
        [ "${{TASK_QUEUE_ENABLE:-}}" != 2 ] || prefill=1100
        echo "a line before"
        echo "{{\\"decode\\": {{\\"1\\":" \\
            "{{\\"tokens_per_s\\": $decode, \\"spread\\": $spread}}}}," \\
            "\\"prefill\\": {{\\"2048\\": {{\\"tokens_per_s\\": $prefill}}}}}}" ;;
esac
"""


def test_acceptance_ends_with_the_options_to_switch_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(SERVER.format(python=sys.executable))
    python.chmod(0o755)
    ran = accept(tmp_path / "out", DEVICE="npu", NPUS="8", PYTHON=str(python))
    assert ran.returncode == 1  # npu-smi is missing, and steps fail
    table = (tmp_path / "out/options.txt").read_text().splitlines()
    assert ran.stdout.splitlines()[-1 - len(table) : -1] == table
    verdicts = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in table[1:-1]}
    assert verdicts == {
        "--enforce-eager": "no",
        "--quantization int8": "unknown: see option-int8-with.log",
        "--quantization w8a8": "depends: see the speeds",
        "TASK_QUEUE_ENABLE=2": "yes",
        "--npu-weight-format nz": "no",
        "--npu-aiv": "yes",
        "--npu-update-first": "no",
        "--moe-dispatch fused": "no: see option-fused-dispatch-verify.log",
    }
    assert table[-1] == "switch on: TASK_QUEUE_ENABLE=2; --npu-aiv"
    aiv = next(line for line in table if line.startswith("--npu-aiv"))
    assert "-tp 8" in aiv and "decode 1 +20.0%, prefill 2048 +0.0%" in aiv


def test_acceptance_runs_only_the_steps_that_are_asked_for(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(SERVER.format(python=sys.executable))
    python.chmod(0o755)
    ran = accept(
        tmp_path / "out", DEVICE="npu", NPUS="8", PYTHON=str(python), STEPS="^option-(aiv|nz-with)"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "out/summary.jsonl").read_text().split("\n")[:-1]
    ]
    assert steps == ["make-checkpoint", "option-nz-without", "option-nz-with"] + [
        f"option-aiv-{which}" for which in ("verify", "without", "with")
    ]
    nz, aiv = (tmp_path / "out/options.txt").read_text().splitlines()[1:-1]
    assert nz.endswith("unknown: not verified") and aiv.endswith("yes")
