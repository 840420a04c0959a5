"""Requests to the engine and the deltas that it returns. Plain values; imports no torch."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from moespan.errors import RequestError

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP = 64
MAX_LOGIT_BIAS = 1024
MAX_STOP_CHARACTERS = 1024


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of a request. Names and meanings are vLLM's.

    Attributes:
        n: number of independent continuations.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the most probable tokens whose probabilities sum to this; 1 keeps all.
        top_k: keep this many of the most probable tokens; 0 or -1 keeps all.
        min_p: drop tokens less probable than this share of the most probable one.
        seed: makes the continuation repeatable in any batch. Continuation i of n uses seed + i.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur in
            the prompt or output (CTRL, arXiv 1909.05858).
        presence_penalty: subtracted once from the logits of tokens that occur in the output.
        frequency_penalty: subtracted once for every occurrence in the output.
        logit_bias: token id -> number added to its logit.
        stop: strings that end the output; the text does not contain them by default.
        stop_token_ids: token ids that end the output.
        include_stop_str_in_output: keep the stop string in the text.
        max_tokens: most tokens to generate; None is as many as the model's length allows.
        min_tokens: EOS, stop token ids and stop strings do not count before this many tokens.
        ignore_eos: treat EOS like any other token.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: return log probabilities of the sampled token and of this many best tokens.
        prompt_logprobs: the same for every prompt token but the first.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def require(name: str, rule: str, holds: bool) -> None:
            if not holds:
                raise RequestError(f"{name}={getattr(self, name)!r} must be {rule}")

        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            require(name, "a finite number", math.isfinite(getattr(self, name)))
        require("n", f"within 1..{MAX_N}", 1 <= self.n <= MAX_N)
        require("temperature", "at least 0", self.temperature >= 0)
        require("top_p", "above 0 and at most 1", 0 < self.top_p <= 1)
        require("top_k", "at least -1", self.top_k >= -1)
        require("min_p", "within 0..1", 0 <= self.min_p <= 1)
        require("repetition_penalty", "above 0", self.repetition_penalty > 0)
        require("presence_penalty", "within -2..2", -2 <= self.presence_penalty <= 2)
        require("frequency_penalty", "within -2..2", -2 <= self.frequency_penalty <= 2)
        require("max_tokens", "at least 1", self.max_tokens is None or self.max_tokens >= 1)
        require("min_tokens", "at least 0", self.min_tokens >= 0)
        for name in ("max_tokens", "min_tokens", "top_k"):
            require(name, "below 2**31", (getattr(self, name) or 0) < 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(name, f"within 0..{MAX_LOGPROBS}", value is None or 0 <= value <= MAX_LOGPROBS)
        require("seed", "within 0..2**63-1", self.seed is None or 0 <= self.seed < 2**63)
        require(
            "stop",
            f"at most {MAX_STOP} strings of 1..{MAX_STOP_CHARACTERS} characters",
            len(self.stop) <= MAX_STOP
            and all(1 <= len(text) <= MAX_STOP_CHARACTERS for text in self.stop),
        )
        require("stop", "whole characters, not half a surrogate pair", _is_unicode(self.stop))
        require(
            "stop_token_ids",
            f"at most {MAX_STOP} token ids",
            len(self.stop_token_ids) <= MAX_STOP and min(self.stop_token_ids, default=0) >= 0,
        )
        require(
            "logit_bias",
            f"at most {MAX_LOGIT_BIAS} finite numbers within -100..100",
            self.logit_bias is None
            or (
                len(self.logit_bias) <= MAX_LOGIT_BIAS
                and all(
                    token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias.items()
                )
            ),
        )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> SamplingParams:
        """Build from decoded JSON; `stop` may be one string, as clients send it.

        Raises:
            RequestError: an unknown name, a wrong type, or a value out of bounds.
        """
        if isinstance(raw.get("stop"), str):
            raw = {**raw, "stop": [raw["stop"]]}
        try:
            return msgspec.convert(raw, cls, strict=False, str_keys=True)
        except msgspec.ValidationError as error:
            raise RequestError(f"sampling parameters: {error}") from None

    @property
    def penalizes(self) -> bool:
        """Whether sampling needs the tokens seen so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def _is_unicode(texts: list[str]) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt for the engine.

    Attributes:
        prompt_token_ids: at least one token.
        prompt_logits: also return the float32 logits of every prompt position (for `verify`).
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_logits: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the model's own distribution: before penalties,
    temperature and truncation.

    Attributes:
        token_id: the token at this position.
        logprob: log probability of that token.
        top: the best tokens and their log probabilities, best first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class OutputDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The additions of one step to continuation `index` of request `id`.

    Attributes:
        text: newly completed text, in whole characters.
        token_ids: newly generated tokens.
        logprobs: one entry for each of `token_ids`, if requested.
        finish_reason: None while running, then `stop`, `length`, `abort` or `error`.
        stop_reason: the stop string or stop token id that ended the continuation.
        error: error text, with `finish_reason` `error`.
        prompt_logprobs: log probabilities for the prompt positions of this step, if requested; the
            entry for position p + 1 comes with position p.
        prompt_logits: float32 rows [positions, vocabulary] as bytes, if requested.
        num_cached_tokens: prompt tokens that the prefix cache held.
    """

    id: str
    index: int = 0
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_logprobs: list[TokenLogprobs] = []
    prompt_logits: bytes = b""
    num_cached_tokens: int = 0


def refusal(request: Request, error: RequestError) -> list[OutputDelta]:
    """An error delta for every continuation of a refused request."""
    return [
        OutputDelta(id=request.id, index=index, finish_reason="error", error=str(error))
        for index in range(request.params.n)
    ]


def check_request(request: Request, max_model_len: int, vocab_size: int) -> None:
    """Raise `RequestError` if no engine with these limits can serve `request`."""
    num_tokens, params = len(request.prompt_token_ids), request.params
    if num_tokens == 0:
        raise RequestError("the prompt is empty; it must have at least one token")
    if num_tokens >= max_model_len:
        raise RequestError(
            f"the prompt has {num_tokens} tokens; max_model_len={max_model_len} leaves room for "
            f"{max_model_len - 1} and one token of output"
        )
    for name, token_ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", list(params.logit_bias or ())),
    ):
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name}: token id {token_id} is not within 0..{vocab_size - 1}")
