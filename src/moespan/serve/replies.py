"""Answers as structs, with OpenAI's names; vLLM's where OpenAI has none.

A field that is `UNSET` is left out of the JSON; one that is None is null.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType


class PromptTokensDetails(Struct):
    """Prompt tokens that the prefix cache held."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of all prompts, and of all continuations."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Struct):
    """Lists of equal length, one entry for each token.

    Attributes:
        text_offset: characters of prompt and text before the token.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(Struct):
    """A candidate at a position of the prompt, in vLLM's form."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]


class CompletionChoice(Struct, kw_only=True):
    """One continuation, whole or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatTop(Struct):
    """One of the best tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Struct):
    """A token of a message. The bytes of all tokens join to the text."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTop]


class ChatLogprobs(Struct):
    """The tokens of a message."""

    content: list[ChatToken]
    refusal: None = None


class CalledFunction(Struct, kw_only=True):
    """A function, and its arguments as JSON text; or a piece of these.

    Attributes:
        name: in the first piece only.
    """

    name: str | UnsetType = UNSET
    arguments: str


class ToolCall(Struct, kw_only=True):
    """A call that the client is to make."""

    id: str
    type: str = "function"
    function: CalledFunction


class ToolCallDelta(Struct, kw_only=True):
    """A piece of a call. The first one has its id and type."""

    index: int = 0
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: CalledFunction


class ChatMessage(Struct):
    """The model's turn: a text, or calls."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatDelta(Struct):
    """A piece of the model's turn."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    """One message."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatDeltaChoice(Struct, kw_only=True):
    """A piece of one message."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class _Reply(Struct, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class Completion(_Reply, kw_only=True):
    """The answer of `POST /v1/completions`; in streams, one event."""

    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ChatCompletion(_Reply, kw_only=True):
    """The answer of `POST /v1/chat/completions`."""

    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(_Reply, kw_only=True):
    """One event of a streamed chat."""

    choices: list[ChatDeltaChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(Struct, kw_only=True):
    """A model of `GET /v1/models`."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "moespan"
    root: str
    parent: None = None
    max_model_len: int
    context_length: int


class ModelList(Struct):
    """The answer of `GET /v1/models`."""

    data: list[ModelCard]
    object: str = "list"


class Tokens(Struct):
    """The answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    """The answer of `POST /detokenize`."""

    prompt: str


class ErrorContent(Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct):
    """Every answer with a status of 400 or more."""

    error: ErrorContent


Json = dict[str, Any]
