"""Makes checked requests of prompts as users give them: text, token ids or messages.

Imports neither torch nor `LLM`: an HTTP server uses it as `LLM` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from moespan.engine.request import Request, SamplingParams, check_request
from moespan.errors import RequestError
from moespan.text.tokenizer import Tokenizer

Prompt = str | list[int] | Mapping[str, object]
"""Text, token ids, or vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

Message = Mapping[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

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

    def encode(self, prompt: object) -> Encoded:
        """Text and token ids of a `Prompt`.

        Raises:
            RequestError: `prompt` is neither text nor token ids, or is text without a tokenizer.
        """
        given = prompt
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    "the prompt is text, and this checkpoint has no tokenizer.json; give token "
                    'ids: a list in Python, {"prompt": [1, 2]} in a line of --input'
                )
            return prompt, self._tokenizer.encode(prompt)
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise RequestError(f"{given!r:.80} is neither text nor a list of token ids")
        return None, prompt

    def encode_chat(self, messages: Sequence[Message]) -> Encoded:
        """Text and token ids of a conversation, through the checkpoint's chat template.

        Raises:
            RequestError: the messages are malformed, or the checkpoint has no chat template.
            TokenizerError: the chat template is faulty.
        """
        if self._tokenizer is None:
            raise RequestError("chat needs a tokenizer, and this checkpoint has no tokenizer.json")
        text = self._tokenizer.apply_chat_template(messages)
        # The template itself writes the special tokens.
        return text, self._tokenizer.encode(text, add_special_tokens=False)

    def request(
        self,
        prompt: Prompt | Encoded,
        params: SamplingParams | None = None,
        *,
        prompt_logits: bool = False,
    ) -> tuple[str | None, Request]:
        """The prompt's text, if it has one, and a checked request with an id of its own.

        Raises:
            RequestError: the prompt or its parameters break a limit.
        """
        text, token_ids = prompt if isinstance(prompt, tuple) else self.encode(prompt)
        request = Request(
            id=str(next(self._numbers)),
            prompt_token_ids=token_ids,
            params=params or SamplingParams(),
            prompt_logits=prompt_logits,
        )
        check_request(request, self._max_model_len, self._vocab_size)
        return text, request
