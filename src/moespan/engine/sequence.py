"""One continuation of one request, as the scheduler sees it: tokens, counts and blocks."""

from __future__ import annotations

import enum
from collections import Counter

from moespan.engine.request import Request
from moespan.engine.step import PromptRow, SampleRow


class Status(enum.Enum):
    """Where a sequence is: only a running one holds blocks, and a finished one in flight."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Continuation `index` of request `id`.

    Attributes:
        arrival: place in the order of arrival.
        token_ids: prompt and output.
        max_output_tokens: at this many it ends, by its own limit or the model's length.
        eos_token_ids: the EOS ids that end it; empty when it ignores them.
        num_computed_tokens: how many of its tokens are in the KV cache.
        num_scheduled_tokens: how many more the plans in flight compute; 0 when not in flight.
        num_expected_tokens: how many tokens those plans sample for it, ids unknown as yet.
        sample: its place among the samples of the last plan that samples for it.
        num_reported_tokens: prompt tokens whose scores are out, or were never asked for.
        num_cached_tokens: prompt tokens that the prefix cache held when it was first admitted.
        block_table: blocks of the KV cache, in the order of its tokens.
        block_digests: names of its full blocks in the prefix cache.
        num_published_blocks: how many of them are there.
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
    ) -> None:
        self.id = request.id
        self.index = index
        self.params = request.params
        self.prompt_logits = request.prompt_logits
        self.arrival = arrival
        self.seed = seed
        self.max_output_tokens = max_output_tokens
        self.eos_token_ids = frozenset() if self.params.ignore_eos else eos_token_ids

        self.status = Status.WAITING
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_expected_tokens = 0
        self.sample = 0
        # The n continuations have one prompt; the first of them reports on it.
        wants_report = self.params.prompt_logprobs is not None or self.prompt_logits
        self.num_reported_tokens = 0 if wants_report and index == 0 else self.num_prompt_tokens
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.block_digests: list[bytes] = []
        self.num_published_blocks = 0

        repeats = self.params.repetition_penalty != 1
        self._seen_prompt = sorted(set(self.token_ids)) if repeats else []
        self._seen_output: Counter[int] = Counter()

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.id}/{self.index} {self.status.name}: {self.num_computed_tokens} of "
            f"{self.num_tokens} tokens computed, {self.num_scheduled_tokens} in flight>"
        )

    @property
    def prompt_token_ids(self) -> list[int]:
        """The tokens it continues."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_unplanned_tokens(self) -> int:
        """Tokens, expected ones among them, that no plan has computed or computes just now."""
        known_or_expected = len(self.token_ids) + self.num_expected_tokens
        return known_or_expected - self.num_computed_tokens - self.num_scheduled_tokens

    @property
    def in_flight(self) -> bool:
        """Whether a plan that computes it has no result yet."""
        return self.num_scheduled_tokens > 0

    @property
    def needs_result(self) -> bool:
        """Whether its next step can only be planned when the result of the last one is known."""
        return self.params.penalizes or self.owes_report

    @property
    def is_all_planned(self) -> bool:
        """Whether it ends with the tokens that are expected, whatever they are."""
        return self.num_output_tokens + self.num_expected_tokens >= self.max_output_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it ended, for whatever reason."""
        return self.status is Status.FINISHED

    @property
    def owes_report(self) -> bool:
        """Whether scores of prompt tokens that were asked for are not out yet."""
        return self.num_reported_tokens < self.num_prompt_tokens

    @property
    def num_reusable_tokens(self) -> int:
        """How many tokens may come from the prefix cache: one must be left to compute, and all
        that are to be reported on."""
        return self.num_reported_tokens if self.owes_report else self.num_tokens - 1

    @property
    def num_tokens_of_next_chunk(self) -> int:
        """Tokens that the next step may compute. A step that computes again what was reported
        before a preemption ends there, so that no step reports on only a part of its tokens."""
        if self.owes_report and self.num_computed_tokens < self.num_reported_tokens:
            return self.num_reported_tokens - self.num_computed_tokens
        return self.num_unplanned_tokens

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.token_ids.append(token_id)
        if self.params.penalizes:
            self._seen_output[token_id] += 1

    def finish_reason(self) -> tuple[str | None, int | None]:
        """Judge the last token: the finish reason, or None, and the stop token id behind it."""
        token_id = self.token_ids[-1]
        if token_id in self.eos_token_ids:
            return "stop", None
        if token_id in self.params.stop_token_ids:
            return "stop", token_id
        if self.num_output_tokens >= self.max_output_tokens:
            return "length", None
        return None, None

    def next_tokens(self, num_tokens: int) -> list[int]:
        """The next `num_tokens` unplanned tokens; an expected one as `~self.sample`."""
        start = self.num_computed_tokens + self.num_scheduled_tokens
        known = self.token_ids[start : start + num_tokens]
        return known if len(known) == num_tokens else [*known, ~self.sample]

    def sample_row(self, row: int, num_tokens: int) -> SampleRow | None:
        """What sampling needs, if the next `num_tokens` are the last ones; `row` is its index."""
        if num_tokens < self.num_unplanned_tokens:
            return None
        params = self.params
        position = self.num_output_tokens + self.num_expected_tokens
        may_stop = position >= params.min_tokens
        barred = [] if may_stop else sorted(self.eos_token_ids.union(params.stop_token_ids))
        return SampleRow(
            sequence=row,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=self.seed,
            position=position,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seen_prompt=self._seen_prompt,
            seen_output=dict(self._seen_output),
            logit_bias=params.logit_bias or {},
            barred=barred,
            logprobs=params.logprobs,
        )

    def prompt_row(self, row: int, num_tokens: int) -> PromptRow | None:
        """What is to be reported on the next `num_tokens`, if anything."""
        start = self.num_computed_tokens
        if not self.owes_report or start < self.num_reported_tokens:
            return None
        end = start + num_tokens
        return PromptRow(
            sequence=row,
            targets=self.token_ids[start + 1 : end + 1],
            logprobs=self.params.prompt_logprobs,
            logits=self.prompt_logits,
        )
