"""The benchmarks run, say all that their table needs, and count what a step cannot do without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from moespan import ModelConfig
from moespan.checkpoint.placement import count_parameters
from moespan.checkpoint.random import preset

# The scripts find each other where they lie, as when they are run.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import engine_overhead
import limits
import offline


def test_one_command_gives_a_table_and_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "new" / "offline.json"
    sizes = "--prompt-lens 8 16 --batch-sizes 1 3 --context 4 --decode-tokens 2 --repeats 2"
    probes = "--probe-mb 1 --probe-width 32"
    command = f"--preset tiny --device cpu {sizes} {probes}".split()
    offline.main([*command, "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["model"] == "tiny"
    assert report["layout"]["tp"] == 1
    assert all(limit > 0 for limit in report["limits"].values())
    cases = [
        (row["engine"], row["phase"], row["batch_size"], row["prompt_len"], row["num_tokens"])
        for row in report["results"]
    ]
    assert cases == [
        ("moespan", "prefill", 1, 8, 0),
        ("moespan", "prefill", 1, 16, 0),
        ("moespan", "decode", 1, 4, 2),
        ("moespan", "decode", 3, 4, 2),
    ]
    for row in report["results"]:
        assert len(row["seconds"]) == 2
        assert row["limit_tokens_per_s"] > 0
        assert row["bound"] in ("compute", "memory")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, bfloat16, tp=1")
    assert [line.split()[:2] for line in lines[-4:]] == [list(case[:2]) for case in cases]


def test_either_a_folder_or_a_preset_is_needed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        offline.main([])
    assert "--preset" in capsys.readouterr().err


def test_each_measurement_asks_for_fresh_prompts_and_decoding_leaves_out_the_prefill():
    asked: list[tuple[list[list[int]], int]] = []

    def engine(prompts: list[list[int]], num_tokens: int) -> None:
        asked.append((prompts, num_tokens))

    draws = iter(range(10))
    for case in (offline.Case("prefill", 1, 5), offline.Case("decode", 2, 3, num_tokens=7)):
        case.measure(engine, lambda case: [[next(draws)] * case.prompt_len] * case.batch_size)
    assert asked == [([[0] * 5], 1), ([[1] * 3] * 2, 1), ([[2] * 3] * 2, 8)]


def test_one_token_reads_the_active_parameters_and_multiplies_all_but_the_embedding():
    config = ModelConfig.from_dict(preset("16b", {}))
    _, active = count_parameters(config)
    table = config.vocab_size * config.hidden_size
    operations, num_bytes = limits.step_work(config, "float32", 1, 1, 0)
    attended = 4 * config.hidden_size * config.num_hidden_layers  # to itself
    assert operations == pytest.approx(2 * (active - table) + attended)
    read = active - table + config.hidden_size
    assert num_bytes == pytest.approx(4 * read + config.kv_bytes_per_token("float32"))


def test_large_batches_read_every_weight_once():
    config = ModelConfig.from_dict(preset("16b", {}))
    total, _ = count_parameters(config)
    table = config.vocab_size * config.hidden_size
    _, num_bytes = limits.step_work(config, "float32", 1000, 1, 0)
    cached = 1000 * config.kv_bytes_per_token("float32")
    read = total - table + 1000 * config.hidden_size
    assert num_bytes == pytest.approx(4 * read + cached, rel=1e-6)


def test_a_prompt_attends_to_half_of_its_square_and_needs_one_row_of_logits():
    config = ModelConfig.from_dict(preset("16b", {}))
    one, _ = limits.step_work(config, "bfloat16", 1, 1, 0)
    many, _ = limits.step_work(config, "bfloat16", 1, 100, 0)
    head = 2 * config.vocab_size * config.hidden_size
    pairs = 100 * 101 // 2 - 100
    attended = 4 * config.hidden_size * config.num_hidden_layers
    assert many == pytest.approx(100 * (one - head) + head + attended * pairs)


def test_the_engines_own_cost_is_told_by_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "engine.json"
    sizes = "--batch-sizes 1 3 --context 8 --steps 4 --warmup 1"
    engine_overhead.main([*sizes.split(), "--json", str(file)])
    results = json.loads(file.read_text())["results"]
    assert [(row["sampling"], row["batch"]) for row in results] == [
        (sampling, batch) for sampling in ("greedy", "drawn", "penalty") for batch in (1, 3)
    ]
    for row in results:
        assert sum(row["parts_us"].values()) == pytest.approx(row["total_us"])
        assert min(row["parts_us"].values()) > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["sampling", "batch", *engine_overhead.PARTS, "rest", "total"]
    assert len(lines) == 4 + len(results)


# The script for machines with NPUs


def accept(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(limits.__file__).parent / "ascend_acceptance.sh"
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
