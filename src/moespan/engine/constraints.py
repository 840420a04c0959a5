"""Which tokens may come next in a continuation: allowed token ids, bad words, and a grammar.

A set of tokens is a NumPy array with a bit for each token: bit t % 8 of byte t // 8 is token t.
NumPy meets and compares such sets of 102,400 tokens in a microsecond, so the leader keeps all of
this beside the sequences. Ranks get only the result, with each row that they sample
(`SampleRow.allowed` and `SampleRow.barred`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moespan.engine.request import Request, SamplingParams
from moespan.errors import MoespanError, RequestError
from moespan.text.grammar import Grammars, require_grammar_extra
from moespan.text.tokenizer import Tokenizer

Bits = NDArray[np.uint8]


class Matcher(Protocol):
    """The state of one continuation in its grammar (`moespan.text.grammar`).

    A method that raises `MoespanError` ends this continuation with that error, and no other.
    """

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""

    def accept(self, token_id: int) -> None:
        """Go on by one of the allowed tokens."""

    def allowed(self) -> bytes:
        """The tokens that may come next; EOS ids are among them exactly if the text may end."""


class Constraint:
    """The constraints of one continuation, and its state in them.

    Attributes:
        allowed: the only tokens that may come next, as in `SampleRow.allowed`; None for all.
        barred: ids that may not come next, as far as `allowed` does not say it.
        needs_tokens: whether these depend on the ids of all tokens before.
        is_complete: whether the grammar leaves nothing but the end of the text.
        error: why no token can come next; None if one can.

    Args:
        vocab_size: number of token ids of the model.
        eos_token_ids: ids that end a text, whether the request ignores them or not.
        bad_words: runs of token ids that the output must not contain.
        matcher: the state before the first token of the output; None without a grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        bad_words: Iterable[Sequence[int]] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._eos = _bits(eos_token_ids, vocab_size)
        self._eos_token_ids = eos_token_ids
        self._ends = {*(() if params.ignore_eos else eos_token_ids), *params.stop_token_ids}
        self._bad_words = [tuple(word) for word in bad_words]
        self._matcher = matcher
        only = params.allowed_token_ids
        self._only = None if only is None else _bits(only, vocab_size)
        # As many of the last tokens as begin the longest bad word.
        self._num_remembered = max(map(len, self._bad_words), default=1) - 1
        self._last: tuple[int, ...] = ()
        self._num_tokens = 0
        self.needs_tokens = matcher is not None or self._num_remembered > 0
        self.allowed: bytes | None = None
        self.barred: list[int] = []
        self.is_complete = False
        self.error: str | None = None
        self._look_ahead()

    @classmethod
    def of(
        cls,
        request: Request,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        tokenizer: Tokenizer | None,
        grammars: Grammars | None,
    ) -> Constraint:
        """What `request` may say, before its first token. This may take longer than a step.

        Raises:
            RequestError: it asks for what this checkpoint cannot do.
        """
        params = request.params
        eos = frozenset(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
        runs: list[list[int]] = []
        if params.bad_words:
            if tokenizer is None:
                raise RequestError(
                    "bad_words need a tokenizer, and this checkpoint has none; use logit_bias"
                )
            runs = _token_runs(params.bad_words, tokenizer)
        matcher = None
        if params.structured_outputs is not None:
            if grammars is None:
                require_grammar_extra()
                raise RequestError(
                    "structured_outputs need a tokenizer and an EOS token; the checkpoint lacks one"
                )
            matcher = grammars.matcher(params.structured_outputs)
        return cls(params, vocab_size, eos, runs, matcher)

    def copy(self) -> Constraint:
        """An independent constraint in the same state."""
        twin = copy.copy(self)
        twin._matcher = self._matcher and self._matcher.copy()
        return twin

    def append(self, token_id: int) -> None:
        """Take in the next token of the output."""
        self._num_tokens += 1
        if not self.needs_tokens:
            return
        if self._num_remembered:
            self._last = (*self._last, token_id)[-self._num_remembered :]
        try:
            if self._matcher is not None and token_id not in self._eos_token_ids:
                self._matcher.accept(token_id)
        except MoespanError as error:
            self.error = str(error)
        else:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Find what may come next."""
        self.barred = sorted({word[-1] for word in self._bad_words if self._begins(word)})
        may_stop = self._num_tokens >= self._params.min_tokens
        allowed, may_end = self._only, False
        if self._matcher is not None:
            try:
                allowed = np.frombuffer(self._matcher.allowed(), np.uint8)
            except MoespanError as error:
                self.error = str(error)
                return
            may_end = bool((allowed & self._eos).any())
            if self._params.ignore_eos:  # then EOS may come, but must not end the grammar
                allowed = allowed & ~self._eos
            if self._only is not None:
                allowed = allowed & self._only
        everything = range(self._vocab_size)
        left = _bits(everything, self._vocab_size) if allowed is None else allowed.copy()
        for token_id in (*self.barred, *(() if may_stop else self._ends)):
            left[token_id // 8] &= 0xFF ^ (1 << token_id % 8)
        self.is_complete = may_end and self._num_tokens > 0 and not (left & ~self._eos).any()
        if not (self.is_complete or left.any()):
            self.error = (
                "no token can come next: grammar, allowed_token_ids, bad_words and min_tokens "
                "together leave none"
            )
        if allowed is not None:
            self.allowed = allowed.tobytes()

    def _begins(self, word: tuple[int, ...]) -> bool:
        """Whether the output ends with all of `word` but its last token."""
        return len(word) == 1 or self._last[1 - len(word) :] == word[:-1]


def _bits(token_ids: Iterable[int], vocab_size: int) -> Bits:
    """The set of `token_ids`."""
    flags = np.zeros(vocab_size, np.bool_)
    flags[list(token_ids)] = True
    return np.packbits(flags, bitorder="little")


def _token_runs(bad_words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The runs of token ids to bar: each word as the output may begin with it, and as it comes
    after other text, where its first token takes in the space before it.

    As in vLLM, the second run counts if it differs in its first token and is as long as the first
    one; a longer run ends with the word's own tokens, which the first one bars already.
    """
    runs = []
    for word in bad_words:
        bare = tokenizer.encode(word.lstrip(" "), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(" "), add_special_tokens=False)
        runs.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            runs.append(spaced)
    return runs
