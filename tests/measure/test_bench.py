"""`bench` reports every promised figure, refuses cases without room, and counts correctly."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from moespan import LLM, cli
from moespan.errors import ConfigError, MoespanError
from moespan.measure.bench import (
    Case,
    Workload,
    bench,
    decode_speed,
    measure,
    peak_rss_bytes,
    percentile,
)
from tests.support import QUICKSTART

SMALL = ["--context", "4", "--decode-tokens", "3", "--repeats", "2", "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_one_command_gives_all_figures_of_a_checkpoint(capsys: pytest.CaptureFixture[str]):
    sizes = ["--prefill", "8,16", "--decode-batch", "1,3"]
    code, out, _ = run(capsys, QUICKSTART, *sizes, *SMALL, "--json")
    assert code == 0
    report = json.loads(out)
    assert list(report["prefill"]) == ["8", "16"] and list(report["decode"]) == ["1", "3"]
    rows = [*report["prefill"].values(), *report["decode"].values()]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["limit_share"] > 0
        assert row["bound"] in ("compute", "memory") and len(row["seconds"]) == 2
    for row in report["prefill"].values():
        assert row["first_token_s"] > 0
    for row in report["decode"].values():
        assert row["inter_token_p99_s"] >= row["inter_token_s"] > 0
    for name in ("bandwidth_GBps", "gemm_TFLOPs", "peak_rss_bytes", "load_s", "engine_start_s"):
        assert report[name] > 0
    assert report["start_to_first_token_s"] >= report["engine_start_s"]
    assert report["layout"]["tp"] == 1 and report["model"] == str(QUICKSTART)


def test_lengths_that_the_model_cannot_take_are_left_out_of_the_default(
    capsys: pytest.CaptureFixture[str],
):
    code, out, err = run(capsys, "--preset", "tiny", "--decode-batch", "", *SMALL, "--json")
    assert code == 0, err
    assert list(json.loads(out)["prefill"]) == ["128"]


@pytest.mark.slow
def test_a_preset_needs_no_file_and_runs_under_a_layout_as_a_table(
    capsys: pytest.CaptureFixture[str],
):
    what = ["--preset", "tiny", "--load-format", "dummy", "-tp", "2"]
    code, out, err = run(capsys, *what, "--prefill", "8", "--decode-batch", "2", *SMALL)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "tiny, bfloat16, tp=2"
    assert [line.split()[:2] for line in lines[-2:]] == [["prefill", "8"], ["decode", "2"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prefill", "8"], "MODEL"),
        ([QUICKSTART, "--preset", "tiny"], "leave one out"),
        (["--preset", "huge"], "16b-4l"),
        (["--preset", "tiny", "--load-format", "safetensors"], "--load-format dummy"),
        (["--preset", "tiny", "--nnodes", "2"], "config.json on every node"),
        ([QUICKSTART, "--prefill", "0"], "prefill=(0,)"),
        ([QUICKSTART, "--prefill", "", "--decode-batch", ""], "neither"),
        ([QUICKSTART, "--prefill", "5000"], "--max-model-len"),
        ([QUICKSTART, "--input", "8"], "--context, --decode-tokens, --repeats measure steps"),
        (
            [QUICKSTART, "--prefill", "8", "--decode-batch", "3", "--max-num-seqs", "2"],
            "--max-num-seqs",
        ),
        (
            [QUICKSTART, "--prefill", "8", "--decode-batch", "40", "--num-blocks", "16"],
            "--num-blocks",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_case_that_cannot_be_measured_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[object], says: str
):
    code, out, err = run(capsys, *arguments, *SMALL)
    assert code in (1, 2) and not out and says in err


def test_a_prefix_cache_is_refused():
    with (
        LLM(str(QUICKSTART), device="cpu") as llm,
        pytest.raises(ConfigError, match="prefix cache"),
    ):
        bench(llm, Workload())


def test_all_sequences_decode_together_for_as_long_as_wanted():
    with LLM(
        str(QUICKSTART),
        device="cpu",
        max_num_seqs=4,
        max_num_batched_tokens=8,
        enable_prefix_caching=False,
    ) as llm:
        case = Case(batch=4, length=10, num_tokens=6)  # its prefills take several steps
        speed = measure(llm, case, random.Random(0))
    assert speed.seconds > 0 and len(speed.gaps_s) >= 4 * 6


def test_decode_speed_counts_from_the_latest_first_token_until_a_sequence_ends():
    times = [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0]]  # together from 2 to 4
    speed = decode_speed(times)
    assert speed.seconds == pytest.approx(2 * 2 / 3)  # two steps of two, less the one that is late
    assert sorted(speed.gaps_s) == [1.0, 1.0, 1.0]
    with pytest.raises(MoespanError, match="never decoded together"):
        decode_speed([[1.0, 2.0], [3.0, 4.0]])


def test_a_percentile_is_one_of_the_values():
    values = [float(n) for n in range(100, 0, -1)]
    assert percentile(values, 0.99) == 99 and percentile(values, 0.5) == 50
    assert percentile([7.0], 0.99) == 7


def test_peak_memory_counts_child_processes():
    alone = peak_rss_bytes()
    program = "x = b'1' * (64 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline()
        assert peak_rss_bytes() > alone + (64 << 20)
        assert peak_rss_bytes(without=child.pid) < alone + (64 << 20)
        child.communicate(b"\n")
