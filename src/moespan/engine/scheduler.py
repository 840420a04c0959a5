"""Which tokens of which sequences the next step computes, and what its result means for them.

Token ids, counts and blocks only: the engine handles text, the worker tensors. The same calls in
the same order make the same plans.

All rules are first come, first served:

- A step continues the running sequences first, then admits waiting ones. Each gets as many of its
  uncomputed tokens as the step has left, so long prompts are computed in chunks.
- A sequence gets the blocks of all its tokens when it is admitted, then one at a time.
- A running sequence that finds no free block preempts the youngest sequence that arrived after it
  and is not in flight. The preempted one waits again, keeps its output, and is recomputed. If all
  younger sequences are in flight, the older one waits for their results. It keeps its own blocks
  meanwhile, and nothing is admitted in such a step.
- The chunks of a prompt go into consecutive plans, which may all be in flight. The plan with the
  last chunk samples a token, and the sequence waits for this token. A sequence holds its blocks
  until all its results are back.
- With `plans_ahead` a sequence may be in one more plan. This plan is made while the previous one
  runs, and names the token that the previous one samples by its index. Limits of length are known
  ahead. If the sequence turns out to have stopped, the second plan's token is dropped. If any
  sequence of the first plan `needs_result`, the second plan waits for it, so that all sequences
  advance together.
- A sequence whose constraint `needs_tokens` is in no plan while a token of it is expected. The
  plans of others do not wait for it; but a plan ahead is made for such sequences alone only after
  the result, so that they come together in one plan.
- The `n` continuations of a request compute its prompt once. The first one is queued; the others
  join the queue, at the place of their arrival, when it has computed the prompt. They share its
  full blocks, and compute the rest of the prompt themselves: at most one block. If the prompt
  fills no block, or the first one ends early, each computes the prompt.
- `max_num_seqs` and `max_num_batched_tokens` bound each step; with several plans in flight, more
  sequences run at a time. With pp stages, a plan takes all tokens of at most 1/pp of the
  sequences, and leaves as many to each plan that is still missing, so that every stage has one.
  Chunks after which more of a prompt is left do not count, since the next plan has work of them.

So the oldest sequence is never preempted, and with nothing in flight it can always go on.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moespan.config import EngineConfig
from moespan.engine.blocks import BlockAllocator
from moespan.engine.constraints import Constraint
from moespan.engine.digests import Digests
from moespan.engine.drafts import DraftCounts
from moespan.engine.request import Request, TokenLogprobs, check_request
from moespan.engine.sequence import Sequence, Status
from moespan.engine.step import PromptScores, Sampled, SampleRow, StepPlan, StepResult
from moespan.engine.updates import SequenceUpdate
from moespan.errors import ConfigError, MoespanError, RequestError, shown


@dataclass
class _Room:
    """The room that is left in a plan in the making.

    Attributes:
        num_wholes: most sequences of which it takes all tokens that are left.
    """

    num_tokens: int
    num_wholes: int

    def fits(self, sequence: Sequence) -> bool:
        """Whether the plan may take the next tokens of the sequence."""
        return self.num_wholes > 0 or sequence.num_unplanned_tokens > self.num_tokens


_Planned = tuple[Sequence, int, int]
"""A sequence in a plan, its tokens there, and its samples: one after them, one for each draft."""


class Scheduler:
    """Makes the plans of steps; any number may be in flight.

    Attributes:
        waiting: sequences without blocks, in the order of arrival.
        running: sequences with blocks, in the order of arrival.
        num_preemptions: how often a sequence lost its blocks.
        draft_counts: how many drafts there were, and how many of them were right.
        num_prefix_queried_tokens: prompt tokens of the requests admitted so far.
        num_prefix_hit_tokens: those of them that the prefix cache held.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        *,
        digests: Digests | None = None,
    ) -> None:
        if num_blocks < config.blocks_per_sequence:
            raise ConfigError(
                f"num_blocks={num_blocks} of {config.block_size} tokens cannot hold one sequence "
                f"of max_model_len={config.max_model_len}; use at least "
                f"{config.blocks_per_sequence} or a shorter max_model_len"
            )
        self.config = config
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(t for t in eos_token_ids if 0 <= t < vocab_size)
        self.allocator = BlockAllocator(num_blocks, config.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.draft_counts = DraftCounts()
        self.num_prefix_queried_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._digests = digests or Digests(config.block_size)
        self._plans_ahead = config.plans_ahead
        self._faults: list[SequenceUpdate] = []
        self._siblings: dict[str, list[Sequence]] = {}  # by request; wait for its first sequence
        self._live: dict[str, list[Sequence]] = {}
        self._in_flight: deque[tuple[int, list[_Planned]]] = deque()
        self._num_arrivals = 0
        self._num_steps = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks: new ones and preempted ones."""
        return len(self.waiting) + sum(map(len, self._siblings.values()))

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self.running)

    @property
    def num_in_flight(self) -> int:
        """Plans without results yet."""
        return len(self._in_flight)

    @property
    def has_unfinished(self) -> bool:
        """Whether a sequence or a plan is unfinished."""
        return bool(self.waiting or self.running or self._in_flight)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks in use, within 0..1."""
        return self.allocator.num_used / self.allocator.num_blocks

    def add(
        self, request: Request, seed: int = 0, constraint: Constraint | None = None
    ) -> list[Sequence]:
        """Queue the `n` continuations of `request`, each with a copy of `constraint`.

        `seed` holds if the request has none.

        Raises:
            RequestError: its id is in use, or its prompt or parameters break a limit.
        """
        if request.id in self._live:
            raise RequestError(f"request id {shown(request.id)} is in use; give each its own")
        check_request(request, self.config.max_model_len, self.vocab_size)
        params = request.params
        first_seed = seed if params.seed is None else params.seed
        limit = self.config.max_model_len - len(request.prompt_token_ids)
        max_output_tokens = limit if params.max_tokens is None else min(limit, params.max_tokens)
        root = self.prefix_root(request)
        sequences = [
            Sequence(
                request,
                index,
                arrival=self._num_arrivals + index,
                seed=(first_seed + index) % 2**63,
                max_output_tokens=max_output_tokens,
                eos_token_ids=self.eos_token_ids,
                constraint=constraint and constraint.copy(),
                prefix_root=root,
                has_drafts=self.config.speculative_tokens > 0,
            )
            for index in range(params.n)
        ]
        self._num_arrivals += params.n
        self._live[request.id] = list(sequences)
        num_together = params.n
        if len(request.prompt_token_ids) > self.config.block_size and params.n > 1:
            num_together = 1
            self._siblings[request.id] = sequences[1:]
        self.waiting.extend(sequences[:num_together])
        return sequences

    def prefix_root(self, request: Request) -> bytes | None:
        """The root of the digests of a request that is added next: prefixes are shared with all
        requests of the same salt, or among the continuations of the request, or not at all."""
        if self.config.enable_prefix_caching:
            return self._digests.root("salt", request.cache_salt or "")
        return self._digests.root("request", self._num_arrivals) if request.params.n > 1 else None

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None if nothing can go on before a result or a request comes."""
        if self._plans_ahead and not self._can_plan_ahead():
            return None
        plan = StepPlan(step=self._num_steps)
        batch: list[_Planned] = []
        num_draft_rows, most_rows = self._num_draft_rows, self.config.max_num_seqs
        room = _Room(self.config.max_num_batched_tokens, self._fair_share)
        for sequence in self._ready_sequences(room):
            num_tokens, is_whole = sequence.next_chunk(room.num_tokens)
            most_drafts = num_draft_rows
            if most_drafts > 0:
                num_left = most_rows - len(plan.query_lens) - 1
                num_slots = self._num_draft_slots(sequence)
                most_drafts = min(most_drafts, num_left, num_slots, room.num_tokens - num_tokens)
            try:
                rows = sequence.sample_rows(most_drafts) if is_whole else []
            except Exception as error:
                self._faults.append(self._fail(sequence, error))
                continue
            self._extend(plan, sequence, num_tokens, rows)
            batch.append((sequence, num_tokens, len(rows)))
            num_drafts = len(sequence.drafts)
            num_draft_rows -= num_drafts
            room.num_wholes -= is_whole
            room.num_tokens -= num_tokens + num_drafts
            if not room.num_tokens or len(plan.query_lens) == most_rows:
                break
        if not batch:
            return None
        self._num_steps += 1
        self._in_flight.append((plan.step, batch))
        return plan

    def take_faults(self) -> list[SequenceUpdate]:
        """The sequences that faults ended in `schedule`, since the last call."""
        faults, self._faults = self._faults, []
        return faults

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest plan in flight; → the updates of its sequences.

        Raises:
            MoespanError: `plan` is not the oldest one in flight.
        """
        if not self._in_flight or self._in_flight[0][0] != plan.step:
            steps = [step for step, _ in self._in_flight]
            raise MoespanError(f"the result of step {plan.step} is not due; in flight: {steps}")
        _, batch = self._in_flight.popleft()
        prompts = {r.sequence: s for r, s in zip(plan.prompts, result.prompts, strict=True)}

        updates: list[SequenceUpdate] = []
        row = at = 0
        for sequence, num_tokens, num_samples in batch:
            run = result.samples[at : at + num_samples]
            at += num_samples
            if num_samples > 1:
                run = self.draft_counts.until_wrong(sequence.drafts, run)
                sequence.drafts = []
            prompt = prompts.get(row) if prompts else None
            row += num_samples or 1
            sequence.num_scheduled_tokens -= num_tokens
            if num_samples:
                sequence.num_expected_tokens -= 1
            if sequence.status is Status.FINISHED:  # while it was in flight
                if not sequence.in_flight:
                    self._release(sequence)
                continue
            try:
                update = self._advance(sequence, num_tokens, run, prompt)
            except Exception as error:
                update = self._fail(sequence, error)
            if update is not None:
                updates.append(update)
        return updates

    def finish(self, sequence: Sequence) -> None:
        """End `sequence` now, unless it has ended; no more updates come for it. If it is in flight,
        its blocks are freed when the result is back."""
        if sequence.is_finished:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        else:
            siblings = self._siblings.get(sequence.id, [])
            (siblings if sequence in siblings else self.waiting).remove(sequence)
        if sequence.index == 0:
            self._queue_siblings(sequence)
        sequence.status = Status.FINISHED
        self._live[sequence.id].remove(sequence)
        if not self._live[sequence.id]:
            del self._live[sequence.id]
        if not sequence.in_flight:
            self._release(sequence)

    def abort(self, request_id: str) -> list[Sequence]:
        """End the unfinished sequences of a request, and return them."""
        sequences = list(self._live.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence)
        return sequences

    def knows(self, request_id: str) -> bool:
        """Whether a continuation of the request is unfinished."""
        return request_id in self._live

    def _can_plan_ahead(self) -> bool:
        """Whether the next plan needs no result: it may only name tokens of the last plan."""
        if not self._in_flight:
            return True
        if len(self._in_flight) == self.config.most_steps_in_flight:
            return False
        _, batch = self._in_flight[-1]
        if any(s.needs_result and not s.is_finished for s, *_ in batch):
            return False
        candidates = itertools.chain(self.running, itertools.islice(self.waiting, 1))
        return not all(s.next_token.needs_tokens or s.is_all_planned for s in candidates)

    @property
    def _fair_share(self) -> int:
        """Most sequences of which one plan takes all tokens, so that each pipeline stage gets some:
        its share of all sequences, and of the ready ones, which the missing plans have to share."""
        pp = self.config.layout.pp
        if pp == 1:
            return self.config.max_num_seqs
        num_ready = len(self.waiting) + sum(map(self._can_go_on, self.running))
        num_missing = max(pp - self.num_in_flight, 1)
        return min(-(-(len(self.running) + len(self.waiting)) // pp), -(-num_ready // num_missing))

    def _can_go_on(self, sequence: Sequence) -> bool:
        """Whether a running sequence has tokens to compute that need no result."""
        if not sequence.in_flight:
            return True
        if sequence.num_expected_tokens and not self._plans_ahead:
            return False
        return not (sequence.is_all_planned or sequence.awaits_token)

    def _ready_sequences(self, room: _Room) -> Iterator[Sequence]:
        """Sequences that can go on and that `room` fits, with the blocks they need: running ones,
        then waiting ones, each of which is admitted when the caller reaches it."""
        num_preemptions, block_size = self.num_preemptions, self.allocator.block_size
        for sequence in tuple(self.running):
            if sequence.in_flight and not self._can_go_on(sequence):
                continue
            if room.num_wholes <= 0 and not room.fits(sequence):
                continue
            if sequence.status is Status.WAITING:  # preempted just now
                continue
            num_tokens = len(sequence.token_ids) + sequence.num_expected_tokens
            has_room = num_tokens <= len(sequence.block_table) * block_size
            if not has_room and not self._make_room(sequence, num_tokens):
                return
            yield sequence
        while self.waiting and self.num_preemptions == num_preemptions:
            sequence = self.waiting[0]
            if not room.fits(sequence) or not self._admit(sequence):
                return
            yield sequence

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take the blocks of all tokens of a running sequence, preempting younger ones."""
        while len(sequence.block_table) < self.allocator.blocks_for(num_tokens):
            block = self.allocator.take(1)
            if block is not None:
                sequence.block_table = sequence.block_table + block
            elif not self._preempt_younger_than(sequence):
                return False
        return True

    def _preempt_younger_than(self, sequence: Sequence) -> bool:
        """Preempt the youngest sequence that is not in flight; False if there is none."""
        for victim in reversed(self.running):
            if victim is sequence:
                return False
            if not victim.in_flight:
                break
        self._release(victim)
        victim.status = Status.WAITING
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.running.remove(victim)
        self._queue(victim)
        return True

    def _queue(self, sequence: Sequence) -> None:
        """Let `sequence` wait at the place of its arrival."""
        older = itertools.takewhile(lambda s: s.arrival < sequence.arrival, self.waiting)
        self.waiting.insert(sum(1 for _ in older), sequence)

    def _queue_siblings(self, first: Sequence) -> None:
        """Queue the continuations that have waited for the first one of their request."""
        for sibling in self._siblings.pop(first.id, ()):
            sibling.num_cached_tokens = first.num_cached_tokens
            self._queue(sibling)

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first waiting sequence blocks for all its tokens, sharing cached ones; False
        if too few are free, and nothing changes."""
        allocator = self.allocator
        self._extend_digests(sequence)
        num_reusable_blocks = sequence.num_reusable_tokens // allocator.block_size
        shared = allocator.match(sequence.block_digests[:num_reusable_blocks])
        num_new = allocator.blocks_for(sequence.num_tokens) - len(shared)
        table = allocator.take(num_new, shared)
        if table is None:
            return False
        self.waiting.popleft()
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
        sequence.status = Status.RUNNING
        sequence.admitted_at = sequence.admitted_at or time.monotonic()
        sequence.block_table = table
        sequence.num_published_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * allocator.block_size
        if sequence.num_preemptions == 0 and sequence.index == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_prefix_queried_tokens += sequence.num_prompt_tokens
            self.num_prefix_hit_tokens += sequence.num_cached_tokens
        return True

    @property
    def _num_draft_rows(self) -> int:
        """Drafts that a plan has rows for beside all sequences that are likely to be in it."""
        if not self.config.speculative_tokens:
            return 0
        num_sequences = len(self.running)
        if self.waiting:
            num_blocks = self.allocator.blocks_for(self.waiting[0].num_tokens)
            num_sequences += len(self.waiting) * (num_blocks <= self.allocator.num_free)
        return self.config.most_rows_with_drafts - min(num_sequences, self._fair_share)

    def _num_draft_slots(self, sequence: Sequence) -> int:
        """Most drafts of a sequence for which there are slots. They get one more block only if
        each running sequence can still have one, so that drafts preempt nobody."""
        num_slots = len(sequence.block_table) * self.allocator.block_size
        num_slots += self.allocator.block_size * (self.allocator.num_free > len(self.running))
        num_slots -= sequence.num_tokens + sequence.num_expected_tokens
        return min(self.config.speculative_tokens, num_slots)

    def _extend(
        self, plan: StepPlan, sequence: Sequence, num_tokens: int, rows: list[SampleRow]
    ) -> None:
        """Plan the next tokens of a sequence, and its drafts."""
        start = sequence.num_computed_tokens + sequence.num_scheduled_tokens
        if sequence.num_reported_tokens < sequence.num_prompt_tokens:
            plan.prompts.extend(sequence.prompt_rows(len(plan.query_lens), num_tokens))
        token_ids = sequence.token_ids[start : start + num_tokens]
        if len(token_ids) < num_tokens:
            token_ids.append(~sequence.sample)
        sequence.num_scheduled_tokens += num_tokens
        if not rows:
            self._add_row(plan, sequence, token_ids, start)
            return
        position = sequence.next_position
        sequence.sample = len(plan.samples)
        sequence.num_expected_tokens += 1
        self._add_row(plan, sequence, token_ids, start, rows[0], position)
        if len(rows) > 1:
            end = start + num_tokens
            num_blocks = self.allocator.blocks_for(end + len(sequence.drafts))
            num_missing = max(num_blocks - len(sequence.block_table), 0)
            sequence.block_table = sequence.block_table + (self.allocator.take(num_missing) or [])
            for number, draft in enumerate(sequence.drafts):
                sample, at = rows[1 + number], end + number
                self._add_row(plan, sequence, [draft], at, sample, position + 1 + number)

    def _add_row(
        self,
        plan: StepPlan,
        sequence: Sequence,
        token_ids: list[int],
        context_len: int,
        sample: SampleRow | None = None,
        position: int = 0,
    ) -> None:
        if sample is not None:
            plan.sampled.append(len(plan.query_lens))
            plan.positions.append(position)
            plan.samples.append(sample)
        num_tokens, table = len(token_ids), sequence.block_table
        num_blocks = -(-(context_len + num_tokens) // self.allocator.block_size)
        plan.token_ids.extend(token_ids)
        plan.query_lens.append(num_tokens)
        plan.context_lens.append(context_len)
        plan.block_tables.append(table if len(table) == num_blocks else table[:num_blocks])

    def _advance(
        self, sequence: Sequence, num_tokens: int, run: list[Sampled], prompt: PromptScores | None
    ) -> SequenceUpdate | None:
        """Add `num_tokens` computed tokens and their results to a sequence.

        Args:
            run: what was sampled after them, and after each draft that is right.
        """
        sequence.num_computed_tokens += num_tokens
        if prompt is not None:
            sequence.num_reported_tokens += num_tokens
        token_ids, reason, stop_reason = sequence.take(run)
        logprobs: list[TokenLogprobs] = []
        if sequence.params.logprobs is not None:
            taken = run[: len(token_ids)]
            logprobs = [sampled.logprobs for sampled in taken if sampled.logprobs is not None]
        if reason is None and len(token_ids) < len(run):
            # The first bad position is unknown, so none of these blocks may be shared.
            self.allocator.retract(sequence.block_table)
            self.finish(sequence)
            error = f"the logits at position {sequence.num_tokens - 1} are not finite"
            return SequenceUpdate(sequence, token_ids, logprobs, prompt, "error", error=error)

        num_full_blocks = sequence.num_computed_tokens // self.allocator.block_size
        if num_full_blocks > sequence.num_published_blocks:
            self._publish(sequence, num_full_blocks)
        if self._siblings and sequence.index == 0 and sequence.has_prompt:
            self._queue_siblings(sequence)
        if not run and sequence.max_output_tokens == 0 and sequence.has_prompt:
            reason = "length"
        if not run and reason is None and prompt is None:
            return None
        if reason is not None:
            self.finish(sequence)
        problem = sequence.next_token.error if reason == "error" else None
        return SequenceUpdate(sequence, token_ids, logprobs, prompt, reason, stop_reason, problem)

    def _fail(self, sequence: Sequence, error: Exception) -> SequenceUpdate:
        """End a sequence whose own work has raised `error`; the others go on."""
        self.finish(sequence)
        return SequenceUpdate.of_fault(sequence, error)

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Let other sequences share the blocks up to `end`, which are computed and full."""
        start = sequence.num_published_blocks
        self._extend_digests(sequence)
        new = zip(sequence.block_table[start:end], sequence.block_digests[start:end], strict=False)
        for block, digest in new:
            self.allocator.publish(block, digest)
        sequence.num_published_blocks = end

    def _extend_digests(self, sequence: Sequence) -> None:
        if sequence.prefix_root is not None:
            self._digests.extend(sequence.block_digests, sequence.token_ids, sequence.prefix_root)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_published_blocks = sequence.num_computed_tokens = 0
