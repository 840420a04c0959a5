"""A running engine under a load: requests arrive whether or not earlier ones have ended.

The load is that of `moespan.planner.load`, and the figures are those of `moespan.planner.outcome`,
so that a plan and a measurement can be laid side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from moespan.engine.request import OutputDelta, Request, SamplingParams
from moespan.errors import MoespanError
from moespan.front.llm import LLM
from moespan.measure.probe import machine_name
from moespan.planner.load import Load
from moespan.planner.outcome import Outcome, RequestTimes

Paced = Iterator["tuple[str | None, Request] | float"]


class LoadRun:
    """Sends the requests of a load when they are due, and notes when their tokens come.

    Args:
        now: the clock, in seconds.
    """

    def __init__(
        self, llm: LLM, load: Load, seed: int = 0, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._llm, self._load, self._seed, self._now = llm, load, seed, now
        self._arrived_s: dict[str, float] = {}
        self._token_s: dict[str, list[float]] = {}
        self._num_open = 0

    def run(self) -> list[RequestTimes]:
        """The times of all requests, in the order of their arrival.

        Raises:
            MoespanError: a request failed.
        """
        for output in self._llm.stream(self._paced(), self._note):
            self._num_open -= 1
            if output.error is not None:
                raise MoespanError(f"a request of the load failed: {output.error}")
        times = [
            RequestTimes(arrived, self._token_s[key][0], self._token_s[key][1], length)
            for key, arrived in self._arrived_s.items()
            for length in [int(self._token_s[key][2])]
        ]
        return sorted(times, key=lambda one: one.arrival_s)

    def _paced(self) -> Paced:
        """Requests that are due; in between the seconds until the next one."""
        vocab_size = self._llm.model_config.vocab_size
        started = self._now()
        for number, one in enumerate(self._load.requests):
            params = SamplingParams(temperature=0, max_tokens=one.output_tokens, ignore_eos=True)
            prompt = one.token_ids(number, vocab_size, self._seed)
            _, request = self._llm.request(prompt, params)
            due_s = started + one.arrival_s
            while (wait_s := self._wait_s(due_s)) > 0:
                yield wait_s
            # A closed loop has no times of its own. An open one counts from the time when the
            # request should have come, even if nobody could take it then.
            arrived_s = self._now() if self._load.concurrency is not None else due_s
            self._arrived_s[request.id] = arrived_s
            self._num_open += 1
            yield None, request

    def _wait_s(self, due_s: float) -> float:
        if self._load.concurrency is not None:
            return math.inf if self._num_open >= self._load.concurrency else 0.0
        return due_s - self._now()

    def _note(self, delta: OutputDelta) -> None:
        if not delta.token_ids:
            return
        now = self._now()
        first, _, count = self._token_s.get(delta.id, [now, now, 0])
        self._token_s[delta.id] = [first, now, count + len(delta.token_ids)]


def bench_load(llm: LLM, load: Load, seed: int = 0) -> dict[str, Any]:
    """Run a load, and report what `moespan plan` predicts for it.

    Args:
        load: its requests fit into `max_model_len`.

    Raises:
        MoespanError: a request failed.
    """
    before = llm.stats()
    times = LoadRun(llm, load, seed).run()
    outcome = Outcome.of(times, cut_end=load.concurrency is not None)
    after = llm.stats()
    queried = after.num_prefix_queried_tokens - before.num_prefix_queried_tokens
    hit = after.num_prefix_hit_tokens - before.num_prefix_hit_tokens
    config = llm.config
    return {
        "model": config.model,
        "device": config.device,
        "machine": machine_name(config.device),
        "layout": config.layout.sizes,
        "load": load.name,
        "num_clipped": load.num_clipped,
        **{key: msgspec.to_builtins(getattr(outcome, key)) for key in _FIGURES},
        "tokens_per_s_per_device": outcome.tokens_per_s / config.layout.world_size,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "prefix_hits": hit / queried if queried else 0.0,
        "draft_tokens": after.num_draft_tokens - before.num_draft_tokens,
        "accepted_tokens": after.num_accepted_tokens - before.num_accepted_tokens,
        "memory": msgspec.to_builtins(llm.memory()),
    }


_FIGURES = ("ttft_s", "tpot_s", "tokens_per_s", "requests_per_s", "num_requests", "seconds")
