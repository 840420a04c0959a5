"""Graphs as torch_npu defines them: operations are recorded, replayed and updated.

Nothing computes during capture, as on hardware: results are poison until a replay, and memory that
operations write in place stays unchanged. A replay runs the same operations on the same addresses,
with the captured host values unless a task update replaced them. A graph does not keep the memory
of its arguments alive; on hardware, too, that is the program's duty.
"""

from __future__ import annotations

import torch
import torch_npu
from torch.utils._pytree import tree_map

from ascend_sim.memory import to_cpu, tree_leaves
from ascend_sim.rules import RefusedError

COLLECTIVES = ("c10d", "_c10d_functional", "npu_custom_dist")

_graphs = torch_npu.npu.graphs
_begin = _graphs.NPUGraph.capture_begin
_end = _graphs.NPUGraph.capture_end
_group_begin = _graphs.graph_task_group_begin
_group_end = _graphs.graph_task_group_end
_task_groups = {}  # handle → (steps of its graph, first, last)


class Graph:
    """The lists of steps to which operations are recorded at the moment; None if they compute."""

    capturing = updating = None
    group_start = group = None

    @staticmethod
    def record(func, args, kwargs, result):
        """Add a step to the graph being captured."""
        Graph.capturing.append(step_of(func, args, kwargs, result))

    @staticmethod
    def record_update(func, args, kwargs):
        """Add a step to the task group being updated; returns the result of the operation."""
        if func._schema.returns and "out" not in kwargs:
            raise RefusedError(f"{func} in a task update makes a new tensor: use an out variant")
        result = kwargs.get("out")
        result = tuple(result) if isinstance(result, list) else result
        Graph.updating.append(step_of(func, args, kwargs, result))
        return result


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
    _begin(graph, *args, **kwargs)
    Graph.capturing = graph.steps = []


def capture_end(graph):
    Graph.capturing = None
    _end(graph)


def replay(graph):
    for step in graph.steps:
        step()


def graph_task_group_begin(stream):
    Graph.group_start = len(Graph.capturing)
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
    steps[first:last], Graph.updating = Graph.updating, None


def install():
    """Replace torch_npu's functions by those of the simulator."""
    for function in (capture_begin, capture_end, replay):
        setattr(_graphs.NPUGraph, function.__name__, function)
    for function in (
        graph_task_group_begin,
        graph_task_group_end,
        graph_task_update_begin,
        graph_task_update_end,
    ):
        for module in (_graphs, torch_npu.npu):
            setattr(module, function.__name__, function)
