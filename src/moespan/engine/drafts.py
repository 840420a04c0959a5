"""Drafts of a sequence's next tokens, copied from its own text (prompt lookup).

Where the last tokens have occurred before, what followed them then is the draft of what follows
now. A step computes drafts beside the last token, so that it yields several tokens where they are
right: in edits, extracts, code, or answers that quote. Nothing else is needed: no second model.

A draft is accepted exactly when it is the token that would have been sampled without it. Draws are
pure functions of logits, seed and position (`moespan.engine.sampler`), so drafts change no token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moespan.engine.step import Sampled

NUM_MATCHED = 2
"""Number of last tokens that must have occurred before."""

# Token ids of a key are this far apart; a larger vocabulary only finds false matches, and false
# drafts.
_TOKEN_BITS = 20
_KEY_MASK = (1 << NUM_MATCHED * _TOKEN_BITS) - 1
# How much the last looked-up token counts in the share of right ones, and the share before any.
_RATE, _FIRST_SHARE = 0.1, 0.4
# A draft is worth its row if it is accepted more often than not: at batch 1, a second row of a
# mixture of experts reads half as many bytes again (docs/speculation.md).
_LEAST_CHANCE = 0.5


@dataclass
class DraftCounts:
    """How many drafts all sequences had, and how many were right.

    Attributes:
        num_drafts: how often a sequence had drafts in a step.
        num_tokens: drafted tokens.
        num_accepted: those that were right: each saved its sequence a step.
    """

    num_drafts: int = 0
    num_tokens: int = 0
    num_accepted: int = 0

    def until_wrong(self, drafts: list[int], samples: list[Sampled]) -> list[Sampled]:
        """The samples up to the first wrong draft; each draft has one before and one after it."""
        come = [draft == sample.token_id for draft, sample in zip(drafts, samples, strict=False)]
        num_right = (*come, False).index(False)
        self.num_drafts += 1
        self.num_tokens += len(drafts)
        self.num_accepted += num_right
        return samples[: 1 + num_right]


class Drafter:
    """Drafts the next tokens of one sequence, in constant time for each token of its text.

    The drafter checks its predictions at every new token, whether they were in a step or not. So it
    knows how often they are right before anything is spent on them, and drafts as many tokens as
    are likely to be accepted.

    Args:
        token_ids: prompt and output, which the sequence extends.
    """

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._num_prompt_tokens = len(token_ids)
        self._num_read = 0
        self._key = 0  # the last tokens, as one number
        self._after: dict[int, int] = {}  # key -> where the text went on after its last occurrence
        self._source: int | None = None  # where the predicted next token stands
        self._share = _FIRST_SHARE  # of predictions that were right, the latest counting most

    def draft(self, most: int, num_expected: int = 0) -> list[int]:
        """At most `most` likely next tokens, after `num_expected` ones that are being sampled."""
        self._read()
        if self._source is None:
            return []
        count = min(self._num_likely - num_expected, most)
        start, length = self._source + num_expected, len(self._token_ids)
        # Beyond the end of the text, the repetition that is being drafted goes on.
        period = length - self._source
        return [
            self._token_ids[at if at < length else at - period * ((at - self._source) // period)]
            for at in range(start, start + count)
        ]

    @property
    def _num_likely(self) -> int:
        """Number of next tokens that are right with at least `_LEAST_CHANCE`."""
        if self._share < _LEAST_CHANCE:
            return 0
        return int(math.log(_LEAST_CHANCE) / math.log(min(self._share, 0.99)))

    def _read(self) -> None:
        """Take in the tokens that are new since the last call."""
        for at in range(self._num_read, len(self._token_ids)):
            token_id = self._token_ids[at]
            if self._source is not None:
                is_right = self._token_ids[self._source] == token_id
                if at >= self._num_prompt_tokens:
                    self._share += (is_right - self._share) * _RATE
                self._source = self._source + 1 if is_right else None
            self._key = (self._key << _TOKEN_BITS | token_id) & _KEY_MASK
            found = self._after.get(self._key)
            if self._source is None:
                self._source = found
            self._after[self._key] = at + 1
        self._num_read = len(self._token_ids)
