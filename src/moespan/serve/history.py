"""Messages of a conversation → messages that a chat template takes: a role and a text each.

Templates of this model know `system`, `user` and `assistant`. Agents send back earlier calls of
functions and their results, so these become text:

- an assistant's message with calls is its content, and a line `{"name":...,"arguments":...}` for
  each call;
- results (`tool`, `function`) that follow each other are one message of the user, in which each
  begins with `Result of NAME:`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from moespan.errors import shown
from moespan.serve.bodies import Message, Part, PastFunction
from moespan.serve.refusals import bad

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
_RESULTS = ("tool", "function")


def plain_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages that the chat template gets.

    Raises:
        Refusal: a 400 that names the message.
    """
    plain: list[dict[str, str]] = []
    names: dict[str, str] = {}  # id of a call → its function
    was_result = False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _check_role(message, where)
        text = _text(message, where)
        for call in message.tool_calls or ():
            if call.id is not None:
                names[call.id] = call.function.name
        is_result = message.role in _RESULTS
        if is_result:
            name = message.name or names.get(message.tool_call_id or "")
            text = f"Result of {name}:\n{text}" if name else f"Result:\n{text}"
        if is_result and was_result:
            plain[-1]["content"] += f"\n{text}"
        else:
            plain.append({"role": _ROLES[message.role], "content": text})
        was_result = is_result
    return plain


def _check_role(message: Message, where: str) -> None:
    if message.role not in _ROLES:
        raise bad(
            f"{where}.role={shown(message.role)} must be one of {', '.join(_ROLES)}",
            f"{where}.role",
        )
    for name, roles in (
        ("tool_calls", ("assistant",)),
        ("function_call", ("assistant",)),
        ("tool_call_id", _RESULTS),
    ):
        if getattr(message, name) and message.role not in roles:
            raise bad(
                f"{where}.{name} is refused: messages of the role {shown(message.role)} have none",
                f"{where}.{name}",
            )


def _text(message: Message, where: str) -> str:
    """The content, and the calls after it."""
    functions = [call.function for call in message.tool_calls or ()]
    if message.function_call is not None:
        functions.append(message.function_call)
    content = message.content
    if content is None and not functions:
        raise bad(
            f"{where}.content is missing; it must be a string or text parts", f"{where}.content"
        )
    if isinstance(content, list):
        parts = (_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content))
        content = "\n".join(parts)
    if not functions:
        return content or ""
    return "\n".join([*filter(None, [content]), *map(_call_text, functions)])


def _call_text(function: PastFunction) -> str:
    """A call in the form in which the model's own calls come (`moespan.serve.tools`)."""
    arguments = function.arguments
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode(arguments).decode()
    name = msgspec.json.encode(function.name).decode()
    return f'{{"name":{name},"arguments":{arguments or "{}"}}}'


def _text_of(part: Part, name: str) -> str:
    if part.type != "text":
        raise bad(f"{name}.type={shown(part.type)} is refused: the model takes text only", name)
    if part.text is None:
        raise bad(f"{name}.text is missing; it must be a string", name)
    return part.text
