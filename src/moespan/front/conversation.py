"""A conversation of several turns, with an engine of this program or with a server.

`moespan.front.remote.ServerAnswerer` asks a server. Imports neither torch nor `LLM`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from moespan.errors import RequestError

if TYPE_CHECKING:
    from moespan.engine.request import OutputDelta, SamplingParams
    from moespan.front.llm import LLM

Say = Callable[[str], object]
"""Takes the next piece of an answer's text, as soon as it is known."""


class Ending(NamedTuple):
    """How an answer ended: its finish reason, and its number of tokens (0 if unknown)."""

    finish_reason: str | None
    num_tokens: int


class Answerer(Protocol):
    """Answers the last message of a conversation."""

    def answer(self, messages: list[Mapping[str, str]], say: Say) -> Ending:
        """Hand the answer to `say`, piece by piece. Ctrl-C ends the answer and is raised.

        Raises:
            RequestError: the conversation cannot be answered as it is; another one can.
            MoespanError: nothing can be answered any more.
        """


class EngineAnswerer:
    """Answers with an engine of this program."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params

    def answer(self, messages: list[Mapping[str, str]], say: Say) -> Ending:
        """Answer through the checkpoint's chat template."""

        def observe(delta: OutputDelta) -> None:
            if delta.text:
                say(delta.text)

        request = self._llm.request(self._llm.chat_prompt(messages), self._params)
        (output,) = self._llm.stream([request], observe)
        if output.error is not None:
            raise RequestError(output.error)
        (one,) = output.outputs
        return Ending(one.finish_reason, len(one.token_ids))


@dataclass
class Conversation:
    """The turns so far, after an optional system message.

    Attributes:
        answerer: answers the questions.
        system: text of the system message; empty for none.
        turns: messages of the user and the assistant, in turns.
    """

    answerer: Answerer
    system: str = ""
    turns: list[Mapping[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[Mapping[str, str]]:
        """The whole conversation, as a chat template takes it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def ask(self, question: str, say: Say) -> Ending:
        """Ask, and keep the question with its answer, or with the part before Ctrl-C.

        An answer may be empty. A question that gets none is not kept. Raises what
        `Answerer.answer` raises.
        """
        pieces: list[str] = []
        ending = None

        def keep(piece: str) -> None:
            pieces.append(piece)
            say(piece)

        asked = {"role": "user", "content": question}
        try:
            ending = self.answerer.answer([*self.messages, asked], keep)
            return ending
        finally:
            if pieces or ending is not None:
                answered = {"role": "assistant", "content": "".join(pieces).strip()}
                self.turns += [asked, answered]

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Write `{"messages": [...]}`, as `/v1/chat/completions` takes it.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
