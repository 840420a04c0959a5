"""Graphs as torch_npu defines them: operations are recorded, replayed and updated.

Nothing computes during capture, as on hardware: results are poison until a replay, and memory that
operations write in place stays unchanged. A replay runs the same operations on the same addresses,
with the captured host values unless a task update replaced them. A graph does not keep the memory
of its arguments alive; on hardware, too, that is the program's duty.

An operation that waits for an `ExternalEvent`, as each attention of `auto_dispatch_capture` does,
runs only after the event was recorded, and the graph resets the event. So the updates of a replay
may come before it, after it, or from another thread. A replay without its updates never ends. The
next operation on the device, and everything that waits for the device, then raises a `RefusedError`
after `ASCEND_SIM_TIMEOUT` seconds; a real device hangs.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
import torch_npu
from torch.utils._pytree import tree_leaves, tree_map

from ascend_sim.memory import to_cpu
from ascend_sim.rules import RefusedError, warn

COLLECTIVES = ("c10d", "_c10d_functional", "npu_custom_dist")

counts: Counter[str] = Counter()
"""Since the start: `replays`, `updates` of task groups, and `launches` of operations in these."""

_graphs = torch_npu.npu.graphs
_begin = _graphs.NPUGraph.capture_begin
_end = _graphs.NPUGraph.capture_end
_group_begin = _graphs.graph_task_group_begin
_group_end = _graphs.graph_task_group_end
Steps = list[Callable[[], Any]]
_task_groups: dict[Any, tuple[Steps, int, int]] = {}  # handle → (steps of its graph, first, last)


class _Recording(threading.local):
    """The lists of steps to which this thread's operations are recorded; None if they compute."""

    capturing: Any = None
    updating: Any = None
    group_start = 0
    group: Any = None
    has_collective = has_group = False

    def record(self, func, args, kwargs, result):
        """Add a step to the graph being captured."""
        self.capturing.append(step_of(func, args, kwargs, result))
        self.has_collective |= func.namespace in COLLECTIVES

    def record_update(self, func, args, kwargs):
        """Add a step to the task group being updated; returns the result of the operation."""
        if func._schema.returns and "out" not in kwargs:
            raise RefusedError(f"{func} in a task update makes a new tensor: use an out variant")
        result = kwargs.get("out")
        result = tuple(result) if isinstance(result, list) else result
        self.updating.append(step_of(func, args, kwargs, result))
        return result


Graph = _Recording()


class _Wait:
    """A step that waits for an event."""

    def __init__(self, flag):
        self.flag = flag


class _Queue:
    """Replays in the order of their calls. Each runs until it waits for an event, and goes on when
    the event is recorded, in the thread that records it."""

    def __init__(self):
        self._changed = threading.Condition(threading.RLock())
        self._runs: deque[list[Any]] = deque()  # [steps, next step, thread that replayed]
        self._here = threading.local()
        self._failure = None  # error of a step that another thread ran

    def add(self, steps):
        with self._changed:
            self._runs.append([steps, 0, threading.get_ident()])
        self.advance()

    def advance(self):
        """Run all steps that wait for nothing."""
        if getattr(self._here, "is_running", False):
            return
        with self._changed:
            self._here.is_running = True
            try:
                # Tensors of any mode may be written, as by a device.
                with torch.inference_mode():
                    while self._runs and self._finish(self._runs[0]):
                        self._runs.popleft()
            except BaseException as error:
                if self._runs[0][2] != threading.get_ident():
                    self._failure = error
                self._runs.clear()
                raise
            finally:
                self._here.is_running = False
                self._changed.notify_all()

    def _finish(self, run):
        """Run the steps of a replay; False if it waits for an event."""
        steps, place, _ = run
        while place < len(steps):
            step = steps[place]
            if not isinstance(step, _Wait):
                step()
            elif not step.flag.is_set():
                return False
            place += 1
            run[1] = place
        return True

    def settle(self):
        """Wait until all replays have ended. Raises `RefusedError` if one hangs or has failed."""
        if getattr(self._here, "is_running", False) or not (self._runs or self._failure):
            return
        seconds = float(os.environ.get("ASCEND_SIM_TIMEOUT", "60"))
        with self._changed:
            if not self._changed.wait_for(lambda: not self._runs, seconds):
                self._runs.clear()
                raise RefusedError(
                    f"a replayed graph has waited {seconds:g} s for the update of a recorded task "
                    "that never came; an NPU would hang"
                )
            failure, self._failure = self._failure, None
            if failure is not None:
                raise RefusedError(f"a replayed graph failed: {failure}") from failure

    def is_empty(self):
        return not self._runs


_queue = _Queue()
settle = _queue.settle


def _flag(event):
    """Whether an external event is recorded, as a `threading.Event`."""
    return event.__dict__.setdefault("_ascend_sim_recorded", threading.Event())


def _event_method(name, step_for):
    """`ExternalEvent.name`, which also does `step_for(flag)`: now, or in the captured graph."""
    original = getattr(torch_npu.npu.ExternalEvent, name)

    def method(event, stream=None):
        original(event, stream)
        step = step_for(_flag(event))
        if Graph.capturing is not None:
            Graph.capturing.append(step)
        elif name == "record":
            step()
            _queue.advance()
        else:
            _queue.add([step])

    return method


def step_of(func, args, kwargs, result):
    """A function that repeats one operation in a replay."""
    if func.namespace in COLLECTIVES:
        return lambda: func(*args, **kwargs)
    # Views of the memory at its present address: they do not keep it alive.
    args, kwargs, result = tree_map(to_cpu, (args, kwargs, result))
    places = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]

    def step():
        values = func(*args, **kwargs)
        found = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
        for place, value in zip(places, found, strict=True):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)

    return step


def capture_begin(graph, *args, **kwargs):
    settle()
    _begin(graph, *args, **kwargs)
    Graph.capturing = graph.steps = []
    Graph.has_collective = Graph.has_group = False


def capture_end(graph):
    Graph.capturing = None
    is_aiv = os.environ.get("HCCL_OP_EXPANSION_MODE") == "AIV"
    if is_aiv and Graph.has_collective and Graph.has_group:
        warn(
            "a graph holds a collective and a task group under HCCL_OP_EXPANSION_MODE=AIV; such "
            "graphs hang or fail with 507009 at the first replay on some systems"
        )
    _end(graph)


def replay(graph):
    counts["replays"] += 1
    trace("replay")
    _queue.add(graph.steps)


def trace(text):
    if os.environ.get("ASCEND_SIM_TRACE"):
        print(f"[graph] {text}", file=sys.stderr, flush=True)


def graph_task_group_begin(stream):
    Graph.group_start = len(Graph.capturing)
    Graph.has_group = True
    _group_begin(stream)


def graph_task_group_end(stream):
    handle = _group_end(stream)
    _task_groups[handle] = (Graph.capturing, Graph.group_start, len(Graph.capturing))
    return handle


def graph_task_update_begin(stream, handle):
    Graph.updating, Graph.group = [], _task_groups[handle]


def graph_task_update_end(stream):
    steps, first, last = Graph.group
    if len(Graph.updating) != last - first:
        raise RefusedError(
            f"a task group of {last - first} operations was updated with {len(Graph.updating)}"
        )
    counts["updates"] += 1
    counts["launches"] += len(Graph.updating)
    trace(f"update of {len(Graph.updating)} operations")
    steps[first:last], Graph.updating = Graph.updating, None


def _settled(function):
    """`function`, which waits for the device, after all replays have ended."""

    def call(*args, **kwargs):
        settle()
        return function(*args, **kwargs)

    return call


def install():
    """Replace torch_npu's functions by those of the simulator."""
    npu = torch_npu.npu
    step_for: Callable[[Any], Any]
    for name, step_for in (
        ("wait", _Wait),
        ("reset", lambda flag: flag.clear),
        ("record", lambda flag: flag.set),
    ):
        setattr(npu.ExternalEvent, name, _event_method(name, step_for))
    for owner in (npu.Event, npu.Stream, npu):
        owner.synchronize = _settled(owner.synchronize)
    query = npu.Event.query
    npu.Event.query = lambda event: _queue.is_empty() and query(event)
    methods: tuple[Callable[..., None], ...] = (capture_begin, capture_end, replay)
    for method in methods:
        setattr(_graphs.NPUGraph, method.__name__, method)
    functions: tuple[Callable[..., Any], ...] = (
        graph_task_group_begin,
        graph_task_group_end,
        graph_task_update_begin,
        graph_task_update_end,
    )
    for function in functions:
        for module in (_graphs, torch_npu.npu):
            setattr(module, function.__name__, function)
