"""Host time of the engine itself in a decode step, without the model.

The engine, its worker, and the socket to a front are the real ones. The network is replaced by a
function that returns fixed logits, and other replicas by one that always has the same result; or
the network is real, and its operations do not count. `moespan.measure.calibrate` takes the terms of
a profile from it, and `benchmarks/engine_overhead.py` prints the parts.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from moespan.config import EngineConfig, Layout
from moespan.engine import results, worker
from moespan.engine.build import build_leader
from moespan.engine.engine import Engine
from moespan.engine.request import OutputDelta, Request, SamplingParams
from moespan.engine.step import Sampled, StepPlans, StepResult
from moespan.front.live_texts import LiveTexts
from moespan.launch.protocol import Connection, FromLeader, News
from moespan.parallel.control import Control
from moespan.parallel.mesh import Mesh
from moespan.planner.memory import RankMemory
from moespan.text.tokenizer import Tokenizer

PARTS = ("schedule", "encode", "inputs", "sample", "update", "deltas", "send")
"""Parts of a decode step in the leader's process."""

LEADING = ("schedule", "update", "deltas", "send")
"""Those that only the leader has."""

NETWORK = "network"
"""The part of the network's own Python, between its operations, where the network is real."""

_OPERATIONS = "operations"
_NORMS, _PRODUCTS = ("rms_norm", "add_rms_norm"), ("linear", "mlp", "route", "experts")
_CALIBRATED = (*_NORMS, *_PRODUCTS, "rope_to_cache", "attention")

GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, seed=1)


class OtherReplicas(Control):
    """Stands in for the ranks of all replicas but the first: each row gets the same token."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self._answer = msgspec.msgpack.encode(RankMemory())
        self._result = msgspec.msgpack.encode(StepResult([Sampled(5)] * batch_size, []))

    def broadcast(self, message: bytes, kind: str) -> None:
        """The first message is a step, and so are all others."""
        self._answer = self._result

    def receive(self, rank: int) -> bytes:
        """The memory that a rank takes, then its results."""
        return self._answer


class Clock:
    """Adds up the time of calls by part; a nested timed call counts for the inner part only.

    Args:
        now_ns: nanoseconds; of CPU time, or of the wall clock.
    """

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self.spent_ns: Counter[str] = Counter()
        self.now_ns = now_ns
        self._inside_ns = 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time added to `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            outside_ns, self._inside_ns = self._inside_ns, 0
            started = self.now_ns()
            try:
                return function(*args, **kwargs)
            finally:
                took_ns = self.now_ns() - started
                self.spent_ns[part] += took_ns - self._inside_ns
                self._inside_ns = outside_ns + took_ns

        return call


def measure(
    model: Path,
    batch_size: int,
    params: SamplingParams = GREEDY,
    *,
    context: int = 384,
    num_steps: int = 60,
    warmup: int = 20,
    now_ns: Callable[[], int] = time.perf_counter_ns,
    num_replicas: int = 1,
    sweep: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Mean microseconds of each of `PARTS` of a decode step, of the `rest` and of their `total`,
    over the faster half of `num_steps`; and of the `front`, which takes in what the leader sends,
    in its own process otherwise.

    Args:
        model: folder with a config and, for the cost of text, a tokenizer. No weights are read.
        batch_size: sequences of each replica.
        context: prompt tokens of each of them.
        sweep: makes the network a real one of random weights, and is called after each of its
            operations, so that the engine's code is as cold as it is beside large weights. The
            time of operations and sweeps does not count; `NETWORK` is a further part.
    """
    engine = _build(model, batch_size, context, warmup + num_steps + 1, num_replicas)
    clock = Clock(now_ns)
    parts = PARTS if sweep is None else (*PARTS, NETWORK)
    if sweep is None:
        _replace_network(engine, batch_size)
    here, there = socket.socketpair()
    to_front: Connection[Any] = Connection(here, FromLeader)
    front: Connection[Any] = Connection(there, FromLeader)
    texts = LiveTexts(Tokenizer.from_pretrained(model), engine.abort)

    def send(deltas: list[OutputDelta]) -> None:
        to_front.send(News(deltas, engine.pulse()))

    def take_in() -> None:
        while not (messages := front.receive(0)):
            to_front.receive(0)  # sends what did not fit into the socket
        texts.complete(messages[0].deltas)

    send, take_in = clock.timed("send", send), clock.timed("front", take_in)
    for number in range(batch_size * num_replicas):
        prompt = [2 + (number * 7 + at * 3) % 500 for at in range(context)]
        request = Request(id=str(number), prompt_token_ids=prompt, params=params)
        engine.add(request)
        texts.begin(request)
    steps: list[Counter[str]] = []
    with ExitStack() as stack:
        stack.enter_context(_watched(clock, engine))
        if sweep is not None:
            stack.enter_context(_watched_network(clock, engine, sweep))
        while engine.has_unfinished:
            clock.spent_ns = Counter()
            started = now_ns()
            send(engine.step())
            clock.spent_ns["total"] = now_ns() - started - clock.spent_ns.pop(_OPERATIONS, 0)
            take_in()
            steps.append(clock.spent_ns)
    engine.close()
    to_front.close()
    front.close()
    measured = steps[warmup + 1 : warmup + 1 + num_steps]
    # Other processes only add time, so the faster half shows the engine's own.
    measured = sorted(measured, key=lambda step: step["total"])[: max(num_steps // 2, 1)]
    mean_us = {
        part: statistics.fmean(step[part] for step in measured) / 1e3
        for part in (*parts, "total", "front")
    }
    rest = mean_us["total"] - sum(mean_us[part] for part in parts)
    return {**mean_us, "rest": rest}


def _build(model: Path, batch_size: int, context: int, num_steps: int, num_replicas: int) -> Engine:
    """The leader of an engine with random weights."""
    layout = Layout(dp=num_replicas)
    config = EngineConfig(
        str(model),
        layout,
        device="cpu",
        load_format="dummy",
        max_model_len=context + num_steps,
        max_num_seqs=batch_size,
        max_num_batched_tokens=batch_size * context,
        enable_prefix_caching=True,
    )
    mesh = Mesh(layout, 0, torch.device("cpu"))
    mesh.control = OtherReplicas(batch_size)
    return build_leader(config, mesh)


def _replace_network(engine: Engine, batch_size: int) -> None:
    """Let the network always return the same logits."""
    vocab_size = engine._worker.model.vocab_size
    logits = torch.randn(batch_size, vocab_size, generator=torch.Generator().manual_seed(0))

    def network(inputs: Any, caches: Any, batch: Any, rows: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits[: len(rows)]

    engine._worker.model = network  # type: ignore[assignment]


@contextmanager
def _watched(clock: Clock, engine: Engine) -> Iterator[None]:
    """Time the parts of the engine's steps while the context is open."""
    places: list[tuple[Any, str, str]] = [
        (engine._replicas, "schedule", "schedule"),
        (StepPlans, "of", "encode"),
        (engine, "_broadcast", "encode"),
        (engine._worker, "_run", "inputs"),
        (worker, "Pending", "sample"),
        (results.Pending, "wait", "sample"),
        (results, "_decode_result", "update"),
        (engine._replicas, "update", "update"),
        (engine, "_deltas", "deltas"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            function = getattr(owner, name)
            timed: Any = clock.timed(part, function)
            if isinstance(owner, type) and hasattr(function, "__self__"):
                timed = staticmethod(timed)  # a class method that is bound already
            stack.enter_context(_replaced(owner, name, timed))
        yield


@contextmanager
def _watched_network(clock: Clock, engine: Engine, sweep: Callable[[], object]) -> Iterator[None]:
    """Time the real network, with its operations and a sweep after each as a part of its own."""
    model = engine._worker.model

    def swept(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = operation(*args, **kwargs)
            sweep()
            return result

        return call

    with ExitStack() as stack:
        for name in _CALIBRATED:
            operation = swept(getattr(model.ops, name))
            stack.enter_context(_replaced(model.ops, name, clock.timed(_OPERATIONS, operation)))
        network: Any = clock.timed(NETWORK, model)
        network.vocab_size, network.counter = model.vocab_size, model.counter
        stack.enter_context(_replaced(engine._worker, "model", network))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner` with another attribute `name` while the context is open."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
