"""What a front hands to its user: whole outputs, put together from the engine's deltas."""

from __future__ import annotations

from dataclasses import dataclass, field

from moespan.engine.request import OutputDelta, Request, TokenLogprobs


@dataclass
class CompletionOutput:
    """One continuation.

    Attributes:
        index: which of the request's `n`.
        logprobs: one entry for each token, if asked for.
        cumulative_logprob: their sum, if asked for.
        finish_reason: None while running, then `stop`, `length`, `abort` or `error`.
        stop_reason: the stop string or stop token id that ended it; None for EOS.
        error: what went wrong, with `finish_reason` `error`.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Log probability of the continuation; None when log probabilities were not asked for."""
        if self.logprobs is None:
            return None
        return sum(entry.logprob for entry in self.logprobs)

    def add(self, delta: OutputDelta) -> None:
        """Append what one step brought."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if self.logprobs is not None:
            self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.error = delta.error


@dataclass
class RequestOutput:
    """One request with all its continuations.

    Attributes:
        prompt: its text; None when it was given as token ids.
        prompt_logprobs: one entry for each prompt token, None for the first, if asked for.
        prompt_logits: float32 rows [prompt tokens, vocabulary] as bytes, if asked for.
        num_cached_tokens: prompt tokens that the prefix cache held.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_logits: bytearray = field(default_factory=bytearray)
    num_cached_tokens: int = 0

    @classmethod
    def begin(cls, request: Request, prompt: str | None) -> RequestOutput:
        """The output of a request before its first delta."""
        params = request.params
        return cls(
            request.id,
            prompt,
            request.prompt_token_ids,
            [
                CompletionOutput(index, logprobs=None if params.logprobs is None else [])
                for index in range(params.n)
            ],
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )

    @property
    def finished(self) -> bool:
        """Whether every continuation has ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def error(self) -> str | None:
        """What went wrong with the first continuation that ended in an error, if any did."""
        return next((output.error for output in self.outputs if output.error), None)

    def add(self, delta: OutputDelta) -> None:
        """Take in what one step brought."""
        self.outputs[delta.index].add(delta)
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += delta.prompt_logprobs
        self.prompt_logits += delta.prompt_logits
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
