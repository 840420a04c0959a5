"""Chat templates: they turn messages into a prompt, in bounded time and memory.

A chat template is a program that comes with a checkpoint. It runs in a child process, for which the
kernel enforces a time limit and a memory limit (`ChatTemplate`). The child imports this module too,
so the module imports little; only the child imports jinja2.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from moespan.errors import RequestError, TokenizerError, shortened, shown
from moespan.text.child import Answer, Child, as_line

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "check_unicode"]

# The limits of one rendering. The memory limit is on top of what the child maps at rest. It holds
# the largest conversation several times, even one of tiny messages only.
_RENDER_SECONDS: Final = 1.5
_RENDER_MEMORY_BYTES: Final = 64 << 20
_MAX_CONVERSATION_BYTES: Final = 2 << 20
_MAX_PROMPT_CHARACTERS: Final = 4 << 20
_MAX_REASON_CHARACTERS: Final = 200
_MAX_REPLY_BYTES: Final = 6 * _MAX_PROMPT_CHARACTERS + 1024  # up to 6 bytes for a character in JSON


class ChatTemplate:
    """Renders one chat template, whatever it contains, in bounded time and memory.

    Jinja's sandbox keeps a template away from Python's internals, but does not limit its steps or
    its memory. A template can ask for 10^10 of either, mostly in one uninterruptible call of C
    code: `"a" * 10**9`, `|center`, `"%999999999d"`, the text of a list that holds itself twice,
    forty levels deep. Therefore a child process renders, and the kernel enforces the limits
    (`moespan.text.child`), which the child sets before it looks at the template.

    The child starts with the first rendering, waits for the next, and ends when this object or this
    process does. A child that breaks a limit, or is silent for 10 s, is replaced. Threads may share
    this object; their renderings take turns.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str], folder: Path) -> None:
        self._source = source
        self._named_tokens = named_tokens
        self._folder = folder
        self._lock = threading.Lock()
        self._child: Child | None = None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The prompt; see `Tokenizer.apply_chat_template`."""
        request = {
            "messages": _checked_messages(messages),
            "add_generation_prompt": add_generation_prompt,
            # Templates test these for `none`; a missing variable is undefined instead.
            "tools": None,
            "documents": None,
            **self._named_tokens,
        }
        num_bytes = len(as_line(request))
        if num_bytes > _MAX_CONVERSATION_BYTES:
            raise RequestError(
                f"the messages take {num_bytes} bytes as JSON; "
                f"at most {_MAX_CONVERSATION_BYTES} can be rendered"
            )
        with self._lock:
            if self._child is None or not self._child.is_usable:
                self._child = self._start()
            reply = self._child.ask(request)
        match reply:
            case {"text": text}:
                return text
            case {"refusal": reason}:
                raise RequestError(f"the chat template refuses the messages: {reason}")
        raise TokenizerError(
            f"the chat template of {self._folder} cannot be used: {reply['fault']}. Put a "
            "working one beside tokenizer.json as chat_template.jinja, or complete plain prompts"
        )

    def _start(self) -> Child:
        try:
            return Child(
                __name__,
                {"source": self._source, "characters": _MAX_PROMPT_CHARACTERS},
                seconds=_RENDER_SECONDS,
                memory_bytes=_RENDER_MEMORY_BYTES,
                most_reply_bytes=_MAX_REPLY_BYTES,
            )
        except OSError as error:
            raise TokenizerError(
                f"cannot render the chat template, which needs Linux and jinja2: {error}"
            ) from error


def _checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """`messages` as plain dicts.

    Raises:
        RequestError: names the first message that is malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages is {type(messages).__name__}; it must be a list of "
            '{"role": ..., "content": ...}'
        )
    if not messages:
        raise RequestError("messages is empty; it must hold at least one message")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(
                f'{name} is {type(message).__name__}; it must be {{"role": ..., "content": ...}}'
            )
        for key in ("role", "content"):
            if key not in message:
                raise RequestError(f"{name} has no {key!r}; every message needs a role and content")
        for key, value in message.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise RequestError(
                    f"{name}[{shown(key)}] is {type(value).__name__}; it must be a string"
                )
            check_unicode(key, f"a key of {name}")
            check_unicode(value, f"{name}[{shown(key)}]")
    return [dict(message) for message in messages]


def check_unicode(text: str, name: str) -> None:
    """Refuses half a surrogate pair, which JSON can represent and UTF-8 cannot.

    Raises:
        RequestError: `text` has one; the message calls the text `name`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a surrogate "
            "pair; send whole characters"
        ) from None


# The rest of this module runs in the child, which imports the module anew.


class _RefusalError(Exception):
    """The template called `raise_exception`."""


def answer_in_child(set_up: Mapping[str, Any]) -> Answer:
    """Makes the function that renders the template of `set_up` with the variables of a request.

    The reply is "text", "refusal" (the template refuses the messages) or "fault".
    """
    environment = _template_environment()
    template: jinja2.Template | None = None

    def answer(variables: dict[str, Any]) -> dict[str, str]:
        nonlocal template
        try:
            template = template or environment.from_string(set_up["source"])
            return {"text": _limited_text(template.generate(variables), set_up["characters"])}
        except (MemoryError, OverflowError):
            raise
        except _RefusalError as error:
            return {"refusal": shortened(error, _MAX_REASON_CHARACTERS)}
        except Exception as error:  # a template can raise anything
            fault = f"{type(error).__name__}: {error}"
            return {"fault": shortened(fault, _MAX_REASON_CHARACTERS)}

    return answer


def _template_environment() -> jinja2.Environment:
    """An environment like Hugging Face's, for which chat templates are written."""
    import datetime

    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: object, attribute: str) -> jinja2.Undefined:
            # Jinja's own method would let the template print nothing and go on.
            raise SecurityError(f"no access to {attribute!r} of a {type(obj).__name__}")

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks for training what a model said."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> None:
        raise _RefusalError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    # Jinja and Python import some modules at first use. Use them now, while files can be opened.
    strftime_now("%c")
    with contextlib.suppress(jinja2.UndefinedError):
        environment.from_string(r"{{ '\n'|wordwrap|pprint|tojson }}{{ x.y }}").render()
    return environment


def _limited_text(pieces: Iterable[str], limit_characters: int) -> str:
    """The joined pieces.

    Raises:
        OverflowError: at the first piece that exceeds the limit.
    """
    text = []
    left = limit_characters
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise OverflowError(f"it writes over {limit_characters} characters")
        text.append(piece)
    return "".join(text)
