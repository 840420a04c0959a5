"""The engine on the leader, which owns the requests.

It makes the plans, broadcasts them to all ranks, and tells what was sampled. The other ranks run
`moespan.engine.build.follow`.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from moespan.config import EngineConfig, ModelConfig
from moespan.engine.constraints import Constraint
from moespan.engine.continuations import Continuations
from moespan.engine.info import EngineInfo, EngineStats, Pulse
from moespan.engine.masks import send_masks, without_masks
from moespan.engine.pace import Pace
from moespan.engine.preparation import Preparation
from moespan.engine.questions import ExpertCounts, Memory, Question, Stats, Trace, Traffic
from moespan.engine.replicas import Replicas
from moespan.engine.reports import answer_by_reports
from moespan.engine.request import OutputDelta, Request, check_request, fault, refusal
from moespan.engine.results import Pending, collect_results
from moespan.engine.step import Close, FromLeader, Heartbeat, StepPlans, StepResult
from moespan.engine.trace import Observation, run_trace
from moespan.engine.updates import SequenceUpdate
from moespan.engine.worker import Worker
from moespan.errors import EngineDeadError, RequestError, shown
from moespan.text.tokenizer import Tokenizer


class Engine:
    """Serves requests, one step at a time. Build it with `build.build_leader`."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        worker: Worker,
        tokenizer: Tokenizer | None,
        info: EngineInfo,
    ) -> None:
        self.info = info
        self._worker = worker
        self._mesh = worker.mesh
        self._tokenizer = tokenizer
        eos = {*model_config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        vocab_size = model_config.vocab_size
        self._replicas = Replicas(config, info.num_blocks, vocab_size, eos)
        self._most_in_flight = config.most_steps_in_flight
        self._seeds = random.Random(config.seed)
        self._live = Continuations(tokenizer)
        self._preparation = Preparation.of(vocab_size, eos, tokenizer)
        # One for each step in flight; None unless this rank is the speaker of its replica.
        self._own_results: deque[Pending | None] = deque()
        self._pace = Pace()
        self._kept: list[OutputDelta] = []  # for the next `step` to return
        self._death: EngineDeadError | None = None
        self._is_closed = False

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do, or the error of a dead engine to raise."""
        return bool(self._kept or self._death or self._preparation) or self._replicas.has_unfinished

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: the request cannot be served as asked; nothing has changed.
            EngineDeadError: a step failed, or the engine is closed.
        """
        if self._death is not None:
            raise self._death
        if request.params.stop and self._tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and this checkpoint has none; use stop_token_ids"
            )
        if request.id in self._preparation or self._replicas.knows(request.id):
            raise RequestError(f"request id {shown(request.id)} is in use; give each its own")
        seed = self._seeds.getrandbits(62)
        if request.params.constrains:
            check_request(request, self.info.max_model_len, self._replicas.schedulers[0].vocab_size)
            self._preparation.start(request, seed)
            self._admit_prepared()
        else:
            self._admit(request, seed)

    def abort(self, request_id: str) -> None:
        """Drop the rest of a request; no more deltas come of it. Unknown ids are ignored."""
        if self._death is not None:  # its queues may be inconsistent
            return
        self._kept = [delta for delta in self._kept if delta.id != request_id]
        self._preparation.drop(request_id)
        for sequence in self._replicas.abort(request_id):
            self._live.drop(sequence)

    def step(self) -> list[OutputDelta]:
        """Keep plans in flight, one for each pipeline stage or one ahead of the device, and return
        the deltas of the oldest one; nothing if there is no work.

        An error or interrupt in here leaves ranks at different places, and so ends the engine.

        Raises:
            EngineDeadError: an earlier step failed, or the engine is closed.
        """
        with self._all_or_dead():
            self._admit_prepared(may_wait=not self._kept and not self._replicas.has_unfinished)
            while self._replicas.num_in_flight < self._most_in_flight:
                plans = self._replicas.schedule()
                self._kept += self._deltas(self._replicas.take_faults())
                if plans is None:
                    break
                message = StepPlans.of([without_masks(plan) for plan in plans])
                self._pace.start(message)
                self._broadcast(message)
                send_masks(self._mesh, plans)
                own = plans[self._mesh.at.dp]
                self._own_results.append(self._worker.execute(message, own))
            if not self._kept and self._replicas.num_in_flight:
                self._finish_oldest()
            deltas, self._kept = self._kept, []
            return deltas

    def answer(self, question: Question[Any]) -> Any:
        """Answer a question between two steps; requests may be running.

        Raises:
            RequestError: the question cannot be answered now, or as asked; nothing has changed.
            EngineDeadError: a step failed, or the engine is closed.
        """
        with self._all_or_dead():
            if not self._live:
                self._settle()
            if isinstance(question, Stats):
                return EngineStats.total([EngineStats.of(s) for s in self._replicas.schedulers])
            if isinstance(question, Traffic | Memory | ExpertCounts):
                self._settle()
                return answer_by_reports(question, self._worker, self._broadcast)
            if isinstance(question, Trace):
                scheduler = self._replicas.schedulers[0]
                live = len(self._live)
                return run_trace(question.token_ids, scheduler, live, self._mesh, self._record)
        raise TypeError(f"{type(question).__name__} is no question to an engine")

    def pulse(self) -> Pulse:
        """The state of the engine, and the steps since the last call."""
        replicas = [EngineStats.of(scheduler) for scheduler in self._replicas.schedulers]
        return Pulse(replicas, self._pace.num_steps, self._pace.take())

    def heartbeat(self) -> None:
        """Tell idle followers that the leader is alive; call it within the group's timeout."""
        self._broadcast(Heartbeat())

    def close(self, successor: EngineConfig | None = None) -> None:
        """Release the followers, which then build `successor` if there is one. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._preparation.close()
        if self._death is None:
            for sequence in self._live:
                self._replicas.finish(sequence)
                self._live.drop(sequence)
            with self._all_or_dead():
                self._settle()
            self._death = EngineDeadError("the engine is closed")
        self._broadcast(Close(successor))
        self._mesh.close()

    @contextlib.contextmanager
    def _all_or_dead(self) -> Iterator[None]:
        """Run work that all ranks share; any error but a refusal ends the engine."""
        if self._death is not None:
            raise self._death
        try:
            yield
        except RequestError:
            raise
        except BaseException as error:
            self._death = EngineDeadError(
                f"a step of the engine was cut short by {type(error).__name__}; start a new engine"
            )
            raise

    def _record(self, message: StepPlans) -> list[Observation]:
        self._broadcast(message)
        self._worker.execute(message)
        return self._worker.trace

    def _admit(self, request: Request, seed: int, constraint: Constraint | None = None) -> None:
        try:
            for sequence in self._replicas.add(request, seed, constraint):
                self._live.add(sequence, request)
        except RequestError:
            raise
        except Exception as error:
            self.abort(request.id)
            raise fault(request.id, error) from None

    def _admit_prepared(self, may_wait: bool = False) -> None:
        """Queue the requests whose constraints are made."""
        for one in self._preparation.take(may_wait):
            try:
                self._admit(one.request, one.seed, one.constraint)
            except RequestError as error:
                self._kept += refusal(one.request, error)

    def _settle(self) -> None:
        """Take in all results in flight; the next `step` returns their deltas.

        Followers handle the leader's messages in order, so a speaker sends these results before
        its answer to any later message.
        """
        while self._replicas.num_in_flight:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Take in the results of the oldest step in flight, and keep their deltas."""
        results = self._collect()
        self._pace.end()
        self._kept += self._deltas(self._replicas.update(results))

    def _broadcast(self, message: FromLeader) -> None:
        kind = str(message.__struct_config__.tag)
        self._mesh.control.broadcast(msgspec.msgpack.encode(message), kind)

    def _collect(self) -> list[StepResult | None]:
        """The result of each replica in the oldest step in flight; None if it had no plan."""
        own = self._own_results.popleft()
        return collect_results(self._mesh, self._replicas.oldest_in_flight, own)

    def _deltas(self, updates: list[SequenceUpdate]) -> list[OutputDelta]:
        deltas = [self._live.delta(update) for update in updates]
        for update, delta in zip(updates, deltas, strict=True):
            if delta.finish_reason is not None:  # a stop string may have ended it
                self._replicas.finish(update.sequence)
        return deltas
