"""Host time of the engine itself in a decode step, without the model.

The engine, its worker, and the socket to a front are the real ones. Only the network is replaced,
by a function that returns fixed logits; or the network is real, and its operations do not count.
`moespan.measure.calibrate` takes the terms of a profile from it, and
`benchmarks/engine_overhead.py` prints the parts.
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

import torch

from moespan.config import EngineConfig, Layout
from moespan.engine import results, worker
from moespan.engine.build import build_leader
from moespan.engine.engine import Engine
from moespan.engine.request import Request, SamplingParams
from moespan.engine.step import StepPlans
from moespan.launch.protocol import Connection, FromLeader, News
from moespan.parallel.mesh import Mesh

PARTS = ("schedule", "encode", "inputs", "sample", "update", "deltas", "front")
"""Parts of a decode step on the host."""

NETWORK = "network"
"""The part of the network's own Python, between its operations, where the network is real."""

_OPERATIONS = "operations"
_NORMS, _PRODUCTS = ("rms_norm", "add_rms_norm"), ("linear", "mlp", "route", "experts")
_CALIBRATED = (*_NORMS, *_PRODUCTS, "rope_to_cache", "attention")

GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, seed=1)


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
    sweep: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Mean microseconds of each of `PARTS`, of the `rest`, and of the `total` of a decode step,
    over the faster half of `num_steps`.

    Args:
        model: folder with a config and, for the cost of text, a tokenizer. No weights are read.
        context: prompt tokens of each of `batch_size` sequences.
        sweep: makes the network a real one of random weights, and is called after each of its
            operations, so that the engine's code is as cold as it is beside large weights. The
            time of operations and sweeps does not count; `NETWORK` is a further part.
    """
    engine = _build(model, batch_size, context, warmup + num_steps + 1)
    clock = Clock(now_ns)
    parts = PARTS if sweep is None else (*PARTS, NETWORK)
    if sweep is None:
        _replace_network(engine, batch_size)
    here, there = socket.socketpair()
    to_front: Connection[Any] = Connection(here, FromLeader)
    front: Connection[Any] = Connection(there, FromLeader)

    def tell(deltas: Any) -> None:
        to_front.send(News(deltas, engine.pulse()))
        while not front.receive(0):
            pass

    tell = clock.timed("front", tell)
    for number in range(batch_size):
        prompt = [2 + (number * 7 + at * 3) % 500 for at in range(context)]
        engine.add(Request(id=str(number), prompt_token_ids=prompt, params=params))
    steps: list[Counter[str]] = []
    with ExitStack() as stack:
        stack.enter_context(_watched(clock, engine))
        if sweep is not None:
            stack.enter_context(_watched_network(clock, engine, sweep))
        while engine.has_unfinished:
            clock.spent_ns = Counter()
            started = now_ns()
            tell(engine.step())
            clock.spent_ns["total"] = now_ns() - started - clock.spent_ns.pop(_OPERATIONS, 0)
            steps.append(clock.spent_ns)
    engine.close()
    to_front.close()
    front.close()
    measured = steps[warmup + 1 : warmup + 1 + num_steps]
    # Other processes only add time, so the faster half shows the engine's own.
    measured = sorted(measured, key=lambda step: step["total"])[: max(num_steps // 2, 1)]
    mean_us = {
        part: statistics.fmean(step[part] for step in measured) / 1e3 for part in (*parts, "total")
    }
    total = mean_us.pop("total")
    return {**mean_us, "rest": total - sum(mean_us.values()), "total": total}


def _build(model: Path, batch_size: int, context: int, num_steps: int) -> Engine:
    """An engine on one rank with random weights."""
    config = EngineConfig(
        str(model),
        Layout(),
        device="cpu",
        load_format="dummy",
        max_model_len=context + num_steps,
        max_num_seqs=batch_size,
        max_num_batched_tokens=batch_size * context,
        enable_prefix_caching=True,
    )
    return build_leader(config, Mesh.create(Layout(), torch.device("cpu")))


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
        (engine._replicas, "update", "update"),
        (engine, "_delta", "deltas"),
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
