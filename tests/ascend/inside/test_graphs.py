"""Graph capture: frozen values, updated values, and operations that cannot be captured."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import torch_npu
from ascend_sim.graphs import Graph, counts

from tests.ascend.inside.layer import (
    SMALL,
    TOLERANCE,
    altered,
    layer,
    make_batch,
    make_weights,
    on,
    reference,
)


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def update(graph, lengths):
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])


def captured(function, **options):
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = function()
    return graph, result


def test_replays_see_new_tokens_but_new_lengths_only_after_an_update():
    w, b = make_weights(SMALL), make_batch(SMALL)
    npu_w, npu_b = on("npu", w), on("npu", b)
    graph, y = captured(lambda: layer(SMALL, npu_w, npu_b), auto_dispatch_capture=True)
    assert y.isnan().all(), "nothing computes before a replay"

    def difference(**changes):
        want = reference(SMALL, w, altered(b, **changes))
        return (y.cpu().float() - want)[3].abs().max()  # of the sequence that has a past

    update(graph, [3, 129])
    graph.replay()
    assert difference() < TOLERANCE
    other = torch.randn_like(b.x)
    npu_b.x.copy_(other)
    update(graph, [3, 129])
    graph.replay()
    assert difference(x=other) < TOLERANCE
    # One step later: only lengths and slots change.
    later = {"x": other, "cached": [3, 230], "slots": b.slots + torch.tensor([0, 0, 0, 101])}
    npu_b.slots.copy_(later["slots"])
    update(graph, [3, 129])
    graph.replay()
    assert difference(**later) > TOLERANCE
    update(graph, [3, 230])
    graph.replay()
    assert difference(**later) < TOLERANCE


@pytest.fixture
def recorded():
    """A recorded layer, its result, and the expected result with 230 keys of the last sequence."""
    w, b = make_weights(SMALL), make_batch(SMALL)
    npu_w, npu_b = on("npu", w), on("npu", b)
    graph, y = captured(lambda: layer(SMALL, npu_w, npu_b), auto_dispatch_capture=True)
    slots = b.slots + torch.tensor([0, 0, 0, 101])
    npu_b.slots.copy_(slots)
    return graph, y, reference(SMALL, w, altered(b, cached=[3, 230], slots=slots))


def test_an_update_may_come_after_its_replay(recorded):
    graph, y, want = recorded
    counts.clear()
    for _ in range(2):
        graph.replay()
        done = torch.npu.Event()
        done.record()
        assert not done.query()
        update(graph, [3, 230])
        assert done.query()
        assert (y.cpu().float() - want)[3].abs().max() < TOLERANCE
    assert counts == {"replays": 2, "updates": 2, "launches": 2}


def test_an_update_may_come_from_another_thread(recorded):
    graph, y, want = recorded
    replayed = threading.Event()
    thread = threading.Thread(target=lambda: replayed.wait() and update(graph, [3, 230]))
    thread.start()
    graph.replay()
    replayed.set()
    assert (y.cpu().float() - want)[3].abs().max() < TOLERANCE
    thread.join()


def test_an_error_in_another_thread_reaches_the_one_that_waits(recorded):
    graph, y, _ = recorded

    def update_wrongly():
        with contextlib.suppress(RuntimeError):
            update(graph, [3, 9999])

    thread = threading.Thread(target=update_wrongly)
    graph.replay()
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="a replayed graph failed: sequence 1 has 9999 keys"):
        y.cpu()


@pytest.mark.parametrize("wait", ["synchronize", "read", "compute"])
def test_an_update_that_never_comes_is_an_error_in_bounded_time(recorded, monkeypatch, wait):
    graph, y, _ = recorded
    monkeypatch.setenv("ASCEND_SIM_TIMEOUT", "0.2")
    graph.replay()
    with pytest.raises(RuntimeError, match=r"waited 0\.2 s for the update"):
        {"synchronize": torch.npu.synchronize, "read": y.cpu, "compute": lambda: y + 1}[wait]()
    # The error does not repeat itself.
    torch.npu.synchronize()


def test_the_same_update_serves_one_replay_only(recorded, monkeypatch):
    graph, _, _ = recorded
    monkeypatch.setenv("ASCEND_SIM_TIMEOUT", "0.2")
    update(graph, [3, 230])
    graph.replay()
    torch.npu.synchronize()
    graph.replay()
    with pytest.raises(RuntimeError, match="never came"):
        torch.npu.synchronize()


def test_a_format_is_not_cast_while_recording():
    x = torch.ones(32, 32, dtype=torch.bfloat16).npu()
    with pytest.raises(RuntimeError, match="runs as an aclop"):
        captured(lambda: torch_npu.npu_format_cast(x, 29))


def test_recorded_collectives_beside_attention_under_aiv_are_warned_of(
    recorded, monkeypatch, capfd
):
    """Reported of real systems; the parts of a capture that matter are marked by hand."""
    monkeypatch.setenv("HCCL_OP_EXPANSION_MODE", "AIV")
    x = torch.ones(3).npu()

    def both():
        Graph.has_collective = Graph.has_group = True
        return x + 1

    captured(both)
    assert "507009" in capfd.readouterr().err


def test_capture_leaves_memory_alone():
    x = torch.ones(3).npu()
    graph, y = captured(lambda: x.mul_(2) + 1)
    assert x.tolist() == [1, 1, 1]
    for _ in range(2):
        graph.replay()
    assert (x.tolist(), y.tolist()) == ([4, 4, 4], [5, 5, 5])


def test_copies_and_integer_indices_are_captured():
    x, index = torch.arange(6.0).view(2, 3).npu(), torch.tensor([1]).npu()
    kept = torch.zeros(3, 2).npu()
    graph, y = captured(lambda: kept.copy_(x.t().contiguous())[index].bfloat16())
    assert not kept.any()
    graph.replay()
    assert y.tolist() == [[1, 4]]
    index.fill_(2)
    graph.replay()
    assert y.tolist() == [[2, 5]]


@pytest.mark.parametrize(
    "name",
    ["item", "bool", "to_cpu", "from_cpu", "nonzero", "where", "mask", "copy_in", "cpu_operand"],
)
def test_the_host_cannot_take_part(name):
    x, host = torch.ones(3).npu(), torch.ones(3)
    uses = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.any()),
        "to_cpu": lambda: x.cpu(),
        "from_cpu": lambda: torch.tensor([1.0, 2], device="npu"),
        "nonzero": lambda: x.nonzero(),
        "where": lambda: torch.where(x > 0),
        "mask": lambda: x[x > 0],
        "copy_in": lambda: x.copy_(host),
        "cpu_operand": lambda: torch.add(x, host),
    }
    # Reported by the simulator, or by the device that is asked to wait.
    with pytest.raises(RuntimeError, match=r"captured graph cannot|ACL stream synchronize failed"):
        captured(uses[name])


def test_synchronising_while_capturing_fails():
    with pytest.raises(RuntimeError):
        captured(torch.npu.synchronize)


def test_graph_memory_is_used_again():
    """Two graphs of one pool together take the memory of the larger one."""
    x = torch.ones(1 << 20).npu()

    def chain():
        y = x
        for _ in range(8):
            y = y + 1
        return y

    first, _ = captured(chain)
    before = torch.npu.memory_reserved()
    second, z = captured(chain, pool=first.pool())
    assert torch.npu.memory_reserved() - before <= 2 * x.numel() * x.element_size()
    second.replay()
    assert z[0] == 9
