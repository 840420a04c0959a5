"""Log probabilities in the forms of completions and chats.

Half a character is never shown as U+FFFD. Log probabilities that JSON cannot hold (-inf) are shown
as `LOWEST`.
"""

from __future__ import annotations

from collections.abc import Sequence

from moespan.engine.request import TokenLogprobs
from moespan.serve.replies import (
    ChatToken,
    ChatTop,
    CompletionLogprobs,
    PromptLogprobs,
    PromptToken,
)
from moespan.text.tokenizer import IncrementalDetokenizer, Tokenizer

LOWEST = -9999.0


class TokenTexts:
    """How tokens are shown.

    Args:
        tokenizer: None shows tokens by their ids.
        as_ids: show every token as `token_id:N`.
        skips_special: whether the text leaves special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool, skips_special: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None
        self._skips_special = skips_special

    def text(self, token_id: int) -> str:
        """The token as lists of log probabilities show it."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        """The bytes that the token adds to the text."""
        if self._tokenizer is None:
            return []
        return list(self._tokenizer.decode_bytes((token_id,), self._skips_special))

    def top(self, entry: TokenLogprobs, most: int) -> dict[str, float]:
        """The best tokens by their text, and the token itself. Another token of the same text is
        shown by its id."""
        best = dict(entry.top[:most])
        best[entry.token_id] = entry.logprob
        top: dict[str, float] = {}
        for token_id, logprob in best.items():
            text = self.text(token_id)
            top[text if text not in top else f"token_id:{token_id}"] = _finite(logprob)
        return top


class Offsets:
    """Where tokens begin in the prompt and the text, counted in characters.

    A token that begins within a character has the offset of that character. A token that the text
    does not show takes no room.

    Args:
        start: characters before the first token.
        prompt: token ids before the first token.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, skips_special: bool, start: int, prompt: Sequence[int]
    ) -> None:
        self._next = start
        self._text = None
        if tokenizer is not None:
            self._text = IncrementalDetokenizer(tokenizer, skips_special, prompt)

    def push(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._next)
            if self._text is not None:
                self._next += len(self._text.push((token_id,)))
        return offsets


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    offsets: list[int],
    most: int,
    texts: TokenTexts,
) -> CompletionLogprobs:
    """The form of completions. An entry is None where there is no prediction."""
    return CompletionLogprobs(
        tokens=[texts.text(token_id) for token_id in token_ids],
        token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
        top_logprobs=[None if entry is None else texts.top(entry, most) for entry in entries],
        text_offset=offsets,
    )


def chat_tokens(entries: Sequence[TokenLogprobs], most: int, texts: TokenTexts) -> list[ChatToken]:
    """The form of chats."""
    return [
        ChatToken(
            token=texts.text(entry.token_id),
            logprob=_finite(entry.logprob),
            bytes=texts.bytes(entry.token_id),
            top_logprobs=[
                ChatTop(texts.text(token_id), _finite(logprob), texts.bytes(token_id))
                for token_id, logprob in entry.top[:most]
            ],
        )
        for entry in entries
    ]


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], most: int, texts: TokenTexts
) -> PromptLogprobs:
    """vLLM's form for prompts: token id → its log probability, rank and text; the first is None.

    The rank is known for the best tokens only.
    """
    return [None if entry is None else _candidates(entry, most, texts) for entry in entries]


def _candidates(entry: TokenLogprobs, most: int, texts: TokenTexts) -> dict[str, PromptToken]:
    found = {
        str(token_id): PromptToken(_finite(logprob), rank, texts.text(token_id))
        for rank, (token_id, logprob) in enumerate(entry.top[:most], 1)
    }
    own = str(entry.token_id)
    if own not in found:
        found[own] = PromptToken(_finite(entry.logprob), None, texts.text(entry.token_id))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
