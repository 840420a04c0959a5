"""Collectives between simulated NPUs: results, refusals, hangs, and memory."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torch.distributed as dist
import torch_npu
from torch.distributed.device_mesh import DeviceMesh

from tests.ascend.inside.layer import SMALL, experts, make_weights, on
from tests.ascend.inside.ranks import run_ranks


def numbers(rank):
    size = dist.get_world_size()
    mine = torch.arange(4.0, device="npu") + rank
    total = torch.arange(4.0) * size + sum(range(size))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        x = mine.to(dtype, copy=True)
        dist.all_reduce(x)
        assert torch.equal(x.cpu(), total.to(dtype)), dtype
    gathered = torch.empty(size * 4, device="npu")
    dist.all_gather_into_tensor(gathered, mine)
    assert gathered.view(size, 4)[:, 0].tolist() == list(range(size))
    part = torch.empty(4, device="npu")
    dist.reduce_scatter_tensor(part, gathered)
    assert torch.equal(part.cpu(), (torch.arange(4.0) + rank) * size)
    send, receive = [[1, 2], [0, 3]][rank], [[1, 0], [2, 3]][rank]  # rows
    rows = torch.arange(3.0).repeat(2, 1).t().contiguous().npu() + 10 * rank
    out = torch.empty(sum(receive), 2, device="npu")
    dist.all_to_all_single(out, rows, receive, send)
    assert out[:, 0].tolist() == [[0], [1, 2, 10, 11, 12]][rank]
    x = torch.full((3,), float(rank), device="npu")
    dist.broadcast(x, 1)
    assert x.tolist() == [1, 1, 1]
    if rank == 0:
        dist.send(x + 5, 1)
    else:
        dist.recv(x, 0)
        assert x.tolist() == [6, 6, 6]
    dist.barrier()
    return "well"


def test_numbers():
    assert run_ranks(2, numbers) == ["well", "well"]


def exchange(rank):
    """Send and receive at once, which is safe in one batch."""
    sent, got = torch.full((2,), float(rank), device="npu"), torch.empty(2, device="npu")
    ops = [dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, got, 1 - rank)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return got.tolist()


def test_batched_exchange():
    assert run_ranks(2, exchange) == [[1, 1], [0, 0]]


def ring(rank, in_chain_order):
    """Send to the right, receive from the left. The first transfer of a pair waits for its peer."""
    size = dist.get_world_size()
    right, left = (rank + 1) % size, (rank - 1) % size
    sent, got = torch.full((2,), float(rank), device="npu"), torch.empty(2, device="npu")
    began = time.monotonic()
    steps = [lambda: dist.isend(sent, right).wait(), lambda: dist.irecv(got, left).wait()]
    if in_chain_order and rank:
        steps.reverse()
    try:
        for step in steps:
            step()
    except RuntimeError as error:
        return f"{error}", time.monotonic() - began
    return got[0].item(), time.monotonic() - began


def test_bug_a_ring_of_sends_hangs_but_not_forever():
    results = run_ranks(3, ring, False, ASCEND_SIM_TIMEOUT="2")
    # The rank that opens the communicator times out in HCCL, the one that joins in torch's store.
    assert all("error code is 9" in str(said) or "imeout" in str(said) for said, _ in results)
    assert all(1 < seconds < 20 for _, seconds in results), results


def test_transfers_in_the_order_of_the_chain():
    assert [got for got, _ in run_ranks(3, ring, True)] == [2, 0, 1]


@pytest.mark.parametrize(
    "name", ["count", "dtype", "other", "split", "root"], ids=lambda name: f"other_{name}"
)
def test_bug_mismatched_collectives(name, capfd):
    def mismatched(rank):
        x = torch.ones(4, device="npu")
        if name == "count":
            dist.all_reduce(torch.ones(4 + rank, device="npu"))
        elif name == "dtype":
            dist.all_reduce(x.half() if rank else x)
        elif name == "other":
            dist.broadcast(x, 0) if rank else dist.all_reduce(x)
        elif name == "root":
            dist.broadcast(x, rank)
        else:
            dist.all_to_all_single(torch.empty(2 + 2 * rank, device="npu"), x, [1, 1 + 2 * rank])
        return "nothing said"

    results = run_ranks(2, mismatched)
    assert any("error code is 1" in said for said in results), results
    assert "here, but" in capfd.readouterr().err or name == "split"


def replay_of_collectives(rank):
    total = torch.ones(2, device="npu")
    dist.all_reduce(total.clone())  # makes the communicator
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        total *= 2
        dist.all_reduce(total)
    assert total.tolist() == [1, 1]
    for _ in range(2):
        graph.replay()
    return total.tolist()


def test_captured_collectives():
    assert run_ranks(2, replay_of_collectives) == [[16, 16]] * 2


def shared_experts(rank):
    torch.manual_seed(0)
    w, h = make_weights(SMALL), torch.randn(5, SMALL.hidden).bfloat16()
    w.gate = w.gate.abs()
    share = SMALL.experts // 2
    y = experts(SMALL, on("npu", w), h.npu(), rank * share, (rank + 1) * share).float()
    dist.all_reduce(y)
    return (y.cpu() - experts(SMALL, w, h).float()).abs().max().item()


def test_experts_over_two_ranks():
    assert max(run_ranks(2, shared_experts)) < 0.05


def buffers(rank):
    free = [torch.npu.mem_get_info()[0] >> 20]

    def use(group):
        dist.all_reduce(torch.ones(1, device="npu"), group=group)
        free.append(torch.npu.mem_get_info()[0] >> 20)

    use(None)
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": 32}
    use(dist.new_group(backend="hccl", pg_options=options))
    use(DeviceMesh("npu", list(range(dist.get_world_size()))).get_group())
    return [before - after for before, after in itertools.pairwise(free)]


def test_every_group_takes_its_buffers():
    for world, small, mesh in run_ranks(2, buffers, HCCL_BUFFSIZE="100"):
        assert 200 <= world < 230  # including the memory pool of tensors
        assert small == 64
        assert mesh in (0, 200)  # the group of the world may be used again


def name_of(group):
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())


def fused(rank):
    """Dispatch, one matrix per expert, combine; and a matmul with its all-reduce."""
    size = dist.get_world_size()
    torch.manual_seed(0)
    num_experts, hidden, k = 2 * size, 64, 3
    matrices = torch.randn(num_experts, hidden, hidden).bfloat16() / 8
    x = torch.randn(size, 4, hidden).bfloat16()[rank]
    scores, ids = torch.rand(size, 4, num_experts)[rank].topk(k)
    name = name_of(dist.new_group(list(range(size)), backend="hccl"))
    where = (name, size, rank, num_experts)
    rows, _, assist, counts, received, _, scales = torch_npu.npu_moe_distribute_dispatch_v2(
        x.npu(), ids.int().npu(), *where, expert_scales=scores.npu(), global_bs=4 * size
    )
    assert rows[int(counts.sum()) :].isnan().all()
    y = torch_npu.npu_grouped_matmul(
        [rows],
        [matrices[2 * rank : 2 * rank + 2].npu()],
        group_list=counts,
        group_list_type=1,
        group_type=0,
        split_item=2,
    )[0]
    got = torch_npu.npu_moe_distribute_combine_v2(
        y, ids.int().npu(), assist, received, scores.npu(), *where,
        expand_scales=scales, global_bs=4 * size,
    )  # fmt: skip
    each = torch.stack([x.float() @ matrices[e].float() for e in range(num_experts)], 1)
    want = (each.take_along_dim(ids.unsqueeze(-1), 1) * scores.unsqueeze(-1)).sum(1)
    assert (got.cpu().float() - want).abs().max() < 0.05

    dist.all_reduce(torch.ones(1, device="npu"))
    summed = torch_npu.npu_mm_all_reduce_base(x.npu(), matrices[0].npu(), name_of(dist.group.WORLD))
    want = x.float() @ matrices[0].float()
    gathered = torch.empty(size, *want.shape, device="npu")
    dist.all_gather_into_tensor(gathered, want.npu())
    assert (summed.cpu().float() - gathered.cpu().sum(0)).abs().max() < 0.1
    return "well"


def test_fused_communication():
    assert run_ranks(2, fused) == ["well", "well"]


def refused(rank, change):
    size = dist.get_world_size()
    group = dist.new_group(backend="hccl")
    x = torch.ones(2, 64, dtype=torch.bfloat16).npu()
    ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    call = {"experts": 4, "global_bs": 0, **change}
    if call.get("same_expert"):
        ids[0] = 1
    if call.get("other_batch"):
        call["global_bs"] = 4 + 4 * rank
    torch_npu.npu_moe_distribute_dispatch_v2(
        x[:, : call.get("hidden", 64)],
        ids.npu(),
        name_of(group),
        size,
        call.get("rank", rank),
        call["experts"],
        global_bs=call["global_bs"],
    )
    dist.all_reduce(x, group=group)
    return "nothing said"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 5}, "5 experts on 2 ranks"),
        ({"rank": 0}, "rank 0 of 2 is 1 of 2"),
        ({"hidden": 48}, "hidden size 48"),
        ({"same_expert": True}, "one expert twice"),
        ({"other_batch": True}, "ranks disagree"),
        ({"environ": "1"}, "HCCL_BUFFSIZE of"),
        ({}, "error code is 1"),  # the group may carry nothing else
    ],
)
def test_fused_communication_refuses(change, message):
    environ = {"ASCEND_SIM_TIMEOUT": "2", "HCCL_BUFFSIZE": change.get("environ", "200")}
    results = run_ranks(2, refused, change, **environ)
    assert any(message in said for said in results), results
