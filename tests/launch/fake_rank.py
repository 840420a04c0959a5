"""The program of a rank with a fake engine: it echoes, and a request's id may name a deed.

A request `sigkill@1` makes rank 1 kill itself in the next step, and so on (`DEEDS`). The model
`load-error@1` makes rank 1 fail while loading. All other ranks wait in a collective meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moespan.config import EngineConfig, Layout
from moespan.engine.info import EngineInfo, EngineStats, Pulse, StepFigures
from moespan.engine.questions import Question, Stats, Trace, Traffic
from moespan.engine.request import OutputDelta, Request
from moespan.errors import CheckpointError, RequestError
from moespan.launch.rank import run_rank
from moespan.parallel.beats import Beat, named


def fail() -> None:
    raise ValueError("the fake engine fails on purpose")


def fill() -> None:
    """Write to the folder of temporary files until the disk is full, and fail."""
    with contextlib.suppress(OSError), Path(tempfile.gettempdir(), "filler").open("wb", 0) as file:
        while True:
            file.write(bytes(4096))
    fail()


def eat() -> None:
    """Take more memory than there is, some at a time."""
    eaten = []
    while True:
        eaten.append(b"x" * (64 << 20))


DEEDS = {
    "nothing": lambda: None,
    "raise": fail,
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigstop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "crash": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(7),
    "sleep": lambda: time.sleep(60),
    "fill": fill,
    "eat": eat,
}
HEARTBEAT, CLOSE = -1, -2
ANSWER_S = 1.5
"""How long an answer to `Traffic` takes."""


class FakeEngine:
    def __init__(self, beat: Beat) -> None:
        dist.barrier()
        self.beat = beat
        self.info = EngineInfo(
            model="fake",
            layout=Layout(tp=dist.get_world_size()),
            device="cpu",
            dtype="float32",
            cache_dtype="float32",
            max_model_len=64,
            num_blocks=int(os.environ["OMP_NUM_THREADS"]),
            block_size=16,
            load_s=0.0,
            read_bytes=0,
            weight_bytes=0,
        )
        self.waiting: list[Request] = []
        self.num_steps = 0
        self.figures: list[StepFigures] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting)

    def add(self, request: Request) -> None:
        if request.id == "bad":
            raise RequestError("this prompt is refused")
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        self.waiting = [request for request in self.waiting if request.id != request_id]

    def step(self) -> list[OutputDelta]:
        request = self.waiting.pop(0)
        token_ids = step(request.id, request.prompt_token_ids, self.beat)
        self.num_steps += 1
        self.figures.append(StepFigures("prefill", len(token_ids), 0.0))
        return [OutputDelta(id=request.id, token_ids=token_ids, finish_reason="stop")]

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=len(self.waiting),
            num_running=0,
            kv_usage=0.0,
            num_free_blocks=self.info.num_blocks,
            num_preemptions=0,
            num_prefix_queried_tokens=0,
            num_prefix_hit_tokens=0,
        )

    def pulse(self) -> Pulse:
        new, self.figures = self.figures, []
        return Pulse([self.stats], self.num_steps, new)

    def heartbeat(self) -> None:
        announce(HEARTBEAT, 0, 0)

    def answer(self, question: Question[Any]) -> Any:
        if isinstance(question, Stats):
            return self.stats
        if isinstance(question, Traffic):
            time.sleep(ANSWER_S)
            return [[("fake", "send", "nothing", 0, 0)]]
        assert isinstance(question, Trace)
        if question.token_ids == [0]:
            fail()
        raise RequestError("this trace is refused")

    def close(self, successor: EngineConfig | None = None) -> None:
        announce(CLOSE, 0, 0)


def announce(deed: int, rank: int, tokens: int) -> tuple[int, int, int]:
    header = torch.tensor([deed, rank, tokens])
    dist.broadcast(header, 0)
    deed, rank, tokens = header.tolist()
    return deed, rank, tokens


def step(request_id: str, token_ids: list[int], beat: Beat) -> list[int]:
    name, _, rank = request_id.partition("@")
    deed = list(DEEDS).index(name) if name in DEEDS else 0
    announce(deed, int(rank or 0), len(token_ids))
    return take_part(deed, int(rank or 0), torch.tensor(token_ids), beat)


def take_part(deed: int, rank: int, tokens: torch.Tensor, beat: Beat) -> list[int]:
    beat.start_step("fake")
    if dist.get_rank() == rank:
        list(DEEDS.values())[deed]()
    beat.enter(named("all_reduce", "tp", "fake", tuple(range(dist.get_world_size()))))
    dist.all_reduce(tokens)  # the leader's tokens, the others' zeros
    beat.leave()
    return tokens.tolist()


def build_leader(config: EngineConfig, device: torch.device, beat: Beat) -> FakeEngine:
    load(config)
    return FakeEngine(beat)


def follow(config: EngineConfig, device: torch.device, beat: Beat) -> None:
    load(config)
    dist.barrier()
    while True:
        beat.idle()
        deed, rank, tokens = announce(0, 0, 0)
        beat.busy()
        if deed == CLOSE:
            return
        if deed != HEARTBEAT:
            take_part(deed, rank, torch.zeros(tokens, dtype=torch.long), beat)


def load(config: EngineConfig) -> None:
    name, _, rank = config.model.partition("@")
    if name == "load-error" and dist.get_rank() == int(rank):
        raise CheckpointError("the fake checkpoint is broken", ["a.safetensors is truncated"])


if __name__ == "__main__":
    timeout_s = [float(sys.argv.pop(1))] if sys.argv[1].isdigit() else []
    run_rank(build_leader, follow, *timeout_s)
