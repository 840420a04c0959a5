"""Recorded decode steps: the order of replay and updates, and what follows an error in either."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch_npu

from moespan.config import EngineOptions, Layout
from moespan.engine.worker import Worker
from moespan.ops.npu.ops import NpuOps
from moespan.parallel.mesh import Mesh
from tests.ascend.inside.test_decode import FUSED, NPU, decode
from tests.support import execute, make_worker

GRAPH = torch_npu.npu.graphs.NPUGraph
STEPS = [[3 + i, 23 + i, 3 + i] for i in range(4)]


def make(enforce_eager: bool = False, **options: Any) -> Worker:
    worker = make_worker(
        FUSED,
        mesh=Mesh.create(Layout(), NPU),
        ops=NpuOps(options=EngineOptions(**options)),
        dtype="bfloat16",
        block_size=32,
        num_blocks=64,
        enforce_eager=enforce_eager,
    )
    for caches in worker.caches:
        for cache in caches.tensors:
            cache.zero_()
    return worker


def run(worker: Worker) -> list[list[int | None]]:
    """The tokens of a few decode steps. All but the first are replays."""
    return [[one.token_id for one in execute(worker, decode(step)).samples] for step in STEPS]


@pytest.mark.parametrize("update_first", [False, True])
def test_lengths_are_updated_while_the_graph_runs_or_before(update_first: bool):
    expected = run(make(enforce_eager=True))
    worker, order = make(npu_update_first=update_first), []

    def spy(name: str) -> Any:
        method = getattr(GRAPH, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return method(*args, **kwargs)

        return mock.patch.object(GRAPH, name, call)

    with spy("replay"), spy("update"):
        assert run(worker) == expected
    pair = ["update", "replay"] if update_first else ["replay", "update"]
    assert order == pair * (len(STEPS) - 1)


def test_an_update_that_fails_after_the_replay_was_queued_ends_the_rank_and_not_the_device():
    worker = make()
    execute(worker, decode(STEPS[0]))
    started = time.monotonic()
    broken = mock.patch.object(GRAPH, "update", side_effect=RuntimeError("507009"))
    with broken, pytest.raises(RuntimeError, match=r"507009; start again with --enforce-eager or"):
        execute(worker, decode(STEPS[1]))
    # The replay waits for events that only the updates record. Without them this would hang.
    torch.npu.synchronize()
    assert (torch.ones(3, device=NPU) + 1).tolist() == [2, 2, 2]
    assert time.monotonic() - started < 40  # less than the stand-in waits for an update


@pytest.mark.parametrize("ending_fails", [False, True])
def test_an_operator_error_while_recording_leaves_steps_without_graphs(
    ending_fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("moespan.log._said", set())
    expected = run(make(enforce_eager=True))
    operator, end = torch_npu.npu_fused_infer_attention_score, GRAPH.capture_end

    def fail_in_capture(*args: Any, **kwargs: Any) -> Any:
        if torch.npu.is_current_stream_capturing():
            raise RuntimeError("207008: no stream left")
        return operator(*args, **kwargs)

    def fail_at_the_end(graph: Any) -> None:
        end(graph)
        if ending_fails:
            raise RuntimeError("207005: capture is invalid")

    monkeypatch.setattr(torch_npu, "npu_fused_infer_attention_score", fail_in_capture)
    monkeypatch.setattr(GRAPH, "capture_end", fail_at_the_end)
    worker, stream = make(), torch.npu.current_stream()
    assert run(worker) == expected
    assert worker.graphs is not None and worker.graphs.num_recorded == 0
    assert torch.npu.current_stream() == stream
    said = capsys.readouterr().err
    assert said.count("RuntimeError: 207008: no stream left; the device still computes") == 1
