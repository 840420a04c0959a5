"""Makes checked requests of prompts as users give them: text, token ids or messages.

Imports neither torch nor `LLM`: an HTTP server uses it as `LLM` does.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from moespan.engine.request import Request, SamplingParams, check_request
from moespan.errors import RequestError, shown
from moespan.text.grammar import GrammarChecker, StructuredOutputsParams
from moespan.text.tokenizer import Tokenizer

Prompt = str | list[int] | Mapping[str, object]
"""Text, token ids, or vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ...}`.

The content is a string, or a list of parts `{"type": "text", "text": ...}`, whose texts are joined
by newlines. Other keys whose value is None are not set.
"""

Encoded = tuple[str | None, list[int]]
"""A prompt's text, if it was given as text, and its token ids."""


class Prompts:
    """Encodes prompts and turns them into numbered requests.

    Args:
        tokenizer: tokenizer of the checkpoint; None if it has none.
        max_model_len: most tokens of one sequence.
        vocab_size: number of token ids of the model.
    """

    def __init__(self, tokenizer: Tokenizer | None, max_model_len: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._numbers = itertools.count()
        self._grammars = GrammarChecker()

    def encode(self, prompt: object, add_special_tokens: bool = True) -> Encoded:
        """Text and token ids of a `Prompt`.

        Args:
            add_special_tokens: put the begin token before text, if the tokenizer does so. Token
                ids are taken as they are.

        Raises:
            RequestError: `prompt` is neither text nor token ids, or is text without a tokenizer.
        """
        given = prompt
        if isinstance(prompt, Mapping):
            token_ids = prompt.get("prompt_token_ids")
            prompt = prompt.get("prompt") if token_ids is None else token_ids
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    "the prompt is text, and this checkpoint has no tokenizer.json; give token "
                    'ids: a list in Python, {"prompt": [1, 2]} in a line of --input'
                )
            return prompt, self._tokenizer.encode(prompt, add_special_tokens)
        if isinstance(prompt, list) and all(map(_is_integer, prompt)):
            return None, [int(token) for token in prompt]  # those of NumPy too
        raise RequestError(f"{shown(given)} is neither text nor a list of token ids")

    def encode_chat(self, messages: Sequence[Message]) -> Encoded:
        """Text and token ids of a conversation, through the checkpoint's chat template.

        Raises:
            RequestError: the messages are malformed, or the checkpoint has no chat template.
            TokenizerError: the chat template is faulty.
        """
        text = self.chat_text(messages)
        # The template itself writes the special tokens.
        return self.encode(text, add_special_tokens=False)

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The text that the checkpoint's chat template makes of a conversation.

        Args:
            add_generation_prompt: end with the text after which the model answers.
            continue_final_message: end with the content of the last message, for the model to go
                on there.

        Raises:
            RequestError: the messages are malformed, or the checkpoint has no chat template.
            TokenizerError: the chat template is faulty.
        """
        if self._tokenizer is None:
            raise RequestError("chat needs a tokenizer, and this checkpoint has no tokenizer.json")
        given = _with_texts(messages)
        text = self._tokenizer.apply_chat_template(given, add_generation_prompt)
        return _cut_after(text, given[-1]["content"].strip()) if continue_final_message else text

    def request(
        self,
        prompt: Prompt | Encoded,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        cache_salt: str | None = None,
        prompt_logits: bool = False,
        tries_form: bool = True,
    ) -> tuple[str | None, Request]:
        """The prompt's text, if it has one, and a checked request.

        Args:
            id: of the request; None for the next number.
            cache_salt: only requests with the same salt share cached prefixes.
            tries_form: call `try_form` with the form of the output, if there is one.

        Raises:
            RequestError: the prompt or its parameters break a limit.
        """
        if isinstance(prompt, tuple) and len(prompt) == 2:
            text, token_ids = prompt
        else:
            text, token_ids = self.encode(prompt)
        request = Request(
            id=str(next(self._numbers)) if id is None else id,
            prompt_token_ids=token_ids,
            params=SamplingParams() if params is None else params,
            cache_salt=cache_salt,
            prompt_logits=prompt_logits,
        )
        check_request(request, self._max_model_len, self._vocab_size)
        form = request.params.structured_outputs
        if tries_form and form is not None:
            self.try_form(form)
        return text, request

    def try_form(self, form: StructuredOutputsParams) -> None:
        """Try a form of an output in a child process; the first time this may take seconds.

        Raises:
            RequestError: the form cannot be used.
        """
        self._grammars.check(form)


def _cut_after(text: str, content: str) -> str:
    """`text` up to the end of `content` in it."""
    start = text.rfind(content)
    if start < 0:
        raise RequestError(
            "continue_final_message: the chat template changes the content of the last "
            "message, so that it cannot go on"
        )
    return text[: start + len(content)]


def _is_integer(value: object) -> bool:
    return type(value) is int or (
        isinstance(value, numbers.Integral) and not isinstance(value, bool)
    )


def _with_texts(messages: Any) -> Any:
    """`messages` with each content as one string, and without keys that are not set.

    The chat template checks the rest.

    Raises:
        RequestError: a part of a content is not text.
    """
    if not isinstance(messages, list | tuple):
        return messages
    return [
        {
            key: _text_of(value, f"messages[{index}]['content']") if key == "content" else value
            for key, value in message.items()
            if value is not None or key in ("role", "content")
        }
        if isinstance(message, Mapping)
        else message
        for index, message in enumerate(messages)
    ]


def _text_of(content: Any, name: str) -> Any:
    if content is None:
        raise RequestError(f'{name} is None; it must be a string, "" if there is nothing to say')
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for index, part in enumerate(content):
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
        text = part.get("text") if is_text else part
        if not isinstance(text, str):
            raise RequestError(
                f"{name}[{index}] is {shown(part)}; each part must be a text: "
                '{"type": "text", "text": ...}'
            )
        texts.append(text)
    return "\n".join(texts)
