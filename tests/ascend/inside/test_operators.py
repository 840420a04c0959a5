"""The fused operators on CPU tensors and on the device: results and refusals."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from ascend_sim.rules import RefusedError
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ascend.inside.layer import (
    BLOCK,
    DTYPE,
    EPS,
    FULL,
    SMALL,
    TOLERANCE,
    altered,
    attend,
    experts,
    layer,
    make_batch,
    make_weights,
    needs_cache_mode,
    on,
    plain_experts,
    reference,
)


@pytest.fixture(params=["cpu", "npu"])
def device(request):
    torch.manual_seed(0)
    with torch.inference_mode():
        yield request.param


@pytest.fixture
def made():
    """Weights and a batch on the CPU."""
    torch.manual_seed(0)
    with torch.inference_mode():
        yield make_weights(SMALL), make_batch(SMALL)


def close(got, want, tolerance=TOLERANCE):
    torch.testing.assert_close(got.cpu().float(), want.cpu().float(), atol=tolerance, rtol=0.02)


def test_the_wheel_is_real_and_the_device_is_simulated():
    assert torch.npu.get_device_name(0) == "Ascend910B3"
    assert torch.npu.device_count() == 8
    assert torch.npu.mem_get_info()[1] == 64 << 30
    assert str(torch.ops.npu.npu_rms_norm.default._schema).startswith(
        "npu::npu_rms_norm(Tensor input, Tensor gamma, float epsilon="
    )


def test_full_size_on_fake_tensors():
    gc.collect()
    before = torch.npu.memory_allocated()
    with FakeTensorMode():
        w, b = make_weights(FULL, "npu:0"), make_batch(FULL, "npu:0")
        y = layer(FULL, w, b)
        assert (tuple(y.shape), y.dtype, y.device.type) == ((4, 2048), DTYPE, "npu")
        assert torch.npu.memory_allocated() == before
        with pytest.raises(RuntimeError, match="Unknown keyword argument 'eps'"):
            torch_npu.npu_rms_norm(b.x, w.norm1, eps=EPS)
        with pytest.raises(RuntimeError, match="same device"):
            torch_npu.npu_rms_norm(b.x, torch.ones(FULL.hidden))
        with pytest.raises(RuntimeError, match="THD"):
            torch_npu.npu_fused_infer_attention_score(
                b.x, b.x, b.x, num_heads=16, input_layout="THD"
            )
        with pytest.raises(RuntimeError, match="group_type"):
            torch_npu.npu_grouped_matmul([b.x], [w.up], group_list=b.slots, split_item=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(device, dtype):
    x, gamma = torch.randn(6, 256, dtype=dtype), torch.randn(256, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    on_device = x.to(device)
    want = F.rms_norm(x.float(), (256,), gamma.float(), EPS)
    close(torch_npu.npu_rms_norm(on_device, gamma.to(device), EPS)[0], want, tolerance)
    normed, _, total = torch_npu.npu_add_rms_norm(on_device, on_device, gamma.to(device), EPS)
    close(total, x + x, 0)
    close(normed, F.rms_norm(x.float() * 2, (256,), gamma.float(), EPS), tolerance)
    gate, up = x.float().chunk(2, -1)
    close(torch_npu.npu_swiglu(on_device), F.silu(gate) * up, tolerance)


def test_rotation_is_in_place(device):
    angle = torch.randn(5, 1, 64)
    cos, sin = (torch.cat([half] * 2, -1).to(DTYPE) for half in (angle.cos(), angle.sin()))
    q, k = torch.randn(5, 4, 128, dtype=DTYPE), torch.randn(5, 2, 128, dtype=DTYPE)
    rotated = [x.float() * cos + torch.cat((-x[..., 64:], x[..., :64]), -1) * sin for x in (q, k)]
    on_device = [x.to(device) for x in (q, k, cos, sin)]
    again = torch_npu.npu_rotary_mul(on_device[0], on_device[2], on_device[3])
    out = torch_npu.npu_apply_rotary_pos_emb(*on_device, layout="TND")
    for got, same, want in zip(out, on_device, rotated, strict=False):
        close(got, want, 0.05)
        assert torch.equal(got.cpu(), same.cpu())
    close(again, rotated[0], 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmul(device, dtype):
    x, w = torch.randn(8, 64, dtype=dtype), torch.randn(3, 64, 16, dtype=dtype)
    want = torch.cat((x[:1] @ w[0], x[1:6] @ w[2]))
    for kind, groups in ((0, [1, 1, 6]), (1, [1, 0, 5])):
        y = torch_npu.npu_grouped_matmul(
            [x.to(device)],
            [w.to(device)],
            group_list=torch.tensor(groups).to(device),
            group_list_type=kind,
            group_type=0,
            split_item=2,
        )[0]
        close(y[:6], want, 1e-4 if dtype == torch.float32 else 0.1)
        assert y[6:].isnan().all(), "rows of no group are old memory"


def test_routing_to_some_experts(device):
    x = torch.arange(8.0).view(4, 2)
    ids = torch.tensor([[3, 0], [1, 3], [2, 0], [0, 1]], dtype=torch.int32)
    rows, where, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.to(device),
        ids.to(device),
        active_num=8,
        expert_num=4,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[1, 3],
        quant_mode=-1,
    )
    assert counts.tolist() == [2, 1]
    assert where.tolist() == [-1, -1, 0, -1, 2, -1, -1, 1]
    assert torch.equal(rows[:3].cpu(), x[[1, 3, 2]])
    assert rows[3:].isnan().all()
    with pytest.raises(RuntimeError, match="active_expert_range should be 2"):
        torch_npu.npu_moe_init_routing_v2(x.npu(), ids.npu(), expert_num=4, active_expert_range=[0])


def test_experts_add_up_over_ranges(made):
    w, b = made
    want = plain_experts(SMALL, w, b.x)
    parts = [experts(SMALL, on("npu", w), b.x.npu(), i, i + 2).cpu().float() for i in (0, 2, 4, 6)]
    close(sum(parts), want)


def test_bug_rows_of_other_experts_are_read(made):
    w, b = made
    with pytest.raises(RefusedError, match=r"reads rows \[-1"):
        experts(SMALL, on("npu", w), b.x.npu(), 0, 2, tame=False)


@pytest.mark.parametrize("place", ["cpu", "npu"])
def test_layer(made, place):
    w, b = made
    want = reference(SMALL, w, altered(b))
    close(layer(SMALL, on(place, w), on(place, b)), want)


@pytest.fixture
def attended(made):
    """A function that returns the error of attention after `changes` to its batch."""
    _, cpu_batch = made
    b = on("npu", cpu_batch)
    q = torch.randn(4, SMALL.heads, SMALL.dim, dtype=DTYPE).npu()
    right = attend(SMALL, q, b).cpu().float()

    def difference(**changes):
        return (attend(SMALL, q, altered(b, **changes)).cpu().float() - right).abs().max()

    assert difference() == 0
    return difference


@pytest.mark.parametrize("ends", [[3, 1], [3], [4, 3]], ids=["lengths", "short", "falling"])
def test_bug_query_lengths_are_not_cumulative(attended, ends):
    with pytest.raises(RefusedError, match="561002"):
        attended(query_ends=ends)


def test_bug_lengths_of_cached_sequences_are_cumulative(attended):
    assert attended(cached=[3, 132]) > 0.01  # reads rows of another sequence
    with pytest.raises(RefusedError, match="not cumulative"):
        attended(cached=[3, 257])


def test_bug_another_number_of_sequences(attended):
    with pytest.raises(RefusedError, match="561002"):
        attended(cached=[3])


def test_bug_mask_is_inverted(attended, made):
    with pytest.raises(RefusedError, match="above the diagonal"):
        attended(mask=(1 - made[1].mask).npu())


def test_bug_scale_is_forgotten(attended):
    assert attended(scale=1.0) > 0.1


def test_bug_a_used_block_is_minus_one(attended):
    attended(table=torch.tensor([[0, -1], [1, 2]], dtype=torch.int32).npu())  # not used
    with pytest.raises(RefusedError, match="per sequence"):
        attended(table=torch.tensor([[0, 3], [1, -1]], dtype=torch.int32).npu())


def test_bug_dtypes(attended, made):
    b = made[1]
    with pytest.raises(RefusedError, match="block_table is int32"):
        attended(table=b.table.long().npu())
    with pytest.raises(RefusedError, match="attention_score takes"):
        attended(cache=b.cache.float().npu())


def test_the_scale_is_1_unless_it_is_passed(made):
    _, cpu_batch = made
    schema = torch.ops.npu.npu_fused_infer_attention_score.default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    assert defaults["scale"] == 1.0
    b = altered(on("npu", cpu_batch), scale=1.0)
    q = torch.randn(4, SMALL.heads, SMALL.dim, dtype=DTYPE)
    keys, values = cpu_batch.cache[:, 0, :3].float().transpose(1, 2)
    q32 = q[:3].float().transpose(0, 1)
    want = F.scaled_dot_product_attention(q32, keys, values, is_causal=True, scale=1)
    close(attend(SMALL, q.npu(), b)[:3], want.transpose(0, 1))


@needs_cache_mode
def test_cache_writes(made):
    _, b = made
    rows = torch.randn(3, SMALL.heads, SMALL.dim, dtype=DTYPE).npu()

    def write(slots, cache, mode="Norm", rows=rows):
        slots = torch.tensor(slots, dtype=torch.int32).npu()
        torch_npu.npu_scatter_pa_kv_cache(rows, rows, cache, cache, slots, cache_mode=mode)
        return cache.cpu().flatten(0, 1)

    cache = b.cache[0].npu()
    written = write([5, -1, 130], cache.clone())
    assert torch.equal(written[[5, 130]], rows[[0, 2]].cpu())
    untouched = torch.ones(4 * BLOCK, dtype=torch.bool)
    untouched[[5, 130]] = False
    assert torch.equal(written[untouched], b.cache[0].flatten(0, 1)[untouched])
    assert write([5, 5, 6], cache.clone())[5].isnan().all(), "two rows race for one slot"
    with pytest.raises(RefusedError, match="PA_NZ"):
        write([0, 1, 2], cache, "PA_NZ")
    with pytest.raises(RefusedError, match="contiguous"):
        write([0, 1, 2], cache, rows=rows.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(RefusedError, match="slots up to 512"):
        write([0, 1, 512], cache)


def test_refusals_of_an_a2():
    x = torch.randn(4, 64).npu()
    with torch.inference_mode():
        with pytest.raises(RefusedError, match="gamma"):
            torch_npu.npu_rms_norm(x.bfloat16(), torch.ones(64, dtype=torch.float16).npu())
        with pytest.raises(RefusedError, match="no empty tensor"):
            torch_npu.npu_swiglu(x[:0])
        with pytest.raises(RefusedError, match="contiguous"):
            torch_npu.npu_swiglu(x.t())
        with pytest.raises(RefusedError, match="groups"):
            torch_npu.npu_grouped_matmul(
                [x],
                [torch.randn(2, 64, 8).npu()],
                group_list=torch.tensor([4, 3]).npu(),
                group_list_type=1,
                group_type=0,
                split_item=2,
            )
        with pytest.raises(RuntimeError, match="same device"):
            torch_npu.npu_rms_norm(x, torch.ones(64))
