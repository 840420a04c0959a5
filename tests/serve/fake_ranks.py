"""Ranks without processes, for `Life`: a test says what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from moespan.config import EngineConfig, Layout
from moespan.engine.info import EngineInfo, EngineStats, Pulse, StepFigures
from moespan.engine.questions import ExpertCounts, Question
from moespan.engine.request import OutputDelta, Request, SamplingParams
from moespan.errors import EngineDeadError, MoespanError
from moespan.parallel.beats import IDLE, Place
from moespan.serve.live_requests import OnNews
from moespan.serve.metrics import Metrics

INFO = EngineInfo(
    model="fake",
    layout=Layout(),
    device="cpu",
    dtype="float32",
    cache_dtype="float32",
    max_model_len=64,
    num_blocks=8,
    block_size=4,
    load_s=0.0,
    read_bytes=0,
    weight_bytes=0,
)


def request(request_id: str, n: int = 1, num_tokens: int = 3) -> Request:
    return Request(
        id=request_id, prompt_token_ids=[1] * num_tokens, params=SamplingParams(n=n, max_tokens=9)
    )


def token(
    request_id: str, token_id: int = 7, index: int = 0, end: str | None = None
) -> OutputDelta:
    return OutputDelta(
        id=request_id, index=index, text="x", token_ids=[token_id], finish_reason=end
    )


def metrics(**options: Any) -> Metrics:
    return Metrics("fake model", EngineConfig("fake", max_model_len=64, **options))


def pulse(
    running: int = 0, waiting: int = 0, steps: Sequence[StepFigures] = (), **counts: int
) -> Pulse:
    stats = EngineStats(
        num_waiting=waiting,
        num_running=running,
        kv_usage=running / 8,
        num_free_blocks=8 - running,
        num_preemptions=counts.get("preemptions", 0),
        num_prefix_queried_tokens=counts.get("queried", 0),
        num_prefix_hit_tokens=counts.get("hit", 0),
        num_drafts=min(counts.get("drafted", 0), 1),
        num_draft_tokens=counts.get("drafted", 0),
        num_accepted_tokens=counts.get("accepted", 0),
    )
    return Pulse(replicas=[stats], num_steps=len(steps), steps=list(steps))


class FakeRanks:
    """One life.

    Attributes:
        running: requests that were handed over and neither finished nor aborted.
        aborted: ids in the order of their aborts.
        is_closed: whether `close` has been called.
        is_silent: neither beats nor speaks any more.
        is_stopped: the rank is stopped, as its agent has seen.
        expert_counts: the answer to `ExpertCounts`.
        num_asked: questions so far.
    """

    def __init__(self, on_news: OnNews) -> None:
        self.info = INFO
        self.on_news = on_news
        self.running: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.is_closed = False
        self.is_silent = False
        self.heard_at = asyncio.get_running_loop().time()
        self.is_stopped = False
        self.expert_counts: dict[int, list[int]] = {1: [0, 0, 0], 2: [0, 0, 0]}
        self.num_asked = 0
        self._death: asyncio.Future[MoespanError] = asyncio.get_running_loop().create_future()

    @property
    def is_dead(self) -> bool:
        return self._death.done()

    def add(self, request: Request) -> None:
        assert not self.is_closed
        if self.is_dead:
            raise EngineDeadError("the ranks are gone")
        assert request.id not in self.running
        self.running[request.id] = request

    def abort(self, request_id: str) -> None:
        assert not self.is_closed
        if self.is_dead:
            raise EngineDeadError("the ranks are gone")
        self.aborted.append(request_id)
        self.running.pop(request_id, None)

    async def ask(self, question: Question[Any]) -> Any:
        self.num_asked += 1
        assert isinstance(question, ExpertCounts)
        answer = dict(self.expert_counts)
        await asyncio.sleep(0.01)
        if self.is_dead:
            raise EngineDeadError("the ranks are gone")
        return answer

    def places(self) -> list[Place]:
        """One rank, which beats at each look, and whose leader speaks then, unless told not to."""
        if not self.is_silent:
            self.heard_at = asyncio.get_running_loop().time()
        beat = int(self.heard_at * 10)
        return [Place(rank=0, alive=beat, state=IDLE, step=1, is_stopped=self.is_stopped)]

    async def wait_dead(self) -> MoespanError:
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        self.is_closed = True
        await asyncio.sleep(0)

    # What the test has them do.

    def tell(self, *deltas: OutputDelta, pulse: Pulse | None = None) -> None:
        self.on_news(list(deltas), pulse)

    def finish(self, request_id: str) -> None:
        """End every continuation of a request."""
        done = self.running.pop(request_id)
        self.tell(*(token(request_id, index=i, end="stop") for i in range(done.params.n)))

    def die(self, cause: str = "rank 1 was killed by SIGKILL") -> None:
        self._death.set_result(EngineDeadError(cause))


class FakeStart:
    """Starts lives.

    Attributes:
        lives: all that were started, oldest first.
        start_s: seconds that a start takes.
        failures: causes of the next starts that fail.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self.lives: list[FakeRanks] = []
        self.start_s = start_s
        self.failures: list[MoespanError] = []

    async def __call__(self, on_news: OnNews) -> FakeRanks:
        assert all(ranks.is_closed for ranks in self.lives), "an earlier life is not closed"
        await asyncio.sleep(self.start_s)
        if self.failures:
            raise self.failures.pop(0)
        self.lives.append(FakeRanks(on_news))
        return self.lives[-1]

    @property
    def ranks(self) -> FakeRanks:
        """The newest life."""
        return self.lives[-1]
