"""Finds out that a process is stopped or that a step hangs, and says where every rank is.

The agents judge ranks by their beats (`moespan.parallel.beats`); each front judges its agent. All
silence is summed over the watcher's own ticks, of at most `_LONGEST_TICK_S` each: a machine that
was paused as a whole does not look as if its ranks had been silent.

| what | counts as lost after |
|---|---|
| a rank or agent that a signal or a debugger has stopped | `STOPPED_S` |
| a step in which no rank of the job gets further | `step_timeout_s` |
| the same, if a rank runs its first step of a kind | `FIRST_STEP_FACTOR` times as long |
| an idle rank whose process does not run, though not stopped | the same, at least `FROZEN_S` |
| an agent whose process does not run, though not stopped | `FROZEN_S` |

Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from moespan.errors import EngineDeadError
from moespan.launch.fate import is_stopped
from moespan.launch.job import Failure
from moespan.machine.topology import format_list
from moespan.parallel.beats import IDLE, Beats, Place

STOPPED_S = 5.0
FROZEN_S = 60.0
FIRST_STEP_FACTOR = 5

_LONGEST_TICK_S = 1.0
_MOST_LINES = 64

_STOPPED = "is stopped (SIGSTOP or a debugger)"


class Silence:
    """How long a value has not changed, by the ticks of whoever looks at it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._value: object = None
        self.seconds = 0.0

    def look(self, value: object) -> float:
        """The seconds for which `value` has been the same."""
        now = self._clock()
        self.seconds += min(now - self._looked_at, _LONGEST_TICK_S)
        self._looked_at = now
        if value != self._value:
            self._value = value
            self.seconds = 0.0
        return self.seconds


class StallWatch:
    """Judges the ranks of a job, as one node's agent sees them.

    Args:
        step_timeout_s: see `EngineOptions`.
        own: the ranks of this node.
        nnodes: nodes of the job, with equally many ranks each.
    """

    def __init__(
        self,
        step_timeout_s: float,
        own: range,
        nnodes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = step_timeout_s
        self._own = own
        self._nnodes = nnodes
        self._steps = Silence(clock)
        self._stopped = {rank: Silence(clock) for rank in own}
        self._idle = {rank: Silence(clock) for rank in own}

    def look(self, places: Sequence[Place], patience: float = 1.0) -> Failure | None:
        """The failure that has to end the job, if any. Call it again and again.

        Args:
            places: all ranks of the job whose places are known, those of this node included.
            patience: part of the limit for which a step must have made no progress.
        """
        # In one order, so that all nodes say the same.
        places = sorted(places, key=lambda place: place.rank)
        own = {place.rank: place for place in places if place.rank in self._own}
        for rank, place in own.items():
            # A new object at each look resets the silence of a rank that runs.
            value: object = "stopped" if place.is_stopped else object()
            if self._stopped[rank].look(value) >= STOPPED_S:
                return self._stop(place)
        for rank, place in own.items():
            value = place.alive if place.state == IDLE else object()
            silent_s = self._idle[rank].look(value)
            if silent_s >= max(self._timeout_s, FROZEN_S):
                return self._failure(f"does not run, for {silent_s:.0f} s, {_while(place)}", place)
        busy = [place for place in places if place.is_busy]
        progress = [(place.rank, place.changes) for place in places] if busy else object()
        limit_s = self._timeout_s
        if any(place.is_first for place in busy):
            limit_s *= FIRST_STEP_FACTOR
        if self._steps.look(progress) >= limit_s * patience:
            return self._hang(places, busy, limit_s)
        return None

    def _hang(self, places: Sequence[Place], busy: Sequence[Place], limit_s: float) -> Failure:
        """The failure of a step in which nothing happens any more."""
        stopped = next((place for place in places if place.is_stopped), None)
        if stopped is not None:
            return self._stop(stopped)
        since = f"no rank has got further for {limit_s:g} s (--step-timeout)"
        where = "".join(f"\n  {line}" for line in waits(places))
        # A rank that waits for no other one is what the others wait for.
        culprits = [place for place in busy if not (place.is_inside and place.peers)]
        if not culprits:
            return Failure(
                rank=None, kind="", message=f"a step hangs inside collectives: {since}{where}"
            )
        return self._failure(f"hangs {culprits[0]}: {since}{where}", culprits[0])

    def _stop(self, place: Place) -> Failure:
        return self._failure(f"{_STOPPED} {_while(place)}", place)

    def _failure(self, message: str, place: Place) -> Failure:
        node = f"node {place.rank // len(self._own)}" if self._nnodes > 1 else ""
        return Failure(rank=place.rank, kind="", message=message, node=node)


class AgentWatch:
    """Judges the agent of this node, for its front.

    Args:
        index: record of the agent in `beats`.
        node: name of this node; empty if the job has one only.
    """

    def __init__(self, beats: Beats, index: int, pid: int, node: str = "") -> None:
        self._beats, self._index, self._pid = beats, index, pid
        self._name = f"{node}{', ' if node else ''}the agent that watches the ranks (process {pid})"
        self._silence = Silence()

    def check(self) -> None:
        """Call it again and again while waiting for anything that the ranks do.

        Raises:
            EngineDeadError: the agent is stopped, or does not run. It has to be killed; the kernel
                then kills its ranks.
        """
        alive = self._beats.alive(self._index)
        silent_s = self._silence.look(alive)
        if silent_s >= STOPPED_S and is_stopped(self._pid):
            raise EngineDeadError(f"{self._name} {_STOPPED}")
        if alive and silent_s >= FROZEN_S:
            raise EngineDeadError(f"{self._name} has not run for {silent_s:.0f} s")


def waits(places: Sequence[Place]) -> list[str]:
    """Where every rank is, and for which others it waits; ranks in the same place share a line."""
    inside: dict[tuple[int, str], set[int]] = {}
    for place in places:
        if place.is_busy and place.is_inside:
            inside.setdefault((place.step, place.collective), set()).add(place.rank)
    groups: dict[str, list[int]] = {}
    for place in places:
        text = str(place)
        if place.is_busy and place.is_inside and place.peers:
            late = set(place.peers) - inside[place.step, place.collective]
            text += f", waits for {_ranks(sorted(late))}" if late else ", as all of its peers"
        groups.setdefault(text, []).append(place.rank)
    lines = [f"{_ranks(ranks)}: {text}" for text, ranks in groups.items()]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {format_list(ranks)}"


def _while(place: Place) -> str:
    """The place, after a verb that does not say what the rank does."""
    return str(place) if place.is_busy else f"while {place}"
