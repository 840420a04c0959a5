"""What one step means for one sequence, as the scheduler tells the engine."""

from __future__ import annotations

import msgspec

from moespan.engine.request import TokenLogprobs, fault
from moespan.engine.sequence import Sequence
from moespan.engine.step import PromptScores


class SequenceUpdate(msgspec.Struct, frozen=True, gc=False):
    """The additions of one step to one sequence. Fields mean the same as in the `OutputDelta` that
    the engine makes of them. The token that stopped a sequence is among its tokens."""

    sequence: Sequence
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt: PromptScores | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it has tokens only, and the sequence goes on."""
        return self.finish_reason is None and self.prompt is None and not self.logprobs

    @classmethod
    def of_fault(cls, sequence: Sequence, error: Exception) -> SequenceUpdate:
        """The end of a sequence whose own work has raised `error`."""
        return cls(sequence, finish_reason="error", error=str(fault(sequence.id, error)))
