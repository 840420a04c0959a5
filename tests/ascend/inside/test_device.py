"""The simulated device: plain operators, memory, threads."""

from __future__ import annotations

import threading

import pytest
import torch

F32, BF16 = torch.float32, torch.bfloat16


def sample(*shape, dtype=F32):
    return torch.randn(*shape).to(dtype)


# Operators that a model, a sampler and an engine use between the fused ones.
PLAIN = {
    "matmul": lambda d: sample(4, 8).to(d) @ sample(8, 3).to(d),
    "linear": lambda d: torch.nn.functional.linear(*(sample(4, 4).to(d) for _ in range(3))),
    "bmm": lambda d: torch.bmm(sample(2, 3, 4).to(d), sample(2, 4, 5).to(d)),
    "einsum": lambda d: torch.einsum("snd,tnd->nst", *(sample(3, 2, 4).to(d) for _ in range(2))),
    "index_select": lambda d: sample(5, 3).to(d).index_select(0, torch.tensor([4, 0]).to(d)),
    "index": lambda d: sample(5, 3).to(d)[torch.tensor([4, 0]).to(d)],
    "index_mask": lambda d: sample(5, 3).to(d)[torch.tensor([True, False] * 2 + [True]).to(d)],
    "index_put": lambda d: (
        sample(5, 3).to(d).index_put_((torch.tensor([4, 0]).to(d),), torch.zeros(2, 3).to(d))
    ),
    "index_add": lambda d: (
        sample(5, 3).to(d).index_add_(0, torch.tensor([4, 0]).to(d), sample(2, 3).to(d))
    ),
    "index_copy": lambda d: (
        sample(5, 3).to(d).index_copy_(0, torch.tensor([4, 0]).to(d), sample(2, 3).to(d))
    ),
    "embedding": lambda d: torch.nn.functional.embedding(
        torch.tensor([1, 0, 2]).to(d), sample(4, 3).to(d)
    ),
    "gather": lambda d: sample(2, 3).to(d).gather(1, torch.tensor([[2], [0]]).to(d)),
    "scatter": lambda d: sample(2, 3).to(d).scatter_(1, torch.tensor([[2], [0]]).to(d), 7.0),
    "take_along": lambda d: sample(2, 3).to(d).take_along_dim(torch.tensor([[2], [0]]).to(d), 1),
    "sort": lambda d: sample(3, 7).to(d).sort(descending=True),
    "argsort": lambda d: torch.tensor([2, 1, 2, 0]).to(d).argsort(stable=True),
    "topk": lambda d: sample(3, 7).to(d).topk(2),
    "argmax": lambda d: sample(3, 7).to(d).argmax(-1),
    "max": lambda d: sample(3, 7).to(d).max(-1),
    "softmax": lambda d: sample(3, 7, dtype=BF16).to(d).softmax(-1),
    "softmax_float": lambda d: sample(3, 7, dtype=BF16).to(d).softmax(-1, dtype=F32),
    "log_softmax": lambda d: sample(3, 7).to(d).log_softmax(-1),
    "logsumexp": lambda d: sample(3, 7).to(d).logsumexp(-1),
    "cumsum": lambda d: torch.tensor([3, 1, 2]).to(d).cumsum(0),
    "bincount": lambda d: torch.bincount(torch.tensor([3, 1, 1]).to(d), minlength=5),
    "cat": lambda d: torch.cat([sample(2, 3).to(d), sample(1, 3).to(d)]),
    "cat_cast": lambda d: torch.cat([sample(2, 3).to(d), sample(1, 3, dtype=BF16).to(d)]),
    "stack": lambda d: torch.stack([sample(3).to(d), sample(3).to(d)], 1),
    "split": lambda d: sample(5, 2).to(d).split([2, 3])[1] + 1,
    "pad": lambda d: torch.nn.functional.pad(sample(2, 3).to(d), (1, 0, 0, 2)),
    "repeat": lambda d: sample(2, 3).to(d).repeat_interleave(2, 0),
    "repeat_by": lambda d: torch.arange(3).to(d).repeat_interleave(torch.tensor([1, 0, 2]).to(d)),
    "where": lambda d: torch.where(sample(3).to(d) > 0, sample(3).to(d), 0.0),
    "where_numbers": lambda d: torch.where(torch.tensor([True, False, True]).to(d)),
    "nonzero": lambda d: torch.tensor([0, 2, 0, 1]).to(d).nonzero(),
    "masked_fill": lambda d: sample(3).to(d).masked_fill_(torch.ones(3, dtype=bool).to(d), 2),
    "arange": lambda d: torch.arange(3, 9, device=d).view(2, 3).t().contiguous(),
    "full": lambda d: torch.full((2, 3), 7, dtype=torch.int32, device=d),
    "zeros": lambda d: torch.zeros(3, device=d).fill_(2).mul_(3),
    "ones_triu": lambda d: torch.ones(4, 4, dtype=torch.int8, device=d).triu(1),
    "clamp": lambda d: sample(5).to(d).clamp(-0.5, 0.5),
    "math": lambda d: (sample(5).to(d).abs() + 1).rsqrt().exp().log().sigmoid().pow(2),
    "divide": lambda d: torch.tensor([7, -7]).to(d) // 2 + torch.tensor([7, -7]).to(d) % 3,
    "compare": lambda d: (torch.tensor([1, 2]).to(d) >= torch.tensor([2, 1]).to(d)).logical_not(),
    "mean": lambda d: sample(3, 4).to(d).mean(-1, keepdim=True),
    "sum_bool": lambda d: torch.tensor([True, True, False]).to(d).sum(),
    "isfinite": lambda d: torch.tensor([1.0, float("inf")]).to(d).isfinite().all(),
    "isin": lambda d: torch.isin(torch.tensor([1, 2, 3]).to(d), torch.tensor([2]).to(d)),
    "cast": lambda d: sample(3, 4).to(d).to(BF16).to(torch.float16).float(),
    "copy_strided": lambda d: torch.zeros(4, 3).to(d).t().copy_(sample(3, 4).to(d)),
    "slice_assign": lambda d: assign(torch.zeros(4, 3).to(d), sample(2, 3).to(d)),
    "view_dtype": lambda d: sample(2, 4).to(d).view(torch.int32),
    "unfold": lambda d: sample(6).to(d).unfold(0, 2, 2).transpose(0, 1).flatten(),
    "searchsorted": lambda d: torch.searchsorted(
        torch.tensor([1.0, 2, 3]).to(d), torch.tensor([2.5]).to(d)
    ),
    "tril_mask": lambda d: torch.ones(3, 3, dtype=bool, device=d).tril(),
    "sdpa": lambda d: torch.nn.functional.scaled_dot_product_attention(
        *(sample(1, 2, 3, 8).to(d) for _ in range(3)), is_causal=True
    ),
    "silu": lambda d: torch.nn.functional.silu(sample(3, 4, dtype=BF16).to(d)),
    "rms_norm": lambda d: torch.nn.functional.rms_norm(sample(3, 4).to(d), (4,)),
    "unique": lambda d: torch.tensor([3, 1, 3]).to(d).unique(return_counts=True),
    "item": lambda d: torch.tensor(sample(3).to(d).sum().item()),
    "any": lambda d: torch.tensor(bool((sample(3).to(d) > -99).any())),
}


def assign(x, values):
    x[1:3] = values
    return x


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operators(name):
    results = []
    for device in ("cpu", "npu"):
        torch.manual_seed(0)
        with torch.inference_mode():
            result = PLAIN[name](device)
        results.append(result if isinstance(result, tuple) else (result,))
    assert len(results[0]) == len(results[1])
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)


def test_devices_do_not_mix():
    with pytest.raises(RuntimeError):
        torch.ones(2).npu() + torch.ones(2)
    with pytest.raises(RuntimeError):
        torch.ones(2, 2).npu() @ torch.ones(2, 2)


def test_unwritten_memory_reads_as_poison():
    assert torch.empty(3, device="npu").isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=BF16).npu()).isnan().all()
    assert (torch.ones(1).npu().new_empty(2, dtype=torch.int64) == -(2**31)).all()
    assert (torch.empty(2, dtype=torch.int8, device="npu") == -128).all()


def test_memory_is_counted_and_ends(monkeypatch):
    free = torch.npu.mem_get_info()[0]
    block = torch.empty(1 << 30, dtype=torch.int8, device="npu")
    assert torch.npu.mem_get_info()[0] <= free - len(block)
    monkeypatch.setenv("ASCEND_SIM_HBM_GIB", "2")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(3 << 29, dtype=torch.int8, device="npu")


def test_every_thread_computes():
    results = []
    thread = threading.Thread(target=lambda: results.append((torch.ones(2).npu() + 1).tolist()))
    thread.start()
    thread.join()
    assert results == [[2, 2]]


def test_printing():
    assert repr(torch.ones(2).npu() * 2) == "tensor([2., 2.], device='npu:0')"
