"""The load of an engine: when requests arrive, how long their prompts are, and their outputs.

One reader serves `plan` and `bench`, so that what is predicted is what is measured. Loads are drawn
from distributions, or read from a file in one of three forms:

- CSV of the Azure LLM inference traces: `TIMESTAMP` (date and time, or seconds), `ContextTokens`,
  `GeneratedTokens`.
- JSON Lines of Mooncake's traces: `timestamp` in milliseconds, `input_length`, `output_length`,
  `hash_ids` of blocks of 512 tokens.
- JSON Lines of our own: `arrival_s`, `prompt` (text) or `prompt_tokens` (a number),
  `output_tokens`.

Equal `hash_ids` become equal tokens, so that a real prefix cache finds them. Imports no torch.
"""

from __future__ import annotations

import csv
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from moespan import files
from moespan.errors import ConfigError, shown

MOST_REQUESTS = 1_000_000
_MOST_BYTES = 1 << 30
_MOST_TOKENS = 1 << 28

HASHED_TOKENS = 512
"""Tokens of one of Mooncake's blocks."""


@dataclass(frozen=True)
class LoadRequest:
    """One request.

    Attributes:
        arrival_s: when it arrives, after the first one.
        prompt_tokens, output_tokens: how many; 0 prompt tokens: `prompt` has to be encoded.
        blocks: names of its blocks of 512 tokens; equal names are equal tokens.
        prompt: its text, if it has one.
        ids: the tokens of that text, once it is encoded.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    prompt: str | None = None
    ids: tuple[int, ...] = ()

    def token_ids(self, number: int, vocab_size: int, seed: int = 0) -> list[int]:
        """The tokens of the prompt of request `number`. They repeat with their arguments, and
        differ from those of other requests except in blocks of the same name."""
        if self.ids:
            return list(self.ids[: self.prompt_tokens])
        found: list[int] = []
        for block in self.blocks:
            draw = random.Random(f"block {block} {seed}")
            found += draw.choices(range(vocab_size), k=HASHED_TOKENS)
        missing = self.prompt_tokens - len(found)
        if missing > 0:
            draw = random.Random(f"request {number} {seed}")
            found += draw.choices(range(vocab_size), k=missing)
        return found[: self.prompt_tokens]


@dataclass(frozen=True)
class Load:
    """Requests in the order of their arrival.

    Attributes:
        concurrency: requests at any time, each followed by the next when it ends; None: requests
            come at their arrival times.
        num_clipped: prompts that were cut.
        name: what it is, in words.
        poisson_rate: requests per second that were asked for, independent of each other; None:
            arrival times are those of a file, or do not matter.
    """

    requests: tuple[LoadRequest, ...]
    concurrency: int | None = None
    num_clipped: int = 0
    name: str = ""
    poisson_rate: float | None = None

    @functools.cached_property
    def mean_prompt_tokens(self) -> float:
        """Mean length of a prompt."""
        return sum(one.prompt_tokens for one in self.requests) / len(self.requests)

    @functools.cached_property
    def mean_output_tokens(self) -> float:
        """Mean length of an output."""
        return sum(one.output_tokens for one in self.requests) / len(self.requests)

    @property
    def rate(self) -> float | None:
        """Requests per second; None if arrivals do not matter."""
        if self.concurrency is not None:
            return None
        if self.poisson_rate is not None:
            return self.poisson_rate
        last = self.requests[-1].arrival_s
        return (len(self.requests) - 1) / last if last > 0 else math.inf

    @property
    def shares_prefixes(self) -> bool:
        """Whether a prefix cache may find anything."""
        return any(one.blocks or one.prompt is not None for one in self.requests)

    def share(self, engines: float, seed: int = 0) -> Load:
        """The part that one of `engines` engines gets if each request goes to any of them."""
        if engines == 1:
            return self
        name = f"{self.name}, one of {engines:g} parts"
        if self.concurrency is not None:
            return replace(self, concurrency=max(1, round(self.concurrency / engines)), name=name)
        rate = self.poisson_rate and self.poisson_rate / engines
        if rate is not None and not self.shares_prefixes:
            # A random part is Poisson again, at a lower rate; all requests may stand for it.
            slow = (replace(one, arrival_s=one.arrival_s * engines) for one in self.requests)
            return replace(self, requests=tuple(slow), poisson_rate=rate, name=name)
        draw = random.Random(f"share {seed}")
        mine = tuple(one for one in self.requests if draw.random() * engines < 1)
        requests = _from_first(mine or self.requests[:1])
        return replace(self, requests=requests, poisson_rate=rate, name=name)

    def extended(self, number: int) -> Load:
        """This load with `number` requests: the first ones, or all again after the last one."""
        found = list(self.requests[:number])
        while len(found) < number:
            rate = self.rate
            first = found[-1].arrival_s + (1 / rate if rate else 0.0)
            again = self.requests[: number - len(found)]
            found += [replace(one, arrival_s=first + one.arrival_s) for one in again]
        return replace(self, requests=tuple(found))

    def fitting(self, max_model_len: int, clip: bool) -> Load:
        """This load within sequences of `max_model_len` tokens.

        Raises:
            ConfigError: a prompt is too long and `clip` is not set.
        """
        fitting, clipped = [], 0
        for number, one in enumerate(self.requests):
            length = one.prompt_tokens + one.output_tokens
            if length > max_model_len and not clip:
                raise ConfigError(
                    f"request {number} has {one.prompt_tokens} prompt and {one.output_tokens} "
                    f"output tokens, and max_model_len is {max_model_len}; --clip cuts such "
                    "prompts and counts them"
                )
            if length > max_model_len:
                output = min(one.output_tokens, max_model_len - 1)
                prompt = min(one.prompt_tokens, max_model_len - output)
                one = replace(one, prompt_tokens=prompt, output_tokens=output)
                clipped += 1
            fitting.append(one)
        return replace(self, requests=tuple(fitting), num_clipped=clipped)


def drawn(
    prompt_tokens: str,
    output_tokens: str,
    num_requests: int,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    seed: int = 0,
) -> Load:
    """A load whose lengths are drawn from distributions, and whose arrivals are Poisson.

    Args:
        prompt_tokens, output_tokens: see `distribution`.
        rate: requests per second; None: all come at once.

    Raises:
        ConfigError: a distribution or a number is not one.
    """
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigError(f"rate={rate} must be a number of requests per second above 0")
    if concurrency is not None and concurrency < 1:
        raise ConfigError(f"concurrency={concurrency} must be at least 1")
    draw = random.Random(f"load {seed}")
    prompt, output = distribution(prompt_tokens), distribution(output_tokens)
    at, requests = 0.0, []
    for number in range(num_requests):
        requests.append(LoadRequest(at if rate else 0.0, prompt(draw), output(draw)))
        if rate and number < num_requests:
            at += draw.expovariate(rate)
    name = f"{prompt_tokens} tokens in, {output_tokens} out"
    if rate is not None:
        name += f", {rate:g} request{'' if rate == 1 else 's'} a second (Poisson)"
    if concurrency is not None:
        name += f", {concurrency} at a time"
    return Load(_from_first(tuple(requests)), concurrency, name=name, poisson_rate=rate)


def distribution(text: str) -> Callable[[random.Random], int]:
    """What draws a length: `1024`, `uniform:LOW:HIGH`, or `lognormal:MEAN:SIGMA`, where SIGMA is
    the deviation of the logarithm.

    Raises:
        ConfigError: `text` is none of these.
    """
    kind, *given = text.split(":")
    try:
        numbers = [float(one) for one in given]
        if not given:
            length = int(kind)
            if 1 <= length <= _MOST_TOKENS:
                return lambda draw: length
        elif kind == "uniform" and len(numbers) == 2 and 1 <= numbers[0] <= numbers[1]:
            low, high = int(numbers[0]), int(min(numbers[1], _MOST_TOKENS))
            return lambda draw: draw.randint(low, high)
        elif kind == "lognormal" and len(numbers) == 2 and numbers[0] >= 1 and numbers[1] >= 0:
            mean, sigma = numbers
            middle = math.log(mean) - sigma**2 / 2
            return lambda draw: min(max(1, round(draw.lognormvariate(middle, sigma))), _MOST_TOKENS)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(
        f"length {shown(text)} is not a number of at least 1, uniform:LOW:HIGH or "
        "lognormal:MEAN:SIGMA"
    )


def read(
    path: str | Path,
    *,
    speed: float | None = None,
    rate: float | None = None,
    concurrency: int | None = None,
    seed: int = 0,
) -> Load:
    """The load in a file.

    Args:
        speed: arrival times are divided by this (1).
        rate: Poisson arrivals of so many requests per second instead of the file's.
        concurrency: so many requests at any time, whatever the arrival times.

    Raises:
        ConfigError: the file cannot be read, or a line of it is not a request.
    """
    path = Path(path)
    if rate is not None or concurrency is not None:
        refuse_speed(speed)
    speed = 1.0 if speed is None else speed
    if not 0 < speed < math.inf:
        raise ConfigError(f"speed={speed} must be a number above 0")
    try:
        text = files.read_bytes(path, _MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"load {path} cannot be read: {error}") from None
    lines = text.splitlines()
    parse = _json_rows if text.lstrip().startswith("{") else _csv_rows
    requests = sorted(parse(path, lines), key=lambda one: one.arrival_s)
    if not requests:
        raise ConfigError(f"load {path} holds no request")
    if rate is not None:
        draw, at = random.Random(f"load {seed}"), 0.0
        for number, one in enumerate(requests):
            requests[number] = replace(one, arrival_s=at)
            at += draw.expovariate(rate)
    elif speed != 1:
        requests = [replace(one, arrival_s=one.arrival_s / speed) for one in requests]
    name = f"{len(requests)} requests of {path.name}"
    return Load(_from_first(tuple(requests)), concurrency, name=name, poisson_rate=rate)


def refuse_speed(speed: float | None) -> None:
    """Raise `ConfigError` if a speed is given, where no arrival times of a file count."""
    if speed is not None:
        raise ConfigError(
            f"--speed {speed:g} is for the arrival times of a trace; give --load FILE without "
            "--rate and --concurrency, or leave --speed out"
        )


def _from_first(requests: Sequence[LoadRequest]) -> tuple[LoadRequest, ...]:
    first = requests[0].arrival_s
    if first == 0:
        return tuple(requests)
    return tuple(replace(one, arrival_s=one.arrival_s - first) for one in requests)


def _csv_rows(path: Path, lines: list[str]) -> Iterator[LoadRequest]:
    reader = csv.DictReader(lines)
    wanted = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if not set(wanted) <= set(reader.fieldnames or ()):
        raise ConfigError(
            f"load {path} is neither JSON Lines nor a CSV with the columns {', '.join(wanted)}"
        )
    start: datetime | None = None
    for number, row in enumerate(_at_most(path, reader), 2):
        try:
            stamp = row["TIMESTAMP"]
            try:
                arrival_s = float(stamp)
            except ValueError:
                at = datetime.fromisoformat(_six_digits(stamp))
                start = start or at
                arrival_s = (at - start).total_seconds()
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            yield _request(arrival_s, prompt, output)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"load {path}, line {number}: {error}") from None


def _six_digits(stamp: str) -> str:
    """A time whose fraction of a second has at most the six digits that Python 3.10 reads."""
    whole, point, fraction = stamp.partition(".")
    digits = len(fraction) - len(fraction.lstrip("0123456789"))
    return whole + point + fraction[: min(digits, 6)].ljust(6 if point else 0, "0")


class _Line(msgspec.Struct, frozen=True):
    """A line of Mooncake's form or of our own."""

    timestamp: float | None = None
    input_length: int | None = None
    output_length: int | None = None
    hash_ids: list[int] = []
    arrival_s: float = 0.0
    prompt: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def request(self) -> LoadRequest:
        """The request; raises ValueError for a missing field."""
        if self.timestamp is not None:
            if self.input_length is None or self.output_length is None:
                raise ValueError("timestamp needs input_length and output_length")
            blocks = tuple(self.hash_ids)
            prompt, output = self.input_length, self.output_length
            return _request(self.timestamp / 1000, prompt, output, blocks)
        if self.output_tokens is None:
            raise ValueError("output_tokens is missing")
        if (self.prompt is None) == (self.prompt_tokens is None):
            raise ValueError("give one of prompt and prompt_tokens")
        if self.prompt is not None:
            return _request(self.arrival_s, 0, self.output_tokens, prompt=self.prompt)
        return _request(self.arrival_s, self.prompt_tokens or 0, self.output_tokens)


def _json_rows(path: Path, lines: list[str]) -> Iterator[LoadRequest]:
    decode = msgspec.json.Decoder(_Line).decode
    for number, line in enumerate(_at_most(path, lines), 1):
        if not line.strip():
            continue
        try:
            yield decode(line).request()
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"load {path}, line {number}: {error}") from None


def _at_most(path: Path, rows: Any) -> Iterator[Any]:
    for number, row in enumerate(rows):
        if number >= MOST_REQUESTS:
            raise ConfigError(f"load {path} has over {MOST_REQUESTS} requests; use a part of it")
        yield row


def _request(
    arrival_s: float,
    prompt_tokens: int,
    output_tokens: int,
    blocks: tuple[int, ...] = (),
    prompt: str | None = None,
) -> LoadRequest:
    """A request whose numbers are in bounds; raises ValueError."""
    if not 0 <= arrival_s < math.inf:
        raise ValueError(f"the arrival time {arrival_s} must be at least 0")
    if prompt is None and not 1 <= prompt_tokens <= _MOST_TOKENS:
        raise ValueError(f"{prompt_tokens} prompt tokens; there must be at least 1")
    # Azure's traces have requests without output; an engine makes one token at least.
    if not 0 <= output_tokens <= _MOST_TOKENS:
        raise ValueError(f"{output_tokens} output tokens; there must be at least 0")
    return LoadRequest(arrival_s, prompt_tokens, max(output_tokens, 1), blocks, prompt)


def encoded(load: Load, encode: Callable[[str], list[int]] | None) -> Load:
    """`load` with the tokens of prompts that are given as text.

    Raises:
        ConfigError: there are such prompts and no tokenizer.
    """
    if all(one.prompt is None for one in load.requests):
        return load
    if encode is None:
        raise ConfigError(
            "the load has prompts as text, and there is no tokenizer beside the model's config; "
            "give prompt_tokens, or a folder with the tokenizer"
        )
    requests = []
    for one in load.requests:
        if one.prompt is not None:
            ids = tuple(encode(one.prompt)) or (0,)
            one = replace(one, prompt_tokens=len(ids), ids=ids)
        requests.append(one)
    return replace(load, requests=tuple(requests))
