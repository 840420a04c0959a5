"""Calls that the simulator refuses: for every release of CANN, and for CANN 8.5.0 only."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from ascend_sim.rules import RELEASES

from tests.ascend.inside.layer import needs_cache_mode

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=RELEASES)
def release(request, monkeypatch):
    monkeypatch.setenv("ASCEND_SIM_CANN", request.param)
    return request.param


def npu(*shape, dtype=HALF):
    return torch.ones(*shape, dtype=dtype).npu()


def int32(*values):
    return torch.tensor(values, dtype=torch.int32).npu()


def write(dtype=HALF, tokens=2, slots=None, **options):
    key, cache = npu(tokens, 2, 128, dtype=dtype), npu(2, 16, 2, 128, dtype=dtype)
    slots = torch.arange(tokens, dtype=torch.int32).npu() if slots is None else slots
    options = {"cache_mode": "Norm", **options}
    torch_npu.npu_scatter_pa_kv_cache(key, key, cache, cache.clone(), slots, **options)


@needs_cache_mode
@pytest.mark.parametrize("dtype", [torch.float16, HALF, torch.int8])
def test_the_cache_is_written(release, dtype):
    write(dtype)


@needs_cache_mode
@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": torch.float32}, "npu_scatter_pa_kv_cache takes torch.float16"),
        ({"cache_mode": "PA_NZ"}, "tiles of 16"),
        ({"slots": torch.zeros(1, 2, dtype=torch.int32)}, "slot_mapping"),
        ({"slots": torch.zeros(2)}, "slot_mapping"),
        ({"tokens": 33}, "33 tokens for 32 slots"),
    ],
)
def test_writes_into_the_cache_are_refused(release, changes, rule):
    changes = {name: x.npu() if torch.is_tensor(x) else x for name, x in changes.items()}
    with pytest.raises(RuntimeError, match=rule):
        write(**changes)


@needs_cache_mode
def test_without_a_mode_the_adapter_writes_tiles():
    cache = npu(2, 16, 2, 128)
    with pytest.raises(RuntimeError, match=r"561002.*PA_NZ.*tiles of 16"):
        torch_npu.npu_scatter_pa_kv_cache(npu(1, 2, 128), npu(1, 2, 128), cache, cache, int32(0))


MASK = torch.ones(2048, 2048, dtype=torch.int8).triu(1)


def attend(queries=2, keys=5, heads=2, kv_heads=2, mask=MASK, **options):
    q, cache = npu(queries, heads, 128), npu(2, 16, kv_heads * 128)
    options = {
        "input_layout": "TND",
        "sparse_mode": 3,
        "actual_seq_lengths": [queries],
        "actual_seq_lengths_kv": [keys],
        "block_size": 16,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        **options,
    }
    mask = None if mask is None else mask.npu()
    table = int32(0, 1).view(1, 2)
    return torch_npu.npu_fused_infer_attention_score(
        q, cache, cache, atten_mask=mask, block_table=table, **options
    )[0]


def test_attention_is_taken(release):
    attend()
    attend(mask=None, sparse_mode=0)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"sparse_mode": 0}, "sparse_mode=0 without an atten_mask"),
        ({"sparse_mode": 1}, "sparse_mode 0, 3 and 4"),
        ({"sparse_mode": 2}, "sparse_mode 0, 3 and 4"),
        ({"mask": None}, "takes an atten_mask"),
        ({"mask": MASK.t()}, "contiguous"),
        ({"queries": 6}, "no more queries than keys"),
        ({"keys": 0, "mask": None, "sparse_mode": 0}, "no keys"),
        ({"heads": 65, "kv_heads": 1}, "64 at most"),
        ({"block_size": 32}, "block_size=32"),
    ],
)
def test_attention_is_refused(release, changes, rule):
    with pytest.raises(RuntimeError, match=rule):
        attend(**changes)


def route(ids=((0, 1), (1, 3)), **options):
    ids = torch.tensor(ids, dtype=torch.int32).npu()
    options = {
        "active_num": ids.numel(),
        "expert_num": 4,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "quant_mode": -1,
        "active_expert_range": [0, 4],
        **options,
    }
    return torch_npu.npu_moe_init_routing_v2(npu(2, 32), ids, **options)


@pytest.mark.parametrize(
    "changes",
    [{"expert_tokens_num_type": 0}, {"expert_tokens_num_flag": False}, {"active_num": 3}],
    ids=str,
)
def test_routing_of_8_5_0_takes_less(release, changes):
    route()
    if release == "8.5.0":
        with pytest.raises(RuntimeError, match=r"8\.5\.0"):
            route(**changes)
    else:
        route(**changes)


def test_an_expert_that_does_not_exist(release):
    with pytest.raises(RuntimeError, match=r"expert \[4\] of 4"):
        route(ids=((0, 4), (1, 3)))


@pytest.mark.parametrize("index", [torch.zeros(4, dtype=torch.int64), int32(0, 1, 2)], ids=str)
def test_indices_of_unpermute(release, index):
    with pytest.raises(RuntimeError, match="sorted_indices"):
        torch_npu.npu_moe_token_unpermute(npu(4, 32), index.npu(), npu(2, 2))


def product(groups, **options):
    options = {"group_type": 0, "split_item": 2, "group_list_type": 1, **options}
    x = options.pop("x", None)
    x = npu(4, 32) if x is None else x
    weight = npu(len(groups), 32, 16, dtype=x.dtype)
    return torch_npu.npu_grouped_matmul([x], [weight], group_list=groups, **options)


def test_groups_of_rows(release):
    product(torch.tensor([1, 3]).npu())
    product(torch.tensor([4]).npu(), group_list_type=0)
    with pytest.raises(RuntimeError, match="more than one group"):
        product(torch.tensor([4]).npu())
    with pytest.raises(RuntimeError, match="group_list_type=2 is for int8"):
        product(torch.tensor([[0, 1], [1, 3]]).npu(), group_list_type=2)


def test_float32_of_several_tensors(release):
    x, weight = npu(2, 32, dtype=torch.float32), npu(32, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="one x and one weight"):
        torch_npu.npu_grouped_matmul([x, x], [weight, weight], group_type=-1)


def test_an_unknown_release(monkeypatch):
    monkeypatch.setenv("ASCEND_SIM_CANN", "8.0.0")
    with pytest.raises(NotImplementedError, match=r"use one of 8\.5\.0, 9\.0\.0, 9\.1\.0"):
        route()
