"""The live continuations of an engine: what a step adds to each."""

from __future__ import annotations

from collections.abc import Iterator

from moespan.engine.request import OutputDelta, Request, fault
from moespan.engine.sequence import Sequence
from moespan.engine.text import TextStream
from moespan.engine.updates import SequenceUpdate
from moespan.text.tokenizer import Tokenizer


class Continuations:
    """All live continuations, in the order of arrival.

    Those with stop strings have a text here, which may end them. Fronts make the other texts.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._live: dict[Sequence, TextStream | None] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._live))

    def add(self, sequence: Sequence, request: Request) -> None:
        """Begin a continuation of `request`."""
        text = None
        if self._tokenizer is not None and request.params.stop:
            text = TextStream(self._tokenizer, request.params, request.prompt_token_ids)
        self._live[sequence] = text

    def drop(self, sequence: Sequence) -> None:
        """Forget a continuation, if it is live."""
        self._live.pop(sequence, None)

    def delta(self, update: SequenceUpdate) -> OutputDelta:
        """The additions of a step to a live continuation. A stop string may end it, and so does a
        fault in making its text."""
        sequence, token_ids = update.sequence, update.token_ids
        stream = self._live[sequence]
        begins = len(sequence.token_ids) - len(token_ids) == sequence.num_prompt_tokens
        if stream is None and update.is_plain and not begins:
            return OutputDelta(id=sequence.id, index=sequence.index, token_ids=token_ids)
        finish_reason, error = update.finish_reason, update.error
        stop_reason: str | int | None = update.stop_reason
        text, num_tokens = "", len(token_ids)
        if stream is not None:
            try:
                text, num_tokens = _push(stream, update)
            except Exception as unexpected:
                finish_reason, error = "error", str(fault(sequence.id, unexpected))
            if stream.stopped_by is not None:
                finish_reason, stop_reason, error = "stop", stream.stopped_by, None
        if finish_reason is not None:
            self.drop(sequence)
        begins = begins and bool(token_ids or finish_reason)
        return OutputDelta(
            id=sequence.id,
            index=sequence.index,
            text=text,
            token_ids=token_ids[:num_tokens],
            logprobs=update.logprobs[:num_tokens],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=error,
            prompt_logprobs=update.prompt.logprobs if update.prompt else [],
            prompt_logits=update.prompt.logits if update.prompt else b"",
            num_cached_tokens=sequence.num_cached_tokens if begins else 0,
            timing=sequence.timing() if begins else None,
        )


def _push(stream: TextStream, update: SequenceUpdate) -> tuple[str, int]:
    """The text of an update, and how many of its tokens there are until a stop string is complete.

    Tokens of a run that was drafted come one by one, as they would come without drafts.
    """
    sequence, token_ids = update.sequence, update.token_ids
    num_before, text = sequence.num_output_tokens - len(token_ids), ""
    is_cut = len(token_ids) > 1 and sequence.params.stop
    pieces = [[token] for token in token_ids] if is_cut else [token_ids]
    num_tokens = 0
    for number, piece in enumerate(pieces, 1):
        num_tokens += len(piece)
        may_stop = num_before + num_tokens >= sequence.params.min_tokens
        is_last = update.finish_reason is not None and number == len(pieces)
        text += stream.push(piece, may_stop, is_last)
        if stream.stopped_by is not None:
            break
    return text, num_tokens
