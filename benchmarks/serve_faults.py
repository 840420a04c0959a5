"""Faults of every kind against a server of the quickstart model, and what its clients see.

    python benchmarks/serve_faults.py --layouts tp=2 pp=2 dp=2 --json build/serve_faults.json
    python benchmarks/serve_faults.py --layouts --two-nodes tp=2 pp=2      # as root

For each layout and each rank: SIGKILL and SIGSTOP in the middle of streams and while idle; SIGKILL
of the agent; then SIGTERM under load, and a second SIGTERM with a stopped rank. `--two-nodes` puts
one rank on each of two network namespaces, hurts the node that does not serve, and cuts the cable
between them. The program checks
that no stream which was cut looks finished, that health says so, that the server comes back by
itself, and that nothing is left behind. It ends with code 1 if a check fails. README.md explains
the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "quickstart"
sys.path.insert(0, str(ROOT))

from tests.launch.netns import Host, two_hosts  # noqa: E402

_START_S = 120.0
_END_S = 60.0
_FORCED_S = 15.0
_STREAMS = 4
_PROMPT = {"prompt": "story: Mia, a fox, the river.", "max_tokens": 400, "ignore_eos": True}


@dataclass
class Row:
    """One fault.

    Attributes:
        told_s: until every stream had its error event, or health had turned; None if neither came.
        back_s: until `/health` said 200 again; None if it was not to come back.
        seen: what clients saw.
        problem: what should not be; empty if all is well.
    """

    layout: str
    fault: str
    told_s: float | None = None
    back_s: float | None = None
    seen: str = ""
    problem: str = ""


class Server:
    """A server in a process of its own."""

    def __init__(self, layout: str, folder: Path) -> None:
        self.layout = layout
        self.folder = folder
        self.scratch = folder / "tmp"
        self.scratch.mkdir()
        self.process = self.start()
        transport = httpx.AsyncHTTPTransport(uds=str(folder / "http"))  # of all network namespaces
        self.http = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=_START_S
        )

    def start(self) -> subprocess.Popen[str]:
        """Start the process that serves."""
        return self.launch(_start_here, "log")

    def launch(
        self, start: Callable[..., subprocess.Popen[str]], log: str, *more: str
    ) -> subprocess.Popen[str]:
        """Run `moespan serve` by `start`, with `more` flags."""
        sizes = [word for part in self.layout.split(",") for word in part.split("=")]
        flags = [f"-{word}" if at % 2 == 0 else word for at, word in enumerate(sizes)]
        flags += ["--restart-window", "1"]  # each fault is the first one
        scratch = self.scratch / log
        scratch.mkdir(exist_ok=True)
        return start(
            *("-m", "moespan", "serve", str(MODEL), "--uds", str(self.folder / "http")),
            *(*flags, *more),
            stderr=(self.folder / log).open("a"),
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                "TMPDIR": str(scratch),
                "MOESPAN_CLUSTER_KEY": "a secret of this run",
            },
        )

    async def health(self) -> str:
        """`200`, or the word of a 503; `away` if nobody answers."""
        try:
            answer = await self.http.get("/health", timeout=5.0)
        except httpx.HTTPError:
            return "away"
        return "200" if answer.status_code == 200 else answer.text

    async def until_well(self, limit_s: float = _START_S) -> float:
        """Wait for health; → the seconds that it took."""
        return await self._until(lambda word: word == "200", limit_s)

    async def until_unwell(self, limit_s: float) -> float:
        """Wait until health has turned; → the seconds that it took."""
        return await self._until(lambda word: word != "200", limit_s)

    async def _until(self, holds: Any, limit_s: float) -> float:
        began = time.monotonic()
        while not holds(await self.health()):
            if time.monotonic() - began > limit_s:
                raise TimeoutError(f"health says {await self.health()} after {limit_s:g} s")
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def stream(self, is_begun: asyncio.Event) -> str:
        """One client's end: `finished`, `error`, `ended without a word`, or the status."""
        try:
            async with self.http.stream(
                "POST", "/v1/completions", json={**_PROMPT, "stream": True}
            ) as answer:
                if answer.status_code != 200:
                    return str(answer.status_code)
                last = ""
                async for line in answer.aiter_lines():
                    is_begun.set()
                    last = line or last
        except httpx.HTTPError as error:
            return type(error).__name__
        if last == "data: [DONE]":
            return "finished"
        return "error" if '"error"' in last else "ended without a word"

    async def streams(self) -> list[asyncio.Task[str]]:
        """Clients whose streams have all begun."""
        events = [asyncio.Event() for _ in range(_STREAMS)]
        tasks = [asyncio.create_task(self.stream(event)) for event in events]
        for event in events:
            await asyncio.wait_for(event.wait(), _START_S)
        return tasks

    def processes(self, top: int | None = None) -> dict[int, str]:
        """Processes below the server, or below `top`: their command lines by pid."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(entry.parent.name)] = int(
                    entry.read_text().rpartition(")")[2].split()[1]
                )
            except (OSError, ValueError):
                continue
        top = self.top if top is None else top
        found = {top}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: _command(pid) for pid in found - {top}}

    def ranks(self) -> list[int]:
        """Pids of the ranks, by their number."""
        numbered = []
        for pid, command in self.processes().items():
            if "moespan.launch.rank" in command and "moespan.launch.agent" not in command:
                numbered.append((_rank_of(pid), pid))
        return [pid for _, pid in sorted(numbered)]

    def life(self) -> set[int]:
        """The agent and all processes below it."""
        return {self.agent(), *self.processes(self.agent())}

    def agent(self) -> int:
        """The pid of the agent."""
        return next(p for p, c in self.processes().items() if "moespan.launch.agent" in c)

    @property
    def top(self) -> int:
        """The process that faults happen below."""
        return self.process.pid

    def ends(self) -> list[subprocess.Popen[str]]:
        """The processes that end when the server has drained."""
        return [self.process]


class TwoNodes(Server):
    """A server with a node in each of two network namespaces. Faults happen on node 1."""

    def __init__(self, layout: str, folder: Path, hosts: tuple[Host, Host]) -> None:
        self.hosts = hosts
        super().__init__(layout, folder)
        self.start_node_1()

    def start(self) -> subprocess.Popen[str]:
        """Start node 0, which serves."""
        return self._start_node(0)

    def start_node_1(self) -> None:
        """Start the node that runs ranks only."""
        self.node_1 = self._start_node(1)

    def kill_node_1(self) -> None:
        """Kill everything on node 1, as a machine that loses its power does, with its files."""
        for pid in (*self.processes(), self.node_1.pid):
            os.kill(pid, signal.SIGKILL)
        self.node_1.wait()
        shutil.rmtree(self.scratch / "log1")

    def _start_node(self, number: int) -> subprocess.Popen[str]:
        where = "--nnodes", "2", "--master-addr", self.hosts[0].address
        return self.launch(
            self.hosts[number].start, f"log{number}", *where, "--node-rank", str(number)
        )

    @property
    def top(self) -> int:
        """Node 1."""
        return self.node_1.pid

    def ends(self) -> list[subprocess.Popen[str]]:
        """Both nodes."""
        return [self.process, self.node_1]


def _start_here(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], text=True, **options)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _rank_of(pid: int) -> int:
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(one[5:]) for one in environ if one.startswith(b"RANK=")), -1)


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and _command(pid)}


async def hurt(
    server: Server,
    fault: str,
    hit: Callable[[], object],
    busy: bool,
    repair: Callable[[], object] = lambda: None,
) -> Row:
    """Do something bad, watch what follows, and repair it once all are told."""
    row = Row(server.layout, f"{fault}, {'in streams' if busy else 'idle'}")
    await server.until_well()
    before = server.life()
    tasks = await server.streams() if busy else []
    began = time.monotonic()
    hit()
    try:
        if busy:
            seen = await asyncio.wait_for(asyncio.gather(*tasks), 30)
            row.told_s = time.monotonic() - began
            row.seen = ", ".join(sorted(set(seen)))
            if set(seen) != {"error"}:
                row.problem = f"streams: {row.seen}"
        else:
            row.told_s = await server.until_unwell(30)
            row.seen = await server.health()
        repair()
        await server.until_well()
        row.back_s = time.monotonic() - began
        if left := _alive(before):
            row.problem = f"processes are left: {left}"
        answer = await server.http.post("/v1/completions", json=_PROMPT)
        if answer.status_code != 200:
            row.problem = f"afterwards: {answer.status_code}"
    except TimeoutError as error:
        row.problem = f"too late: {error}"
    return row


async def terminate(server: Server, twice: bool) -> Row:
    """SIGTERM under load; a second one while a rank is stopped."""
    row = Row(server.layout, "SIGTERM twice, a rank stopped" if twice else "SIGTERM under load")
    await server.until_well()
    below = set(server.processes())
    tasks = await server.streams()
    if twice:
        os.kill(server.ranks()[-1], signal.SIGSTOP)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await server.until_unwell(5)
    row.told_s = time.monotonic() - began
    if twice:
        server.process.send_signal(signal.SIGTERM)
    seen = set(await asyncio.gather(*tasks))
    row.seen = ", ".join(sorted(seen))
    codes = [await asyncio.to_thread(one.wait, _END_S) for one in server.ends()]
    code = max(codes)
    ended_s = time.monotonic() - began
    row.seen += f"; exit code {code} after {ended_s:.1f} s"
    wrong = {
        "streams": seen != ({"error"} if twice else {"finished"}),
        f"exit code {code}": code != 0,
        f"{ended_s:.1f} s": twice and ended_s > _FORCED_S,
        "processes are left": bool(_alive(below)),
        "files are left": any(server.scratch.glob("*/*")),
    }
    row.problem = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
    return row


@contextmanager
def running(layout: str, make: Callable[[str, Path], Server] = Server) -> Iterator[Server]:
    """A server, which is gone at the end."""
    with tempfile.TemporaryDirectory() as folder:
        server = make(layout, Path(folder))
        try:
            yield server
        finally:
            for process in server.ends():
                process.kill()
                process.wait()


async def examine(layout: str) -> list[Row]:
    """All faults under one layout, on one node."""
    rows = []
    with running(layout) as server:
        await server.until_well()
        for number in range(len(server.ranks())):
            for sign in (signal.SIGKILL, signal.SIGSTOP):
                for busy in (True, False):
                    await server.until_well()
                    hit = functools.partial(os.kill, server.ranks()[number], sign)
                    rows.append(await hurt(server, f"{sign.name} rank {number}", hit, busy))
                    show(rows[-1])
        hit = functools.partial(os.kill, server.agent(), signal.SIGKILL)
        rows.append(await hurt(server, "SIGKILL agent", hit, busy=True))
        show(rows[-1])
        rows.append(await terminate(server, twice=False))
        show(rows[-1])
    with running(layout) as server:
        rows.append(await terminate(server, twice=True))
        show(rows[-1])
    return rows


async def examine_two_nodes(layout: str) -> list[Row]:
    """All faults of node 1 under one layout."""
    rows = []

    def make(layout: str, folder: Path) -> TwoNodes:
        return TwoNodes(layout, folder, hosts)

    with two_hosts() as hosts, running(layout, make) as server:
        assert isinstance(server, TwoNodes)
        for busy in (True, False):
            for sign in (signal.SIGKILL, signal.SIGSTOP):
                await server.until_well()
                hit = functools.partial(os.kill, server.ranks()[0], sign)
                rows.append(await hurt(server, f"{sign.name} rank 1 of node 1", hit, busy))
                show(rows[-1])
            restart = server.start_node_1
            rows.append(await hurt(server, "node 1 dies", server.kill_node_1, busy, restart))
            show(rows[-1])
            cut, plug = hosts[0].pull_cable, hosts[0].plug_cable
            rows.append(await hurt(server, "cable cut, then plugged", cut, busy, plug))
            show(rows[-1])
        rows.append(await terminate(server, twice=False))
        show(rows[-1])
    with two_hosts() as hosts, running(layout, make) as server:
        rows.append(await terminate(server, twice=True))
        show(rows[-1])
    for row in rows:
        row.layout += ", two nodes"
    return rows


def show(row: Row) -> None:
    """One row of the table."""
    times = [f"{one:.1f} s" if one is not None else "" for one in (row.told_s, row.back_s)]
    cells = (row.layout, row.fault, *times, row.seen, row.problem or "ok")
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    """Run all faults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layouts", nargs="*", default=["tp=2", "pp=2", "dp=2"])
    parser.add_argument("--two-nodes", nargs="*", default=[], metavar="LAYOUT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    print("| layout | fault | told after | well after | clients saw | |\n|---|---|---|---|---|---|")
    rows = [row for layout in args.layouts for row in asyncio.run(examine(layout))]
    rows += [row for layout in args.two_nodes for row in asyncio.run(examine_two_nodes(layout))]
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
