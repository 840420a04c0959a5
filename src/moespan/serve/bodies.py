"""Bodies of requests: which fields each route knows, and how bytes become them.

A field is honoured, or refused by name; none is ignored in silence:

| a field is | then |
|---|---|
| declared by the body's struct | honoured; null is the same as a missing field |
| in `HARMLESS` | taken; it cannot change the answer |
| in `REFUSED` | a 400 that names it, unless its value asks for nothing |
| one typo away from any of these | a 400 that says which was meant |
| unknown otherwise | reported back in `x-moespan-ignored-fields`; a 400 with --strict-fields |

A body is taken apart field by field. So unknown values are never built, and an error names its
field and shows its value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_type_hints

import msgspec

from moespan.engine.request import SamplingParams
from moespan.errors import shown
from moespan.serve.refusals import Refusal, bad

MOST_DEPTH = 64
"""Levels of objects and lists in a value whose form is free."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What streams report beside text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Part(msgspec.Struct):
    """A part of a message's content."""

    type: str = "text"
    text: str | None = None


class PastFunction(msgspec.Struct):
    """A function that was called, and its arguments: JSON as text, or an object."""

    name: str
    arguments: str | dict[str, Any] = ""


class PastCall(msgspec.Struct):
    """A call in an earlier answer."""

    function: PastFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    """One turn of a conversation.

    Attributes:
        name: the function of a result; other messages may have one without effect.
        tool_call_id: the call that a result is of.
        function_call: a call in OpenAI's older form.
    """

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: PastFunction | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """The fields that completions and chats share. None is the same as a missing field.

    Fields of `SamplingParams` are checked by it, so that there is one place for their rules.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    priority: int = 0
    cache_salt: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: str | list[Any]
    echo: bool = False
    logprobs: int | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """`POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    model: str | None = None
    stream: bool = False
    store: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    text: dict[str, Any] | None = None
    truncation: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", bound=msgspec.Struct)

SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"logprobs", "structured_outputs"}
"""Fields whose values `SamplingParams` checks."""

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "reasoning_effort",
        "reasoning",
        "include",
        "max_tool_calls",
        "verbosity",
    }
)
"""Fields that cannot change the answer of this model."""

_NO = ()  # only null asks for nothing
_STATE = "nothing is stored; send the whole conversation as input"
_BEAMS = "beam search is not supported"
_LORA = "LoRA adapters are not supported"
_MEDIA = "the model takes text only"
_TEMPLATE = "a chat template never comes from a request; the operator sets --chat-template"
_MODE = "this way of sampling is not supported; temperature, top_p, top_k and min_p are"
_GUIDED = "use response_format or structured_outputs"
_LENGTH = "use max_tokens"

REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((1,), "only n continuations are made; use n"),
    "use_beam_search": ((False,), _BEAMS),
    "length_penalty": ((1,), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "num_beams": ((1,), _BEAMS),
    "suffix": (("",), "the model does not fill in the middle"),
    "prompt_embeds": (_NO, "the model takes text and token ids only"),
    "lora": (_NO, _LORA),
    "lora_name": (_NO, _LORA),
    "lora_path": (_NO, _LORA),
    "lora_request": (_NO, _LORA),
    "adapter_id": (_NO, _LORA),
    "modalities": ((["text"],), _MEDIA),
    "audio": (_NO, _MEDIA),
    "images": (([],), _MEDIA),
    "image_data": (_NO, _MEDIA),
    "mm_processor_kwargs": (({},), _MEDIA),
    "media_io_kwargs": (({},), _MEDIA),
    "chat_template": (_NO, _TEMPLATE),
    "chat_template_kwargs": (({},), _TEMPLATE),
    "documents": (([],), "the chat template takes no documents; put them into a message"),
    "repeat_penalty": ((1,), "use repetition_penalty"),
    "no_repeat_ngram_size": ((0,), _MODE),
    "encoder_repetition_penalty": ((1,), _MODE),
    "do_sample": (_NO, "use temperature: 0 is greedy"),
    "typical_p": ((1,), _MODE),
    "tfs_z": ((1,), _MODE),
    "top_a": ((0,), _MODE),
    "epsilon_cutoff": ((0,), _MODE),
    "eta_cutoff": ((0,), _MODE),
    "mirostat": ((0,), _MODE),
    "mirostat_mode": ((0,), _MODE),
    "mirostat_eta": (_NO, _MODE),
    "mirostat_tau": (_NO, _MODE),
    "dry_multiplier": ((0,), _MODE),
    "xtc_probability": ((0,), _MODE),
    "dynatemp_range": ((0,), _MODE),
    "smoothing_factor": ((0,), _MODE),
    "logits_processors": (([],), _MODE),
    "logit_bias_type": (_NO, "use logit_bias with token ids"),
    "spaces_between_special_tokens": ((True,), "special tokens are written as they are"),
    "detokenize": ((True,), "use return_token_ids to get ids beside the text"),
    "max_new_tokens": (_NO, _LENGTH),
    "max_length": (_NO, _LENGTH),
    "n_predict": (_NO, _LENGTH),
    "num_predict": (_NO, _LENGTH),
    "min_new_tokens": (_NO, "use min_tokens"),
    "guided_json": (_NO, _GUIDED),
    "guided_regex": (_NO, _GUIDED),
    "guided_choice": (_NO, _GUIDED),
    "guided_grammar": (_NO, _GUIDED),
    "guided_decoding_backend": (_NO, _GUIDED),
    "guided_whitespace_pattern": (_NO, _GUIDED),
    "grammar": (_NO, _GUIDED),
    "json_schema": (_NO, _GUIDED),
    "regex": (_NO, _GUIDED),
    "ebnf": (_NO, _GUIDED),
    "kv_transfer_params": (_NO, "prefill and decode run in one engine"),
    "prediction": (_NO, "predicted outputs are not supported"),
    "web_search_options": (_NO, "the server makes no requests of its own"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
}
"""Field → values that ask for nothing, and why others are refused."""

_REFUSED_IN: Mapping[Any, Mapping[str, tuple[tuple[object, ...], str]]] = {
    ChatBody: {
        "echo": ((False,), "completions have it; a chat has no single text to repeat"),
        "prompt": (_NO, "a chat has messages"),
    },
    ResponsesBody: {
        "previous_response_id": (_NO, _STATE),
        "conversation": (_NO, _STATE),
        "background": ((False,), _STATE),
        "prompt": (_NO, "stored prompts are not supported; use input"),
        "messages": (_NO, "use input"),
        "max_tokens": (_NO, "use max_output_tokens"),
        "max_completion_tokens": (_NO, "use max_output_tokens"),
        "response_format": (_NO, "use text.format"),
        "top_logprobs": ((0,), "/v1/chat/completions has log probabilities"),
        "n": ((1,), "/v1/chat/completions has n"),
        "stop": (_NO, "/v1/chat/completions has stop"),
        "seed": (_NO, "/v1/chat/completions has seed"),
    },
    CompletionBody: {
        "messages": (_NO, "completions have a prompt; /v1/chat/completions takes messages"),
        "top_logprobs": (_NO, "use logprobs with a number"),
        "tools": (([],), "/v1/chat/completions takes tools"),
        "tool_choice": (("none", "auto"), "/v1/chat/completions takes tools"),
        "add_generation_prompt": (_NO, "/v1/chat/completions applies the chat template"),
        "continue_final_message": ((False,), "/v1/chat/completions applies the chat template"),
    },
}

_HARMLESS_IN_MESSAGES = frozenset({"refusal", "annotations", "reasoning", "reasoning_content"})
"""Keys that clients send back with a model's message, and that no template reads."""

_RULES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "an object",
    list: "a list",
}


def decode(body: bytes, kind: type[Body], strict: bool = False) -> tuple[Body, list[str]]:
    """The body as a `kind`, and the names of fields that have no effect.

    Raises:
        Refusal: a 400 that names the field.
    """
    raw = _fields_of(body)
    known: tuple[str, ...] = kind.__struct_fields__
    refused: dict[str, tuple[tuple[object, ...], str]] = {**REFUSED, **_REFUSED_IN.get(kind, {})}
    ignored = []
    for name, value in raw.items():
        if name in known or name in HARMLESS:
            continue
        if name in refused:
            _check_asks_nothing(name, value, *refused[name])
        else:
            _check_no_typo(name, (*known, *HARMLESS, *refused), strict)
            ignored.append(name)
    values = {
        name: _value(name, raw[name], kind)
        for name in known
        if name in raw and not _is_null(raw[name])
    }
    if isinstance(values.get("messages"), list):
        ignored += _check_messages(raw["messages"], values["messages"], strict)
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in values:
            raise bad(f"{field.name} is missing; it is required", field.name)
    return kind(**values), ignored


def _fields_of(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, unparsed."""
    try:
        return _decode_fields(body)
    except msgspec.ValidationError:
        raise bad("the body must be a JSON object") from None
    except RecursionError:
        raise bad(f"the body is nested too deep; at most {MOST_DEPTH} levels are taken") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad(f"the body is not JSON: {error}") from None


_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _is_null(raw: msgspec.Raw) -> bool:
    return bytes(raw) == b"null"


def _value(name: str, raw: msgspec.Raw, kind: type[Any]) -> Any:
    """The value of a known field, checked unless `SamplingParams` will check it."""
    declared = Any if name in SAMPLING else _types_of(kind)[name]
    if name == "prompt" and kind is CompletionBody:
        declared = _type_of_prompt(raw)
    try:
        value = msgspec.json.decode(raw, type=declared)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _wrong(name, raw, declared, error) from None
    _check_depth(value, name)
    return value


_MOST_LISTS = 1 << 14
_LIST = re.compile(rb'\[\s*(["\[]?)')


def _type_of_prompt(raw: msgspec.Raw) -> Any:
    """The one form of a prompt that its first characters allow. msgspec has no union of lists."""
    data = bytes(raw)
    found = _LIST.match(data)
    if found is None:
        if data[:1] != b'"':
            raise bad(_PROMPT_RULE, "prompt")
        return str
    if found[1] == b"[" and data.count(b"[") > _MOST_LISTS:  # before they are built
        raise bad(f"prompt holds more than {_MOST_LISTS} lists", "prompt")
    return {b'"': list[str], b"[": list[list[int]]}.get(found[1], list[int])


_PROMPT_RULE = (
    "prompt must be a string, a list of strings, a list of token ids, or a list of such lists"
)
_HINTS: dict[type[Any], dict[str, Any]] = {}


def _types_of(kind: type[Any]) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def _wrong(name: str, raw: msgspec.Raw, declared: Any, error: Exception) -> Refusal:
    """The 400 for a value that is not of the declared type."""
    if name == "prompt":
        return bad(_PROMPT_RULE, name)
    path = str(error).rpartition("at `$")[2].rstrip("`") if "at `$" in str(error) else ""
    where = name + path.replace("[...]", "[]")
    try:
        value = shown(msgspec.json.decode(raw)) if not path else ""
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return bad(f"{name} is not JSON that can be read", name)
    rules = [_RULES[kind] for kind in _RULES if kind in _members(declared)]
    if path or not rules:
        reason = str(error).partition(" - at ")[0]
        return bad(f"{where}: {reason[:1].lower()}{reason[1:]}", where)
    return bad(f"{name}={value} must be {' or '.join(rules)}", name)


def _members(declared: Any) -> list[Any]:
    parts = getattr(declared, "__args__", ()) if "|" in str(declared) else (declared,)
    kinds = [getattr(part, "__origin__", part) for part in parts]
    return [
        dict if kind is not Any and issubclass(kind, msgspec.Struct) else kind for kind in kinds
    ]


def _check_depth(value: Any, name: str, depth: int = 1) -> None:
    """Refuse a value of more than `MOST_DEPTH` levels."""
    if not isinstance(value, list | dict):
        return
    if depth > MOST_DEPTH:
        raise bad(f"{name} is nested deeper than {MOST_DEPTH} levels", name)
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, list | dict):
            _check_depth(item, name, depth + 1)


def _check_asks_nothing(
    name: str, raw: msgspec.Raw, neutral: tuple[object, ...], reason: str
) -> None:
    if _is_null(raw):
        return
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        value = "a value that cannot be read"
    if not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
    ):
        raise bad(f"{name}={shown(value)} is refused: {reason}", name)


def _check_no_typo(name: str, known: Iterable[str], strict: bool) -> None:
    for other in known:
        if len(other) > 2 and _is_one_typo(name, other):
            raise bad(f"{shown(name)} is not a field; did you mean {other}?", name)
    if strict:
        raise bad(f"{shown(name)} is not a field of this route (--strict-fields)", name)


def _is_one_typo(name: str, other: str) -> bool:
    """Whether one letter added, left out, changed, or two neighbours swapped, makes the names
    equal; or their case does."""
    if name.lower() == other.lower():
        return True
    if abs(len(name) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(name), len(other)) and name[start] == other[start]:
        start += 1
    a, b = name[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def _check_messages(raw: msgspec.Raw, messages: list[Message], strict: bool) -> list[str]:
    """Check the keys of messages that no struct declares; → those that have no effect."""
    ignored: dict[str, None] = {}
    for index, keys in enumerate(msgspec.json.decode(raw, type=list[dict[str, msgspec.Raw]])):
        for key, value in keys.items():
            if key in Message.__struct_fields__ or key in _HARMLESS_IN_MESSAGES:
                continue
            if bytes(value) in (b"null", b"[]", b"{}", b'""'):
                continue
            name = f"messages[{index}].{key}"
            if key == "audio":
                raise bad(f"{name} is refused: {_MEDIA}", name)
            _check_no_typo(key, Message.__struct_fields__, strict)
            ignored[f"messages[].{key}"] = None
    return list(ignored)
