"""The leader says how far loading is, also where no terminal shows a bar. Weights that an earlier
start kept: all ranks map them, or all load."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moespan import LLM, SamplingParams
from moespan.checkpoint.building import Loaded
from moespan.checkpoint.loader import LoadReport
from moespan.config import Layout
from moespan.engine.build import _map_or_load, _ProgressLines
from moespan.parallel.control import Control
from moespan.parallel.mesh import Mesh
from tests.support import CPU, DATA

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no compiler"
)
FOLDER = DATA / "oracle" / "sixteen"


def test_loading_is_told_every_ten_seconds(caplog: pytest.LogCaptureFixture):
    now = [0.0]
    caplog.set_level("INFO", logger="moespan")
    progress = _ProgressLines(40_000_000_000, lambda: now[0])
    for _ in range(8):
        now[0] += 3.0
        progress(4_000_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "loading: 16.0 GB of 40.0 GB are read (40%)",
        "loading: 32.0 GB of 40.0 GB are read (80%)",
    ]


def keep_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep weights in `folder`; the kernels stay where they are, since they take long to build."""
    monkeypatch.setattr("moespan.ops.cpu.native.cache_path", lambda: folder)


def start(folder: Path = FOLDER, **options: Any) -> tuple[int, list[int]]:
    """Bytes that are read by a start, and what the engine answers."""
    with LLM(str(folder), dtype="bfloat16", num_blocks=64, max_model_len=128, **options) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8))
        return llm.info.read_bytes, output.outputs[0].token_ids


@needs_compiler
def test_a_second_start_reads_nothing_from_the_checkpoint_and_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keep_in(tmp_path, monkeypatch)
    first = start(weight_cache_gb=1)
    assert first[0] > 0 and start(weight_cache_gb=1) == (0, first[1])
    assert start(weight_cache_gb=1, check_finite=True) == first, "a check reads the weights"
    assert start() == first, "without the option nothing is mapped"


@needs_compiler
def test_a_changed_checkpoint_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keep_in(tmp_path / "cache", monkeypatch)
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    read_bytes, _ = start(folder, weight_cache_gb=1)
    assert start(folder, weight_cache_gb=1)[0] == 0
    for file in folder.glob("*.safetensors"):
        os.utime(file, (1, 1))
    assert start(folder, weight_cache_gb=1)[0] == read_bytes


def test_without_the_kernels_a_notice_says_that_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    keep_in(tmp_path, monkeypatch)
    with LLM(
        str(FOLDER), dtype="float32", num_blocks=64, max_model_len=128, weight_cache_gb=1
    ) as llm:
        assert llm.info.read_bytes > 0
    assert "weight_cache_gb=1 has no effect" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


class Kept:
    """Kept weights that may be missing at first, and that may be there after loading."""

    def __init__(self, found: list[Loaded | None]) -> None:
        self._found = found
        self.mapped_bytes = 0

    def find(self) -> Loaded | None:
        return self._found.pop(0)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[Callable[[str, Any], Any]]:
        yield lambda name, weight: weight


class OtherRank(Control):
    """The channel to one other rank, which has found its weights, or not."""

    def __init__(self, has_found: bool) -> None:
        super().__init__()
        self._has_found = has_found

    def smallest(self, value: int) -> int:
        return min(value, self._has_found)


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("others", [True, False])
def test_ranks_load_unless_all_have_found_their_weights(mine: bool, others: bool):
    mesh = Mesh(Layout(), 0, CPU)
    mesh.control = OtherRank(others)
    kept = Kept([{"kept": 1} if mine else None, None])
    loaded = {"loaded": 2}, LoadReport(100, 50, 0.1)
    weights, report = _map_or_load(kept, mesh, 50, lambda keep: loaded)
    assert weights == ({"kept": 1} if mine and others else {"loaded": 2})
    assert report.read_bytes == (0 if mine and others else 100)


def test_a_rank_maps_what_a_replica_has_written_meanwhile():
    kept = Kept([None, {"kept": 1}])
    loaded = {"loaded": 2}, LoadReport(100, 50, 0.1)
    weights, _ = _map_or_load(kept, Mesh(Layout(), 0, CPU), 50, lambda keep: loaded)
    assert weights == {"kept": 1}
