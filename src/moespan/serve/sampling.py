"""Bodies of generation → jobs: checked requests to the engine, and what their answers have to show.

Everything here may take long, and runs in a thread of `moespan.serve.pool`.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from moespan import log
from moespan.engine.request import Request, SamplingParams
from moespan.errors import RequestError, TokenizerError, shown
from moespan.front.prompts import Encoded
from moespan.serve.bodies import (
    SAMPLING,
    ChatBody,
    CompletionBody,
    GenerationBody,
    StreamOptions,
    TokenizeBody,
    decode,
)
from moespan.serve.history import plain_messages
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal, bad
from moespan.serve.served import ServedModel
from moespan.serve.tools import DemandedCall, about_form, demanded_call
from moespan.text.grammar import StructuredOutputsParams

_MOST_TEXT_BYTES = 1 << 20
"""Bytes of one text to encode. Taking over the ids of a megabyte holds Python's lock for 10 ms."""

_COMPLETION_TOKENS = 16
_HIGHEST_TEMPERATURE = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request to generate: a request to the engine for each prompt, and the answer's form.

    Attributes:
        id: of the answer; requests to the engine begin with it.
        texts: for each prompt its text; None if it was given as ids or was cut.
        n: continuations of each prompt.
        logprobs: best tokens to show at each position; None shows no log probabilities.
        prompt_logprobs: the same at each position of the prompt, in vLLM's form.
        usage: what streams tell of usage; None for nothing.
        call: the call of a function that each continuation must be; None for text.
        form: name of the field that asks for a form of the output; see `try_form`.
        ignored: names of fields that have no effect.
    """

    id: str
    is_chat: bool
    model: ServedModel
    name: str
    created: int
    requests: list[Request]
    texts: list[str | None]
    n: int
    stream: bool
    usage: StreamOptions | None
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool
    tokens_as_ids: bool
    skip_special_tokens: bool
    ignored: list[str]
    call: DemandedCall | None
    form: str | None


def completion_job(body: bytes, model: ServedModel, options: ServeOptions) -> Job:
    """The job of `POST /v1/completions`.

    Raises:
        Refusal, RequestError: the request cannot be served as asked.
    """
    asked, ignored = decode(body, CompletionBody, options.strict_fields)
    name = model.name_of(asked.model)
    _check_logprobs("logprobs", asked.logprobs, options)
    params = _params(
        asked,
        model,
        options,
        max_tokens=_COMPLETION_TOKENS,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
    )
    prompts = _prompts_of(asked.prompt)
    _check_counts(len(prompts), params.n, options)
    encoded = [_encoded(prompt, name, asked, model, params.max_tokens) for name, prompt in prompts]
    return _job(asked, ignored, model, name, params, encoded, "cmpl", asked.echo, asked.logprobs)


def chat_job(body: bytes, model: ServedModel, options: ServeOptions) -> Job:
    """The job of `POST /v1/chat/completions`.

    Raises:
        Refusal, RequestError: the request cannot be served as asked.
    """
    asked, ignored = decode(body, ChatBody, options.strict_fields)
    return job_of_chat(asked, ignored, model, options)


def job_of_chat(
    asked: ChatBody,
    ignored: list[str],
    model: ServedModel,
    options: ServeOptions,
    kind: str = "chatcmpl",
) -> Job:
    """The job of a chat.

    Args:
        ignored: names of fields that have no effect.
        kind: how the id begins.
    """
    name = model.name_of(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad(f"top_logprobs={shown(asked.top_logprobs)} needs logprobs=true", "top_logprobs")
    _check_logprobs("top_logprobs", asked.top_logprobs, options)
    call = demanded_call(asked)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    params = _params(asked, model, options, max_tokens=None, logprobs=logprobs, call=call)
    _check_counts(1, params.n, options)
    encoded = _fit(
        chat_prompt(asked, model, may_exceed=asked.truncate_prompt_tokens is not None),
        "messages",
        asked,
        model,
        params.max_tokens,
    )
    return _job(asked, ignored, model, name, params, [encoded], kind, False, logprobs, call)


def try_form(job: Job) -> None:
    """Try the form that the output of a job is held to, which may take seconds.

    Raises:
        Refusal: a 400; the form cannot be used.
    """
    form = job.requests[0].params.structured_outputs
    if form is None or job.form is None:
        return
    try:
        job.model.prompts.try_form(form)
    except RequestError as error:
        raise about_form(error, job.form) from None


def _job(
    asked: GenerationBody,
    ignored: list[str],
    model: ServedModel,
    name: str,
    params: SamplingParams,
    encoded: Sequence[Encoded],
    kind: str,
    echo: bool,
    logprobs: int | None,
    call: DemandedCall | None = None,
) -> Job:
    id = f"{kind}-{secrets.token_hex(16)}"
    requests = [
        _request(prompt, params, f"{id}-{number}", asked, model)
        for number, prompt in enumerate(encoded)
    ]
    return Job(
        id=id,
        is_chat=kind != "cmpl",
        model=model,
        name=name,
        created=int(time.time()),
        requests=requests,
        texts=[text for text, _ in encoded],
        n=params.n,
        stream=asked.stream,
        usage=asked.stream_options if asked.stream else None,
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=None if asked.prompt_logprobs is None else int(asked.prompt_logprobs),
        return_token_ids=asked.return_token_ids,
        tokens_as_ids=asked.return_tokens_as_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        ignored=ignored,
        call=call,
        form=None if params.structured_outputs is None else _form_field(asked, call),
    )


def _request(
    prompt: Encoded, params: SamplingParams, id: str, asked: GenerationBody, model: ServedModel
) -> Request:
    try:
        return model.prompts.request(
            prompt, params, id=id, cache_salt=asked.cache_salt, tries_form=False
        )[1]
    except RequestError as error:  # it has the engine's name of the field
        raise RequestError(str(error).replace("prompt_token_ids", "prompt", 1)) from None


# Sampling parameters.


def _params(
    asked: GenerationBody,
    model: ServedModel,
    options: ServeOptions,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    call: DemandedCall | None = None,
) -> SamplingParams:
    """The sampling parameters of a request.

    Args:
        max_tokens: the route's default.
        prompt_logprobs: what the answer needs, whether the request asks for it or not.
    """
    _check_form(asked)
    _check_logprobs("prompt_logprobs", asked.prompt_logprobs, options)
    given: dict[str, Any] = {
        **model.defaults,
        **{name: value for name in SAMPLING if (value := getattr(asked, name)) is not None},
        "logprobs": logprobs,
    }
    given["max_tokens"] = _max_tokens(asked, max_tokens)
    given["structured_outputs"] = _form(asked, call)
    given["seed"] = _seed(given.get("seed"))
    _check_temperature(given.get("temperature", 0))
    params = SamplingParams(**given)
    if prompt_logprobs is not None:
        needed = max(prompt_logprobs, params.prompt_logprobs or 0)
        params = msgspec.structs.replace(params, prompt_logprobs=needed)
    return params


def _seed(seed: Any) -> Any:
    """Any 64-bit integer as one that the engine takes; `SamplingParams` checks the type."""
    if type(seed) is not int:
        return seed
    if not -(2**63) <= seed < 2**63:
        raise bad(f"seed={shown(seed)} must be an integer within -2**63..2**63-1", "seed")
    return seed % 2**63


def _check_temperature(temperature: Any) -> None:
    """OpenAI's range, which is narrower than the engine's; `SamplingParams` checks the type."""
    if type(temperature) in (int, float) and not 0 <= temperature <= _HIGHEST_TEMPERATURE:
        raise bad(
            f"temperature={shown(temperature)} must be within 0..{_HIGHEST_TEMPERATURE}",
            "temperature",
        )


def _check_form(asked: GenerationBody) -> None:
    """Check the fields that no sampling parameter holds."""
    if asked.stream_options is not None and not asked.stream:
        raise bad("stream_options needs stream=true", "stream_options")
    if asked.prompt_logprobs is not None and asked.stream:
        raise bad(
            "prompt_logprobs needs stream=false; completions stream them with echo and logprobs",
            "prompt_logprobs",
        )
    if asked.priority:
        raise bad(
            f"priority={shown(asked.priority)} must be 0: first come, first served", "priority"
        )


def _form(asked: GenerationBody, call: DemandedCall | None) -> StructuredOutputsParams | None:
    """The form that the output is held to."""
    field = _form_field(asked, None)
    wanted = asked.structured_outputs or _format(asked.response_format)
    if wanted is None:
        return None if call is None else call.form
    if call is not None:
        raise bad(f"{field} and a tool_choice that demands a call exclude each other", field)
    if asked.structured_outputs and _format(asked.response_format) is not None:
        raise bad("response_format and structured_outputs exclude each other; send one", field)
    try:
        return StructuredOutputsParams.from_dict(wanted)
    except RequestError as error:
        raise about_form(error, field) from None


def _form_field(asked: GenerationBody, call: DemandedCall | None) -> str:
    """The field that asks for the form of the output."""
    if call is not None:
        return "tools"
    return "structured_outputs" if asked.structured_outputs else "response_format"


def _format(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """`response_format` in the words of `StructuredOutputsParams`; None for text."""
    if response_format is None:
        return None
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            named = response_format.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            if not isinstance(named, dict) or not isinstance(schema, dict):
                raise bad(
                    "response_format.json_schema.schema is missing; it must be a JSON schema",
                    "response_format",
                )
            return {"json": schema, "strict": named.get("strict") is True}
        case kind:
            raise bad(
                f"response_format.type={shown(kind)} must be text, json_object or json_schema",
                "response_format",
            )


def _max_tokens(asked: GenerationBody, default: int | None) -> int | None:
    """`max_tokens`, also under its newer name."""
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad(
            f"max_tokens={shown(old)} and max_completion_tokens={shown(new)} mean the same and "
            "differ; send one of them",
            "max_completion_tokens",
        )
    given = new if old is None else old
    return default if given is None else given


def _check_logprobs(name: str, value: int | None, options: ServeOptions) -> None:
    if type(value) is int and not 0 <= value <= options.max_logprobs:
        raise bad(f"{name}={shown(value)} must be within 0..{options.max_logprobs}", name)


def _check_counts(num_prompts: int, n: int, options: ServeOptions) -> None:
    if num_prompts > options.max_prompts:
        raise bad(f"prompt holds {num_prompts} prompts; at most {options.max_prompts}", "prompt")
    if n > options.max_n:
        raise bad(f"n={n} must be within 1..{options.max_n}", "n")
    if num_prompts * n > options.max_choices:
        raise bad(
            f"{num_prompts} prompts with n={n} are {num_prompts * n} continuations; at most "
            f"{options.max_choices} are made for a request",
            "n",
        )


# Prompts.


def _prompts_of(prompt: Any) -> list[tuple[str, str | list[int]]]:
    """Each prompt of a completion with the name that errors call it."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [("prompt", prompt)]
    if not prompt:
        raise bad("prompt is empty; it must have at least one token", "prompt")
    return [(f"prompt[{number}]", one) for number, one in enumerate(prompt)]


def _encoded(
    prompt: str | list[int],
    name: str,
    asked: CompletionBody,
    model: ServedModel,
    max_tokens: int | None,
) -> Encoded:
    """Text and ids of one prompt, cut if the request says so."""
    if isinstance(prompt, list):
        return _fit((None, prompt), name, asked, model, max_tokens)
    add = True if asked.add_special_tokens is None else asked.add_special_tokens
    return _fit(
        encode(prompt, name, model, add, asked.truncate_prompt_tokens is not None),
        name,
        asked,
        model,
        max_tokens,
    )


def encode(
    text: str, name: str, model: ServedModel, add_special_tokens: bool, may_exceed: bool
) -> Encoded:
    """Text and ids of a text.

    Args:
        may_exceed: whether a text that the model's length cannot hold is encoded nevertheless.

    Raises:
        Refusal: a 400; the text is too long.
    """
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    if model.tokenizer is not None and not may_exceed:
        least = math.ceil(num_bytes / model.tokenizer.longest_token_bytes)
        if least >= model.max_model_len:
            raise _too_long(f"at least {least}", name, model)
    if num_bytes > _MOST_TEXT_BYTES:
        raise bad(
            f"{name} has {num_bytes} bytes; texts of at most {_MOST_TEXT_BYTES} are encoded", name
        )
    return model.prompts.encode(text, add_special_tokens)


def chat_prompt(asked: ChatBody | TokenizeBody, model: ServedModel, may_exceed: bool) -> Encoded:
    """Text and ids of a conversation; see `encode`.

    Raises:
        Refusal: a 400; the messages cannot be rendered.
    """
    add_special_tokens = asked.add_special_tokens or False  # the template writes them itself
    if model.tokenizer is None or not model.tokenizer.has_chat_template:
        raise bad(
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template FILE",
            "messages",
        )
    try:
        text = model.prompts.chat_text(
            plain_messages(asked.messages or []),
            add_generation_prompt=asked.add_generation_prompt and not asked.continue_final_message,
            continue_final_message=asked.continue_final_message,
        )
    except RequestError as error:
        raise bad(str(error), "messages") from None
    except TokenizerError as error:
        log.logger.error("%s", error)  # it names files
        raise bad("the chat template cannot render these messages", "messages") from None
    return encode(text, "messages", model, add_special_tokens, may_exceed)


def _fit(
    encoded: Encoded, name: str, asked: GenerationBody, model: ServedModel, max_tokens: int | None
) -> Encoded:
    """A prompt cut to `truncate_prompt_tokens`, which must leave room for a token."""
    text, ids = encoded
    cut = asked.truncate_prompt_tokens
    if cut is not None:
        if cut == -1:
            cut = max(1, model.max_model_len - max(1, max_tokens or 1))
        if not 1 <= cut < model.max_model_len:
            raise bad(
                f"truncate_prompt_tokens={shown(cut)} must be -1 or within "
                f"1..{model.max_model_len - 1}",
                "truncate_prompt_tokens",
            )
        if len(ids) > cut:
            return None, ids[-cut:]
    if not ids:
        raise bad(f"{name} is empty; it must have at least one token", name)
    if len(ids) >= model.max_model_len:
        raise _too_long(str(len(ids)), name, model)
    return text, ids


def _too_long(num_tokens: str, name: str, model: ServedModel) -> Refusal:
    return bad(
        f"This model's maximum context length is {model.max_model_len} tokens, and {name} has "
        f"{num_tokens}; leave room for a token of output, or set truncate_prompt_tokens",
        name.partition("[")[0],
        "context_length_exceeded",
    )
