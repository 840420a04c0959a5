"""What crosses a process boundary can be decoded on whatever Python runs the tests.

msgspec reads the annotations of a type when it first makes a decoder for it. An annotation that one
Python resolves and another refuses (a bare `ClassVar`, say) therefore fails at run time only.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import moespan
from moespan.config import EngineConfig, Layout, Nodes
from moespan.engine import engine
from moespan.engine.questions import AnyQuestion
from moespan.launch import protocol

SOURCE = Path(moespan.__file__).parent
NEEDS_A_LIBRARY = ("moespan.ops.cuda", "moespan.ops.npu")
NEVER_SENT = {"Settings"}  # its KW_ONLY is one that Python 3.10 does not resolve
UNIONS = (protocol.FromFront, protocol.FromLeader, vars(engine)["FromLeader"], AnyQuestion)
BARE = {"ClassVar", "Final", "InitVar"}
"""Names that need an argument where Python 3.10 is to resolve them."""


def types() -> Iterator[type]:
    """Every struct and every dataclass of the package."""
    for found in pkgutil.walk_packages([str(SOURCE)], "moespan."):
        if found.name.startswith(NEEDS_A_LIBRARY) or found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for value in vars(module).values():
            if not isinstance(value, type) or value.__module__ != found.name:
                continue
            if issubclass(value, msgspec.Struct) or is_dataclass(value):
                yield value


TYPES = [kind for kind in types() if kind.__name__ not in NEVER_SENT]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__qualname__)
def test_each_struct_and_dataclass_has_decoders(kind: type) -> None:
    msgspec.json.Decoder(kind)
    msgspec.msgpack.Decoder(kind)


@pytest.mark.parametrize("union", UNIONS)
def test_each_union_of_messages_has_a_decoder(union: Any) -> None:
    msgspec.msgpack.Decoder(union)


@pytest.mark.parametrize(
    "value",
    [
        Layout(tp=2, ep=4, pp=2, sp=2, dp=3, pipeline_layers=(2, 1)),
        EngineConfig("models/quickstart", Layout(tp=2)),
        Nodes(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_job_is_told_comes_back_equal(value: Any) -> None:
    assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value


def test_no_field_has_an_annotation_that_only_newer_pythons_resolve() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in sorted(SOURCE.rglob("*.py"))
        for class_ in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(class_, ast.ClassDef)
        for node in class_.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).split(".")[-1] in BARE
    ]
    assert not found, f"give each an argument, such as ClassVar[int]: {', '.join(found)}"
