"""The text of one continuation as it grows, and the stop strings that end it."""

from __future__ import annotations

from moespan.engine.request import SamplingParams
from moespan.text.tokenizer import IncrementalDetokenizer, Tokenizer


class TextStream:
    """Turns tokens into text piece by piece and watches for stop strings.

    Text that may be the beginning of a stop string is held back until the next tokens decide.

    Attributes:
        stopped_by: the stop string that was found, if any; nothing may be pushed after that.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: list[int]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens, prompt)
        self._stop = params.stop
        self._keep_stop = params.include_stop_str_in_output
        self._held_back = ""
        self.stopped_by: str | None = None

    def push(self, token_ids: list[int], may_stop: bool, is_last: bool) -> str:
        """Add new tokens and return the text that is now certain.

        Args:
            may_stop: whether stop strings count already (`min_tokens`).
            is_last: whether no more tokens follow; then nothing is held back.
        """
        new = self._detokenizer.push(token_ids)
        if is_last:
            new += self._detokenizer.finish()
        if not self._stop:
            return new
        text = self._held_back + new
        found = self._find(text) if may_stop else None
        if found is not None:
            at, self.stopped_by = found
            self._held_back = ""
            return text[: at + len(self.stopped_by) * self._keep_stop]
        certain = len(text) if is_last else len(text) - self._num_undecided(text)
        self._held_back = text[certain:]
        return text[:certain]

    def _find(self, text: str) -> tuple[int, str] | None:
        """Start and text of the stop string that is complete first, the longest of equals.

        So the end does not depend on the tokens into which the text is cut.
        """
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
