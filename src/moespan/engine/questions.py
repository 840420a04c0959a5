"""Questions that a front may ask about a running engine. Plain values; imports no torch.

`Engine.answer` answers them, `EngineClient.ask` returns the answer. A new question is a struct and
an entry of `AnyQuestion` here, and a branch in `Engine.answer`.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, get_args

import msgspec

from moespan.engine.info import EngineStats
from moespan.engine.trace import Observation
from moespan.parallel.counters import TrafficRows
from moespan.planner.memory import RankMemory

A = TypeVar("A")


class Question(msgspec.Struct, Generic[A], frozen=True):
    """Base of all questions; the parameter is the type of the answer."""

    @classmethod
    def answer_type(cls) -> Any:
        """The type of the answer, for decoding."""
        (base,) = cls.__orig_bases__  # type: ignore[attr-defined]
        return get_args(base)[0]


class Stats(Question[EngineStats], frozen=True, tag="stats"):
    """Queues, cache use and counts since the start. Requests go on meanwhile."""


class Traffic(Question[list[TrafficRows]], frozen=True, tag="traffic"):
    """Calls and bytes that each rank has sent since the start, in the order of ranks.

    Running requests go on, but the steps in flight end first: the pipeline empties once.
    """


class Memory(Question[list[RankMemory]], frozen=True, tag="memory"):
    """What each rank takes by part, in the order of ranks. The steps in flight end first."""


class Trace(Question[list[Observation]], frozen=True, tag="trace"):
    """Values inside the network for one prompt, computed in one step, in the network's order.

    Refused with `RequestError` while a request is unfinished, and for a prompt that does not fit
    into one step.
    """

    token_ids: list[int]


class ExpertCounts(Question[dict[int, list[int]]], frozen=True, tag="expert_counts"):
    """Layer → how many tokens chose each expert since the start, over all ranks.

    Every computed token counts once in each layer with experts, for each of its experts. Tokens
    found in the prefix cache are not computed; those of a preempted sequence are computed again.
    Running requests go on, but the steps in flight end first.

    Refused with `RequestError` unless the engine runs with `expert_stats`.
    """


AnyQuestion = Stats | Traffic | Memory | Trace | ExpertCounts
