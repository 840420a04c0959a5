"""The plan as text, JSON, page and picture, and the commands that it prints."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moespan.checkpoint.presets import preset
from moespan.cli import _parser
from moespan.cli.flags import settings_of
from moespan.config import EngineConfig, Layout, ModelConfig, all_layouts
from moespan.planner import profile
from moespan.planner.expert_load import Routing
from moespan.planner.load import Load, LoadRequest, drawn
from moespan.planner.memory import RankMemory
from moespan.planner.outcome import Target
from moespan.search.candidates import Candidate, Space
from moespan.search.commands import start_commands
from moespan.search.document import document
from moespan.search.explore import Question, explore
from moespan.search.pages import page
from moespan.search.report import text
from tests import tiers

MODEL = ModelConfig.from_dict(preset("16b", {}))
A2 = profile.load("910b3")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    base = EngineConfig("", device="npu", block_size=128)
    only = (("sp", 1), ("pp", 1), ("dp", 1))
    space = Space(base, 16, max_num_seqs=(64,), max_num_batched_tokens=(2048,), only=only)
    load = drawn("lognormal:512:0.5", "24", 80, rate=20)
    targets = (Target("ttft", "p90", 1.0), Target("tpot", "p99", 0.04))
    asked = Question(
        space, A2, MODEL, Routing(MODEL), load, targets=targets, num_requests=80, jobs=1
    )
    return document(explore(asked), "MODEL", nodes=[1, -1, -5])


def test_the_document_is_json_that_says_everything(found: dict[str, Any]):
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["version"] == 1 and again["met"] is True
    plan = again["plans"][0]
    assert plan["rank"] == 1 and plan["num_blocks"] > 0
    assert {"p50", "p90", "p95", "p99", "mean"} == set(plan["ttft_s"])
    parts = [size for name, size in plan["memory"].items() if name in _PARTS]
    assert sum(parts) == plan["memory"]["taken_bytes"]
    assert sum(plan["limits"].values()) == pytest.approx(1)
    assert len(plan["band"]) == 2
    assert {origin for _, origin, _ in again["hardware"]["figures"]} <= {
        "vendor", "measured", "derived", "guess",
    }  # fmt: skip


_PARTS = {
    f"{part}_bytes"
    for part in ("base", "weight", "cache", "activation", "graph", "communicator", "slack")
}


def test_the_text_has_a_row_for_each_plan_and_says_that_figures_are_guesses(found: dict[str, Any]):
    lines = list(text(found))
    assert "VENDOR FIGURES AND GUESSES (±40%)" in lines[0]
    rows = [line for line in lines if line[:2] in {f"{n} " for n in range(1, 10)}]
    assert len(rows) == len(found["plans"])
    assert all("±40%" in row and "GiB" in row for row in rows)
    assert any(line.startswith("limits     1, in decode: ") for line in lines)
    assert any("2 → 3 nodes: +" in line for line in lines)
    assert any("2 → 1 nodes: -" in line for line in lines)
    assert any(line.startswith("guess      small messages") for line in lines)
    bands = [line for line in lines if ", at times ±40%: TTFT p90 " in line]
    assert len(bands) == len(rows) and all(line.count(" to ") == 2 for line in bands)
    close = [plan for plan in found["plans"] if plan["too_close"]]
    for plan in close:  # the runs that would decide
        assert f"           and {plan['rank']}: {plan['bench']}" in lines
    assert any("load balancer" in line for line in lines)
    assert any("write the folder of the model for MODEL" in line for line in lines)


def test_an_explanation_shows_memory_and_both_steps_with_their_sources(found: dict[str, Any]):
    lines = list(text(found, explain=True))
    whole = "\n".join(lines)
    for words in ("memory, GiB", "communicator", "a decode step", "a prefill step"):
        assert words in whole
    parts = [line for line in lines if " × " in line and " µs " in line]
    assert len(parts) > 30
    assert all(line.rstrip()[-1].isalnum() or line.rstrip()[-1] in ')"' for line in parts)


def test_an_explanation_has_the_memory_of_every_class_of_ranks():
    base = EngineConfig("", device="npu", block_size=128)
    only = (("tp", 2), ("ep", 1), ("pp", 4), ("dp", 1))
    space = Space(base, 8, max_num_seqs=(64,), max_num_batched_tokens=(2048,), only=only)
    load = drawn("512", "24", 40, rate=4)
    asked = Question(space, A2, MODEL, Routing(MODEL), load, fast=True, jobs=1)
    said = document(explore(asked), "MODEL")
    classes = said["plans"][0]["classes"]
    assert {one["stage"] for one in classes} == {0, 1, 2, 3}
    assert sum(one["ranks"] for one in classes) == 8
    tightest = said["plans"][0]["memory"]["taken_bytes"]
    assert max(one["taken_bytes"] for one in classes) == tightest
    (titles,) = (line for line in text(said, explain=True) if "stage 3, " in line)
    assert titles.count("stage ") == len(classes)


def test_nothing_that_fits_is_said_in_every_form(found: dict[str, Any]):
    empty = {**found, "plans": [], "points": [], "what_if": [], "met": False}
    assert "nothing fits" in list(text(empty))[-1]
    assert "No layout fits" in page(empty)


class _Reader(HTMLParser):
    """Notes tags, and every address that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_whole_file_without_addresses(found: dict[str, Any]):
    html = page({**found, "model": {**found["model"], "name": "<script>evil</script>"}})
    reader = _Reader()
    reader.feed(html)
    assert not reader.open and not reader.addresses
    assert "http" not in html and "@import" not in html and "url(" not in html
    assert "<script>evil" not in html and "&lt;script&gt;evil" in html
    assert reader.tags.count("svg") == 1 and reader.tags.count("script") == 1
    # Each column that has a name sorts, by a button that the keyboard reaches.
    assert reader.tags.count("button") == 9
    assert "prefers-color-scheme: dark" in html


def test_the_picture_is_written(found: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    from moespan.search.plot import plot

    for name, start in (("front.png", b"\x89PNG"), ("front.svg", b"<?xml")):
        plot(found, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def candidate(devices: int, layout: Layout, **options: Any) -> Candidate:
    config = EngineConfig("", layout, "npu", block_size=128, **options)
    return Candidate(devices // layout.world_size, config, 1480, RankMemory())


PARSER = _parser()


def parsed(command: list[str]) -> Any:
    """What the command line makes of a command."""
    return settings_of(PARSER.parse_args(command))


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 64])
def test_every_start_command_is_one_that_the_command_line_takes(devices: int):
    for layout in tiers.every(all_layouts(devices, MODEL), 1 + devices // 4):
        one = candidate(devices, layout)
        commands = start_commands(one, "MODEL", A2)
        assert len(commands) == max(1, -(-devices // 8))
        for rank, command in enumerate(commands):
            settings = parsed(command.arguments)
            assert settings.with_layout(layout) == replace(settings, pipeline_layers=None)
            assert (settings.nnodes, settings.node_rank) == (len(commands), rank)
            assert settings.num_blocks == 1480 and settings.device == "npu"
            assert shlex.split(str(command))[1:] == command.arguments


@pytest.mark.parametrize("often", [{"rate": 8.0}, {"concurrency": 6}, None], ids=str)
def test_the_command_that_measures_has_the_share_of_one_engine(often: dict[str, Any] | None):
    base = EngineConfig("", device="npu", block_size=128, max_model_len=2048)
    space = Space(base, 8, max_num_seqs=(16,), only=(("tp", 4), ("ep", 1), ("dp", 1)))
    lengths = ("lognormal:512:0.5", "32")
    load = drawn(*lengths, 20, **often) if often else None
    asked = Question(space, A2, MODEL, Routing(MODEL), load, lengths, fast=True, jobs=1)
    plan = document(explore(asked), "MODEL")["plans"][0]
    args = PARSER.parse_args(shlex.split(plan["bench"])[1:])
    assert plan["engines"] == 2 and settings_of(args).max_num_seqs == 16
    assert (args.input, args.output) == lengths
    if load is not None and load.rate is not None:
        assert args.rate == pytest.approx(load.rate / 2, rel=1e-3) and args.concurrency is None
    else:
        assert args.rate is None and args.concurrency == (3 if often else 16)
    traced = document(explore(replace(asked, trace="a trace.jsonl")), "MODEL")["plans"][0]
    args = PARSER.parse_args(shlex.split(traced["bench"])[1:])
    assert args.load == "a trace.jsonl" and args.input is None


def test_engines_get_the_arrivals_of_a_trace_itself():
    base = EngineConfig("", device="npu", block_size=128, max_model_len=2048)
    space = Space(base, 8, max_num_seqs=(16,), only=(("tp", 4), ("ep", 1), ("dp", 1)))
    bursts = Load(tuple(LoadRequest(float(at // 10), 100, 8) for at in range(200)), name="bursts")
    asked = Question(space, A2, MODEL, Routing(MODEL), bursts, fast=True, jobs=1)
    asked = replace(asked, trace="trace.jsonl", speed=2.0, seed=3)
    plan = document(explore(asked), "MODEL")["plans"][0]
    args = PARSER.parse_args(shlex.split(plan["bench"])[1:])
    assert plan["engines"] == args.share == 2
    assert (args.load, args.speed, args.seed) == ("trace.jsonl", 2.0, 3)
    assert args.rate is None and args.concurrency is None
    part = bursts.share(args.share, args.seed)
    assert 70 < len(part.requests) < 130
    assert {one.arrival_s for one in part.requests} <= set(map(float, range(20)))


def test_engines_of_one_node_get_devices_and_ports_of_their_own():
    commands = start_commands(candidate(16, Layout(tp=4)), "MODEL", A2)
    assert [command.node for command in commands] == [0, 0, 1, 1]
    assert [one.environment["ASCEND_RT_VISIBLE_DEVICES"] for one in commands] == [
        "0,1,2,3",
        "4,5,6,7",
    ] * 2
    ports = [one.arguments[one.arguments.index("--port") + 1] for one in commands]
    assert ports == ["8000", "8001", "8000", "8001"]
    assert all("--host 0.0.0.0 --api-key-file KEYS" in str(one) for one in commands)
    one_node = start_commands(candidate(8, Layout(tp=4)), "MODEL", A2)
    assert not any("--host" in str(one) for one in one_node)


def test_engines_of_several_nodes_meet_at_their_own_first_node():
    commands = start_commands(candidate(32, Layout(tp=8, dp=2)), "MODEL", A2)
    assert [(one.node, one.engine) for one in commands] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    settings = [parsed(one.arguments) for one in commands]
    assert [one.master_addr for one in settings] == ["node0", "node0", "node2", "node2"]
    for some, reached in (
        (commands, [True, False, True, False]),
        (start_commands(candidate(16, Layout(tp=8, dp=2)), "MODEL", A2), [True, False]),
    ):  # what a load balancer reaches, or users of one engine
        hosts = ["--host 0.0.0.0 --api-key-file KEYS" in str(one) for one in some]
        assert hosts == reached
    assert [one.node_rank for one in settings] == [0, 1, 0, 1]


def test_settings_of_a_candidate_are_in_its_commands():
    one = candidate(8, Layout(tp=8), quantization="w8a8", kv_cache_dtype="int8", max_num_seqs=96)
    settings = parsed(start_commands(one, "MODEL", A2)[0].arguments)
    assert (settings.quantization, settings.kv_cache_dtype) == ("w8a8", "int8")
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (96, 2048)
