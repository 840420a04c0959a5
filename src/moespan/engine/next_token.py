"""How the next token of a continuation is sampled: its parameters, and the tokens so far."""

from __future__ import annotations

import copy
from collections import Counter

from moespan.engine.constraints import Constraint
from moespan.engine.request import Request
from moespan.engine.step import SampleRow


class NextToken:
    """Makes the sample rows of one continuation.

    Attributes:
        settled: the row of all positions from now on; None if it may change.
        reads_tokens: whether `append` has anything to do.

    Args:
        ends: token ids that end the continuation.
        constraint: what it may say; None if anything.
    """

    def __init__(
        self, request: Request, seed: int, ends: set[int], constraint: Constraint | None
    ) -> None:
        self._params = request.params
        self._seed = seed
        self._ends = sorted(ends)
        self._constraint = constraint
        repeats = self._params.repetition_penalty != 1
        self._seen_prompt = sorted(set(request.prompt_token_ids)) if repeats else []
        self._seen_output: Counter[int] = Counter()
        self.settled: SampleRow | None = None
        self.reads_tokens = self._params.penalizes or constraint is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether what may come next depends on the ids of the tokens so far."""
        return self._constraint is not None and self._constraint.needs_tokens

    @property
    def is_complete(self) -> bool:
        """Whether nothing may come next but the end."""
        return self._constraint is not None and self._constraint.is_complete

    @property
    def error(self) -> str | None:
        """Why nothing can come next; None if something can."""
        return None if self._constraint is None else self._constraint.error

    def append(self, token_id: int) -> None:
        """Take in the next token of the output."""
        if self._params.penalizes:
            self._seen_output[token_id] += 1
        if self._constraint is not None:
            self._constraint.append(token_id)

    def rows(self, position: int, drafts: list[int]) -> list[SampleRow]:
        """How to sample the token at `position` of the output, counted from 0, and the one after
        each draft.

        There are fewer rows if a draft cannot come, or ends the output: nothing follows it then.
        """
        rows = [self.settled or self._row(position)]
        if not drafts:
            return rows
        after = self._copy()
        for number, draft in enumerate(drafts, 1):
            if draft in self._ends or not rows[-1].allows(draft):
                break
            after.append(draft)
            if after.error is not None or after.is_complete:
                break
            rows.append(after.settled or after._row(position + number))
        return rows

    def _copy(self) -> NextToken:
        """The same in the same state, which goes on by itself."""
        twin = copy.copy(self)
        twin._seen_output = Counter(self._seen_output)
        twin._constraint = self._constraint and self._constraint.copy()
        return twin

    def _row(self, position: int) -> SampleRow:
        params, constraint = self._params, self._constraint
        barred = [] if position >= params.min_tokens else self._ends
        row = SampleRow(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            seed=self._seed,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seen_prompt=self._seen_prompt,
            seen_output=dict(self._seen_output),
            logit_bias=params.logit_bias or {},
            barred=barred if constraint is None else sorted({*barred, *constraint.barred}),
            allowed=None if constraint is None else constraint.allowed,
            logprobs=params.logprobs,
        )
        if not self.reads_tokens and position >= params.min_tokens:
            self.settled = row
        return row
