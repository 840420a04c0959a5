"""The texts of unfinished requests, made where they are read: in the process of the front.

The leader sends token ids. Only requests with stop strings come with their text, because the leader
has to look for these strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from moespan.engine.request import OutputDelta, Request, fault
from moespan.text.tokenizer import IncrementalDetokenizer, Tokenizer


@dataclass
class _Live:
    """A request whose text is made here.

    Attributes:
        running: its continuations that have not ended.
        streams: those of them that have tokens.
    """

    request: Request
    running: set[int]
    streams: dict[int, IncrementalDetokenizer] = field(default_factory=dict)


class LiveTexts:
    """Puts the text into the deltas of requests.

    Args:
        tokenizer: None leaves all texts empty.
        abort: called with the id of a request whose text cannot be made.
    """

    def __init__(self, tokenizer: Tokenizer | None, abort: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._abort = abort
        self._live: dict[str, _Live] = {}

    def begin(self, request: Request) -> None:
        """Expect deltas of a request."""
        if self._tokenizer is not None and not request.params.stop:
            self._live[request.id] = _Live(request, set(range(request.params.n)))

    def drop(self, request_id: str) -> None:
        """Expect no more deltas of a request."""
        self._live.pop(request_id, None)

    def complete(self, deltas: Iterable[OutputDelta]) -> list[OutputDelta]:
        """The deltas with their texts. A fault in making one ends its request."""
        completed: list[OutputDelta] = []
        for delta in deltas:
            live = self._live.get(delta.id)
            if live is None:
                completed.append(delta)
            elif delta.index in live.running:  # no fault has ended it
                try:
                    self._add_text(live, delta)
                except Exception as error:
                    completed += self._fail(live, error)
                else:
                    completed.append(delta)
        return completed

    def _add_text(self, live: _Live, delta: OutputDelta) -> None:
        stream = live.streams.get(delta.index)
        if stream is None:
            assert self._tokenizer is not None
            skips, prompt = live.request.params.skip_special_tokens, live.request.prompt_token_ids
            stream = IncrementalDetokenizer(self._tokenizer, skips, prompt)
            live.streams[delta.index] = stream
        delta.text = stream.push(delta.token_ids)
        if delta.finish_reason is not None:
            delta.text += stream.finish()
            live.running.discard(delta.index)

    def _fail(self, live: _Live, error: Exception) -> list[OutputDelta]:
        """The error deltas of all continuations that have not ended."""
        request_id, message = live.request.id, str(fault(live.request.id, error))
        failed = [
            OutputDelta(id=request_id, index=index, finish_reason="error", error=message)
            for index in sorted(live.running)
        ]
        live.running.clear()
        self._abort(request_id)
        return failed
