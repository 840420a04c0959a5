"""Answers the prompts of JSONL lines into a JSONL file; finished answers are never lost.

Input lines are `{"prompt": text or token ids, "id": any, "params": {...}}`. `id` defaults to the
number of the line, counted from 1. With chat, a text prompt is one user message, and `"messages"`
may replace `"prompt"`. Other keys are ignored, and a warning names them. Each answer is one line,
written as soon as its request finishes.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TextIO

import msgspec

from moespan.engine.interrupts import hold_interrupts
from moespan.engine.request import Request, SamplingParams
from moespan.errors import ConfigError, MoespanError, RequestError, shown
from moespan.front.llm import LLM
from moespan.front.outputs import RequestOutput
from moespan.log import logger


@dataclass
class BatchReport:
    """Counts of all lines, and those answered, skipped because already answered, and failed."""

    num_lines: int = 0
    num_answered: int = 0
    num_skipped: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    seconds: float = 0.0


_KEYS = ("prompt", "messages", "id", "params")
_MOST_IGNORED = 8  # keys that a warning names


@dataclass
class _Lines:
    """Makes requests of input lines, one at a time, and reports bad lines."""

    llm: LLM
    lines: Iterable[bytes]
    name: str
    defaults: dict[str, Any]
    chat: bool
    done: set[str]
    report: BatchReport
    report_failure: Callable[[str], object]
    advance: Callable[[int], object]
    ids: dict[str, Any] = field(default_factory=dict)
    line_numbers: dict[str, int] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[tuple[str | None, Request]]:
        seen: set[str] = set()
        for number, line in enumerate(self.lines, 1):
            if not line.strip():
                continue
            self.report.num_lines += 1
            try:
                item = _parse(line)
                self._warn_of_ignored(number, item)
                given_id = item.get("id", number)
                key = _key(given_id)
                if key in seen:
                    raise RequestError(
                        f"id {shown(given_id)} is on an earlier line too; give each its own"
                    )
                seen.add(key)
                if key in self.done:
                    self.report.num_skipped += 1
                    self.advance(1)
                    continue
                text, request = self._request(item)
            except RequestError as error:
                self.fail(number, str(error))
                continue
            self.ids[request.id] = given_id
            self.line_numbers[request.id] = number
            yield text, request

    def fail(self, number: int, message: str) -> None:
        self.report.num_failed += 1
        self.report_failure(f"{self.name}:{number}: {message}")
        self.advance(1)

    def _warn_of_ignored(self, number: int, item: dict[str, Any]) -> None:
        """Name each key that means nothing here, once, and at most a few of them."""
        known = {*_KEYS, *SamplingParams.__struct_fields__, *self.ignored}
        for key in [key for key in item if key not in known]:
            if len(self.ignored) == _MOST_IGNORED:
                return
            self.ignored.add(key)
            near = get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"lines have {', '.join(_KEYS)}"
            logger.warning("%s:%d: the key %s is ignored; %s", self.name, number, shown(key), hint)

    def _request(self, item: dict[str, Any]) -> tuple[str | None, Request]:
        raw = {} if item.get("params") is None else item["params"]
        if not isinstance(raw, dict):
            raise RequestError(f"params={shown(raw)} must be an object")
        for name in SamplingParams.__struct_fields__:
            if item.get(name) is not None:
                raise RequestError(f'{name} belongs in params: {{"params": {{...}}}}')
        # Clients write null where nothing is set; only max_tokens means something by it.
        own = {name: value for name, value in raw.items() if value is not None}
        if "max_tokens" in raw:
            own["max_tokens"] = raw["max_tokens"]
        params = SamplingParams.from_dict({**self.defaults, **own})
        prompt: Any = item.get("prompt")
        messages: Any = item.get("messages")
        if messages is not None and not self.chat:
            raise RequestError("messages are only for chat; add --chat, or give a prompt")
        if messages is None and prompt is None:
            raise RequestError("the line has no prompt")
        if messages is not None and prompt is not None:
            raise RequestError("the line has both a prompt and messages; give one of them")
        if self.chat and isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        if messages is not None:
            return self.llm.request(self.llm.chat_prompt(messages), params)
        return self.llm.request(prompt, params)


def run_batch(
    llm: LLM,
    lines: Iterable[bytes],
    output: Answers,
    defaults: dict[str, Any],
    *,
    name: str,
    chat: bool,
    done: set[str],
    report_failure: Callable[[str], object],
    advance: Callable[[int], object] = lambda num_lines: None,
) -> BatchReport:
    """Answer every line into `output`.

    Lines are read ahead: up to twice as many as the engine takes in a step.

    Args:
        lines: each a JSON object; empty ones count for the numbers of the others only.
        name: of the input, for messages.
        defaults: sampling parameters for lines that do not set them.
        done: keys of the ids that are answered already (`answered_ids`); they are skipped.
        report_failure: called with a message for each line that fails; the message has its number.
        advance: called with the number of lines that have just been finished.

    Raises:
        EngineDeadError: the ranks are gone; every finished answer is in `output`.
        MoespanError: `output` can take no more answers.
    """
    started = time.perf_counter()
    report = BatchReport()
    source = _Lines(llm, lines, name, defaults, chat, done, report, report_failure, advance)
    with contextlib.closing(llm.stream(source)) as results:
        for result in results:
            given_id = source.ids.pop(result.request_id)
            number = source.line_numbers.pop(result.request_id)
            report.num_output_tokens += sum(len(one.token_ids) for one in result.outputs)
            if result.error is not None:
                source.fail(number, result.error)
                continue
            with hold_interrupts():
                output.write(answer(given_id, result))
            report.num_answered += 1
            advance(1)
    report.seconds = time.perf_counter() - started
    return report


class Answers(Protocol):
    """A place for answers."""

    def write(self, record: dict[str, Any]) -> object:
        """Write one answer, so that it outlives this process.

        Raises:
            MoespanError: the answer could not be written.
        """


class AnswerStream:
    """Writes answers to an open text file, such as stdout."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, record: dict[str, Any]) -> None:
        """Write and flush one line. JSON's escapes replace what the encoding cannot represent."""
        line = json.dumps(record, ensure_ascii=False)
        try:
            line.encode(self._file.encoding or "utf-8")
        except UnicodeEncodeError:
            line = json.dumps(record)
        self._file.write(line + "\n")
        self._file.flush()


class AnswerFile:
    """Appends answers to a file, unbuffered, and notices when the file is no longer there.

    Args:
        path: the file; it is made if it is missing.
        num_answers: answers that the file holds already.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, num_answers: int = 0) -> None:
        self._path = path
        self._num_answers = num_answers
        self._file = path.open("ab", buffering=0)
        self._num_bytes = self._stat().st_size

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, and check that the path still leads to all lines."""
        left = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        try:
            while left:
                count = self._file.write(left) or 0
                left = left[count:]
                self._num_bytes += count
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MoespanError(
                f"{self._path} cannot be written: {error.strerror}; it holds {self._num_answers} "
                "answers, and the same command with --resume adds the others"
            ) from None
        self.check()
        self._num_answers += 1

    def check(self) -> None:
        """Raise `MoespanError` if another program has taken the file away, or cut it."""
        own = self._stat()
        try:
            found: os.stat_result | None = self._path.stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino):
            fate = "was removed or renamed" if found is None else "was replaced by another file"
        elif stat.S_ISREG(own.st_mode) and own.st_size < self._num_bytes:
            fate = "was cut"
        else:
            return
        raise MoespanError(
            f"{self._path} {fate} while answers were written; {self._num_answers} answers that "
            "it held may be lost; run the command again with another --output"
        )

    def close(self) -> None:
        """Check once more, and close the file. Idempotent."""
        if not self._file.closed:
            with self._file:
                self.check()

    def _stat(self) -> os.stat_result:
        return os.fstat(self._file.fileno())


def answer(given_id: Any, result: RequestOutput) -> dict[str, Any]:
    """A finished request as a JSON object; with n > 1, `outputs` holds all continuations."""
    continuations = [
        {
            "text": one.text,
            "token_ids": one.token_ids,
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
            **({} if one.logprobs is None else {"logprobs": msgspec.to_builtins(one.logprobs)}),
            **({} if one.error is None else {"error": one.error}),
        }
        for one in result.outputs
    ]
    record = {
        "id": given_id,
        **continuations[0],
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_cached_tokens": result.num_cached_tokens,
    }
    if len(continuations) > 1:
        record["outputs"] = continuations
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = msgspec.to_builtins(result.prompt_logprobs)
    return record


def answered_ids(path: Path) -> set[str]:
    """Keys of the ids that an earlier run answered into `path`; a truncated last line is removed.

    Raises:
        ConfigError: a line is not an answer; the file is then left as it is.
    """
    keys: set[str] = set()
    whole_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.endswith(b"\n"):
                    keys.add(_key_of_answer(line))
                    whole_bytes += len(line)
                elif line[: len(_BEGIN)] != _BEGIN[: len(line)]:
                    raise RequestError("not the beginning of an answer")
            except RequestError:
                raise ConfigError(
                    f"{path}:{number} is not an answer of an earlier run; give another --output"
                ) from None
    os.truncate(path, whole_bytes)
    return keys


# First bytes of every answer.
_BEGIN = b'{"id": '


def _key_of_answer(line: bytes) -> str:
    record = _parse(line)
    if not {"id", "token_ids", "finish_reason"} <= record.keys():
        raise RequestError("not an answer")
    return _key(record["id"])


def _parse(line: bytes) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}") from None
    if not isinstance(item, dict):
        raise RequestError(f"a JSON {type(item).__name__}, not an object")
    return item


def _key(given_id: Any) -> str:
    """`given_id` as text; two keys are equal exactly if the ids are equal."""
    try:
        json.dumps(given_id, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # an answer could not hold the id
        raise RequestError(f"id {shown(given_id)} cannot be written as JSON: {error}") from None
    return json.dumps(given_id, sort_keys=True)
