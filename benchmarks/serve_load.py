"""Many clients at once, good and bad ones, against a server of the quickstart model.

    python benchmarks/serve_load.py --clients 200 --seconds 120 --json build/serve_load.json
    python benchmarks/serve_load.py --clients 64 --seconds 30 -- -tp 2

Each client sends one request after the other: most read a whole stream; some disconnect in the
middle, some do not stream, some send what must be refused. Flags after `--` go to `moespan serve`.
The program checks that every finished answer is the one that `LLM` gives for the same prompt, that
refusals are 4xx, and that the engine holds nothing when all clients have gone. It ends with code 1
if a check fails. README.md explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moespan import LLM, SamplingParams, __version__
from moespan.measure.probe import machine_name

MODEL = Path(__file__).parents[1] / "models" / "quickstart"

QUESTIONS = [
    *(f"{a}+{b}=" for a, b in ((681, 734), (12, 9), (503, 88), (999, 1), (250, 250))),
    "sort 30 70 7 89 97:",
    "sort c y r a f w:",
    "故事：小雨，鸟，花园。",
    "story: Mia, a fox, the river.",
]
SEEDS = range(4)
MAX_TOKENS = 48

# Kinds of requests, and how many of a hundred are of each.
DEEDS = {"stream": 72, "whole": 8, "leave": 12, "overlong": 4, "malformed": 4}
MALFORMED = [
    b"{",
    b'{"model": "quickstart"}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "n": 1000000}',
    b'{"prompt": "a", "logprobs": -5}',
    b"[" * 5000,
    b"\xff\xfe",
]

_START_S = 120.0
_ANSWER_S = 120.0
_QUIET_S = 10.0


@dataclass
class Seen:
    """Answers and times, as the clients saw them."""

    deeds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    live_s: list[float] = field(default_factory=list)
    front_bytes: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def fault(self, what: str) -> None:
        """Keep the first faults, and count all."""
        self.deeds["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append(what)


@dataclass
class Client:
    """One client: its choices are its own, and the same each time."""

    port: int
    expected: dict[tuple[str, int], str]
    seen: Seen
    choices: random.Random

    async def run(self, until: float) -> None:
        """Send one request after the other until `until`, a time of the loop."""
        deeds, weights = list(DEEDS), list(DEEDS.values())
        while asyncio.get_running_loop().time() < until:
            (deed,) = self.choices.choices(deeds, weights)
            try:
                await asyncio.wait_for(getattr(self, f"_{deed}")(), _ANSWER_S)
            except (OSError, asyncio.TimeoutError, ValueError, LookupError) as error:
                self.seen.fault(f"{deed}: {type(error).__name__}: {error}")
            self.seen.deeds[deed] += 1

    def _body(self, stream: bool) -> tuple[tuple[str, int], bytes]:
        key = self.choices.choice(QUESTIONS), self.choices.choice(SEEDS)
        body = {"prompt": key[0], "seed": key[1], **PARAMETERS, "stream": stream}
        return key, json.dumps(body).encode()

    async def _stream(self) -> None:
        key, body = self._body(stream=True)
        sent_at = last_at = time.perf_counter()
        text, reasons, is_done = "", [], False
        async with self._answer(body) as (status, lines):
            if status != 200:  # 429 and 503 are answers as well
                return
            async for line in lines:
                if not line.startswith(b"data: "):
                    continue
                now = time.perf_counter()
                if line == b"data: [DONE]":
                    is_done = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    self.seen.fault(f"error event: {event['error']}")
                    return
                (self.seen.between_s if text else self.seen.first_s).append(
                    now - (last_at if text else sent_at)
                )
                last_at = now
                choice = event["choices"][0]
                text += choice["text"]
                reasons.append(choice["finish_reason"])
        if not is_done or [reason for reason in reasons if reason] != reasons[-1:]:
            self.seen.fault(f"the stream of {key} did not end as it should: {reasons[-3:]}")
        elif text != self.expected[key]:
            self.seen.fault(f"{key}: {text!r} is not {self.expected[key]!r}")
        self.seen.num_tokens += len(reasons)

    async def _whole(self) -> None:
        key, body = self._body(stream=False)
        async with self._answer(body) as (status, lines):
            answer = json.loads(b"\n".join([line async for line in lines]))
        if status == 200 and answer["choices"][0]["text"] != self.expected[key]:
            self.seen.fault(f"{key}: {answer['choices'][0]['text']!r}, not streamed")

    async def _leave(self) -> None:
        """Disconnect after a few lines, or before the first."""
        _, body = self._body(stream=self.choices.random() < 0.7)
        most_lines = self.choices.randrange(8)
        async with self._answer(body, wait=most_lines > 0) as (_, lines):
            async for _ in lines:
                most_lines -= 1
                if most_lines <= 0:
                    return

    async def _overlong(self) -> None:
        body = json.dumps({"prompt": "1+" * 5000, "max_tokens": 5}).encode()
        await self._refused(body)

    async def _malformed(self) -> None:
        await self._refused(self.choices.choice(MALFORMED))

    async def _refused(self, body: bytes) -> None:
        async with self._answer(body) as (status, lines):
            answer = json.loads(b"\n".join([line async for line in lines]))
        if not (400 <= status < 500 or status == 503) or "message" not in answer["error"]:
            self.seen.fault(f"status {status} for {body[:40]!r}: {str(answer)[:200]}")

    @asynccontextmanager
    async def _answer(
        self, body: bytes, wait: bool = True
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Status and lines of the answer to one request; HTTP/1.0 has no chunks to decode."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n"
                b"host: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            await writer.drain()
            status = 0
            if wait:
                status = int((await reader.readline()).split()[1])
                self.seen.statuses[status] += 1
                while (await reader.readline()).strip():
                    pass
            yield status, _lines(reader)
        finally:
            writer.close()


PARAMETERS: dict[str, Any] = {"temperature": 0.8, "max_tokens": MAX_TOKENS}


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        if line := line.rstrip(b"\n"):
            yield line


async def watch(port: int, front: int, seen: Seen) -> None:
    """Ask `/live` ten times a second, and look at the memory of the front each second."""
    for number in range(1_000_000):
        asked_at = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /live HTTP/1.0\r\n\r\n")
        await reader.read()
        writer.close()
        seen.live_s.append(time.perf_counter() - asked_at)
        if number % 10 == 0:
            seen.front_bytes.append(resident_bytes(front))
        await asyncio.sleep(0.1)


def resident_bytes(pid: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@contextmanager
def server(flags: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Port and process of a server of the quickstart model."""
    command = [sys.executable, "-m", "moespan", "serve", str(MODEL), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32", *flags], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        deadline = time.monotonic() + _START_S
        port = None
        while port is None:
            line = process.stderr.readline()
            if not line or time.monotonic() > deadline:
                sys.exit("the server did not start")
            sys.stderr.write(line)
            if found := re.search(r"ready on http://\S+:(\d+)", line):
                port = int(found[1])
        with subprocess.Popen(["cat"], stdin=process.stderr, stdout=sys.stderr.fileno()):
            yield port, process.pid
            process.terminate()
            process.wait(60)
    finally:
        process.kill()
        process.wait()


def expected_texts() -> dict[tuple[str, int], str]:
    """Answers of `LLM`, by prompt and seed."""
    keys = [(question, seed) for question in QUESTIONS for seed in SEEDS]
    with LLM(str(MODEL), dtype="float32") as llm:
        outputs = llm.generate(
            [question for question, _ in keys],
            [SamplingParams(seed=seed, **PARAMETERS) for _, seed in keys],
        )
    return {key: output.outputs[0].text for key, output in zip(keys, outputs, strict=True)}


async def load(
    port: int, front: int, num_clients: int, seconds: float, seen: Seen
) -> dict[str, float]:
    """Run all clients; → values of `/metrics` when they have gone."""
    expected = expected_texts()
    watcher = asyncio.create_task(watch(port, front, seen))
    until = asyncio.get_running_loop().time() + seconds
    clients = [Client(port, expected, seen, random.Random(number)) for number in range(num_clients)]
    await asyncio.gather(*(client.run(until) for client in clients))
    watcher.cancel()
    deadline = time.monotonic() + _QUIET_S
    while True:
        metrics = await read_metrics(port)
        busy = {name: value for name, value in metrics.items() if name in QUIET and value}
        if not busy:
            return metrics
        if time.monotonic() > deadline:
            seen.fault(f"{_QUIET_S:g} s after the last client: {busy}")
            return metrics
        await asyncio.sleep(0.2)


QUIET = (
    "moespan_num_requests_running",
    "moespan_num_requests_waiting",
    "moespan_kv_cache_usage_perc",
    "moespan_open_streams",
)
"""Metrics that are 0 when there is nothing to do."""


async def read_metrics(port: int) -> dict[str, float]:
    """Values of `/metrics` by name, summed over labels."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    values: dict[str, float] = defaultdict(float)
    for name, value in re.findall(r"^(\w+)(?:\{.*\})? ([\d.e+-]+)$", text, re.MULTILINE):
        values[name] += float(value)
    return values


def percentiles(values: list[float]) -> str:
    """p50 and p99 of seconds, in milliseconds."""
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    p50, p99, most = (1000 * value for value in (cuts[49], cuts[98], max(values)))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.0f} ms"


def report(seen: Seen, seconds: float) -> dict[str, Any]:
    """Print what was seen; → the same for `--json`."""
    quarter = max(len(seen.front_bytes) // 4, 1)
    early, late = (
        statistics.median(part) if part else 0
        for part in (seen.front_bytes[quarter : 2 * quarter], seen.front_bytes[-quarter:])
    )
    figures = {
        "machine": machine_name("cpu"),
        "version": __version__,
        "requests": dict(seen.deeds),
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "events/s": seen.num_tokens / seconds,
        "to the first token": percentiles(seen.first_s),
        "between tokens": percentiles(seen.between_s),
        "answer of /live": percentiles(seen.live_s),
        "memory of the front": f"{early / 2**20:.1f} MiB early, {late / 2**20:.1f} MiB late",
        "faults": seen.faults,
    }
    for name, value in figures.items():
        print(f"{name:<22}{value}")
    return figures


def main() -> None:
    """Start a server, load it, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="flags of `moespan serve`, after --")
    args = parser.parse_args()
    seen = Seen()
    with server(args.flags) as (port, front):
        asyncio.run(load(port, front, args.clients, args.seconds, seen))
    figures = report(seen, args.seconds)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False))
    sys.exit(1 if seen.faults else 0)


if __name__ == "__main__":
    main()
