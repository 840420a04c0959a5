"""Whether all ranks of a running engine still show signs of life.

Health says 200 for as long as they do. All silence is summed over the watcher's own looks
(`moespan.launch.stall.Silence`), so neither a jump of the clock nor a pause of the whole machine
looks like a silent rank.

| who | counts as silent after |
|---|---|
| a rank that a signal or a debugger has stopped | no time: its agent has found that out |
| an idle rank whose process does not run | `IDLE_S` |
| a busy rank whose process does not run | `FROZEN_S` |
| the leader, if no request is live | `IDLE_S` |
| the leader, if one is live | `step_timeout_s` and `IDLE_S`; five times that in a first step |

The agents end a job with a silent rank (`moespan.launch.stall`). A leader that is silent for
`GRACE_S` more has to be ended by `Life`: such an agent has not seen what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moespan.launch.stall import FIRST_STEP_FACTOR, FROZEN_S, Silence
from moespan.parallel.beats import IDLE, Place

IDLE_S = 10.0
GRACE_S = 10.0

LOOK_S = 0.5
"""Seconds between two looks."""


class Signs:
    """Signs of life of one engine's ranks.

    Attributes:
        trouble: who is silent, in words; empty if nobody is.
        is_lost: the leader has been silent for so long that the engine has to be ended.
        ages_s: for each rank, the seconds since its process was last seen to run.
    """

    def __init__(self, step_timeout_s: float, clock: Callable[[], float]) -> None:
        self._step_timeout_s = step_timeout_s
        self._clock = clock
        self._leader = Silence(clock)
        self._ranks: dict[int, Silence] = {}
        self.trouble = ""
        self.is_lost = False
        self.ages_s: dict[int, float] = {}

    def look(self, places: Sequence[Place], heard_at: float, is_live: bool) -> None:
        """Judge again.

        Args:
            places: ranks whose places are known.
            heard_at: time of the leader's last word, on any clock.
            is_live: whether a request is unfinished.
        """
        for place in places:
            silence = self._ranks.setdefault(place.rank, Silence(self._clock))
            self.ages_s[place.rank] = silence.look(place.alive)
        leader_s = self._leader.look(heard_at)
        limit_s = self._limit_of_leader(places, is_live)
        self.is_lost = leader_s >= limit_s + GRACE_S
        silent = [text for place in places if (text := self._silence_of(place))]
        if leader_s >= limit_s:
            silent.append(f"the leader has said nothing for {leader_s:.0f} s")
        self.trouble = "; ".join(silent)

    def _silence_of(self, place: Place) -> str:
        if place.is_stopped:
            return f"rank {place.rank} is stopped (SIGSTOP or a debugger)"
        silent_s = self.ages_s[place.rank]
        if silent_s < (IDLE_S if place.state == IDLE else FROZEN_S):
            return ""
        return f"rank {place.rank} has not run for {silent_s:.0f} s"

    def _limit_of_leader(self, places: Sequence[Place], is_live: bool) -> float:
        if not is_live:
            return IDLE_S
        is_first = any(place.is_busy and place.is_first for place in places)
        return self._step_timeout_s * (FIRST_STEP_FACTOR if is_first else 1) + IDLE_S
