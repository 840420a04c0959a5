"""The operators for 8-bit integers in the stand-in: results as documented, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from ascend_sim.rules import RefusedError

FLOATS = [torch.bfloat16, torch.float16]
COUNTS = [2, 0, 3]  # rows of three experts; a sixth row belongs to none


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def positive(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) + 0.1


def close(got, want, dtype=torch.float32):
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    error = (got.cpu().float() - want.float()).abs().max() / want.abs().max()
    assert error <= tolerance, error


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_rounded_by_their_largest(dtype):
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 100.0, 0.3]], dtype=dtype)
    values, scales = torch_npu.npu_dynamic_quant(x.npu())
    close(scales, torch.tensor([2 / 127, 100 / 127]))
    assert values.tolist() == [[64, -127, 32], [0, 127, 0]]
    of_heads, of_each = torch_npu.npu_dynamic_quant(x.view(1, 2, 3).npu())
    assert (of_heads.shape, of_each.shape) == ((1, 2, 3), (1, 2))
    with pytest.raises(RefusedError, match="float32"):
        torch_npu.npu_dynamic_quant(x.float().npu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_one_matrix(dtype, has_bias):
    x, weight, scale, rows = integers(5, 96), integers(7, 96), positive(7) / 1e4, positive(5)
    bias = positive(7) if has_bias else None
    on_device = None if bias is None else bias.npu()
    want = (x.double() @ weight.t().double()).float() * scale * rows[:, None]
    want = want if bias is None else want + bias
    arguments = x.npu(), weight.npu().t(), scale.npu()
    kwargs = {"pertoken_scale": rows.npu(), "bias": on_device, "output_dtype": dtype}
    close(torch_npu.npu_quant_matmul(*arguments, **kwargs), want, dtype)

    floats, scale = positive(5, 96).to(dtype), scale.to(dtype)
    want = floats.float() @ (weight.float() * scale.float()[:, None]).t()
    want = want if bias is None else want + bias
    if bias is not None and dtype == torch.float16:
        on_device = bias.half().npu()
    found = torch_npu.npu_weight_quant_batchmatmul(
        floats.npu(), weight.npu().t(), scale.npu(), bias=on_device
    )
    close(found, want, dtype)


def grouped(x, weight, **kwargs):
    kwargs = {name: [x.npu()] if torch.is_tensor(x) else x for name, x in kwargs.items()}
    return torch_npu.npu_grouped_matmul(
        [x.npu()],
        [weight.npu()],
        group_list=torch.tensor(COUNTS).npu(),
        group_list_type=1,
        group_type=0,
        split_item=2,
        **kwargs,
    )[0]


EXPERT = torch.tensor([0, 0, 2, 2, 2])


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_of_each_expert(dtype):
    x, weight, scale, rows = integers(6, 32), integers(3, 32, 16), positive(3, 16), positive(6)
    sums = torch.einsum("rk,rkn->rn", x[:5].double(), weight[EXPERT].double())
    found = grouped(x, weight, output_dtype=torch.int32)
    assert torch.equal(found[:5].cpu(), sums.int())
    assert (found[5] == -(2**31)).all(), "a row of no group is old memory"

    scale = scale.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32) / 1e4
    want = sums.float() * scale[EXPERT].float() * rows[:5, None]
    close(
        grouped(x, weight, scale=scale, per_token_scale=rows, output_dtype=dtype)[:5], want, dtype
    )

    floats, scale = positive(6, 32).to(dtype), scale.to(dtype)
    matrices = weight[EXPERT].float() * scale[EXPERT].float()[:, None]
    want = torch.einsum("rk,rkn->rn", floats[:5].float(), matrices)
    offset = torch.zeros_like(scale)
    found = grouped(floats, weight, antiquant_scale=scale, antiquant_offset=offset)
    close(found[:5], want, dtype)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"output_dtype": torch.bfloat16}, "to torch.bfloat16 with"),
        ({"scale": torch.float32, "output_dtype": torch.bfloat16}, "to torch.bfloat16 with"),
        ({"scale": torch.bfloat16, "output_dtype": torch.float16}, "to torch.float16 with"),
        ({"antiquant_scale": torch.bfloat16}, "to None with"),
    ],
    ids=str,
)
def test_refused_combinations_of_dtypes_for_experts(given, why):
    kwargs = {
        name: torch.ones(3, 16, dtype=value) if "scale" in name else value
        for name, value in given.items()
    }
    if "scale" in kwargs:
        kwargs["per_token_scale"] = torch.ones(6)
    with pytest.raises(RefusedError, match=why):
        grouped(integers(6, 32), integers(3, 32, 16), **kwargs)
    with pytest.raises(RefusedError, match="takes antiquant_scale and antiquant_offset"):
        scale = torch.ones(3, 16).bfloat16()
        grouped(positive(6, 32).bfloat16(), integers(3, 32, 16), antiquant_scale=scale)


def swiglu(width=64, counts=COUNTS, **changes):
    x = integers(6, 2 * width).int() * 50
    given = {"weight_scale": positive(3, 2 * width) / 1e4, "activation_scale": positive(6, 1)}
    given |= {"group_index": torch.tensor(counts), **changes}
    found = torch_npu.npu_dequant_swiglu_quant(
        x.npu(),
        activate_left=True,
        quant_mode=1,
        **{name: value.npu() for name, value in given.items()},
    )
    return x, given, found


def test_swiglu_of_sums_is_rounded_again():
    x, given, (values, scales) = swiglu()
    floats = x[:5] * given["weight_scale"][EXPERT] * given["activation_scale"][:5]
    gate, up = floats.chunk(2, 1)
    want = F.silu(gate) * up
    close(scales[:5], want.abs().amax(1) / 127)
    error = (values[:5].cpu() * scales[:5, None].cpu() - want).abs()
    assert (error <= scales[:5, None].cpu() * 0.501).all()
    assert scales[5].isnan().all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"width": 88}, "a width of 88"),
        ({"counts": [2, 2, 5]}, "are counts of 6 rows"),  # and not their running sum
        ({"activation_scale": torch.ones(6)}, r"activation_scale is float32 \[6, 1\]"),
        ({"weight_scale": torch.ones(3, 128).bfloat16()}, "weight_scale is float32"),
    ],
    ids=str,
)
def test_refusals_of_the_fused_swiglu(change, why):
    with pytest.raises(RefusedError, match=why):
        swiglu(**change)


def test_routing_rounds_each_row():
    x, chosen = positive(4, 32).bfloat16(), torch.tensor([[3, 0], [1, 3], [2, 0], [0, 1]]).int()
    rows, _, counts, scales = torch_npu.npu_moe_init_routing_v2(
        x.npu(),
        chosen.npu(),
        active_num=8,
        expert_num=4,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[1, 3],
        quant_mode=1,
    )
    values, each = torch_npu.npu_dynamic_quant(x[[1, 3, 2]].npu())
    assert counts.tolist() == [2, 1]
    assert torch.equal(rows[:3].cpu(), values.cpu())
    assert torch.equal(scales[:3].cpu(), each.cpu())
    assert scales[3:].isnan().all()


def attend(q=None, layout="BSND", size=32, **changes):
    q = positive(2, 1, 4, 128).bfloat16() if q is None else q
    shape = (3, size, 2, 128)
    keys, values = integers(*shape), integers(*shape, seed=1)
    scales = [positive(3, 2, size, seed=seed) / 127 for seed in (0, 1)]
    given = {"key_antiquant_scale": scales[0], "value_antiquant_scale": scales[1], **changes}
    out = torch_npu.npu_fused_infer_attention_score(
        q.npu(),
        keys.npu().flatten(2),
        values.npu().flatten(2),
        key_antiquant_mode=5,
        value_antiquant_mode=5,
        actual_seq_lengths=[1, 2] if layout == "TND" else None,
        actual_seq_lengths_kv=[size + 5, 3],
        block_table=torch.tensor([[2, 0], [1, 0]], dtype=torch.int32).npu(),
        num_heads=4,
        num_key_value_heads=2,
        scale=0.3,
        input_layout=layout,
        block_size=size,
        **{name: value.npu() for name, value in given.items()},
    )[0]
    return q, keys, values, scales, out


def test_attention_over_integers_with_a_scale_for_each_token_and_head():
    q, keys, values, scales, out = attend()
    for row, (blocks, length) in enumerate((([2, 0], 37), ([1], 3))):
        k, v = (
            (part[blocks].float() * scale[blocks].transpose(1, 2)[..., None]).flatten(0, 1)[:length]
            for part, scale in zip((keys, values), scales, strict=True)
        )
        k, v = (part.repeat_interleave(2, 1).transpose(0, 1) for part in (k, v))
        query = q[row].float().transpose(0, 1)
        want = F.scaled_dot_product_attention(query, k, v, scale=0.3)
        close(out[row], want.transpose(0, 1), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": torch.ones(2, 2, 4, 128).bfloat16()}, "one query each"),
        ({"q": torch.ones(2, 4, 128).bfloat16(), "layout": "TND"}, "one query each"),
        ({"key_antiquant_scale": torch.ones(3, 32, 2)}, r"float32 \(3, 2, 32\)"),
        ({"value_antiquant_scale": torch.ones(3, 2, 32).bfloat16()}, "scales are float32"),
        ({"size": 16}, "not a multiple of 32"),
    ],
    ids=str,
)
def test_refusals_of_attention_over_integers(change, why):
    with pytest.raises(RefusedError, match=why):
        attend(**change)


def test_matrices_that_are_too_large_or_in_tiles():
    x, weight = positive(2, 8).bfloat16().npu(), integers(65536, 8).npu()
    scale = torch.ones(65536).npu()
    with pytest.raises(RefusedError, match="above 65535"):
        torch_npu.npu_weight_quant_batchmatmul(x, weight.t(), scale.bfloat16())
    torch.npu.config.allow_internal_format = True
    tiled = torch_npu.npu_format_cast(integers(32, 64).npu(), 29)
    with pytest.raises(RefusedError, match="NZ is for whole matrices"):
        torch_npu.npu_weight_quant_batchmatmul(
            positive(2, 32).bfloat16().npu(), tiled, torch.ones(64).bfloat16().npu()
        )
