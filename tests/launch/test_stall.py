"""Judging ranks by their beats: which silence ends a job, and what is said about it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec
import pytest

from moespan.errors import EngineDeadError
from moespan.launch import stall
from moespan.launch.job import Failure
from moespan.launch.stall import AgentWatch, Silence, StallWatch, waits
from moespan.parallel.beats import BUSY, ENDING, IDLE, STARTING, Beats, Place

TICK_S = 0.5


class Time:
    """A clock that only the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def at(rank: int, collective: str = "", **changes: object) -> Place:
    """A rank in step 7, by default inside `collective` over ranks 0 to 3."""
    values: dict[str, object] = {
        "rank": rank,
        "state": BUSY,
        "step": 7,
        "is_inside": bool(collective),
        "collective": collective,
        "peers": tuple(one for one in range(4) if one != rank) if collective else (),
    }
    return Place(**{**values, **changes})  # type: ignore[arg-type]


def judged(
    places: list[Place],
    seconds: float,
    *,
    stopped: Collection[int] = (),
    moving: Collection[int] = (),
    alive: bool = True,
    nnodes: int = 1,
    own: range = range(4),
) -> Failure | None:
    """The verdict within `seconds` in which only the ranks `moving` get further."""
    clock = Time()
    watch = StallWatch(20.0, own, nnodes, clock)
    for tick in range(int(seconds / TICK_S)):
        clock.now += TICK_S
        now = [
            msgspec.structs.replace(
                place,
                alive=tick * alive,
                changes=tick if place.rank in moving else 0,
                is_stopped=place.rank in stopped,
            )
            for place in places
        ]
        failure = watch.look(now)
        if failure is not None:
            return failure
    return None


WAITING = [at(rank, "all_reduce over tp (moe)") for rank in (0, 1, 3)]
HANGING = [*WAITING[:2], at(2, layer=4), WAITING[2]]


def test_a_stopped_rank_is_named_with_its_place() -> None:
    assert judged(HANGING, 4.5, stopped=[1]) is None
    failure = judged(HANGING, 6, stopped=[1])
    assert failure is not None
    assert failure.rank == 1
    assert failure.message == (
        "is stopped (SIGSTOP or a debugger) in step 7, in all_reduce over tp (moe)"
    )
    idle = [at(rank, state=IDLE) for rank in range(4)]
    failure = judged(idle, 6, stopped=[2])
    assert failure is not None
    assert failure.message.endswith("(SIGSTOP or a debugger) while idle after step 7")


def test_a_rank_that_is_stopped_again_and_again_for_a_moment_is_well() -> None:
    clock = Time()
    watch = StallWatch(20.0, range(4), 1, clock)
    for tick in range(100):
        clock.now += TICK_S
        places = [
            msgspec.structs.replace(
                place, changes=tick, is_stopped=place.rank == 2 and tick % 4 > 0
            )
            for place in HANGING
        ]
        assert watch.look(places) is None


def test_a_hang_names_the_rank_that_the_others_wait_for() -> None:
    assert judged(HANGING, 19.5) is None
    failure = judged(HANGING, 22)
    assert failure is not None
    assert (failure.rank, failure.kind) == (2, "")
    assert failure.message.splitlines() == [
        "hangs in step 7, layer 4: no rank has got further for 20 s (--step-timeout)",
        "  ranks 0-1,3: in step 7, in all_reduce over tp (moe), waits for rank 2",
        "  rank 2: in step 7, layer 4",
    ]


def test_a_hang_in_which_all_have_come_names_the_collective() -> None:
    places = [at(rank, "all_to_all over ep (moe)") for rank in range(4)]
    failure = judged(places, 22)
    assert failure is not None
    assert failure.rank is None
    assert failure.message.splitlines() == [
        "a step hangs inside collectives: no rank has got further for 20 s (--step-timeout)",
        "  ranks 0-3: in step 7, in all_to_all over ep (moe), as all of its peers",
    ]


def test_ranks_in_different_collectives_wait_for_each_other() -> None:
    places = [
        at(0, "all_gather over sp (head)"),
        *(at(n, "all_reduce over tp (moe)") for n in (1, 2, 3)),
    ]
    assert waits(places) == [
        "rank 0: in step 7, in all_gather over sp (head), waits for ranks 1-3",
        "ranks 1-3: in step 7, in all_reduce over tp (moe), waits for rank 0",
    ]


def test_a_step_may_last_as_long_as_any_rank_gets_further() -> None:
    assert judged(HANGING, 200, moving=[2]) is None


def test_a_job_that_is_idle_or_starting_does_not_hang() -> None:
    for state in (IDLE, STARTING, ENDING):
        assert judged([at(rank, state=state) for rank in range(4)], 200) is None


def test_the_first_step_of_a_kind_has_longer() -> None:
    places = [msgspec.structs.replace(place, is_first=True) for place in HANGING]
    assert judged(places, 99) is None
    failure = judged(places, 102)
    assert failure is not None
    assert "for 100 s (--step-timeout)" in failure.message


def test_an_idle_rank_that_does_not_run_is_named_but_a_busy_one_may_hold_the_lock() -> None:
    idle = [at(rank, state=IDLE) for rank in range(4)]
    assert judged(idle, 59, alive=False) is None
    failure = judged(idle, 62, alive=False)
    assert failure is not None
    assert failure.message == "does not run, for 60 s, while idle after step 7"
    assert judged(HANGING, 200, moving=[2], alive=False) is None


def test_a_pause_of_the_whole_machine_is_one_tick() -> None:
    clock = Time()
    watch = StallWatch(20.0, range(4), 1, clock)
    for _ in range(10):
        clock.now += 1000
        assert watch.look(HANGING) is None


def test_the_hang_of_another_node_is_named_with_its_node() -> None:
    failure = judged(HANGING, 22, nnodes=2, own=range(2))
    assert failure is not None
    assert str(failure.to_error(starting=False)).startswith("node 1, rank 2 hangs in step 7")
    # Both nodes say the same, so that their stacks can be put together.
    other = judged(HANGING[::-1], 22, nnodes=2, own=range(2, 4))
    assert other == failure


def test_a_hang_because_of_a_stopped_rank_of_any_node_names_the_stop() -> None:
    stopped = [msgspec.structs.replace(place, is_stopped=place.rank == 3) for place in HANGING]
    clock = Time()
    for own in (range(2), range(2, 4)):
        watch = StallWatch(2.0, own, 2, clock)
        watch.look(stopped)
        for _ in range(4):
            clock.now += TICK_S
            failure = watch.look(stopped)
        assert failure is not None
        said = str(failure.to_error(starting=False))
        assert said.startswith(
            "node 1, rank 3 is stopped (SIGSTOP or a debugger) in step 7, in all"
        )


def test_many_places_are_cut_short() -> None:
    lines = waits([at(rank, layer=rank) for rank in range(100)])
    assert len(lines) == 65
    assert lines[-1] == "and 36 more"


def test_silence_is_reset_by_a_change() -> None:
    clock = Time()
    silence = Silence(clock)
    for value, expected in ((1, 0), (1, 0.5), (1, 1.0), (2, 0), (2, 0.5)):
        clock.now += 0.5
        assert silence.look(value) == expected


@pytest.fixture
def beats(tmp_path: Path) -> Beats:
    path = tmp_path / "beats"
    path.write_bytes(bytes(Beats.size_bytes(1)))
    return Beats(path)


def test_an_agent_that_does_not_run_is_named(beats: Beats, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr("moespan.launch.stall.time.monotonic", clock)
    monkeypatch.setattr(stall.Silence.__init__, "__defaults__", (clock,))
    watch = AgentWatch(beats, 0, 123, "node 1")
    for _ in range(100):  # it is still being started
        clock.now += 1
        watch.check()
    beats.beat(0)._record[256] = 1  # its first sign of life
    for _ in range(60):
        clock.now += 1
        watch.check()
    clock.now += 1
    with pytest.raises(EngineDeadError, match=r"node 1, the agent .* has not run for 60 s"):
        watch.check()
