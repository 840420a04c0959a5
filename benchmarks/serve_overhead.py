"""CPU time of the server's front, and of the leader, for each streamed token, without the model.

    python benchmarks/serve_overhead.py --json build/serve_overhead.json

Front, HTTP, agent, leader and the socket between them are the real ones, on the quickstart model's
tokenizer and geometry. Only the network is replaced, by a function that sleeps and returns fixed
logits. Times are CPU times of the processes, so that other programs disturb little. README.md
explains the table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moespan import __version__
from moespan.measure.probe import machine_name

HERE = Path(__file__).parent
MODEL = HERE.parent / "models" / "quickstart"

STEP_MS = {1: 10, 64: 40, 256: 120}
"""Streams → milliseconds of a step, such that the front keeps up: one event for each token."""

_STEP_VARIABLE = "MOESPAN_BENCHMARK_STEP_S"
_CPU_CLOCK = 2


class Seen(NamedTuple):
    """Counters at one time."""

    at_s: float
    front_s: float
    leader_s: float
    num_events: int


def _program(call: str) -> list[str]:
    """Arguments of Python that call a function of this file."""
    return [
        "-c",
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import serve_overhead as me; {call}",
    ]


def rank() -> None:
    """The program of the leader: the real one, but for the network."""
    import torch

    from moespan.config import EngineConfig
    from moespan.engine.build import build_leader, follow
    from moespan.launch.distributed import make_mesh
    from moespan.launch.rank import run_rank
    from moespan.parallel.beats import Beat

    step_s = float(os.environ[_STEP_VARIABLE])

    def build(config: EngineConfig, device: torch.device, beat: Beat) -> Any:
        engine = build_leader(config, make_mesh(config, device, beat=beat))
        size = config.max_num_seqs, engine._worker.model.vocab_size
        logits = torch.randn(size, generator=torch.Generator().manual_seed(0))

        def network(
            inputs: Any, caches: Any, batch: Any, rows: torch.Tensor, *_: Any
        ) -> torch.Tensor:
            time.sleep(step_s)
            return logits[: len(rows)]

        engine._worker.model = network  # type: ignore[assignment]
        return engine

    run_rank(
        build, lambda config, device, beat: follow(config, make_mesh(config, device, beat=beat))
    )


def front(max_num_seqs: int) -> None:
    """The program of the front, as `moespan serve` runs it, on ranks without a network."""
    from moespan import log
    from moespan.front.settings import Settings
    from moespan.launch.lives import Lives
    from moespan.serve.auth import Keys
    from moespan.serve.options import ServeOptions
    from moespan.serve.program import Program
    from moespan.serve.served import ServedModel
    from moespan.serve.server import listen

    log.set_up("info")
    settings = Settings(
        str(MODEL), device="cpu", dtype="float32", load_format="dummy", max_num_seqs=max_num_seqs
    )
    model_config, config, nodes = settings.resolve(to_run=False)
    assert model_config is not None
    options = ServeOptions(port=0)
    model = ServedModel.load(str(MODEL), config, model_config, options)
    lives = Lives(config, nodes, program=_program("me.rank()"))
    Program(config, model, Keys(options, {}), options, [listen(options)], lives.start).run()


@contextlib.contextmanager
def server(num_streams: int, step_ms: float) -> Iterator[tuple[int, int, int]]:
    """Port of a server, its process, and that of its leader."""
    process = subprocess.Popen(
        [sys.executable, *_program(f"me.front({max(num_streams, 2)})")],
        stderr=subprocess.PIPE,
        text=True,
        # Threads of torch that spin while they wait would count as work of the leader.
        env={"OMP_WAIT_POLICY": "passive", **os.environ, _STEP_VARIABLE: str(step_ms / 1e3)},
    )
    assert process.stderr is not None
    try:
        told, found = "", None
        while found is None:
            line = process.stderr.readline()
            told += line
            if not line:
                sys.exit(f"the server did not start:\n{told}")
            found = re.search(r"ready on http://\S+:(\d+)", line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(found[1]), process.pid, _leader_below(process.pid)
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def _leader_below(front: int) -> int:
    """The rank, which is a child of the agent, which is a child of the front."""
    for agent in _children(front):
        for child in _children(agent):
            if b"\0RANK=0\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return child
    raise SystemExit("the leader's process was not found")


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def cpu_s(pid: int) -> float:
    """CPU time of a process, all threads together."""
    clock = (~pid << 3) | _CPU_CLOCK  # as clock_getcpuclockid(3) makes it
    return time.clock_gettime_ns(clock) / 1e9


class Clients:
    """Streams that count their events."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.num_events: list[int] = []
        self.has_ended = False

    async def stream(self, number: int, max_tokens: int) -> None:
        """One stream, to its end."""
        body = {"prompt": [5 + number], "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        reader, writer = await self._post("POST /v1/completions", json.dumps(body).encode())
        rest = b""
        while data := await reader.read(1 << 16):
            rest += data
            self.num_events[number] += rest.count(b"data: {")
            rest = rest[-6:]
        self.has_ended = True
        writer.close()

    async def tokens(self) -> int:
        """Tokens so far, as the server counts them."""
        reader, writer = await self._post("GET /metrics", b"")
        text = (await reader.read()).decode()
        writer.close()
        found = re.search(r"^moespan_generation_tokens_total\S* (\S+)", text, re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    async def _post(self, line: str, body: bytes) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"{line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += f"content-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
        writer.write(head.encode() + body)
        return reader, writer


async def measure(
    port: int, pids: tuple[int, int], num_streams: int, max_tokens: int
) -> dict[str, float]:
    """One figure of each column, while all streams run."""
    clients = Clients(port)
    clients.num_events = [0] * num_streams
    streams = [
        asyncio.create_task(clients.stream(number, max_tokens)) for number in range(num_streams)
    ]

    def look() -> Seen:
        return Seen(time.monotonic(), cpu_s(pids[0]), cpu_s(pids[1]), sum(clients.num_events))

    while not min(clients.num_events):  # prompts are not measured
        await asyncio.sleep(0.02)
    tokens = await clients.tokens()
    begin = look()
    while not clients.has_ended:
        await asyncio.sleep(0.05)
    end = look()
    tokens = await clients.tokens() - tokens
    await asyncio.gather(*streams)
    if end.front_s == begin.front_s:
        sys.exit("streams ended before all had begun; give more --tokens")
    num_events = end.num_events - begin.num_events
    front_us = 1e6 * (end.front_s - begin.front_s) / tokens
    return {
        "tokens/s": tokens / (end.at_s - begin.at_s),
        "events/token": num_events / tokens,
        "front_us": front_us,
        "leader_us": 1e6 * (end.leader_s - begin.leader_s) / tokens,
        "tokens/s of a core": 1e6 / front_us,
    }


def rows(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """The lines of the table: medians over the repetitions."""
    for num_streams in args.streams:
        step_ms = STEP_MS.get(num_streams, 40) if args.step_ms is None else args.step_ms
        with server(num_streams, step_ms) as (port, *pids):
            results = [
                asyncio.run(measure(port, (pids[0], pids[1]), num_streams, args.tokens))
                for _ in range(args.repeats)
            ]
        medians = {name: statistics.median(one[name] for one in results) for name in results[0]}
        yield {"streams": num_streams, "step_ms": step_ms, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=list(STEP_MS))
    parser.add_argument("--tokens", type=int, default=200, help="of each stream, at most 500")
    parser.add_argument("--step-ms", type=float, help="sleep of a step; 0 outruns the front")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("streams  step ms  tokens/s  events/token  front µs  leader µs  tokens/s of a core")
    report: dict[str, Any] = {"machine": machine_name("cpu"), "version": __version__, "rows": []}
    for row in rows(args):
        report["rows"].append(row)
        print(
            f"{row['streams']:>7}{row['step_ms']:>9g}{row['tokens/s']:>10.0f}"
            f"{row['events/token']:>14.2f}{row['front_us']:>10.1f}{row['leader_us']:>11.1f}"
            f"{row['tokens/s of a core']:>20.0f}",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
