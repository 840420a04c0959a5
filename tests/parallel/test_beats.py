"""Beats: what a process writes of its place, and what another one reads."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moespan.parallel.beats import BUSY, IDLE, STARTING, Beat, Beats, named
from moespan.parallel.mesh import Axis


@pytest.fixture
def beats(tmp_path: Path) -> Beats:
    """Records of two ranks, their agent and their front."""
    path = tmp_path / "beats"
    path.write_bytes(bytes(Beats.size_bytes(4)))
    return Beats(path)


def test_the_front_announces_its_end_in_a_record_of_its_own(beats: Beats) -> None:
    for at in range(3):
        beats.beat(at).ending()
    assert not beats.end_is_announced
    beats.announce_end()
    assert beats.end_is_announced


def test_a_place_is_read_as_it_was_written(beats: Beats) -> None:
    beat = beats.beat(1)
    assert str(beats.place(1, 5)) == "starting"
    beat.starting()
    assert beats.place(1, 5).state == STARTING
    beat.idle()
    assert str(beats.place(1, 5)) == "idle before its first step"
    beat.busy()
    assert str(beats.place(1, 5)) == "in step 0"
    beat.start_step("decode")
    beat.layer(3)
    beat.enter(named("all_reduce", "tp", "moe", (4, 5, 6, 7)))
    inside = beats.place(1, 5)
    assert str(inside) == "in step 1, layer 3, in all_reduce over tp (moe)"
    assert (inside.rank, inside.state, inside.step, inside.is_first) == (5, BUSY, 1, True)
    assert inside.peers == (4, 6, 7)
    beat.leave()
    after = beats.place(1, 5)
    assert str(after) == "in step 1, layer 3, after all_reduce over tp (moe)"
    assert after.changes > inside.changes
    beat.start_step("decode")
    second = beats.place(1, 5)
    assert (str(second), second.is_first) == ("in step 2", False)
    beat.idle()
    idle = beats.place(1, 5)
    assert (str(idle), idle.state) == ("idle after step 2", IDLE)
    assert beats.place(0, 4).changes == 0  # the other records are their writers' own
    beat.start_step("prefill")
    assert beats.place(1, 5).is_first
    beat.starting()  # another model
    beat.start_step("decode")
    assert beats.place(1, 5).is_first


def test_every_write_is_a_change(beats: Beats) -> None:
    beat = beats.beat(0)
    seen = [beats.place(0, 0).changes]
    for write in (
        beat.starting,
        beat.idle,
        beat.busy,
        lambda: beat.start_step("decode"),
        lambda: beat.enter(named("send", "pp", "", (1,))),
        beat.leave,
    ):
        write()
        seen.append(beats.place(0, 0).changes)
    assert sorted(set(seen)) == seen


@pytest.mark.parametrize("ranks", [(), (3,), (0, 1, 2, 3), (1, 5, 9), (2, 3)])
def test_the_peers_of_every_axis_are_kept(beats: Beats, ranks: tuple[int, ...]) -> None:
    beats.beat(0).enter(named("all_gather", "ep", "moe", ranks))
    assert beats.place(0, 3).peers == tuple(rank for rank in ranks if rank != 3)


def test_a_long_or_damaged_name_is_cut(beats: Beats) -> None:
    beats.beat(0).enter((0, 0, 0, b"\xff" + named("x" * 500, "tp", "", ())[3]))
    place = beats.place(0, 0)
    assert place.collective.startswith("\N{REPLACEMENT CHARACTER}xxx")
    assert len(place.collective) == 160


def test_the_pulse_goes_on_while_the_rank_waits(beats: Beats) -> None:
    beats.beat(2).start_pulse()
    deadline = time.monotonic() + 60
    while beats.alive(2) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_process_reads_what_a_killed_one_wrote(beats: Beats, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from moespan.parallel.beats import Beats, named\n"
        "beat = Beats(Path(sys.argv[1])).beat(0)\n"
        "beat.busy()\n"
        "beat.enter(named('broadcast', 'sp', 'sampled', (0, 2)))\n"
        "assert 'torch' not in sys.modules\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "beats")]).returncode == -9
    place = beats.place(0, 0)
    assert (str(place), place.peers) == ("in step 0, in broadcast over sp (sampled)", (2,))


@pytest.mark.parametrize(
    ("call", "function", "says"),
    [
        (lambda axis, x: axis.all_reduce(x, "moe"), "all_reduce", "all_reduce over tp (moe)"),
        (lambda axis, x: axis.maximum(x, "load"), "all_reduce", "all_reduce over tp (load)"),
        (lambda axis, x: axis.broadcast(x, "sampled"), "broadcast", "broadcast over tp (sampled)"),
        (
            lambda axis, x: axis.all_to_all(x, [1, 1], [1, 1], "moe"),
            "all_to_all_single",
            "all_to_all over tp (moe)",
        ),
        (lambda axis, x: axis.receive(x, 1), "recv", "receive over tp"),
        (lambda axis, x: axis.send(x, 1, "hidden"), "isend", "send over tp (hidden)"),
    ],
)
def test_every_collective_of_an_axis_is_entered_and_left(
    beats: Beats, call: object, function: str, says: str
) -> None:
    beat = beats.beat(0)
    beat.busy()
    axis = Axis("tp", (0, 1), 0, beat=beat)
    seen = []

    def note(*_: object, **__: object) -> int:
        seen.append(beats.place(0, 0))
        return 1

    with mock.patch.object(dist, function, note):
        call(axis, torch.zeros(2, 3))  # type: ignore[operator]
    assert [(str(place), place.peers) for place in seen] == [(f"in step 0, in {says}", (1,))]
    assert str(beats.place(0, 0)) == f"in step 0, after {says}"


@pytest.mark.parametrize("name", ["_all_gather", "_reduce_scatter"])
def test_gathering_and_scattering_are_entered_and_left(beats: Beats, name: str) -> None:
    beat = beats.beat(0)
    beat.busy()
    axis = Axis("sp", (0, 1), 0, beat=beat)
    seen = []
    with mock.patch(
        f"moespan.parallel.mesh.{name}", lambda *_, **__: seen.append(beats.place(0, 0))
    ):
        getattr(axis, name.removeprefix("_"))(torch.zeros(2, 3), "moe")
    assert [str(place) for place in seen] == [f"in step 0, in {name[1:]} over sp (moe)"]
    assert not beats.place(0, 0).is_inside


def test_without_a_file_nothing_is_needed() -> None:
    beat = Beat()
    beat.busy()
    beat.enter(named("send", "pp", "", (1,)))
    beat.leave()
