"""The deltas of a job's requests → pieces of its answer.

A piece is what one delta adds to one choice. A stream sends each piece; an answer that is not
streamed is made of one piece for each choice. So the pieces of a stream join to that answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from moespan.engine.request import OutputDelta, TokenLogprobs
from moespan.serve.refusals import Refusal
from moespan.serve.replies import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatDeltaChoice,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptTokensDetails,
    ToolCall,
    Usage,
)
from moespan.serve.sampling import Job
from moespan.serve.scores import (
    Offsets,
    TokenTexts,
    chat_tokens,
    completion_logprobs,
    prompt_logprobs,
)
from moespan.serve.tools import CallPieces

Piece = CompletionChoice | ChatDeltaChoice
Event = Completion | ChatCompletionChunk


def check_went_on(delta: OutputDelta) -> None:
    """Raise a `Refusal` with status 500 if the engine ended the request with an error."""
    if delta.finish_reason in ("error", "abort"):
        reason = delta.error or "it was aborted"
        raise Refusal(500, f"the engine ended the request: {reason}", code="request_failed")


class ShownPrompt:
    """A prompt as answers show it.

    Attributes:
        text: the text as it was given; else that of the token ids.
        pieces: for each token, the part of `text` that it brings, as bytes.
    """

    def __init__(self, job: Job, number: int) -> None:
        tokenizer = job.model.tokenizer
        ids, text = job.requests[number].prompt_token_ids, job.texts[number]
        skips = job.skip_special_tokens and text is None
        self.pieces = [
            b"" if tokenizer is None else tokenizer.decode_bytes((token_id,), skips)
            for token_id in ids
        ]
        if text is None:
            self.text = b"".join(self.pieces).decode("utf-8", "replace")
            return
        self.text = text
        if sum(map(len, self.pieces)) > len(text.encode()):  # the begin token, not in the text
            self.pieces[0] = b""

    @property
    def offsets(self) -> list[int]:
        """Characters of the text before each token."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, num_characters = [], 0
        for piece in self.pieces:
            offsets.append(num_characters)
            num_characters += len(decoder.decode(piece))
        return offsets


class Prompt:
    """One prompt of a job, and what its continuations have told so far."""

    def __init__(self, job: Job, number: int) -> None:
        self.request = job.requests[number]
        self.entries: list[TokenLogprobs | None] = [None]  # the first token has no prediction
        self.num_cached_tokens = 0
        self._waiting: list[OutputDelta] = []
        self._reports = self.request.params.prompt_logprobs is not None
        shows_text = job.echo or (job.logprobs is not None and not job.is_chat)
        self.shown = ShownPrompt(job, number) if shows_text else None

    def ready(self, deltas: Sequence[OutputDelta]) -> list[OutputDelta]:
        """The deltas that may be shown: none before the prompt's log probabilities are complete."""
        for delta in deltas:
            check_went_on(delta)
            self.entries += delta.prompt_logprobs
            if delta.index == 0:
                self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self._waiting += deltas
        if self._reports and len(self.entries) < len(self.request.prompt_token_ids):
            return []
        ready, self._waiting = self._waiting, []
        return [delta for delta in ready if delta.token_ids or delta.text or delta.finish_reason]


class _Choice:
    """One continuation.

    Attributes:
        call: of a function, if the job demands one; then no text is shown.
    """

    def __init__(self, index: int, job: Job) -> None:
        self.index = index
        self.call = None if job.call is None else CallPieces(job.call)
        self.has_begun = False
        self.num_tokens = 0
        self.text: list[str] = []
        self.offsets: Offsets | None = None


class Answer:
    """The answer of a job, as it comes.

    Attributes:
        keeps_text: whether `texts` is wanted.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.keeps_text = False
        self._texts = TokenTexts(job.model.tokenizer, job.tokens_as_ids, job.skip_special_tokens)
        self._prompts = [Prompt(job, number) for number in range(len(job.requests))]
        self._choices = [_Choice(index, job) for index in range(len(job.requests) * job.n)]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        num_prompt_tokens = sum(len(r.prompt_token_ids) for r in self.job.requests)
        num_tokens = sum(choice.num_tokens for choice in self._choices)
        return Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(
                sum(prompt.num_cached_tokens for prompt in self._prompts)
            ),
        )

    @property
    def texts(self) -> list[str]:
        """The text of each choice so far."""
        return ["".join(choice.text) for choice in self._choices]

    def count(self, choice: int, delta: OutputDelta) -> None:
        """Count the tokens of a delta that is shown in another form."""
        self._note(self._choices[choice], delta)

    def events(self, number: int, deltas: Sequence[OutputDelta]) -> Iterator[Any]:
        """What deltas of prompt `number` add to a stream.

        Raises:
            Refusal: a 500; the engine ended the request with an error.
        """
        for choice, piece in self._pieces(number, deltas):
            if self.job.is_chat and not choice.has_begun:
                yield self._event([_role(choice)])
            choice.has_begun = True
            if choice.call is None or not _says_nothing(piece):
                yield self._event([piece])

    def _pieces(
        self, number: int, deltas: Sequence[OutputDelta]
    ) -> Iterator[tuple[_Choice, Piece]]:
        prompt = self._prompts[number]
        make = self._chat_piece if self.job.is_chat else self._completion_piece
        for delta in prompt.ready(deltas):
            choice = self._choices[number * self.job.n + delta.index]
            self._note(choice, delta)
            yield choice, make(prompt, choice, delta)

    def _note(self, choice: _Choice, delta: OutputDelta) -> None:
        choice.num_tokens += len(delta.token_ids)
        if self.keeps_text:
            choice.text.append(delta.text)

    def whole(self, deltas: Iterable[tuple[int, OutputDelta]]) -> Any:
        """The answer that is not streamed, from one delta for each choice, with its prompt's
        number.

        Raises:
            Refusal: a 500; the engine ended a request with an error.
        """
        pieces = [piece for number, delta in deltas for _, piece in self._pieces(number, [delta])]
        pieces.sort(key=lambda piece: piece.index)
        job = self.job
        if not job.is_chat:
            choices = [piece for piece in pieces if isinstance(piece, CompletionChoice)]
            if job.prompt_logprobs is not None:
                for choice in choices:
                    choice.prompt_logprobs = prompt_logprobs(
                        self._prompts[choice.index // job.n].entries,
                        job.prompt_logprobs,
                        self._texts,
                    )
            return Completion(**self._head("text_completion"), choices=choices, usage=self.usage)
        reply = ChatCompletion(
            **self._head("chat.completion"),
            choices=[
                _message(piece, job) for piece in pieces if isinstance(piece, ChatDeltaChoice)
            ],
            usage=self.usage,
        )
        if job.prompt_logprobs is not None:
            entries = self._prompts[0].entries
            reply.prompt_logprobs = prompt_logprobs(entries, job.prompt_logprobs, self._texts)
        if job.return_token_ids:
            reply.prompt_token_ids = job.requests[0].prompt_token_ids
        return reply

    def line(self, event: Any) -> bytes:
        """An event as it goes over the wire."""
        return b"data: " + msgspec.json.encode(event) + b"\n\n"

    def last_event(self) -> Any:
        """The event that tells the usage, if the job wants one."""
        if self.job.usage is None or not self.job.usage.include_usage:
            return None
        return self._event([], is_last=True)

    def _event(self, pieces: Sequence[Piece], is_last: bool = False) -> Event:
        usage: Usage | UnsetType | None = UNSET
        if (wanted := self.job.usage) is not None and wanted.include_usage:
            usage = self.usage if is_last or wanted.continuous_usage_stats else None
        if self.job.is_chat:
            chunk = ChatCompletionChunk(
                **self._head("chat.completion.chunk"),
                choices=[piece for piece in pieces if isinstance(piece, ChatDeltaChoice)],
                usage=usage,
            )
            if self.job.return_token_ids and any(piece.delta.role for piece in chunk.choices):
                chunk.prompt_token_ids = self.job.requests[0].prompt_token_ids
            return chunk
        return Completion(
            **self._head("text_completion"),
            choices=[piece for piece in pieces if isinstance(piece, CompletionChoice)],
            usage=usage,
        )

    def _head(self, kind: str) -> dict[str, Any]:
        job = self.job
        return {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": job.name,
            "system_fingerprint": job.model.fingerprint,
        }

    def _completion_piece(
        self, prompt: Prompt, choice: _Choice, delta: OutputDelta
    ) -> CompletionChoice:
        job = self.job
        echoes = job.echo and not choice.has_begun
        text = delta.text
        if echoes and prompt.shown is not None:
            text = prompt.shown.text + text
        ids = delta.token_ids if job.return_token_ids else UNSET
        first = job.return_token_ids and not choice.has_begun
        return CompletionChoice(
            index=choice.index,
            text=text,
            logprobs=self._completion_logprobs(prompt, choice, delta, echoes),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=ids,
            prompt_token_ids=prompt.request.prompt_token_ids if first else UNSET,
        )

    def _completion_logprobs(
        self, prompt: Prompt, choice: _Choice, delta: OutputDelta, echoes: bool
    ) -> CompletionLogprobs | None:
        job, shown = self.job, prompt.shown
        if job.logprobs is None or shown is None:
            return None
        if choice.offsets is None:
            choice.offsets = Offsets(
                job.model.tokenizer,
                job.skip_special_tokens,
                len(shown.text),
                prompt.request.prompt_token_ids,
            )
        entries: list[TokenLogprobs | None] = list(delta.logprobs)
        ids, offsets = delta.token_ids, choice.offsets.push(delta.token_ids)
        if echoes:
            entries = [*prompt.entries, *entries]
            ids = [*prompt.request.prompt_token_ids, *ids]
            offsets = [*shown.offsets, *offsets]
        return completion_logprobs(entries, ids, offsets, job.logprobs, self._texts)

    def _chat_piece(self, prompt: Prompt, choice: _Choice, delta: OutputDelta) -> ChatDeltaChoice:
        job = self.job
        logprobs = None
        if job.logprobs is not None:
            logprobs = ChatLogprobs(chat_tokens(delta.logprobs, job.logprobs, self._texts))
        shown, reason = ChatDelta(content=delta.text), delta.finish_reason
        if choice.call is not None:
            shown = choice.call.push(delta.text, reason is not None)
            if choice.call.is_complete and reason == "stop":
                reason = "tool_calls"
        return ChatDeltaChoice(
            index=choice.index,
            delta=shown,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if job.return_token_ids else UNSET,
        )


def _says_nothing(piece: Piece) -> bool:
    """Whether a piece of a call adds nothing, as while the name of the function is incomplete."""
    return (
        isinstance(piece, ChatDeltaChoice)
        and piece.delta == ChatDelta()
        and piece.finish_reason is None
        and not piece.logprobs
        and not piece.token_ids
    )


def _role(choice: _Choice) -> ChatDeltaChoice:
    """The piece that begins a message."""
    content = "" if choice.call is None else None
    return ChatDeltaChoice(index=choice.index, delta=ChatDelta(role="assistant", content=content))


def _message(piece: ChatDeltaChoice, job: Job) -> ChatChoice:
    content = piece.delta.content
    message = ChatMessage(content if isinstance(content, str) else None)
    if piece.delta.tool_calls:
        message.tool_calls = [
            ToolCall(id=str(call.id), function=call.function) for call in piece.delta.tool_calls
        ]
    return ChatChoice(
        index=piece.index,
        message=message,
        logprobs=piece.logprobs,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        token_ids=piece.token_ids,
    )
