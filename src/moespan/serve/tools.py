"""Calls of functions that a chat demands: the form that holds an answer to one, and its pieces.

The model was not taught to call tools, so it calls none of its own accord. `tool_choice` can demand
a call: of one function, whose arguments are then the whole output; or of any (`required`), and the
output is `{"name":...,"arguments":...}`. A grammar holds the output to that.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

from moespan.errors import RequestError, install_hint, shown
from moespan.serve.bodies import ChatBody
from moespan.serve.refusals import Refusal, bad
from moespan.serve.replies import CalledFunction, ChatDelta, ToolCallDelta
from moespan.text.grammar import StructuredOutputsParams, has_grammar_extra

_MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_DATA = ("const", "enum", "default", "example", "examples")
"""Keywords of JSON schemas whose values are data, not schemas."""

_ADDS_PROPERTIES = (
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "minProperties"),
    *("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"),
)
"""Keywords with which an object may need properties that `properties` does not name."""

_HEAD = re.compile(r'\{"name":"([^"]*)","arguments":')
_STRING_OR_BRACE = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\]]', re.DOTALL)
_LEVELS = {"{": 1, "[": 1, "}": -1, "]": -1}


@dataclass(frozen=True)
class DemandedCall:
    """The call that an answer must be.

    Attributes:
        function: the one to call; None for any.
        form: what the output is held to.
    """

    function: str | None
    form: StructuredOutputsParams


@dataclass(frozen=True)
class _Function:
    name: str
    parameters: dict[str, Any]
    strict: bool


def demanded_call(asked: ChatBody) -> DemandedCall | None:
    """The call that a chat demands; None if its answer is text.

    Raises:
        Refusal: a 400; `tools` or `tool_choice` is wrong, or the extra for grammars is missing.
    """
    choice = asked.tool_choice
    if choice in (None, "none", "auto"):
        if asked.tools:  # wrong ones are an error, whether they are called or not
            _functions(asked.tools, choice)
        return None
    wanted = _wanted(choice)
    if not has_grammar_extra():
        raise bad(
            f"tool_choice={shown(choice)} needs llguidance, because the model was not taught to "
            f"call tools; the operator installs it with {install_hint('grammar')}",
            "tool_choice",
        )
    functions = _functions(asked.tools or [], choice)
    if wanted is not None and wanted not in functions:
        raise bad(
            f"tool_choice.function.name={shown(wanted)} must be one of tools: "
            f"{shown(', '.join(functions))}",
            "tool_choice",
        )
    called = list(functions.values()) if wanted is None else [functions[wanted]]
    try:
        form = StructuredOutputsParams(
            json=_schema_of_any(called) if wanted is None else called[0].parameters,
            disable_any_whitespace=True,
            strict=any(function.strict for function in called),
        )
    except RequestError as error:
        raise about_form(error, "tools") from None
    return DemandedCall(wanted, form)


def check_uncalled(tools: list[dict[str, Any]]) -> None:
    """Refuse wrong tools of `/v1/responses`, where a function's fields stand in the tool itself.

    Tools of other kinds, which a service of its own would run (`web_search`), are never called.

    Raises:
        Refusal: a 400.
    """
    if len(tools) > _MOST_TOOLS:
        raise bad(f"tools holds {len(tools)} tools; at most {_MOST_TOOLS} are taken", "tools")
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        if not isinstance(tool.get("type"), str):
            raise bad(f"{where}.type={shown(tool.get('type'))} must be a string", f"{where}.type")
        if tool["type"] == "function":
            _function(tool, where)


def about_form(error: RequestError, field: str) -> Refusal:
    """The 400 for a form that cannot be used, with the field that asked for it."""
    message = str(error)
    if field != "structured_outputs":  # the client has not heard of this name
        message = message.replace("structured_outputs.json", field, 1)
    return bad(message, field)


def _wanted(choice: str | dict[str, Any]) -> str | None:
    """The name of the function to call; None for any."""
    if choice == "required":
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return name
    raise bad(
        f"tool_choice={shown(choice)} must be none, auto, required, or "
        '{"type": "function", "function": {"name": ...}}',
        "tool_choice",
    )


def _functions(
    tools: list[dict[str, Any]], choice: str | dict[str, Any] | None
) -> dict[str, _Function]:
    if not 1 <= len(tools) <= _MOST_TOOLS:
        raise bad(
            f"tools holds {len(tools)} tools; tool_choice={shown(choice)} needs 1..{_MOST_TOOLS}",
            "tools",
        )
    functions: dict[str, _Function] = {}
    for number, tool in enumerate(tools):
        function = _function_of(tool, f"tools[{number}]")
        if function.name in functions:
            raise bad(
                f"tools[{number}].function.name={shown(function.name)} is there twice; each tool "
                "needs a name of its own",
                f"tools[{number}].function.name",
            )
        functions[function.name] = function
    return functions


def _function_of(tool: dict[str, Any], where: str) -> _Function:
    if tool.get("type") != "function":
        raise bad(f"{where}.type={shown(tool.get('type'))} must be function", f"{where}.type")
    where = f"{where}.function"
    function = tool.get("function")
    if not isinstance(function, dict):
        raise bad(f"{where}={shown(function)} must be an object with a name", where)
    return _function(function, where)


def _function(function: dict[str, Any], where: str) -> _Function:
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad(
            f"{where}.name={shown(name)} must have 1..64 of the characters a-z, A-Z, 0-9, _ and -",
            f"{where}.name",
        )
    if parameters is None:
        parameters = {"properties": {}}
    if not isinstance(parameters, dict):
        raise bad(
            f"{where}.parameters={shown(parameters)} must be a JSON schema", f"{where}.parameters"
        )
    if parameters.get("type", "object") != "object":
        raise bad(
            f"{where}.parameters.type={shown(parameters['type'])} must be object",
            f"{where}.parameters",
        )
    return _Function(name, _closed(parameters), function.get("strict") is True)


def _closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as an object without arguments that nobody declared, unless they are asked for.

    JSON schemas allow any further property. Functions fail when they get one, and a model that was
    not taught calls invents many.
    """
    schema = {**parameters, "type": "object"}
    declared, required = parameters.get("properties"), parameters.get("required", [])
    if not isinstance(declared, dict) or not isinstance(required, list):
        return schema
    if any(key in parameters for key in _ADDS_PROPERTIES):
        return schema
    if all(isinstance(name, str) and name in declared for name in required):
        schema["additionalProperties"] = False
    return schema


def _schema_of_any(functions: list[_Function]) -> dict[str, Any]:
    """The schema of a call of any of these functions. Its first property is the name."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function.name},
                "arguments": {"$ref": f"#/$defs/{function.name}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schemas = {one.name: _moved(one.parameters, f"#/$defs/{one.name}") for one in functions}
    return {"anyOf": calls, "$defs": schemas}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to itself still hold where it is at `root` of another one."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else value
        if key in _DATA
        else _moved(value, root)
        for key, value in schema.items()
    }


class CallPieces:
    """The text of one continuation → the pieces of its call.

    Attributes:
        is_complete: whether the output is a whole call. Only that of any function (`required`) says
            so.
    """

    def __init__(self, call: DemandedCall) -> None:
        self.is_complete = False
        self._name = call.function
        self._is_of_any = call.function is None
        self._id = f"call_{secrets.token_hex(12)}"
        self._is_begun = False
        self._text = ""
        self._num_told = 0

    def push(self, text: str, is_last: bool) -> ChatDelta:
        """The part of the call that a text adds; none as long as the name is not complete.

        Args:
            is_last: whether no more text comes.
        """
        self._text += text
        if self._name is None:
            found = _HEAD.match(self._text)
            if found is None:
                return ChatDelta()
            self._name, self._text = found[1], self._text[found.end() :]
        arguments = self._new_arguments(is_last)
        if not self._is_begun:
            self._is_begun = True
            function = CalledFunction(name=self._name, arguments=arguments)
            return _delta(ToolCallDelta(id=self._id, type="function", function=function))
        if not arguments:
            return ChatDelta()
        return _delta(ToolCallDelta(function=CalledFunction(arguments=arguments)))

    def _new_arguments(self, is_last: bool) -> str:
        end = len(self._text)
        if self._is_of_any and self._text.endswith("}"):
            # It may be that of the call, which is no part of the arguments.
            self.is_complete = is_last and _level(self._text) == -1
            if self.is_complete or not is_last:
                end -= 1
        new, self._num_told = self._text[self._num_told : end], end
        return new


def _delta(call: ToolCallDelta) -> ChatDelta:
    return ChatDelta(tool_calls=[call])


def _level(text: str) -> int:
    """Braces and brackets that are open after a part of a JSON text."""
    return sum(_LEVELS.get(one, 0) for one in _STRING_OR_BRACE.findall(text))
