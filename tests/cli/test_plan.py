"""The verb `plan`: its files, its exit codes, and its refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moespan.cli import main

QUICK = ["--input", "64", "--output", "8", "--num-requests", "40", "--max-num-seqs", "64"]
QUICK += ["--max-num-batched-tokens", "1024", "--jobs", "1", "--what-if", "none"]


def run(
    capsys: pytest.CaptureFixture[str], *arguments: str, preset: str = "tiny"
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `moespan plan`."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--preset", preset, *QUICK, *arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def run_without_lengths(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """As `run`, for loads that bring their own lengths."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--preset", "tiny", *QUICK[4:], *arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def bench_line(out: str) -> str:
    """The line with the command that measures."""
    return next(line for line in out.splitlines() if line.startswith("next "))


def test_a_plan_is_printed_and_written_in_every_form(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    page, data = tmp_path / "plan.html", tmp_path / "plan.json"
    given = ["--rate", "5", "--ttft", "1s", "--tpot", "50ms@p99", "--html", str(page)]
    code, out, err = run(
        capsys, "--hardware", "h100", "--devices", "2", *given, "--json", str(data)
    )
    assert code == 0, err
    assert "NVIDIA H100" in out and "start 1    node 0: " in out
    found = json.loads(data.read_text())
    assert found["met"] and found["load"]["rate"] == 5
    assert page.read_text().startswith("<!doctype html>")


def test_targets_that_nothing_meets_are_exit_code_1_and_the_closest_are_shown(
    capsys: pytest.CaptureFixture[str],
):
    given = ["--hardware", "h100", "--devices", "2", "--rate", "5", "--tpot", "1ms@p50", "--ttft"]
    code, out, _ = run(capsys, *given, "0.01ms")
    assert code == 1
    assert re.search(r"missed     1: TTFT p90 ≤ 0.01 ms missed: [0-9.]+ ms, [0-9.,]+ times", out)
    assert "would do   none of the changes that were tried; relax the targets" in out
    assert "TTFT p90 ≤ 0.01 ms" in out.splitlines()[2]


def test_a_latency_without_end_is_told_in_words_and_as_null(capsys: pytest.CaptureFixture[str]):
    given = ["--hardware", "h100", "--devices", "1", "--rate", "1e6", "--ttft", "1s", "--fast"]
    code, out, _ = run(capsys, *given)
    assert code == 1 and "inf" not in out
    assert "TTFT p90 ≤ 1.00 s is out of reach: requests come faster than they are served" in out
    assert re.search("would do   fewer requests: about [0-9,]+ a second instead of [0-9,]+\n", out)
    _, out, _ = run(capsys, *given, "--json", "-")
    assert "Infinity" not in out
    assert json.loads(out)["plans"][0]["misses"][0]["value_s"] is None


def test_json_on_stdout_is_nothing_else(capsys: pytest.CaptureFixture[str]):
    given = ["--hardware", "910b3", "--devices", "1", "--concurrency", "4", "--json", "-"]
    code, out, _ = run(capsys, *given)
    assert code == 0 and json.loads(out)["version"] == 1


def test_one_layout_is_explained(capsys: pytest.CaptureFixture[str]):
    given = ["--hardware", "h100", "--devices", "2", "--fast", "--explain"]
    code, out, _ = run(capsys, *given, "tp=2")
    assert code == 0 and "1 × tp=2" in out and "memory, GiB" in out
    code, _, err = run(capsys, *given, "tp=16")
    assert code == 2 and "no such layout" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-model-len", "0"], "max_model_len=0 must be at least 1"),
        (["--speed", "2"], "--speed 2 is for the arrival times of a trace; give --load FILE"),
        (
            ["--quantization", "int8,foo"],
            "--quantization='foo' is not one of none, int8, w8a8, fp8, int4",
        ),
    ],
)
def test_a_flag_that_has_no_effect_or_is_impossible_is_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], says: str
):
    code, _, err = run(capsys, "--hardware", "h100", "--devices", "1", *flags)
    assert code == 2 and says in err


def test_a_trace_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "load.jsonl"
    rows = [
        {"arrival_s": at / 10, "prompt_tokens": 20 + at, "output_tokens": 5} for at in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = ["--hardware", "h100", "--devices", "1", "--load", str(path)]
    code, out, _ = run_without_lengths(capsys, *given)
    assert code == 0 and "30 requests of load.jsonl" in out
    rows.append({"arrival_s": 9, "prompt_tokens": 600, "output_tokens": 5})
    path.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run_without_lengths(capsys, *given)
    assert code == 2 and "request 30 has 600 prompt" in err and "--clip" in err
    code, out, _ = run_without_lengths(capsys, *given, "--clip", "--fast")
    assert code == 0 and "1 prompts CUT" in out and "--clip" in bench_line(out)
    _, out, _ = run_without_lengths(capsys, *given, "--clip", "--fast", "--speed", "2")
    assert bench_line(out).endswith("load.jsonl --clip --speed 2")  # not drawn arrivals


def test_a_profile_of_another_version_warns(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    made = {"schema": 1, "name": "old", "base": "h100", "made": {"moespan": "0.0.1"}}
    (tmp_path / "old.json").write_text(json.dumps(made))
    given = ["--hardware", str(tmp_path / "old.json"), "--devices", "1", "--fast"]
    code, _, err = run(capsys, *given)
    assert code == 0 and err.count("measured with moespan 0.0.1, and this is") == 1


@pytest.mark.parametrize("often", [[], ["--rate", "5"]], ids=str)
def test_clip_cuts_lengths_that_are_given_exactly(
    capsys: pytest.CaptureFixture[str], often: list[str]
):
    given = ["--hardware", "h100", "--devices", "1", "--fast", "--input", "600", *often]
    code, out, err = run(capsys, *given, "--clip")
    assert code == 0, err
    assert "prompts CUT" in out and "--clip" in bench_line(out)
    code, _, err = run(capsys, *given)
    assert code == 2 and "--clip cuts such prompts" in err


def test_lengths_are_refused_before_the_search_forks(capfd: pytest.CaptureFixture[str]):
    """`capfd` sees what other processes print."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--preset", "16b", "--hardware", "910b3", "--jobs", "2", "--input", "0"])
    err = capfd.readouterr().err
    assert ended.value.code == 2 and len(err.splitlines()) == 1 and "length '0'" in err


def test_the_dtype_is_one_that_the_device_computes(capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, "--hardware", "310p3", "--devices", "1", "--fast")
    assert code == 0, err
    assert "float16" in bench_line(out) and "bfloat16" not in out


def test_the_rate_is_the_one_that_was_given(capsys: pytest.CaptureFixture[str]):
    given = ["--hardware", "h100", "--devices", "2", "--only", "tp=1 dp=1 sp=1 pp=1", "--fast"]
    code, out, err = run(capsys, *given, "--rate", "24")
    assert code == 0, err
    assert bench_line(out).endswith("--rate 12")
    _, out, _ = run(capsys, *given, "--rate", "100000", "--ttft", "1s")
    assert "a second instead of 100,000\n" in out


def test_more_devices_than_a_plan_takes_are_refused(capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "--hardware", "910b3", "--nodes", "1000000", "--fast")
    assert code == 2 and "--nodes: 8,000,000 devices exceed the 16,384 of the largest plan" in err


def test_a_long_search_tells_what_it_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("moespan.cli.plan._TOLD_EVERY_S", 0.0)
    code, _, err = run(capsys, "--hardware", "h100", "--devices", "1", "--rate", "5")
    assert code == 0
    assert "s: estimating 1 layouts\n" in err and re.search(r"s: simulating \d+ layouts\n", err)


def test_a_picture_without_matplotlib_is_refused_before_the_search(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("moespan.search.explore.explore", lambda question: pytest.fail("searched"))
    code, _, err = run(capsys, "--hardware", "h100", "--plot", str(tmp_path / "front.png"))
    assert code == 2 and "--plot needs matplotlib" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "abacus"], "hardware 'abacus' is neither"),
        (["--hardware", "h100", "--tpot", "fast"], "tpot='fast' is not a time"),
        (["--hardware", "h100", "--what-if", "cards=1"], "--what-if 'cards=1'"),
        (["--hardware", "h100", "--only", "tp"], "'tp' is not a list of axes"),
        (["--hardware", "h100", "--plot", "a.gif"], "must end in .png or .svg"),
        (["--hardware", "h100", "--num-requests", "3"], "--num-requests 3 must be at least 20"),
        (["--hardware", "h100", "--rate", "-1"], "rate=-1.0 must be"),
        (["--hardware", "h100", "--input", "none"], "length 'none' is not"),
        (["--hardware", "h100", "--input", "600"], "request 0 has 600 prompt"),
        (["--hardware", "h100", "--routing", "x.json"], "routing 'x.json' is neither"),
        (["--hardware", "h100", "--quantization", "int7"], "int7"),
        (["--hardware", "h100", "--json", "no/such/x"], "there is no folder no/such"),
        (["--hardware", "310p3", "--dtype", "bfloat16"], "has figures for float16"),
        (["--hardware", "h100", "--max-model-len", "100000"], "max_model_len=100000 exceeds"),
        (["--hardware", "h100", "--only", "tp=3"], "--only tp=3: no layout of 1 devices"),
        (["--hardware", "h100", "--what-if", "nodes=-5"], "--what-if nodes=-5 leaves no device"),
        (["--hardware", "h100", "--what-if", "nodes=+9000"], "72,001 devices exceed the 16,384"),
        (["--hardware", "h100", "--load", "x.csv"], "leave out --input and --output"),
    ],
)
def test_what_cannot_be_used_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
):
    code, _, err = run(capsys, *arguments, "--devices", "1")
    assert code == 2 and words in err


def test_no_torch_is_needed_and_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    program = (
        "import sys; from moespan.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    given = ["plan", "--preset", "tiny", *QUICK, "--hardware", "h100", "--devices", "2"]
    ran = [
        subprocess.run(
            [sys.executable, "-c", program, *given, "--rate", "5", "--json", "-", "--jobs", jobs],
            capture_output=True,
        )
        for jobs in ("1", "2")
    ]
    assert [one.returncode for one in ran] == [0, 0], ran[0].stderr.decode()
    assert ran[0].stdout == ran[1].stdout
