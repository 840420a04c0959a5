"""CPU kernels for the operators of torch_npu on 8-bit integers, as their documents define them.

The limits of an Atlas A2 come from the operators' pages in Ascend/op-plugin and from the checks in
CANN's sources (ops-transformer, ops-nn). Sums of integer products are exact here; rounding is to
the nearest, half to even.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_sim.rules import HALVES, demand, kernel, plain, poison_of, uninitialised, unknown

MOST = 127
MOST_SIZE = 65535
# torch's numbers of its dtypes, as `output_dtype` arrives.
TYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def round_by_rows(x):
    """int8 [..., W] and float32 scales [...].

    The integers of a row of zeros are undefined: poison.
    """
    largest = x.float().abs().amax(-1)
    scale = largest / MOST
    y = (x.float() / scale.unsqueeze(-1)).round()
    y = y.masked_fill((largest == 0).unsqueeze(-1), poison_of(torch.int8))
    return y.to(torch.int8), scale


def exact(x, weight):
    """The int32 product of two integer matrices; float64 holds each of its sums exactly."""
    return (x.double() @ weight.double()).to(torch.int32)


@kernel("npu::npu_dynamic_quant")
def dynamic_quant(
    x, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0
):
    name = "npu_dynamic_quant"
    unknown(smooth_scales=smooth_scales, group_index=group_index, dst_type_max=dst_type_max)
    demand(x.dtype in HALVES and x.dim() > 1, f"{name}: {x.dtype} of {x.dim()} dims")
    demand(dst_type in (None, 1), f"{name}: {dst_type=}")
    demand(quant_mode == "pertoken", f"{name}: {quant_mode=} is not for an A2")
    return round_by_rows(x)


def check_weight(name, x, weight):
    demand(
        x.dim() == weight.dim() == 2 and x.size(1) == weight.size(0),
        f"{name}: {tuple(x.shape)} by {tuple(weight.shape)}",
    )
    demand(x.numel() and weight.numel(), f"{name} takes no empty tensor")
    demand(
        weight.is_contiguous() or weight.t().is_contiguous(),
        f"{name}: the weight has strides {weight.stride()}",
    )
    demand(
        max(weight.shape) <= MOST_SIZE,
        f"{name}: a weight of {tuple(weight.shape)} is above {MOST_SIZE}",
    )


@kernel("npu::npu_quant_matmul")
def quant_matmul(
    x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, **others
):
    name = "npu_quant_matmul"
    unknown(offset=offset, **others)
    demand(x1.dtype == x2.dtype == torch.int8, f"{name}: {x1.dtype} by {x2.dtype}")
    check_weight(name, x1, x2)
    plain(name, x1)
    output = TYPES[output_dtype] if output_dtype is not None else torch.int8
    if pertoken_scale is None or output not in HALVES:
        raise NotImplementedError(f"the simulator knows {name} with pertoken_scale, to 16 bits")
    scales = (torch.float32, torch.bfloat16) if output == torch.bfloat16 else (torch.float32,)
    demand(
        scale.dtype in scales and scale.shape in ((x2.size(1),), (1,)),
        f"{name}: scale {scale.dtype} {tuple(scale.shape)} for {output} and {x2.size(1)} columns",
    )
    demand(
        pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == x1.shape[:1],
        f"{name}: pertoken_scale {pertoken_scale.dtype} {tuple(pertoken_scale.shape)}",
    )
    y = exact(x1, x2).float() * scale.float() * pertoken_scale.unsqueeze(1)
    if bias is not None:
        demand(
            bias.dtype in (torch.float32, output) and bias.shape == (x2.size(1),),
            f"{name}: bias {bias.dtype} {tuple(bias.shape)} for {output}",
        )
        y = y + bias.float()
    return y.to(output)


@kernel("npu::npu_weight_quant_batchmatmul")
def weight_quant_batchmatmul(
    x,
    weight,
    antiquant_scale,
    antiquant_offset=None,
    quant_scale=None,
    quant_offset=None,
    bias=None,
    antiquant_group_size=0,
    inner_precise=0,
    weight_dtype=None,
):
    name = "npu_weight_quant_batchmatmul"
    unknown(quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    unknown(antiquant_group_size=antiquant_group_size, inner_precise=inner_precise)
    demand(x.dtype in HALVES and weight.dtype == torch.int8, f"{name}: {x.dtype} by {weight.dtype}")
    check_weight(name, x, weight)
    for part in (antiquant_scale, antiquant_offset):
        demand(
            part is None
            or (part.dtype == x.dtype and part.shape in ((weight.size(1),), (1, weight.size(1)))),
            f"{name}: a scale or an offset is of x's dtype, one for each of {weight.size(1)} "
            "columns",
        )
    matrix = weight.float()
    if antiquant_offset is not None:
        matrix = matrix + antiquant_offset.float()
    y = x.float() @ (matrix * antiquant_scale.float())
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        demand(
            bias.dtype == wanted and bias.shape == (weight.size(1),) and bias.is_contiguous(),
            f"{name}: bias {bias.dtype} {tuple(bias.shape)} for {x.dtype}",
        )
        y = y + bias.float()
    return y.to(x.dtype)


@kernel("npu::npu_dequant_swiglu_quant")
def dequant_swiglu_quant(
    x,
    *,
    weight_scale=None,
    activation_scale=None,
    bias=None,
    quant_scale=None,
    quant_offset=None,
    group_index=None,
    activate_left=False,
    quant_mode=0,
    dst_type=None,
    round_mode=None,
    activate_dim=None,
    swiglu_mode=0,
    clamp_limit=7.0,
    glu_alpha=1.702,
    glu_bias=1.0,
):
    """Rows in groups; rows of no group stay unwritten."""
    name = "npu_dequant_swiglu_quant"
    unknown(bias=bias, quant_scale=quant_scale, quant_offset=quant_offset, dst_type=dst_type)
    unknown(round_mode=round_mode, activate_dim=activate_dim, swiglu_mode=swiglu_mode)
    if x.dtype != torch.int32 or group_index is None or quant_mode != 1:
        raise NotImplementedError(f"the simulator knows {name} of groups of int32, quant_mode=1")
    plain(name, x)
    width = x.size(1) // 2
    demand(
        x.size(1) % 2 == 0 and width % 64 == 0 and width <= 10496,
        f"{name} of groups: a width of {width} is not a multiple of 64 up to 10496",
    )
    demand(
        weight_scale is not None
        and weight_scale.dtype == torch.float32
        and weight_scale.shape == (len(group_index), x.size(1)),
        f"{name}: weight_scale is float32 [groups, {x.size(1)}]",
    )
    demand(
        activation_scale is not None
        and activation_scale.dtype == torch.float32
        and activation_scale.shape == (len(x), 1),
        f"{name}: activation_scale is float32 [{len(x)}, 1]",
    )
    demand(
        group_index.dtype == torch.int64 and 0 <= int(group_index.sum()) <= len(x),
        f"{name}: groups {group_index.tolist()} are counts of {len(x)} rows",
    )
    total = int(group_index.sum())
    group = torch.arange(len(group_index)).repeat_interleave(group_index)
    halves = (x[:total].float() * weight_scale[group] * activation_scale[:total]).chunk(2, 1)
    gate, up = halves if activate_left else halves[::-1]
    y, scale = uninitialised((len(x), width), torch.int8), uninitialised((len(x),), torch.float32)
    y[:total], scale[:total] = round_by_rows(F.silu(gate) * up)
    return y, scale


# Arguments of a grouped matmul that are lists of one tensor.
QUANTITIES = ("scale", "per_token_scale", "antiquant_scale", "antiquant_offset")


def integer_product(x, weight, quantities, output_dtype):
    """The product of a group of rows with a matrix of the int8 bank [E, K, N], and its dtype.

    The combinations of dtypes are those that CANN checks (aclnn_grouped_matmul.cpp). Rows of int8
    without scales give int32. With scales of columns and of rows they give bfloat16 if the columns'
    scales are bfloat16, and float16 if these are float32. Rows of 16 bits need scales and offsets
    of their own dtype.
    """
    name = "npu_grouped_matmul of int8"
    given = {key: value[0] for key, value in quantities.items() if value}
    demand(weight.dim() == 3, f"{name}: the simulator knows one bank, not {tuple(weight.shape)}")
    for key, value in given.items():
        shape = (len(x),) if key == "per_token_scale" else (len(weight), weight.size(2))
        demand(value.shape == shape, f"{name}: {key} {tuple(value.shape)}, which is {shape}")
        demand(value.is_contiguous(), f"{name}: {key} has strides {value.stride()}")
    kinds = {key: value.dtype for key, value in given.items()}
    output = TYPES.get(output_dtype)
    if x.dtype in HALVES:
        demand(
            kinds == dict.fromkeys(("antiquant_scale", "antiquant_offset"), x.dtype)
            and output in (None, x.dtype),
            f"{name} by {x.dtype} takes antiquant_scale and antiquant_offset of it, not {kinds}",
        )

        def product(rows, i, places):
            matrix = weight[i].float() + given["antiquant_offset"][i].float()
            return (rows.float() @ (matrix * given["antiquant_scale"][i].float())).to(x.dtype)

        return product, x.dtype
    scale = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}.get(output)
    demand(
        x.dtype == torch.int8
        and (
            (output == torch.int32 and not kinds)
            or (scale and kinds == {"scale": scale, "per_token_scale": torch.float32})
        ),
        f"{name}: {x.dtype} to {output} with {kinds}",
    )

    def scaled_product(rows, i, places):
        sums = exact(rows, weight[i])
        if not kinds:
            return sums
        scales = given["scale"][i].float() * given["per_token_scale"][places].unsqueeze(1)
        return (sums.float() * scales).to(output)

    return scaled_product, output


def check_scales(key, key_scale, value_scale, modes, layout, queries, block_table, heads, size):
    """Check an int8 cache as an A2 takes it: paged, one query for each sequence, not TND, and one
    scale for each token and head (mode 5), in blocks like the cache."""
    name = "npu_fused_infer_attention_score of int8"
    if modes != (5, 5):
        raise NotImplementedError(f"the simulator knows {name} with modes 5 and 5, not {modes}")
    demand(layout != "TND" and all(len(one) == 1 for one in queries), f"{name}: one query each")
    demand(block_table is not None, f"{name}: modes 5 go with a block_table")
    for scale in (key_scale, value_scale):
        demand(
            scale is not None
            and scale.dtype == torch.float32
            and scale.shape == (len(key), heads, size)
            and scale.is_contiguous(),
            f"{name}: scales are float32 {(len(key), heads, size)}",
        )
