"""Many requests through one engine: memory and descriptors of each process have to stay flat.

    python benchmarks/endurance.py models/quickstart -tp 2 --requests 20000

Requests differ in length, sampling and what they report; some are refused, and some are given up
half-way. Each line of the table shows all processes at that time. Exit code 1: after the warm-up,
which is the first fifth, a process has grown by more than `--slack` MiB or has more descriptors, or
an answer is missing.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moespan import LLM, SamplingParams
from moespan.engine.request import Request
from moespan.measure.probe import machine_name

Pair = tuple[str | None, Request]


class Process(NamedTuple):
    """A process of the job: resident memory, and open descriptors."""

    name: str
    resident_bytes: int
    descriptors: int


def processes(root: int) -> dict[int, Process]:
    """The process `root` and its descendants, by process id."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return {pid: one for pid in sorted(found) if (one := process(pid, root)) is not None}


def process(pid: int, root: int) -> Process | None:
    """Memory and descriptors of a process, from /proc; None if the process has ended."""
    folder = Path(f"/proc/{pid}")
    try:
        words = (folder / "cmdline").read_bytes().split(b"\0")
        module = next((word for word in words if word.startswith(b"moespan.")), b"moespan.other")
        name = "front" if pid == root else module.decode().rpartition(".")[2]
        pages = int((folder / "statm").read_text().split()[1])
        return Process(name, pages * os.sysconf("SC_PAGE_SIZE"), len(list(folder.glob("fd/*"))))
    except OSError:
        return None


def requests(llm: LLM, number: int, seed: int) -> Iterator[Pair]:
    """So many requests of random tokens, each made when it is taken."""
    draw = random.Random(seed)
    for index in range(number):
        ids = [draw.randrange(3, llm.model_config.vocab_size) for _ in range(draw.randint(1, 96))]
        params = SamplingParams(
            n=2 if index % 40 == 7 else 1,
            temperature=draw.choice([0.0, 1.0]),
            top_p=draw.choice([1.0, 0.9]),
            max_tokens=draw.randint(1, 24),
            ignore_eos=True,
            logprobs=3 if index % 10 == 0 else None,
            stop=["the end"] if index % 25 == 3 else [],
        )
        yield llm.request(ids, params)


def run(llm: LLM, number: int, seed: int) -> int:
    """Run `number` requests, and give up as many as the engine has in a thirtieth of them.

    Returns:
        How many were answered in full.
    """
    given_up = llm.stream(requests(llm, number // 30, seed + 1))
    next(given_up, None)
    given_up.close()
    answered = sum(
        output.error is None and all(one.token_ids for one in output.outputs)
        for output in llm.stream(requests(llm, number, seed))
    )
    try:
        llm.request([1] * (llm.config.max_model_len + 1))
    except ValueError:
        return answered
    raise AssertionError("a prompt that is too long was taken")


def grown(first: dict[int, Process], last: dict[int, Process], slack_bytes: int) -> list[str]:
    """The processes that have grown from `first` to `last`, or are not the same any more."""
    said = []
    for pid in first.keys() | last.keys():
        before, after = first.get(pid), last.get(pid)
        if before is None or after is None:
            said.append(f"process {pid} ({before or after}) has come or gone")
            continue
        more_bytes = after.resident_bytes - before.resident_bytes
        if more_bytes > slack_bytes:
            said.append(f"{after.name} {pid} has grown by {more_bytes / 2**20:.1f} MiB")
        if after.descriptors > before.descriptors:
            said.append(
                f"{after.name} {pid} has {after.descriptors} descriptors after {before.descriptors}"
            )
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say what has grown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-tp", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--lines", type=int, default=20, help="of the table")
    parser.add_argument("--slack", type=float, default=16.0, help="MiB that a process may grow")
    options = parser.parse_args(arguments)
    each = max(1, options.requests // options.lines)
    answered = 0
    seen: list[dict[int, Process]] = []
    with LLM(options.model, tensor_parallel_size=options.tp, device=options.device) as llm:
        started = time.perf_counter()
        print(f"{machine_name(llm.info.device)}, tp={options.tp}, {llm.info.dtype}", flush=True)
        for line in range(options.lines):
            answered += run(llm, each, seed=2 * line)
            seen.append(processes(os.getpid()))
            shown = "  ".join(
                f"{one.name} {one.resident_bytes / 2**20:.1f} MiB, {one.descriptors} fd"
                for one in seen[-1].values()
            )
            passed_s = time.perf_counter() - started
            print(f"{each * (line + 1):>7} requests {passed_s:>6.0f} s  {shown}", flush=True)
    faults = grown(seen[len(seen) // 5], seen[-1], int(options.slack * 2**20))
    if answered < each * options.lines:
        faults.append(f"{each * options.lines - answered} requests were not answered")
    print("\n".join(faults) or "memory and descriptors are flat, and every request was answered")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
