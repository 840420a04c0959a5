"""Outputs that a user gets, assembled from the deltas of the engine's steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from moespan.engine.request import OutputDelta, Request, TokenLogprobs


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: number of the continuation among the request's `n`, from 0.
        logprobs: one entry for each token; None if the request did not ask for log probabilities.
        finish_reason: None while running, then `stop`, `length`, `abort` or `error`.
        stop_reason: stop string or stop token id that ended the continuation; None for EOS.
        error: error message if `finish_reason` is `error`, else None.
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
        """Log probability of the whole continuation; None if `logprobs` is None."""
        if self.logprobs is None:
            return None
        return sum(entry.logprob for entry in self.logprobs)

    def add(self, delta: OutputDelta) -> None:
        """Append the result of one step."""
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
        prompt: text of the prompt; None if it was given as token ids.
        prompt_logprobs: one entry for each prompt token, None for the first token. The whole list
            is None if the request did not ask for it.
        prompt_logits: float32 rows [prompt tokens, vocabulary] as bytes; empty if not asked for.
        num_cached_tokens: prompt tokens that were found in the prefix cache.
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
        """Error of the first continuation that failed; None if none did."""
        return next((output.error for output in self.outputs if output.error), None)

    def add(self, delta: OutputDelta) -> None:
        """Append the result of one step to its continuation."""
        self.outputs[delta.index].add(delta)
        if self.prompt_logprobs is not None:
            self.prompt_logprobs += delta.prompt_logprobs
        self.prompt_logits += delta.prompt_logits
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
