"""CPU kernels for the operators that communicate and compute in one kernel (MC2).

They communicate over the stand-in's HCCL, and refuse what the documents exclude on an Atlas A2. The
order of rows inside an expert, and the contents of `assist_info`, `ep_recv_counts` and
`expand_scales`, are the simulator's own: the documents promise only that combine understands the
results of dispatch.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch_npu

from ascend_sim.rules import (
    HALVES,
    demand,
    is_old,
    kernel,
    one_dtype,
    plain,
    uninitialised,
    unknown,
)

HCCL_TYPES = {
    torch.int8: 0,
    torch.int32: 2,
    torch.float16: 3,
    torch.float32: 4,
    torch.int64: 5,
    torch.bfloat16: 11,
}
HCCL_SUM = 0
ASSIST = 128  # int32 per row in assist_info_for_combine


class Group:
    """A communicator of this process, found by the name that torch_npu gives it."""

    _cann: ctypes.CDLL | None = None
    with_matmul = None  # the one that matmuls with a collective use

    @staticmethod
    def find(name, only_fused=False):
        """The communicator's address; None if there is none (any more)."""
        return Group.cann().ascend_sim_comm(name.encode(), int(only_fused))

    @staticmethod
    def cann() -> ctypes.CDLL:
        """The stand-in for CANN that this process uses."""
        if Group._cann is None:
            folder = Path(torch_npu.__file__).parent.parent / "torch_npu.libs"
            Group._cann = ctypes.CDLL(str(folder / "libfakecann.so"))
            Group._cann.ascend_sim_comm.restype = ctypes.c_void_p
            Group._cann.ascend_sim_comm_bytes.restype = ctypes.c_size_t
        return Group._cann

    def __init__(self, name, only_fused):
        handle = Group.find(name, only_fused)
        demand(handle, f"there is no communicator {name!r}")
        self._comm = ctypes.c_void_p(handle)
        rank, size = ctypes.c_uint32(), ctypes.c_uint32()
        Group.cann().HcclGetRankId(self._comm, ctypes.byref(rank))
        Group.cann().HcclGetRankSize(self._comm, ctypes.byref(size))
        self.rank, self.size = rank.value, size.value
        self.buffer_bytes = Group.cann().ascend_sim_comm_bytes(self._comm)

    def all_reduce(self, x):
        x = x.contiguous()
        data, count = ctypes.c_void_p(x.data_ptr()), ctypes.c_uint64(x.numel())
        self._call("HcclAllReduce", data, data, count, HCCL_TYPES[x.dtype], HCCL_SUM)
        return x

    def all_gather(self, x):
        out = x.new_empty(self.size, *x.shape)
        data, place = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
        count = ctypes.c_uint64(x.numel())
        self._call("HcclAllGather", data, place, count, HCCL_TYPES[x.dtype])
        return out

    def all_to_all(self, x, send, receive):
        """Rows of x ordered by receiver → received rows ordered by sender."""
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        width = x[0].numel() if len(x) else out.shape[1:].numel()
        kind = HCCL_TYPES[x.dtype]
        numbers = ctypes.c_uint64 * self.size
        sides = []
        for tensor, rows in ((x, send), (out, receive)):
            counts = [row * width for row in rows]
            starts = [sum(counts[:i]) for i in range(self.size)]
            sides += [ctypes.c_void_p(tensor.data_ptr()), numbers(*counts), numbers(*starts), kind]
        self._call("HcclAlltoAllV", *sides)
        return out

    def _call(self, name, *arguments):
        Group.cann().ascend_sim_fused(1)
        try:
            code = getattr(Group._cann, name)(*arguments, self._comm, None)
        finally:
            Group.cann().ascend_sim_fused(0)
        demand(code == 0, f"{name} inside a fused operator: error code {code}")


@kernel("npu::npu_mm_all_reduce_base")
def mm_all_reduce_base(x1, x2, hcom, *, reduce_op="sum", bias=None, x3=None, comm_turn=0, **others):
    unknown(**others)
    name = "npu_mm_all_reduce_base"
    one_dtype(name, HALVES, x1, x2, bias, x3)
    plain(name, x1)
    demand(reduce_op == "sum" and comm_turn == 0, f"{name}: {reduce_op=}, {comm_turn=}")
    demand(x2.dim() == 2 and x1.dim() in (2, 3), f"{name}: {x1.dim()} and {x2.dim()} dims")
    demand(x2.is_contiguous() or x2.t().is_contiguous(), f"{name}: x2 has strides {x2.stride()}")
    group = Group(hcom, only_fused=False)
    demand(group.size in (1, 2, 4, 8), f"{name} takes 1, 2, 4 or 8 ranks, not {group.size}")
    other = Group.with_matmul not in (None, hcom) and Group.find(Group.with_matmul)
    demand(not other, f"{name}: all such operators of a model share one group")
    Group.with_matmul = hcom
    y = x1.float() @ x2.float()
    if x3 is not None:
        demand(x3.shape == y.shape, f"{name}: x3 {tuple(x3.shape)} for {tuple(y.shape)}")
        y = y + x3.float()
    return group.all_reduce((y if bias is None else y + bias.float()).to(x1.dtype))


def check_limits(name, group, x, k, ep_world_size, ep_rank_id, moe_expert_num, comm_alg, global_bs):
    """Check the limits of an A2, and that all ranks agree. Returns the experts of a rank and the
    batch of all ranks."""
    num_tokens, hidden = x.shape
    demand(comm_alg in ("", "fullmesh", "hierarchy"), f"{name}: {comm_alg=}")
    hierarchy = comm_alg == "hierarchy"
    ranks = (16, 32, 64) if hierarchy else (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)
    most_tokens, most_hidden = (512, 10240) if hierarchy else (256, 7168)
    demand(ep_world_size in ranks, f"{name} takes {ranks} ranks, not {ep_world_size}")
    demand(
        (group.size, group.rank) == (ep_world_size, ep_rank_id),
        f"{name}: rank {ep_rank_id} of {ep_world_size} is {group.rank} of {group.size} there",
    )
    demand(0 < num_tokens <= most_tokens, f"{name}: {num_tokens} tokens, up to {most_tokens}")
    demand(
        hidden % 32 == 0 and hidden <= most_hidden,
        f"{name}: hidden size {hidden} is a multiple of 32 up to {most_hidden}",
    )
    demand(0 < k <= 16, f"{name}: {k} experts per token, up to 16")
    demand(
        0 < moe_expert_num <= 1024 and moe_expert_num % ep_world_size == 0,
        f"{name}: {moe_expert_num} experts on {ep_world_size} ranks",
    )
    local = moe_expert_num // ep_world_size
    demand(
        not is_old() or (ep_world_size % 8 == 0 and moe_expert_num <= 512 and local <= 24),
        f"{name} of CANN 8.5.0 takes multiples of 8 ranks, 512 experts and 24 on a rank at most, "
        f"not {ep_world_size}, {moe_expert_num} and {local}",
    )
    batch = global_bs or num_tokens * ep_world_size
    demand(
        num_tokens * ep_world_size <= batch and batch % ep_world_size == 0,
        f"{name}: {global_bs=} is the largest batch of a rank times {ep_world_size}",
    )
    needed = 2 * (batch * min(local, k) * hidden * 2 + (2 << 20))
    demand(
        group.buffer_bytes >= needed,
        f"{name} needs HCCL_BUFFSIZE of {-(-needed >> 20)} MB, it is {group.buffer_bytes >> 20}",
    )
    said = torch.tensor([moe_expert_num, batch, k, hidden])
    demand(
        bool((group.all_gather(said) == said).all()),
        f"{name}: ranks disagree on experts, global_bs, K or hidden size",
    )
    return local, batch


@kernel("npu::npu_moe_distribute_dispatch_v2")
def moe_distribute_dispatch(
    x,
    expert_ids,
    group_ep,
    ep_world_size,
    ep_rank_id,
    moe_expert_num,
    *,
    x_active_mask=None,
    expert_scales=None,
    shared_expert_num=1,
    global_bs=0,
    expert_token_nums_type=1,
    comm_alg="",
    **others,
):
    unknown(**others)
    name = "npu_moe_distribute_dispatch_v2"
    one_dtype(name, HALVES, x)
    demand(expert_ids.dtype == torch.int32, f"{name}: expert_ids is int32")
    group, k = Group(group_ep, only_fused=True), expert_ids.size(1)
    local, batch = check_limits(
        name, group, x, k, ep_world_size, ep_rank_id, moe_expert_num, comm_alg, global_bs
    )
    demand(expert_scales is not None or comm_alg != "hierarchy", f"{name} needs expert_scales")
    flat = chosen_experts(name, expert_ids, x_active_mask, moe_expert_num)

    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=moe_expert_num)
    each = [local] * ep_world_size
    # [source rank, local expert]
    arriving = group.all_to_all(counts, each, each).view(ep_world_size, local)
    send = counts.view(ep_world_size, local).sum(1).tolist()
    receive = arriving.sum(1).tolist()
    rows = group.all_to_all(x[order // k], send, receive)
    origin = torch.stack((torch.full_like(order, ep_rank_id), order), 1).int()
    origin = group.all_to_all(origin, send, receive)
    expert = torch.arange(local).repeat(ep_world_size).repeat_interleave(arriving.flatten())
    by_expert = expert.argsort(stable=True)

    most, total = batch * min(local, k), len(rows)
    expand_x = uninitialised((most, x.size(1)), x.dtype)
    expand_x[:total] = rows[by_expert]
    assist = uninitialised((max(len(x) * k, most * ASSIST),), torch.int32)
    assist[: total * ASSIST].view(-1, ASSIST)[:, :2] = origin[by_expert]
    received = arriving.sum(0)
    if expert_token_nums_type == 0:
        received = received.cumsum(0)
    prefix = arriving.T.flatten().cumsum(0)
    extra = 0 if expert_scales is None else 2 * batch * k * (ep_world_size // 8)
    ep_recv_counts = uninitialised((len(prefix) + extra,), torch.int32)
    ep_recv_counts[: len(prefix)] = prefix
    scales = uninitialised((most,), torch.float32)
    if expert_scales is not None:
        sent = expert_scales.flatten()[order].float()
        scales[:total] = group.all_to_all(sent, send, receive)[by_expert]
    return (
        expand_x,
        uninitialised((most,), torch.float32),
        assist,
        received,
        ep_recv_counts,
        uninitialised((0,), torch.int32),
        scales,
    )


@kernel("npu::npu_moe_distribute_combine_v2")
def moe_distribute_combine(
    expand_x,
    expert_ids,
    assist_info_for_combine,
    ep_send_counts,
    expert_scales,
    group_ep,
    ep_world_size,
    ep_rank_id,
    moe_expert_num,
    *,
    tp_send_counts=None,
    x_active_mask=None,
    expand_scales=None,
    shared_expert_num=1,
    global_bs=0,
    comm_alg="",
    **others,
):
    unknown(**others)
    name = "npu_moe_distribute_combine_v2"
    one_dtype(name, HALVES, expand_x)
    demand(expert_scales.dtype == torch.float32, f"{name}: expert_scales is float32")
    group, k = Group(group_ep, only_fused=True), expert_ids.size(1)
    tokens = expand_x.new_empty(len(expert_ids), expand_x.size(1))
    local, _ = check_limits(
        name, group, tokens, k, ep_world_size, ep_rank_id, moe_expert_num, comm_alg, global_bs
    )
    total = int(ep_send_counts[moe_expert_num - 1])
    origin = assist_info_for_combine[: total * ASSIST].view(-1, ASSIST)[:, :2]
    demand(
        0 <= total <= len(expand_x) and bool(((origin[:, 0] >= 0) & (origin >= 0).all(1)).all()),
        f"{name}: assist_info and ep_send_counts are not what dispatch returned",
    )
    flat = chosen_experts(name, expert_ids, x_active_mask, moe_expert_num)
    by_rank = origin[:, 0].argsort(stable=True)
    send = torch.bincount(origin[:, 0], minlength=ep_world_size).tolist()
    receive = torch.bincount(flat // local, minlength=ep_world_size).tolist()
    rows = group.all_to_all(expand_x[:total][by_rank], send, receive)
    places = group.all_to_all(origin[by_rank][:, 1].contiguous(), send, receive).long()
    weighted = rows.float() * expert_scales.flatten()[places].unsqueeze(1)
    out = torch.zeros(len(flat) // k, expand_x.size(1)).index_add_(0, places // k, weighted)
    tokens.fill_(float("nan"))
    tokens[: len(out)] = out.to(tokens.dtype)
    return tokens


def chosen_experts(name, expert_ids, active_mask, num_experts):
    """The experts of active tokens, [active · K]."""
    if active_mask is not None:
        num_active = int(active_mask.sum())
        demand(bool(active_mask[:num_active].all()), f"{name}: x_active_mask is True, then False")
        expert_ids = expert_ids[:num_active]
    ids = expert_ids.long()
    demand(bool(((ids >= 0) & (ids < num_experts)).all()), f"{name}: an expert is not one of them")
    ordered = ids.sort(1).values
    demand(bool((ordered.diff(dim=1) > 0).all()), f"{name}: a token has one expert twice")
    return ids.flatten()
