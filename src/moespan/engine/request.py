"""Requests to the engine and the deltas that it returns. Plain values; imports no torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from moespan import log
from moespan.errors import RequestError, shown
from moespan.text.grammar import StructuredOutputsParams

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP = 64
MAX_LOGIT_BIAS = 1024
MAX_STOP_CHARACTERS = 1024
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 64
MAX_SALT_CHARACTERS = 1024


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of a request. Names and meanings are vLLM's.

    The constructor checks every value and raises `RequestError` for the first that breaks its rule.
    It takes a whole number for a float, a float that is a whole number for an integer, one string
    for a list of `stop` strings, and token ids as decimal strings in `logit_bias`. None means that
    the parameter is not set, so that its default holds.

    Attributes:
        n: number of independent continuations.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the most probable tokens whose probabilities sum to this; 1 keeps all.
        top_k: keep this many of the most probable tokens; 0 or -1 keeps all.
        min_p: drop tokens less probable than this share of the most probable one.
        seed: makes the continuation repeatable: in float32 and with `batch_invariant` in any batch,
            otherwise in the same batch (docs/verification.md). Continuation i of n uses seed + i.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur in
            the prompt or output (CTRL, arXiv 1909.05858).
        presence_penalty: subtracted once from the logits of tokens that occur in the output.
        frequency_penalty: subtracted once for every occurrence in the output.
        logit_bias: token id -> number added to its logit.
        stop: strings that end the output; the text does not contain them by default.
        stop_token_ids: token ids that end the output.
        allowed_token_ids: the only token ids that may be generated. EOS, too, comes only if it is
            among them. None allows all.
        bad_words: words that the output must not contain. A word is barred as the run of tokens
            that the tokenizer makes of it, at the beginning of a text and after a space. Other
            tokens may still spell it.
        include_stop_str_in_output: keep the stop string in the text.
        max_tokens: most tokens to generate; None is as many as the model's length allows. 0 only
            computes the prompt, to score it (`prompt_logprobs`) or to have it in the prefix cache.
        min_tokens: EOS, stop token ids and stop strings do not count before this many tokens.
        ignore_eos: treat EOS like any other token.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: the form of the output: JSON of a schema, a regular expression, ... The
            output ends where the form leaves nothing more, also before `min_tokens` and with
            `ignore_eos`. Otherwise EOS comes only where the form may end.
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
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None:
                checked = _DEFAULTS[name]()
            else:
                try:
                    checked = check.take(value)
                except RequestError:
                    raise
                except (TypeError, ValueError, OverflowError):
                    raise RequestError(f"{name}={shown(value)} must be {check.rule}") from None
            if checked is not value:
                msgspec.structs.force_setattr(self, name, checked)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SamplingParams:
        """Build from decoded JSON. A null is the same as a missing field, whatever its name.

        Raises:
            RequestError: an unknown name, a wrong type, or a value out of bounds.
        """
        if not isinstance(raw, Mapping):
            raise RequestError(f"sampling parameters: {shown(raw)} must be an object")
        given = {name: value for name, value in raw.items() if value is not None}
        for name in given:
            if name not in _CHECKS:
                known = ", ".join(_CHECKS)
                raise RequestError(f"{shown(name)} is not a sampling parameter; known are {known}")
        if "max_tokens" in raw:
            given["max_tokens"] = raw["max_tokens"]
        return cls(**given)

    @property
    def penalizes(self) -> bool:
        """Whether sampling needs the tokens seen so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def constrains(self) -> bool:
        """Whether not every token may come next, by more than ids that end the output."""
        return (
            self.allowed_token_ids is not None
            or bool(self.bad_words)
            or self.structured_outputs is not None
        )


class _Check(NamedTuple):
    """The rule of one parameter.

    Attributes:
        rule: what the value must be, as an error says it.
        take: the value in the type of the field; raises ValueError, TypeError or OverflowError if
            the rule is broken.
    """

    rule: str
    take: Callable[[Any], Any]


def _integer(low: int, high: int) -> Callable[[Any], int]:
    """Take integers within low..high, and floats that are whole numbers; no bools."""

    def take(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        number = int(value) if isinstance(value, numbers.Integral) else int(float(value))
        if number != value or not low <= number <= high:
            raise ValueError
        return number

    return take


def _number(holds: Callable[[float], bool]) -> Callable[[Any], float]:
    """Take finite numbers for which `holds`; no bools."""

    def take(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        number = float(value)
        if not math.isfinite(number) or not holds(number):
            raise ValueError
        return number

    return take


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _items(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise TypeError
    if len(value) > most:
        raise ValueError
    return list(value)


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else _items(value, MAX_STOP)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise ValueError
        text.encode()  # half a surrogate pair is a ValueError
    return texts


def _bad_words(value: Any) -> list[str]:
    words = [value] if isinstance(value, str) else _items(value, MAX_BAD_WORDS)
    for word in words:
        if not isinstance(word, str):
            raise TypeError
        if not word.strip(" ") or len(word) > MAX_BAD_WORD_CHARACTERS:
            raise ValueError
        word.encode()  # half a surrogate pair is a ValueError
    return words


def _allowed_token_ids(value: Any) -> list[int]:
    token_ids = [_token_id(item) for item in _items(value, MAX_ALLOWED_TOKEN_IDS)]
    if not token_ids:
        raise ValueError
    return token_ids


def _structured_outputs(value: Any) -> StructuredOutputsParams:
    if isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise TypeError
    return StructuredOutputsParams.from_dict(value)


def _stop_token_ids(value: Any) -> list[int]:
    return [_token_id(item) for item in _items(value, MAX_STOP)]


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError
    # The keys of a JSON object are strings.
    return {
        _token_id(int(key) if isinstance(key, str) and key.isdecimal() else key): _bias(bias)
        for key, bias in value.items()
    }


_count = _integer(0, 2**31 - 1)
_token_id = _integer(0, 2**63 - 1)
_bias = _number(lambda bias: -100 <= bias <= 100)

_CHECKS = {
    "n": _Check(f"an integer within 1..{MAX_N}", _integer(1, MAX_N)),
    "temperature": _Check("a finite number of at least 0", _number(lambda t: t >= 0)),
    "top_p": _Check("a number above 0 and at most 1", _number(lambda p: 0 < p <= 1)),
    "top_k": _Check("an integer within -1..2**31-1", _integer(-1, 2**31 - 1)),
    "min_p": _Check("a number within 0..1", _number(lambda p: 0 <= p <= 1)),
    "seed": _Check("an integer within 0..2**63-1", _integer(0, 2**63 - 1)),
    "repetition_penalty": _Check("a finite number above 0", _number(lambda r: r > 0)),
    "presence_penalty": _Check("a number within -2..2", _number(lambda p: -2 <= p <= 2)),
    "frequency_penalty": _Check("a number within -2..2", _number(lambda f: -2 <= f <= 2)),
    "logit_bias": _Check(
        f"at most {MAX_LOGIT_BIAS} token ids, each with a number within -100..100", _logit_bias
    ),
    "stop": _Check(
        f"a string or at most {MAX_STOP} strings, each of 1..{MAX_STOP_CHARACTERS} whole "
        "characters (half a surrogate pair is none)",
        _stop,
    ),
    "stop_token_ids": _Check(f"a list of at most {MAX_STOP} token ids", _stop_token_ids),
    "allowed_token_ids": _Check(
        f"a list of 1..{MAX_ALLOWED_TOKEN_IDS} token ids", _allowed_token_ids
    ),
    "bad_words": _Check(
        f"a string or at most {MAX_BAD_WORDS} strings, each of 1..{MAX_BAD_WORD_CHARACTERS} whole "
        "characters and not of spaces only",
        _bad_words,
    ),
    "include_stop_str_in_output": _Check("true or false", _flag),
    "max_tokens": _Check("an integer within 0..2**31-1", _count),
    "min_tokens": _Check("an integer within 0..2**31-1", _count),
    "ignore_eos": _Check("true or false", _flag),
    "skip_special_tokens": _Check("true or false", _flag),
    "structured_outputs": _Check(
        "a StructuredOutputsParams, or an object with its fields", _structured_outputs
    ),
    "logprobs": _Check(f"an integer within 0..{MAX_LOGPROBS}", _integer(0, MAX_LOGPROBS)),
    "prompt_logprobs": _Check(f"an integer within 0..{MAX_LOGPROBS}", _integer(0, MAX_LOGPROBS)),
}
"""The rule of each parameter: the one place where parameters are checked."""


def _default_of(field: msgspec.structs.FieldInfo) -> Callable[[], Any]:
    """Makes the value of a field that is None."""
    if field.name == "max_tokens":  # None is a value of its own, not the default
        return lambda: None
    if field.default is msgspec.NODEFAULT:
        factory: Callable[[], Any] = field.default_factory
        return factory
    return lambda: field.default


_DEFAULTS = {field.name: _default_of(field) for field in msgspec.structs.fields(SamplingParams)}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt for the engine.

    Attributes:
        prompt_token_ids: at least one token.
        prompt_logits: also return the float32 logits of every prompt position (for `verify`).
        cache_salt: only requests with the same salt share prefixes in the cache, so that nobody
            learns from the time of an answer what others have asked (CVE-2025-46570).
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_logits: bool = False
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise RequestError(f"{name}={shown(getattr(self, name))} must be {rule}")

        ids = self.prompt_token_ids
        is_ids = isinstance(ids, list) and all(type(token) is int for token in ids)
        require("id", isinstance(self.id, str), "a string")
        require("prompt_token_ids", is_ids, "a list of token ids")
        require("params", isinstance(self.params, SamplingParams), "a SamplingParams")
        require("prompt_logits", isinstance(self.prompt_logits, bool), "true or false")
        salt = self.cache_salt
        is_salt = salt is None or (isinstance(salt, str) and 1 <= len(salt) <= MAX_SALT_CHARACTERS)
        require("cache_salt", is_salt, f"a string of 1..{MAX_SALT_CHARACTERS} characters")


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the model's own distribution: before penalties,
    constraints, temperature and truncation.

    Attributes:
        token_id: the token at this position.
        logprob: log probability of that token.
        top: the best tokens and their log probabilities, best first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """How long a continuation took to its first token, by the leader's clock.

    Attributes:
        queued_s: from its arrival until it got blocks. Continuations of one prompt wait for the
            first of them.
        prefill_s: from then to its first token, or to its end if it has none.
    """

    queued_s: float
    prefill_s: float


class OutputDelta(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """The additions of one step to continuation `index` of request `id`.

    Attributes:
        text: newly completed text, in whole characters. The leader leaves it empty, unless the
            request has stop strings: the front makes it (`moespan.front.live_texts`).
        token_ids: newly generated tokens.
        logprobs: one entry for each of `token_ids`, if requested.
        finish_reason: None while running, then `stop`, `length`, `abort` or `error`.
        stop_reason: the stop string or stop token id that ended the continuation.
        error: error text, with `finish_reason` `error`.
        prompt_logprobs: log probabilities for the prompt positions of this step, if requested; the
            entry for position p + 1 comes with position p.
        prompt_logits: float32 rows [positions, vocabulary] as bytes, if requested.
        num_cached_tokens: prompt tokens that the prefix cache held, and
        timing: both with the first token, or with the end of a continuation that has none.
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
    timing: Timing | None = None


def refusal(request: Request, error: RequestError) -> list[OutputDelta]:
    """An error delta for every continuation of a refused request."""
    return [
        OutputDelta(id=request.id, index=index, finish_reason="error", error=str(error))
        for index in range(request.params.n)
    ]


def fault(request_id: str, error: Exception) -> RequestError:
    """The error of one request for a fault of ours in its work, which must not end the engine. The
    log gets the traceback, and the client nothing of it."""
    log.logger.error(f"the work for request {shown(request_id)} failed", exc_info=error)
    return RequestError(f"the engine failed at this request with {type(error).__name__}")


def check_request(request: Request, max_model_len: int, vocab_size: int) -> None:
    """Raise `RequestError` if no engine with these limits can serve `request`."""
    num_tokens, params = len(request.prompt_token_ids), request.params
    if num_tokens == 0:
        raise RequestError("the prompt is empty; it must have at least one token")
    most = max_model_len if params.max_tokens == 0 else max_model_len - 1
    if num_tokens > most:
        output = "no output (max_tokens=0)" if params.max_tokens == 0 else "one token of output"
        raise RequestError(
            f"the prompt has {num_tokens} tokens; max_model_len={max_model_len} leaves room for "
            f"{most} and {output}"
        )
    for name, token_ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", list(params.logit_bias or ())),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"{name}: token id {shown(token_id)} is not within 0..{vocab_size - 1}"
                )
