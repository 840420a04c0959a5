"""Grammars that outputs follow: what a user asks for, its check, and its state at each token.

llguidance (the extra `grammar`) compiles a grammar and says which tokens may come next. It
gets the bytes of each token from the checkpoint's `Tokenizer`, and reads no file.

A grammar comes from anybody. Some take minutes to compile, or crash the process. So the front tries
each one in a child process with limits (`GrammarChecker`) before the engine sees it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from moespan.errors import RequestError, install_hint, shortened, shown
from moespan.text.child import Answer, Child
from moespan.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

T = TypeVar("T")

MAX_GRAMMAR_BYTES: Final = 64 << 10
MAX_GRAMMAR_DEPTH: Final = 64
_MAX_CHOICES: Final = 4096

# The limits of one check. The deepest grammar of 64 KiB recurses through 40 MiB of stack.
_CHECK_SECONDS: Final = 2.0
_CHECK_MEMORY_BYTES: Final = 512 << 20
_STACK_BYTES: Final = 128 << 20
_MAX_REASON_CHARACTERS: Final = 200
_NUM_CHILDREN: Final = 2
# Masks that a check computes: some grammars are compiled fast, and then take minutes for a mask.
_NUM_TRIED_TOKENS: Final = 48

_NUM_KEPT: Final = 64

# Between two tokens of JSON: up to two spaces, or one line break and its indentation. Models that
# have lost the thread fill their output with blanks or empty lines otherwise.
_WHITESPACE: Final = r"\x20{1,2}|\x0D?\x0A(\x20{0,32}|\x09{0,16})"

_KINDS: Final = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form of an output: one of five kinds. Names and meanings are vLLM's, except `strict`.

    The constructor checks sizes and types. `GrammarChecker` checks the rest.

    Attributes:
        json: a JSON schema, decoded or as text; kept as text.
        regex: a regular expression that the whole output matches, in the syntax of Rust's `regex`.
        choice: the texts of which the output is one.
        grammar: a context-free grammar, in llguidance's variant of Lark or in GBNF.
        json_object: any JSON object.
        disable_any_whitespace: JSON without whitespace between its tokens. Otherwise there are at
            most two spaces in one place, or a line break with at most 32 of indentation.
        strict: whether a keyword of a JSON schema that cannot be enforced is an error; otherwise it
            is left out.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    strict: bool = True

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'none'} of {', '.join(_KINDS)}; "
                "give exactly one"
            )
        for name in ("disable_any_whitespace", "strict"):
            _require(name, getattr(self, name), bool, "true or false")
        value = getattr(self, given[0])
        if given[0] == "json":
            msgspec.structs.force_setattr(self, "json", _schema_text(value))
        elif given[0] == "json_object":
            _require(given[0], value, bool, "true")
        elif given[0] == "choice":
            _check_choices(value)
        else:
            _require(given[0], value, str, "text")
            if not value:
                raise RequestError(f"structured_outputs.{given[0]} is empty; it must be text")
        _check_size(given[0], getattr(self, given[0]))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> StructuredOutputsParams:
        """Build from decoded JSON. A null is the same as a missing field.

        Raises:
            RequestError: an unknown name, a wrong type, or a value out of bounds.
        """
        for name in raw:
            if name not in cls.__struct_fields__:
                known = ", ".join(cls.__struct_fields__)
                raise RequestError(f"structured_outputs.{shown(name)} is unknown; known: {known}")
        return cls(**{name: value for name, value in raw.items() if value is not None})

    @property
    def kind(self) -> str:
        """The name of the one kind that is given."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    def source(self) -> str:
        """The grammar in the form that llguidance compiles.

        Raises:
            ValueError: it is malformed.
        """
        from llguidance import LLMatcher

        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.choice is not None:
            texts = [json.dumps(text, ensure_ascii=False) for text in self.choice]
            return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
        if self.grammar is not None:
            return LLMatcher.grammar_from_lark(_as_lark(self.grammar))
        whitespace: dict[str, Any] = {"whitespace_pattern": _WHITESPACE}
        if self.disable_any_whitespace:
            whitespace = {"whitespace_flexible": False}
        schema = '{"type": "object"}' if self.json is None else self.json
        overrides: Any = {**whitespace, "lenient": not self.strict}
        return LLMatcher.grammar_from_json_schema(schema, overrides=overrides)


def _require(name: str, value: object, kind: type, rule: str) -> None:
    if not isinstance(value, kind):
        raise RequestError(f"structured_outputs.{name}={shown(value)} must be {rule}")


def _check_choices(choices: Any) -> None:
    is_list = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    if not is_list or not 1 <= len(choices) <= _MAX_CHOICES or not all(choices):
        raise RequestError(
            f"structured_outputs.choice={shown(choices)} must be a list of 1..{_MAX_CHOICES} texts "
            "that are not empty"
        )


def _schema_text(schema: Any) -> str:
    """A JSON schema as text, not deeper than allowed."""
    rule = f"a JSON schema of at most {MAX_GRAMMAR_DEPTH} levels"
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        _require("json", schema, dict, rule)
        _check_depth(schema, rule)
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RequestError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json must be {rule}: {shortened(error)}") from None


def _check_depth(value: Any, rule: str) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_GRAMMAR_DEPTH:
            raise RequestError(f"structured_outputs.json must be {rule}")
        level = [
            part
            for one in level
            if isinstance(one, dict | list | tuple)
            for part in (one.values() if isinstance(one, dict) else one)
        ]


def _check_size(name: str, value: Any) -> None:
    texts = value if isinstance(value, list) else [value if isinstance(value, str) else ""]
    try:
        num_bytes = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError:
        raise RequestError(
            f"structured_outputs.{name} has half of a surrogate pair; send whole characters"
        ) from None
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"structured_outputs.{name} has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are "
            "allowed"
        )


def _as_lark(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:  # the converter's own errors share no base
        raise ValueError(f"it is neither Lark nor GBNF: {error}") from error


# Checking


def require_grammar_extra() -> None:
    """Raise `RequestError` if the library for grammars is not installed."""
    if not has_grammar_extra():
        raise RequestError(
            "structured outputs need llguidance, which is not installed; "
            f"{install_hint('grammar')}, and start again"
        )


@functools.cache
def has_grammar_extra() -> bool:
    """Whether the library for grammars is installed."""
    return importlib.util.find_spec("llguidance") is not None


class GrammarChecker:
    """Tries grammars in child processes; threads may share it.

    The children start with the first check, and end with this object. A child that breaks a limit
    is replaced.
    """

    def __init__(self) -> None:
        self._children: SimpleQueue[Child | None] = SimpleQueue()
        for _ in range(_NUM_CHILDREN):
            self._children.put(None)
        self._faults: OrderedDict[bytes, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, params: StructuredOutputsParams) -> None:
        """Try a grammar: compile it, and follow it for some tokens.

        This takes some milliseconds, and at most a few seconds; call it where nobody waits. The
        last results are kept.

        Raises:
            RequestError: the extra is not installed, or the grammar is malformed or breaks a limit
                of time or memory.
        """
        require_grammar_extra()
        key = msgspec.msgpack.encode(params)
        with self._lock:
            is_known, fault = key in self._faults, self._faults.get(key)
        if not is_known:
            fault = self._try(msgspec.to_builtins(params))
            with self._lock:
                _keep(self._faults, key, fault)
        if fault is not None:
            raise RequestError(f"structured_outputs.{params.kind} cannot be used: {fault}")

    def _try(self, request: dict[str, Any]) -> str | None:
        child = self._children.get()
        try:
            if child is None or not child.is_usable:
                child = Child(
                    __name__,
                    {},
                    seconds=_CHECK_SECONDS,
                    memory_bytes=_CHECK_MEMORY_BYTES + _STACK_BYTES,
                    most_reply_bytes=1 << 16,
                )
            return child.ask(request).get("fault")
        except OSError as error:
            raise RequestError(f"structured_outputs cannot be checked: {error}") from error
        finally:
            self._children.put(child)


def _keep(kept: OrderedDict[bytes, T], key: bytes, value: T) -> None:
    """Add an entry, and forget the oldest of too many."""
    kept[key] = value
    while len(kept) > _NUM_KEPT:
        kept.popitem(last=False)


def answer_in_child(set_up: Mapping[str, Any]) -> Answer:
    """In the child process: makes the function that tries grammars."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    tokenizer = _Vocabulary(tokens, [256], [256], lambda text: list(text.encode())).prefix_tree()

    def answer(request: dict[str, Any]) -> dict[str, str]:
        # As in the engine: a deep stack for all up to the first mask, and the usual one after that.
        made: SimpleQueue[Matcher | str] = SimpleQueue()
        with deep_stack():
            thread = threading.Thread(target=lambda: made.put(_compiled(request, tokenizer)))
            thread.start()
        thread.join()
        matcher = made.get()
        fault = matcher if isinstance(matcher, str) else _fault_of(matcher.copy())
        return {} if fault is None else {"fault": fault}

    for warm_up in ({"json_object": True}, {"grammar": 'root ::= "a"'}):
        answer(warm_up)  # imports what is imported once, while files can be opened
    return answer


def _compiled(request: dict[str, Any], tokenizer: llguidance.LLTokenizer) -> Matcher | str:
    """The matcher of a grammar, with its first mask computed, or what is wrong with the grammar."""
    try:
        matcher = Matcher.begin(StructuredOutputsParams(**request), tokenizer, 257)
        matcher.allowed()
    except BaseException as error:  # the library panics as a BaseException
        return _short(error)
    return matcher


def _fault_of(matcher: Matcher) -> str | None:
    """What goes wrong while some random tokens follow a grammar; None if nothing does."""
    choose = random.Random(0).choice
    try:
        for _ in range(_NUM_TRIED_TOKENS):
            mask = int.from_bytes(matcher.allowed(), "little")
            token_ids = [token for token in range(256) if mask >> token & 1]
            if not token_ids:
                break
            matcher.accept(choose(token_ids))
    except BaseException as error:
        return _short(error)
    return None


def _short(error: BaseException) -> str:
    return shortened(error, _MAX_REASON_CHARACTERS) or type(error).__name__


@contextmanager
def deep_stack() -> Iterator[None]:
    """Threads that start in here have a stack for the deepest grammar."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


# Following


class _Vocabulary:
    """A vocabulary as llguidance reads it.

    Attributes:
        tokens: the bytes of each token id; empty for an id without a token.
    """

    def __init__(
        self,
        tokens: list[bytes],
        eos: list[int],
        special: list[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.eos_token_id = eos[0]
        self.bos_token_id = None
        self.special_token_ids = special
        self._eos = eos
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text; llguidance asks for those of texts that the grammar forces."""
        return self._encode(text)

    def prefix_tree(self) -> llguidance.LLTokenizer:
        """The prefix tree of all tokens."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self), len(self.tokens), self._eos)


class Matcher:
    """The state of one output in its grammar; methods raise `RequestError` if it cannot go on."""

    def __init__(self, state: llguidance.LLMatcher, vocab_size: int) -> None:
        self._state = state
        self._num_bytes = -(-vocab_size // 8)
        self._check()

    @classmethod
    def begin(
        cls, params: StructuredOutputsParams, tokenizer: llguidance.LLTokenizer, vocab_size: int
    ) -> Matcher:
        """The state before the first token."""
        from llguidance import LLMatcher, LLParserLimits

        try:
            source = params.source()
        except ValueError as error:
            raise RequestError(f"the grammar is malformed: {shortened(error, 200)}") from None
        limits = LLParserLimits(verbose_errors=False)
        return cls(LLMatcher(tokenizer, source, log_level=0, limits=limits), vocab_size)

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""
        return Matcher(self._state.deep_copy(), self._num_bytes * 8)

    def accept(self, token_id: int) -> None:
        """Go on by one of the allowed tokens."""
        self._state.consume_token(token_id)
        self._check()

    def allowed(self) -> bytes:
        """The tokens that may come next: bit t % 8 of byte t // 8 is token t.

        EOS ids are among them exactly if the output may end.
        """
        mask = self._state.compute_bitmask()
        self._check()
        return mask[: self._num_bytes]

    def _check(self) -> None:
        if self._state.is_error():
            reason = self._state.get_error().partition("\n<")[0]
            raise RequestError(f"the grammar fails: {shortened(reason, _MAX_REASON_CHARACTERS)}")


class Grammars:
    """Compiles grammars for one model; threads may share it. The last compiled ones are kept.

    Building it takes up to two seconds of this process for 102,400 tokens.

    Args:
        vocab_size: number of token ids of the model, perhaps more than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[bytes, Matcher] = OrderedDict()
        self._lock = threading.Lock()
        tokens = [tokenizer.decode_bytes((t,), False) for t in range(vocab_size)]
        eos = sorted(eos_token_ids)
        special = sorted(tokenizer.special_token_ids.union(eos))
        self._tokenizer = _Vocabulary(
            tokens, eos, special, lambda text: tokenizer.encode(text, add_special_tokens=False)
        ).prefix_tree()

    @classmethod
    def of(
        cls, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Iterable[int]
    ) -> Grammars | None:
        """The grammars of a checkpoint; None without a tokenizer, an EOS token or the extra."""
        eos = [token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size]
        if tokenizer is None or not eos or not has_grammar_extra():
            return None
        return cls(tokenizer, vocab_size, eos)

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """The state of a new output.

        Raises:
            RequestError: the grammar cannot be compiled.
        """
        key = msgspec.msgpack.encode(params)
        with self._lock:
            if key in self._compiled:
                return self._compiled[key].copy()
        matcher = Matcher.begin(params, self._tokenizer, self._vocab_size)
        with self._lock:
            _keep(self._compiled, key, matcher.copy())
        return matcher
