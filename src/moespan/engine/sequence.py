"""One continuation of one request, as the scheduler sees it: tokens, counts and blocks."""

from __future__ import annotations

import enum
import time

from moespan.engine.constraints import Constraint
from moespan.engine.drafts import Drafter
from moespan.engine.next_token import NextToken
from moespan.engine.request import Request, Timing
from moespan.engine.step import PromptRow, Sampled, SampleRow


class Status(enum.Enum):
    """Where a sequence is. Only running ones hold blocks, and finished ones in flight."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Continuation `index` of request `id`.

    Attributes:
        arrival: position in the order of arrival.
        arrived_at, admitted_at: `time.monotonic()` of its arrival and of its first admission.
        token_ids: prompt and output.
        max_output_tokens: most output tokens, by the request's limit or the model's length.
        eos_token_ids: the EOS ids that end the sequence; empty if it ignores them.
        next_token: how the next token is sampled, and which ones are ruled out.
        num_computed_tokens: tokens in the KV cache.
        num_scheduled_tokens: further tokens that the plans in flight compute.
        num_expected_tokens: tokens that those plans sample, whose ids are not known yet.
        drafter: drafts its next tokens; None if steps compute no drafts.
        drafts: tokens that the last plan in flight computes beside, in case they come next.
        sample: index among the samples of the last plan that samples for this sequence.
        num_reported_tokens: prompt tokens with scores delivered, or not asked for.
        num_cached_tokens: prompt tokens that the prefix cache held at the first admission.
        block_table: blocks of the KV cache, in the order of the tokens. Plans share the list, so it
            is replaced, not changed.
        prefix_root: root of the digests; None if nobody may share the blocks.
        block_digests: digests of the full blocks, which name them in the prefix cache.
        num_published_blocks: blocks that the prefix cache knows.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        arrival: int,
        seed: int,
        max_output_tokens: int,
        eos_token_ids: frozenset[int],
        prefix_root: bytes | None = None,
        constraint: Constraint | None = None,
        has_drafts: bool = False,
    ) -> None:
        self.id = request.id
        self.index = index
        self.params = request.params
        self.prompt_logits = request.prompt_logits
        self.arrival = arrival
        self.arrived_at, self.admitted_at = time.monotonic(), 0.0
        self.max_output_tokens = max_output_tokens
        self.eos_token_ids = frozenset() if self.params.ignore_eos else eos_token_ids

        self.status = Status.WAITING
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_expected_tokens = 0
        self.drafter = Drafter(self.token_ids) if has_drafts else None
        self.drafts: list[int] = []
        self.sample = 0
        # The n continuations share a prompt; the first one reports on it.
        wants_report = self.params.prompt_logprobs is not None or self.prompt_logits
        self.num_reported_tokens = 0 if wants_report and index == 0 else self.num_prompt_tokens
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.prefix_root = prefix_root
        self.block_digests: list[bytes] = []
        self.num_published_blocks = 0

        self.seed = seed
        self._ends = {*self.eos_token_ids, *self.params.stop_token_ids}
        self._most_tokens = self.num_prompt_tokens + max_output_tokens
        self.next_token = NextToken(request, seed, self._ends, constraint)

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.id}/{self.index} {self.status.name}: {self.num_computed_tokens} of "
            f"{self.num_tokens} tokens computed, {self.num_scheduled_tokens} in flight>"
        )

    @property
    def num_tokens(self) -> int:
        """Number of prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_planned_tokens(self) -> int:
        """Tokens that are computed or in flight."""
        return self.num_computed_tokens + self.num_scheduled_tokens

    @property
    def num_unplanned_tokens(self) -> int:
        """Tokens, expected ones included, that are neither computed nor in flight."""
        known_or_expected = len(self.token_ids) + self.num_expected_tokens
        return known_or_expected - self.num_computed_tokens - self.num_scheduled_tokens

    @property
    def in_flight(self) -> bool:
        """Whether a plan in flight computes this sequence."""
        return self.num_scheduled_tokens > 0

    @property
    def needs_result(self) -> bool:
        """Whether planning its next step needs the result of the last one."""
        return self.params.penalizes or self.owes_report or bool(self.drafts)

    @property
    def is_all_planned(self) -> bool:
        """Whether it ends with the plans in flight, whatever the ids of the expected tokens."""
        if self.num_output_tokens + self.num_expected_tokens < self.max_output_tokens:
            return False
        return self.num_planned_tokens >= self.num_prompt_tokens

    @property
    def awaits_token(self) -> bool:
        """Whether it has to wait for an expected token before its next step is planned."""
        return self.num_expected_tokens > 0 and self.next_token.needs_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for any reason."""
        return self.status is Status.FINISHED

    @property
    def owes_report(self) -> bool:
        """Whether requested scores of prompt tokens are not delivered yet."""
        return self.num_reported_tokens < self.num_prompt_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """Tokens that may come from the prefix cache: not the last, and none to be reported on."""
        return self.num_reported_tokens if self.owes_report else self.num_tokens - 1

    def next_chunk(self, most: int) -> tuple[int, bool]:
        """How many of its tokens the next step computes, and whether no others are left then.

        Recomputing reported tokens after a preemption is a step of its own, so that each step
        reports on all of its tokens or on none.
        """
        start = self.num_computed_tokens + self.num_scheduled_tokens
        num_tokens = num_unplanned = len(self.token_ids) + self.num_expected_tokens - start
        if start < self.num_reported_tokens < self.num_prompt_tokens:
            num_tokens = self.num_reported_tokens - start
        if num_tokens > most:
            num_tokens = most
        return num_tokens, num_tokens == num_unplanned

    def timing(self) -> Timing:
        """Its durations, at the time of its first token or of its end."""
        queued_s = self.admitted_at - self.arrived_at
        return Timing(queued_s, time.monotonic() - self.admitted_at)

    def take(self, run: list[Sampled]) -> tuple[list[int], str | None, int | None]:
        """Add tokens that were sampled one after the other, all but the last of them computed.

        Returns:
            Those until the output ends, or until one is None, and `finish_reason` at the last.
        """
        token_ids: list[int] = []
        for sampled in run:
            if sampled.token_id is None:
                break
            if token_ids:
                self.num_computed_tokens += 1
            token_ids.append(sampled.token_id)
            reason, stop_reason = self.append(sampled.token_id)
            if reason is not None:
                return token_ids, reason, stop_reason
        return token_ids, None, None

    def append(self, token_id: int) -> tuple[str | None, int | None]:
        """Add a generated token; → the finish reason if it is the last one, and the stop token id
        that caused it."""
        self.token_ids.append(token_id)
        if self.next_token.reads_tokens:
            self.next_token.append(token_id)
        if token_id in self._ends:
            return "stop", None if token_id in self.eos_token_ids else token_id
        if self.next_token.reads_tokens and self.next_token.is_complete:
            return "stop", None
        if len(self.token_ids) >= self._most_tokens:
            return "length", None
        is_stuck = self.next_token.reads_tokens and self.next_token.error is not None
        return ("error" if is_stuck else None), None

    @property
    def has_prompt(self) -> bool:
        """Whether its whole prompt is in the KV cache."""
        return self.num_computed_tokens >= self.num_prompt_tokens

    @property
    def next_position(self) -> int:
        """Place in the output of the next token that is sampled, from 0."""
        return len(self.token_ids) - self.num_prompt_tokens + self.num_expected_tokens

    def sample_rows(self, most_drafts: int) -> list[SampleRow]:
        """How to sample after all of its tokens, and after each of its new `drafts`."""
        if most_drafts <= 0 and self.next_token.settled is not None:
            return [self.next_token.settled]
        if self.max_output_tokens == 0:
            return []
        position = self.next_position
        drafts: list[int] = []
        if self.drafter is not None and most_drafts > 0:
            most = min(most_drafts, self.max_output_tokens - position - 1)
            drafts = self.drafter.draft(most, self.num_expected_tokens)
        rows = self.next_token.rows(position, drafts)
        self.drafts = drafts[: len(rows) - 1]
        return rows

    def prompt_rows(self, row: int, num_tokens: int) -> list[PromptRow]:
        """The report that it owes on the next `num_tokens`, unless they were reported on."""
        start = self.num_planned_tokens
        if start < self.num_reported_tokens:
            return []
        return [
            PromptRow(
                sequence=row,
                targets=self.token_ids[start + 1 : start + num_tokens + 1],
                logprobs=self.params.prompt_logprobs,
                logits=self.prompt_logits,
            )
        ]
