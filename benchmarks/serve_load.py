"""Many clients at once, good and bad ones, against a server of the quickstart model.

    python benchmarks/serve_load.py --clients 200 --seconds 120 --json build/serve_load.json
    python benchmarks/serve_load.py --clients 64 --seconds 30 -- -tp 2

Each client sends one request after the other: most read a whole stream; some disconnect in the
middle, some do not stream, some send what must be refused. Flags after `--` go to `moespan serve`.
Then comes the worst moment for the event loop: 64 streams run, one request brings 7 MiB of text
to encode, and 500 more arrive at once. A process of its own asks `/live` all the time.

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
import tempfile
import threading
import time
from collections import Counter
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

PARAMETERS: dict[str, Any] = {"temperature": 0.8, "max_tokens": MAX_TOKENS}

BURST_STREAMS, BURST_REQUESTS = 64, 500
# A text of more than 1 MiB is refused before it is encoded, so this takes seven.
BURST_TEXTS = ["one two " * ((1 << 20) // 8)] * 7

_START_S = 120.0
_ANSWER_S = 120.0
_QUIET_S = 10.0

PROBE = """
import socket, sys, time
port, pause_s = int(sys.argv[1]), 0.05
wake_at = time.monotonic()
while True:
    late_s = time.monotonic() - wake_at
    asked_at = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"GET /live HTTP/1.0\\r\\n\\r\\n")
        while link.recv(4096):
            pass
    answered_at = time.monotonic()
    print(asked_at, answered_at - asked_at, late_s, flush=True)
    wake_at = answered_at + pause_s
    time.sleep(pause_s)
"""
"""Asks `/live` twenty times a second; prints when, the seconds until the answer had come, and how
late the process itself had been woken."""


@dataclass
class Seen:
    """Answers and times, as the clients saw them."""

    deeds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
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


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        if line := line.rstrip(b"\n"):
            yield line


async def watch(front: int, seen: Seen) -> None:
    """Look at the memory of the front each second."""
    while True:
        seen.front_bytes.append(resident_bytes(front))
        await asyncio.sleep(1)


class Probe:
    """The process that asks `/live`."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-c", PROBE, str(port)]
        # A file, because a pipe that nobody reads would stop the process once it is full.
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self._process = subprocess.Popen(command, stdout=self._told)

    def end(self) -> list[tuple[float, float, float]]:
        """For each answer its time, its duration, and how late the process was."""
        self._process.terminate()
        self._process.wait()
        with self._told:
            self._told.seek(0)
            rows = [tuple(map(float, line.split())) for line in self._told]
        return [row for row in rows if len(row) == 3]


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
        passing_on = threading.Thread(
            target=sys.stderr.writelines, args=(process.stderr,), daemon=True
        )
        passing_on.start()
        yield port, process.pid
        process.terminate()
        process.wait(60)
        passing_on.join()
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
    port: int,
    front: int,
    expected: dict[tuple[str, int], str],
    args: argparse.Namespace,
    seen: Seen,
) -> None:
    """Run all clients, and wait until the engine holds nothing."""
    watcher = asyncio.create_task(watch(front, seen))
    until = asyncio.get_running_loop().time() + args.seconds
    clients = [
        Client(port, expected, seen, random.Random(number)) for number in range(args.clients)
    ]
    await asyncio.gather(*(client.run(until) for client in clients))
    watcher.cancel()
    deadline = time.monotonic() + _QUIET_S
    while busy := [name for name in QUIET if total(await read_metrics(port), name)]:
        if time.monotonic() > deadline:
            seen.fault(f"{_QUIET_S:g} s after the last client these are not 0: {busy}")
            return
        await asyncio.sleep(0.2)


async def burst(port: int, seen: Seen) -> None:
    """64 streams, 7 MiB of text in one request, and 500 requests at once; all are answered."""
    small = json.dumps({"prompt": "12+9=", "max_tokens": 1}).encode()
    large = {"prompt": BURST_TEXTS, "truncate_prompt_tokens": 5, "max_tokens": 1}
    streamed = {"prompt": QUESTIONS[-1], "max_tokens": 400, "ignore_eos": True, "stream": True}
    streams = [
        asyncio.create_task(_ask(port, json.dumps(streamed).encode())) for _ in range(BURST_STREAMS)
    ]
    await asyncio.sleep(1)
    asked = [json.dumps(large).encode(), *[small] * BURST_REQUESTS]
    answers = await asyncio.gather(*(_ask(port, body) for body in asked))
    answers += await asyncio.gather(*streams)
    for status, body in answers:
        if status != 200 or b'"error"' in body:
            seen.fault(f"in the burst: status {status}: {body[-200:]!r}")


async def _ask(port: int, body: bytes) -> tuple[int, bytes]:
    """Status and whole body of the answer to one completion."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), rest


QUIET = (
    "moespan_num_requests_running",
    "moespan_num_requests_waiting",
    "moespan_kv_cache_usage_perc",
    "moespan_open_streams",
)
"""Metrics that are 0 when there is nothing to do."""


async def read_metrics(port: int) -> str:
    """The text of `/metrics`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return text


def total(metrics: str, name: str) -> float:
    """The value of a metric, summed over labels."""
    found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, found))


def buckets_of(metrics: str, name: str) -> str:
    """p50, p99 and the largest value of a histogram in seconds, as bounds of its buckets."""
    found = re.findall(rf'^{name}_bucket\{{.*le="(\S+?)".*\}} (\S+)$', metrics, re.MULTILINE)
    counts = [(float(bound), float(count)) for bound, count in found]
    most = counts[-1][1] if counts else 0

    def bound_of(share: float) -> str:
        bound = next(bound for bound, count in counts if count >= share * most)
        return f"{1000 * bound:g} ms"

    if not most:
        return "-"
    return f"p50 <= {bound_of(0.5)}, p99 <= {bound_of(0.99)}, max <= {bound_of(1)}"


def percentiles(values: list[float]) -> str:
    """p50 and p99 of seconds, in milliseconds."""
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    p50, p99, most = (1000 * value for value in (cuts[49], cuts[98], max(values)))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.0f} ms"


def report(
    seen: Seen,
    seconds: float,
    metrics: str,
    loaded: list[tuple[float, float, float]],
    burst_rows: list[tuple[float, float, float]],
) -> dict[str, Any]:
    """Print what was seen; → the same for `--json`."""
    quarter = max(len(seen.front_bytes) // 4, 1)
    early, late = (
        statistics.median(part) if part else 0
        for part in (seen.front_bytes[quarter : 2 * quarter], seen.front_bytes[-quarter:])
    )
    server = {
        f"{name}, in the server": buckets_of(metrics, f"moespan_{metric}_seconds")
        for name, metric in (
            ("to the first token", "time_to_first_token"),
            ("between tokens", "inter_token_latency"),
            ("delay of timers", "event_loop_lag"),
        )
    }
    figures = {
        "machine": machine_name("cpu"),
        "version": __version__,
        "requests": dict(seen.deeds),
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "events/s": seen.num_tokens / seconds,
        "to the first token": percentiles(seen.first_s),
        "between tokens": percentiles(seen.between_s),
        **server,
        "answer of /live": percentiles([row[1] for row in loaded]),
        "probe woken late": percentiles([row[2] for row in loaded]),
        "/live in the burst": percentiles([row[1] for row in burst_rows]),
        "probe late in the burst": percentiles([row[2] for row in burst_rows]),
        "memory of the front": f"{early / 2**20:.1f} MiB early, {late / 2**20:.1f} MiB late",
        "faults": seen.faults,
    }
    for name, value in figures.items():
        print(f"{name:<32}{value}")
    return figures


async def run(
    port: int, front: int, expected: dict[tuple[str, int], str], args: argparse.Namespace
) -> dict[str, Any]:
    """All clients, then the burst; → the figures."""
    seen = Seen()
    probe = Probe(port)
    await load(port, front, expected, args, seen)
    burst_at = time.monotonic()
    metrics = await read_metrics(port)
    await burst(port, seen)
    rows = probe.end()
    loaded = [row for row in rows if row[0] < burst_at]
    return report(seen, args.seconds, metrics, loaded, [row for row in rows if row[0] >= burst_at])


def main() -> None:
    """Start a server, load it, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="flags of `moespan serve`, after --")
    args = parser.parse_args()
    expected = expected_texts()
    with server(args.flags) as (port, front):
        figures = asyncio.run(run(port, front, expected, args))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False))
    sys.exit(1 if figures["faults"] else 0)


if __name__ == "__main__":
    main()
