"""The comparison with other engines: what it measures, keeps and prints, on engines made up."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moespan import ModelConfig
from moespan.config import EngineConfig
from moespan.measure.bench import Case
from moespan.planner.work import Limits
from tests.support import DATA, QUICKSTART

# The scripts find each other where they lie, as when they are run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peer_divergence
import peer_formats
import peer_report
import peers

TINY = DATA / "oracle" / "tiny"

FAKE_ENGINE = """
class Engine:
    packages = ("numpy",)

    def __init__(self, job):
        if {broken}:
            raise ValueError("it is broken")

    def run(self, prompts, num_tokens):
        if len(set(num_tokens)) > 1:
            raise NotImplementedError("requests of different lengths")
        return [[{step_s} * (i + 1) for i in range(count)] for count in num_tokens]
"""


class FakeProbe:
    """A machine that reads 10 GB and computes 1 TFLOP in a second."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self) -> Limits:
        return Limits(10e9, 1e12)

    def __enter__(self) -> FakeProbe:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "Probe", FakeProbe)
    monkeypatch.setattr(peers, "PEERS", dict(peers.PEERS))
    monkeypatch.setattr(peers, "_SETTLE_S", 0.0)
    monkeypatch.setattr(peers, "_QUIET_SHARE", 1.0)
    monkeypatch.setattr(peers, "draw", lambda report, folder: [])


def write_engine(path: Path, *, step_s: float = 0.5, broken: bool = False) -> str:
    path.write_text(FAKE_ENGINE.format(step_s=step_s, broken=broken))
    return f"{path.stem}={sys.executable}:{path}"


def compare(out: Path, engines: list[str], *more: str) -> list[dict[str, Any]]:
    """Run it on the tiny checkpoint; the lines of what was measured."""
    rows = "--rows prefill-128,decode-8,mixed"
    command = f"run {TINY} --out {out} --rounds 2 {rows}".split()
    names = [engine.partition("=")[0] for engine in engines]
    flags = [part for engine in engines for part in ("--engine", engine)]
    peers.main([*command, *flags, "--peers", ",".join(names), *more])
    return peers.read_records(out / "measurements.jsonl")


def test_engines_take_turns_and_all_figures_come_of_it(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
):
    engines = [write_engine(tmp_path / f"{name}.py") for name in ("first", "second")]
    records = compare(tmp_path / "out", engines)
    started = [one["engine"] for one in records if "start_s" in one]
    assert started == ["first", "second", "second", "first"]
    report = json.loads((tmp_path / "out/results.json").read_text())
    prefill = report["rows"]["prefill-128"]["engines"]["first"]
    assert prefill["tokens_per_s"] == pytest.approx(128 / 0.5)
    assert len(prefill["seconds"]) == 4 and prefill["latency_s"] == pytest.approx(0.5)
    decode = report["rows"]["decode-8"]["engines"]["first"]
    assert decode["tokens_per_s"] == pytest.approx(8 / 0.5)
    assert decode["latency_s"] == decode["latency_p99_s"] == pytest.approx(0.5)
    work = Case(1, 128).work(
        ModelConfig.from_pretrained(TINY), EngineConfig(model="", dtype="bfloat16")
    )
    limit_s = max(work.operations / 1e12, work.num_bytes / 10e9)
    assert prefill["limit_share"] == pytest.approx(limit_s / 0.5)
    assert "mixed" not in report["rows"]  # these cannot
    engine = report["engines"]["second"]
    assert engine["peak_rss_bytes"] > 1e6 and engine["error"] is None and engine["versions"]
    assert 0 < engine["load_s"] < engine["start_to_first_token_s"]
    printed = capsys.readouterr().out
    assert (tmp_path / "out/table.md").read_text() == printed
    assert "| decode batch 8, tokens/s | 16.0 (" in printed
    peers.main(["table", str(tmp_path / "out/results.json")])
    assert capsys.readouterr().out == printed


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path: Path, quick: None):
    engine, file = write_engine(tmp_path / "one.py"), tmp_path / "out/measurements.jsonl"
    records = compare(tmp_path / "out", [engine])
    assert compare(tmp_path / "out", [engine]) == records  # there was nothing left to do

    def measured(records: list[dict[str, Any]]) -> list[tuple[int, str]]:
        return [(one["round"], one["row"]) for one in records if one.get("measured")]

    lines = file.read_text().splitlines(keepends=True)
    cut = next(i for i, one in enumerate(records) if one.get("round") == 1 and "row" in one)
    file.write_text("".join(lines[: cut + 1]) + lines[cut + 1][:10])  # stopped while it wrote
    assert sorted(measured(compare(tmp_path / "out", [engine]))) == sorted(measured(records))


def test_what_was_measured_of_something_else_is_not_mixed_in(tmp_path: Path, quick: None):
    engine = write_engine(tmp_path / "one.py")
    compare(tmp_path / "out", [engine])
    with pytest.raises(SystemExit, match="of another measurement"):
        compare(tmp_path / "out", [engine], "--threads", "63")


def test_an_engine_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
):
    broken = write_engine(tmp_path / "broken.py", broken=True)
    records = compare(tmp_path / "out", [broken, write_engine(tmp_path / "whole.py")])
    assert [one["engine"] for one in records if "failed" in one] == ["broken"] * 2
    assert "- broken: did not start; failed: ValueError: it is broken" in capsys.readouterr().out
    assert "it is broken" in (tmp_path / "out/broken.log").read_text()
    write_engine(tmp_path / "broken.py")  # mended: it is measured now
    records = compare(tmp_path / "out", [broken])
    assert sum(one["engine"] == "broken" for one in records[1:] if one.get("measured")) == 8
    assert "failed" not in capsys.readouterr().out
    for name in ("broken", "whole"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    alone = [f"{name}={sys.executable}:{tmp_path / name}.py" for name in ("broken", "whole")]
    with pytest.raises(SystemExit, match="nothing was measured"):
        compare(tmp_path / "none", alone)


def test_a_disturbed_measurement_is_made_again(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "_QUIET_SHARE", -1.0)  # nothing is quiet enough
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    asked = 0
    ask = peers.Process.ask

    def count(self: peers.Process, *question: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return ask(self, *question)

    monkeypatch.setattr(peers.Process, "ask", count)
    more = ["--rows", "prefill-128", "--rounds", "1", "--retries", "2"]
    records = compare(tmp_path / "out", [write_engine(tmp_path / "one.py")], *more)
    assert sum(bool(one.get("measured")) for one in records) == 2
    assert asked == 1 + 2 * 3  # the warm-up, and each of two until no retry is left


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rows", "prefill-7"], "'prefill-7' is not one of prefill-128"),
        (["--python", "vllm"], "is not NAME=PATH"),
        (["--peers", "nothing"], "is not one of moespan"),
        (["--peers", "vllm"], "vllm needs --python vllm=PATH"),
        (["--engine", "a=b"], "is not NAME=PYTHON:SCRIPT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_compared_is_one_clear_line(
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
):
    with pytest.raises(SystemExit) as ended:
        peers.main(["run", str(TINY), "--out", str(tmp_path), *flags])
    assert says in f"{ended.value.code} {capsys.readouterr().err}"


def test_long_contexts_and_other_options_of_our_engine_are_measured_when_they_are_named(
    tmp_path: Path,
):
    command = ["run", str(TINY), "--out", str(tmp_path), "--python", "vllm=python"]
    args = peers.parser().parse_args(command)
    args.python = dict(args.python)
    assert "decode-8" in args.rows and "decode-8-2048" not in args.rows
    chosen = peers.chosen_peers(args)
    assert {"moespan", "moespan-int4", "vllm"} <= chosen.keys()
    assert not {"moespan-tp2", "moespan-mapped", "llama.cpp"} & chosen.keys()
    named = [*command, "--peers", "moespan-tp2", "--rows", "prefill-3968,decode-8-3968"]
    args = peers.parser().parse_args(named)
    args.python = dict(args.python)
    assert [*peers.chosen_peers(args)] == ["moespan-tp2"]
    for row in args.rows:
        prompts, counts = peers.ROWS[row].questions(random.Random(0), 100)
        assert max(len(prompt) for prompt in prompts) + max(counts) <= 4096


@pytest.mark.parametrize(("name", "threads"), [("moespan", 3), ("moespan-tp2", 1)])
def test_ranks_share_the_threads(name: str, threads: int):
    assert peers.PEERS[name].threads(3) == threads


def test_our_engine_answers_like_the_peers(tmp_path: Path):
    with peers.Process(
        peers.PEERS["moespan"], sys.executable, str(QUICKSTART), 1, tmp_path / "log"
    ) as process:
        answer = process.ask([[1, 2, 3], [4]], [2, 5])
        assert [len(times) for times in answer["times"]] == [2, 5]
        assert all(times == sorted(times) and times[0] > 0 for times in answer["times"])
        # The metadata of some wheels leaves out what follows the +.
        versions = process.versions["torch"], torch.__version__
        assert len({version.partition("+")[0] for version in versions}) == 1, versions


def test_ours_is_compared_with_the_best_peer_of_its_precision():
    figures = {"moespan": 8.0, "moespan-int8": 9.0, "vllm": 4.0, "llama.cpp": 6.0}
    assert peer_report.ratio_to_best_peer(figures, more_is_better=True) == 1.5
    assert peer_report.ratio_to_best_peer(figures, more_is_better=False) == 0.5
    assert peer_report.ratio_to_best_peer({"moespan": 8.0}, more_is_better=True) is None


@pytest.mark.parametrize(
    ("number", "text"), [(1234.5, "1234"), (99.96, "100.0"), (12.34, "12.3"), (0.456, "0.46")]
)
def test_figures_have_about_three_digits(number: float, text: str):
    assert peer_report.three_digits(number) == text


def test_pictures_are_drawn_of_a_report(tmp_path: Path, quick: None):
    pytest.importorskip("matplotlib")
    compare(tmp_path / "out", [write_engine(tmp_path / "one.py")])
    report = json.loads((tmp_path / "out/results.json").read_text())
    for file in peer_report.draw(report, tmp_path):
        assert file.read_bytes().startswith(b"\x89PNG")
    del report["rows"]["prefill-128"], report["rows"]["decode-8"]
    report["rows"]["mixed"] = {"label": "mixed load", "work": None, "engines": {}}
    assert [file.name for file in peer_report.draw(report, tmp_path)] == ["bars.png"]


# Formats of others


def test_a_gguf_file_holds_every_tensor_of_the_checkpoint_once():
    config = json.loads((TINY / "config.json").read_text())
    read = peer_formats.checkpoint_reader(TINY)
    used: list[str] = []

    def note(name: str) -> torch.Tensor:
        used.append(name)
        return read(name)

    names = set()
    for entry in peer_formats.gguf_entries(config, note):
        assert tuple(entry.read().shape) == entry.shape, entry.name
        assert entry.keeps_f32 == ("norm" in entry.name or "gate_inp" in entry.name)
        names.add(entry.name)
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    assert sorted(used) == sorted(index["weight_map"])
    assert {"token_embd.weight", "blk.1.ffn_down_exps.weight", "output.weight"} <= names


@pytest.mark.parametrize(
    ("kind", "hidden", "head"),
    [("q4_0", 2048, "Q6_K"), ("q4_0", 128, "Q8_0"), ("q4_0-pure", 2048, "Q4_0")],
)
def test_a_file_of_4_bits_has_the_head_that_llama_cpp_gives_it(kind: str, hidden: int, head: str):
    config = {**json.loads((TINY / "config.json").read_text()), "hidden_size": hidden}
    entries = peer_formats.gguf_entries(config, peer_formats.checkpoint_reader(TINY))
    types = {entry.name: peer_formats.entry_type(entry, kind) for entry in entries}
    assert types.pop("output.weight") == head
    assert types["output_norm.weight"] == types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert types["token_embd.weight"] == types["blk.1.ffn_down_exps.weight"] == "Q4_0"


def test_divergence_is_the_reference_s_mean_of_differences_of_log_probabilities():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    other = torch.tensor([[math.log(3.0), 0.0], [5.0, 5.0]])
    found = peer_divergence.divergences(logits, other)
    assert found.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2), 0.0])


def test_halves_become_neighbours_head_by_head():
    rows = torch.arange(8.0)[:, None].expand(8, 3)  # two heads of four
    mixed = peer_formats.interleave_rotary_halves(rows.contiguous(), 2)
    assert mixed[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_int8_weights_are_within_half_a_step_of_the_checkpoints(tmp_path: Path):
    peer_formats.write_w8a8(TINY, tmp_path / "w8a8")
    read = peer_formats.checkpoint_reader(TINY)
    index = json.loads((tmp_path / "w8a8/model.safetensors.index.json").read_text())
    held: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        held |= load_file(tmp_path / "w8a8" / file)
    assert set(held) == set(index["weight_map"])
    matrices = [name for name in held if held[name].dtype == torch.int8]
    assert len(matrices) > 10
    for name in matrices:
        scales = held[f"{name}_scale"]
        error = (held[name].float() * scales - read(name).float()).abs()
        assert (error <= 0.501 * scales).all(), name
    assert held["lm_head.weight"].equal(read("lm_head.weight"))
    config = json.loads((tmp_path / "w8a8/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
