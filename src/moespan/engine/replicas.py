"""The dp replicas under one leader: which one takes a request, and their common steps.

Each replica has its own scheduler and blocks. All make their plans for a step together, so ranks
that share experts stay in lockstep without asking each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from moespan.config import EngineConfig
from moespan.engine.constraints import Constraint
from moespan.engine.digests import Digests
from moespan.engine.request import Request
from moespan.engine.scheduler import Scheduler
from moespan.engine.sequence import Sequence
from moespan.engine.step import StepPlan, StepResult
from moespan.engine.updates import SequenceUpdate
from moespan.errors import RequestError, shown


class Replicas:
    """All replicas of an engine; with dp=1 there is one.

    Attributes:
        schedulers: one for each replica.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._digests = Digests(config.block_size)
        eos_token_ids = tuple(eos_token_ids)
        self.schedulers = [
            Scheduler(config, num_blocks, vocab_size, eos_token_ids, digests=self._digests)
            for _ in range(config.layout.dp)
        ]
        self._most_ahead = config.max_num_seqs
        self._home: dict[str, Scheduler] = {}
        self._in_flight: deque[list[StepPlan | None]] = deque()

    @property
    def has_unfinished(self) -> bool:
        """Whether a sequence or a plan is unfinished."""
        return any(scheduler.has_unfinished for scheduler in self.schedulers)

    @property
    def num_in_flight(self) -> int:
        """Steps without results yet."""
        return len(self._in_flight)

    def knows(self, request_id: str) -> bool:
        """Whether a continuation of the request is unfinished."""
        return request_id in self._home

    def add(
        self, request: Request, seed: int = 0, constraint: Constraint | None = None
    ) -> list[Sequence]:
        """Queue a request with the replica whose cache holds the longest prefix of its prompt.

        Among equals, the one with the fewest sequences takes it. A replica that is a whole batch
        of sequences ahead of the least loaded one gets no more.

        Raises:
            RequestError: its id is in use, or its prompt or parameters break a limit.
        """
        if request.id in self._home:
            raise RequestError(f"request id {shown(request.id)} is in use; give each its own")
        scheduler = self._choose(request)
        sequences = scheduler.add(request, seed, constraint)
        self._home[request.id] = scheduler
        return sequences

    def abort(self, request_id: str) -> list[Sequence]:
        """End the unfinished sequences of a request, and return them."""
        scheduler = self._home.pop(request_id, None)
        return [] if scheduler is None else scheduler.abort(request_id)

    def finish(self, sequence: Sequence) -> None:
        """End `sequence` now, whether it waits, runs or is in flight."""
        scheduler = self._home.get(sequence.id)
        if scheduler is not None:
            scheduler.finish(sequence)
            self._forget_if_done(sequence.id)

    def schedule(self) -> list[StepPlan | None] | None:
        """Plan the next step: a plan or None for each replica; None if all are idle."""
        plans = [scheduler.schedule() for scheduler in self.schedulers]
        if not any(plans):
            return None
        self._in_flight.append(plans)
        return plans

    def take_faults(self) -> list[SequenceUpdate]:
        """The sequences that faults ended in `schedule`."""
        faults = [update for scheduler in self.schedulers for update in scheduler.take_faults()]
        for update in faults:
            self._forget_if_done(update.sequence.id)
        return faults

    def update(self, results: list[StepResult | None]) -> list[SequenceUpdate]:
        """Take in the results of the oldest step in flight; → the updates of its sequences."""
        updates = []
        for scheduler, plan, result in zip(
            self.schedulers, self._in_flight.popleft(), results, strict=True
        ):
            if plan is not None and result is not None:
                updates += scheduler.update(plan, result)
        for update in updates:
            if update.finish_reason is not None:
                self._forget_if_done(update.sequence.id)
        return updates

    @property
    def oldest_in_flight(self) -> list[StepPlan | None]:
        """The plans whose results are due next."""
        return self._in_flight[0]

    def _choose(self, request: Request) -> Scheduler:
        if len(self.schedulers) == 1:
            return self.schedulers[0]
        loads = [scheduler.num_waiting + scheduler.num_running for scheduler in self.schedulers]
        most = min(loads) + self._most_ahead
        digests: list[bytes] = []
        if (root := self.schedulers[0].prefix_root(request)) is not None:
            self._digests.extend(digests, request.prompt_token_ids, root)

        def merit(replica: int) -> tuple[int, int]:
            cached = self.schedulers[replica].allocator.match(digests)
            return (len(cached), -loads[replica])

        candidates = [replica for replica, load in enumerate(loads) if load < most]
        return self.schedulers[max(candidates, key=merit)]

    def _forget_if_done(self, request_id: str) -> None:
        scheduler = self._home.get(request_id)
        if scheduler is not None and not scheduler.knows(request_id):
            del self._home[request_id]
