"""Products of activations with one matrix or with a bank of experts, by two sets of kernels.

*few*: for so few tokens that two of them rarely share an expert, as in decode of small batches.
Pairs of token and expert are not sorted. Each pair reads the whole matrix of its expert and sums
products; a matrix shared by two pairs comes from the card's cache. Only reading weights takes time.

*grouped*: pairs are sorted by expert (`routing.sort_pairs`), and computed in tiles for the tensor
cores.

In both the first product ends with swiglu. The second product of *few* also sums the weighted
results of a token's experts. In *grouped* the second product leaves one row for each pair, rounded
as the reference rounds it, and a third kernel sums the rows in the order of k.

Weights may have 8 bits with a scale for each output (W8A16: they are widened to 16 bits in the
kernel). Activations may have 8 bits too, with a scale for each row (W8A8: products of 8 bits).
Integer sums are exact, float sums are in float32; scales are applied last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight
from moespan.ops.base import ExpertBank, Weight
from moespan.ops.cuda.routing import Order, sort_pairs
from moespan.ops.cuda.rows import gated, quantize
from moespan.ops.cuda.tiles import tile

# Largest number of tokens for the kernels *few*.
FEW_TOKENS = 4
# Elements of a row that one program of the last sum handles.
_BLOCK = 512


@dataclass(frozen=True)
class Matrix:
    """A weight as the kernels take it: one matrix [out, in] or a bank [E, out, in].

    Attributes:
        scales: float32 [..., out] where `values` are int8 or float8_e4m3fn; else None.
        rounds_activations: whether activations are rounded to the dtype of `values`.
    """

    values: Tensor
    scales: Tensor | None
    rounds_activations: bool

    @classmethod
    def of(cls, weight: Weight) -> Matrix:
        """From a tensor or a `QuantizedWeight`."""
        if isinstance(weight, QuantizedWeight):
            return cls(weight.values, weight.scales, weight.activation_bits == 8)
        return cls(weight, None, False)

    @property
    def out_width(self) -> int:
        """Outputs of one matrix."""
        return int(self.values.shape[-2])

    @property
    def in_width(self) -> int:
        """Inputs of one matrix."""
        return int(self.values.shape[-1])

    @property
    def num_experts(self) -> int:
        """Matrices of a bank."""
        return int(self.values.shape[0])

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [R, in] as this weight needs it: 8 bits with a scale for each row, or unchanged."""
        x = x.contiguous()
        return quantize(x, self.values.dtype) if self.rounds_activations else (x, None)


@triton.jit
def _few_rows(
    x,
    weight,
    columns,
    outs,
    start,
    WIDTH: tl.constexpr,
    OUTS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Products of K elements of one row of x with N rows of a matrix: [N, K]."""
    mask = columns < WIDTH
    value = tl.load(x + columns, mask=mask, other=0.0).to(KIND)
    at = (start + outs)[:, None] * WIDTH + columns[None, :]
    matrix = tl.load(weight + at, mask=(outs < OUTS)[:, None] & mask[None, :], other=0.0)
    return matrix.to(KIND) * value[None, :]


@triton.jit(do_not_specialize=["first"])
def _few_gate_up_kernel(
    x,
    x_scales,
    physical_ids,
    weight,
    weight_scales,
    hidden,
    first,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """BLOCK_N elements of swiglu(gate_up(x)) for one pair; pairs of other ranks are skipped."""
    pair = tl.program_id(1).to(tl.int64)
    expert = pair * 0
    if HAS_IDS:
        expert = tl.load(physical_ids + pair).to(tl.int64) - first
        if (expert < 0) | (expert >= NUM_EXPERTS):
            return
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = pair // NUM_CHOSEN
    matrix = weight + expert * (2 * INNER * WIDTH)
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    gate = tl.zeros([BLOCK_N, BLOCK_K], kind)
    up = tl.zeros([BLOCK_N, BLOCK_K], kind)
    for at in range(0, WIDTH, BLOCK_K):
        columns = at + tl.arange(0, BLOCK_K)
        gate += _few_rows(x + token * WIDTH, matrix, columns, outs, 0, WIDTH, INNER, kind)
        up += _few_rows(x + token * WIDTH, matrix, columns, outs, INNER, WIDTH, INNER, kind)
    g = tl.sum(gate, 1).to(tl.float32)
    u = tl.sum(up, 1).to(tl.float32)
    mask = outs < INNER
    if HAS_SCALES:
        scales = weight_scales + expert * (2 * INNER) + outs
        g *= tl.load(scales, mask=mask, other=0.0)
        u *= tl.load(scales + INNER, mask=mask, other=0.0)
    if ROUNDS:
        x_scale = tl.load(x_scales + token)
        g *= x_scale
        u *= x_scale
    value = gated(g, u, hidden.dtype.element_ty)
    tl.store(hidden + pair * INNER + outs, value, mask=mask)


@triton.jit(do_not_specialize=["first"])
def _few_down_kernel(
    hidden,
    hidden_scales,
    physical_ids,
    pair_weights,
    weight,
    weight_scales,
    onto,
    out,
    first,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_ONTO: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """BLOCK_N elements of a token's output: the weighted sum over its experts in order of k."""
    token = tl.program_id(1).to(tl.int64)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = outs < WIDTH
    total = tl.zeros([BLOCK_N], tl.float32)
    kind: tl.constexpr = tl.int32 if hidden.dtype.element_ty == tl.int8 else tl.float32
    for k in range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + k
        expert = pair * 0
        if HAS_IDS:
            expert = tl.load(physical_ids + pair).to(tl.int64) - first
        if (expert >= 0) & (expert < NUM_EXPERTS):
            acc = tl.zeros([BLOCK_N, BLOCK_K], kind)
            matrix = weight + expert * (WIDTH * INNER)
            for at in range(0, INNER, BLOCK_K):
                columns = at + tl.arange(0, BLOCK_K)
                row = hidden + pair * INNER
                acc += _few_rows(row, matrix, columns, outs, 0, INNER, WIDTH, kind)
            result = tl.sum(acc, 1).to(tl.float32)
            if HAS_SCALES:
                result *= tl.load(weight_scales + expert * WIDTH + outs, mask=mask, other=0.0)
            if ROUNDS:
                result *= tl.load(hidden_scales + pair)
            if HAS_IDS:
                result *= tl.load(pair_weights + pair)
            total += result
    to = token * WIDTH + outs
    if HAS_ONTO:
        total += tl.load(onto + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tile_of(tiles, index, num_rows, BLOCK_M: tl.constexpr, IS_GROUPED: tl.constexpr):
    """(expert, first row, rows) of a tile."""
    if IS_GROUPED:
        entry = tiles + 3 * index
        return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    else:
        start = index * BLOCK_M
        return tl.zeros([], tl.int64), start, tl.minimum(BLOCK_M, num_rows - start)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b. A Hopper card sums products of 8-bit floats in fewer bits than float32 has. Here
    only the sum within one tile does so, as DeepSeek-V3 (arXiv:2412.19437, 3.3.2) found necessary.
    """
    depth: tl.constexpr = a.shape[1] if a.dtype == tl.float8e4nv else 0
    return tl.dot(
        a,
        b,
        acc,
        input_precision=PRECISION,
        max_num_imprecise_acc=depth,
        out_dtype=acc.dtype,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x,
    x_scales,
    pairs,
    tiles,
    weight,
    weight_scales,
    hidden,
    num_rows,
    NUM_CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of swiglu(gate_up(x)), gate and up side by side."""
    num_columns: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0) // num_columns
    expert, start, rows = _tile_of(tiles, index, num_rows, BLOCK_M, IS_GROUPED)
    if rows == 0:
        return
    member = tl.arange(0, BLOCK_M)
    is_row = member < rows
    row = (start + member).to(tl.int64)
    token = row
    if IS_GROUPED:
        token = tl.load(pairs + row, mask=is_row, other=0).to(tl.int64) // NUM_CHOSEN
    token = tl.where(is_row, token, 0)
    outs = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end read the first row of the matrix; their results are not stored.
    known = tl.where(outs < INNER, outs, 0)
    depth = tl.arange(0, BLOCK_K)
    left = x + token[:, None] * WIDTH + depth[None, :]
    right = weight + expert * (2 * INNER * WIDTH) + known[None, :] * WIDTH + depth[:, None]
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    gate = tl.zeros([BLOCK_M, BLOCK_N], kind)
    up = tl.zeros([BLOCK_M, BLOCK_N], kind)
    for at in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            a = tl.load(left + at)
            g = tl.load(right + at)
            u = tl.load(right + INNER * WIDTH + at)
        else:
            mask = depth < WIDTH - at
            a = tl.load(left + at, mask=mask[None, :], other=0.0)
            g = tl.load(right + at, mask=mask[:, None], other=0.0)
            u = tl.load(right + INNER * WIDTH + at, mask=mask[:, None], other=0.0)
        gate = _dot(a, g.to(a.dtype), gate, PRECISION)
        up = _dot(a, u.to(a.dtype), up, PRECISION)
    g_value = gate.to(tl.float32)
    u_value = up.to(tl.float32)
    if HAS_SCALES:
        scales = weight_scales + expert * (2 * INNER) + known
        g_value *= tl.load(scales)[None, :]
        u_value *= tl.load(scales + INNER)[None, :]
    if ROUNDS:
        x_scale = tl.load(x_scales + token)[:, None]
        g_value *= x_scale
        u_value *= x_scale
    value = gated(g_value, u_value, hidden.dtype.element_ty)
    to = hidden + row[:, None] * INNER + outs[None, :]
    mask = is_row[:, None] & (outs < INNER)[None, :]
    tl.store(to, value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _down_kernel(
    hidden,
    hidden_scales,
    pairs,
    tiles,
    weight,
    weight_scales,
    onto,
    out,
    num_rows,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    HAS_ONTO: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ROUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows times a matrix; a row of a grouped product is stored at its pair's place."""
    num_columns: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0) // num_columns
    expert, start, rows = _tile_of(tiles, index, num_rows, BLOCK_M, IS_GROUPED)
    if rows == 0:
        return
    member = tl.arange(0, BLOCK_M)
    is_row = member < rows
    row = tl.where(is_row, start + member, start).to(tl.int64)
    place = row
    if IS_GROUPED:
        place = tl.load(pairs + row).to(tl.int64)
    outs = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    known = tl.where(outs < WIDTH, outs, 0)
    depth = tl.arange(0, BLOCK_K)
    left = hidden + row[:, None] * INNER + depth[None, :]
    right = weight + expert * (WIDTH * INNER) + known[None, :] * INNER + depth[:, None]
    kind: tl.constexpr = tl.int32 if hidden.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], kind)
    for at in range(0, INNER, BLOCK_K):
        if INNER % BLOCK_K == 0:
            a = tl.load(left + at)
            b = tl.load(right + at)
        else:
            mask = depth < INNER - at
            a = tl.load(left + at, mask=mask[None, :], other=0.0)
            b = tl.load(right + at, mask=mask[:, None], other=0.0)
        acc = _dot(a, b.to(a.dtype), acc, PRECISION)
    value = acc.to(tl.float32)
    if HAS_SCALES:
        value *= tl.load(weight_scales + expert * WIDTH + known)[None, :]
    if ROUNDS:
        value *= tl.load(hidden_scales + row)[:, None]
    to = place[:, None] * WIDTH + outs[None, :]
    mask = is_row[:, None] & (outs < WIDTH)[None, :]
    if HAS_ONTO:
        value += tl.load(onto + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def _sum_kernel(
    results,
    pair_weights,
    physical_ids,
    out,
    first,
    NUM_EXPERTS: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weighted sum of a token's pairs, in the order of k. Rows of other ranks' pairs were never
    written, and are not read."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + k
        expert = tl.load(physical_ids + pair).to(tl.int64) - first
        is_here = (expert >= 0) & (expert < NUM_EXPERTS)
        row = tl.load(results + pair * WIDTH + columns, mask=mask & is_here, other=0.0)
        total += row.to(tl.float32) * tl.load(pair_weights + pair)
    tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=mask)


def linear(x: Tensor, weight: Matrix, onto: Tensor | None = None) -> Tensor:
    """x·Wᵀ (+ `onto` [T, out]): [T, in] → [T, out] in x's dtype."""
    out = x.new_empty(len(x), weight.out_width)
    if not out.numel():
        return out
    values, scales = weight.activations(x)
    if len(x) <= FEW_TOKENS:
        _few_down(values, scales, None, None, weight, onto, out, 0)
    else:
        _down(values, scales, None, weight, onto, out)
    return out


def mlp(x: Tensor, gate_up: Matrix, down: Matrix, onto: Tensor | None = None) -> Tensor:
    """down(swiglu(gate_up(x))) (+ `onto`): [T, H] → [T, H] in x's dtype."""
    if not x.numel():
        return torch.empty_like(x)
    values, scales = gate_up.activations(x)
    hidden = x.new_empty(len(x), down.in_width)
    if len(x) <= FEW_TOKENS:
        _few_gate_up(values, scales, None, gate_up, hidden, 0, 1)
    else:
        _gate_up(values, scales, None, gate_up, hidden, 1)
    return linear(hidden, down, onto)


def experts(x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank) -> Tensor:
    """`Ops.experts`. With unquantised weights two launches for few tokens, else four or five."""
    out = torch.empty_like(x)
    if not x.numel():
        return out
    gate_up, down, first = Matrix.of(bank.gate_up), Matrix.of(bank.down), bank.first
    num_chosen = physical_ids.shape[1]
    weights, physical_ids = weights.contiguous(), physical_ids.contiguous()
    values, scales = gate_up.activations(x)
    hidden = x.new_empty(physical_ids.numel(), down.in_width)
    if len(x) <= FEW_TOKENS:
        if down.rounds_activations:
            hidden.zero_()  # rows of other ranks' pairs, never written, are rounded too
        _few_gate_up(values, scales, physical_ids, gate_up, hidden, first, num_chosen)
        values, scales = down.activations(hidden)
        _few_down(values, scales, physical_ids, weights, down, None, out, first)
        return out
    rows = triton.cdiv(physical_ids.numel(), bank.num_physical)
    sizes = tile("down", rows, down.out_width, down.in_width, down.values.dtype, x.device)
    order = sort_pairs(physical_ids, first, gate_up.num_experts, sizes["BLOCK_M"])
    _gate_up(values, scales, order, gate_up, hidden, num_chosen, rows)
    values, scales = down.activations(hidden)
    results = x.new_empty(physical_ids.numel(), down.out_width)
    _down(values, scales, order, down, None, results, rows)
    width = x.shape[1]
    _sum_kernel[(len(x), triton.cdiv(width, _BLOCK))](
        results,
        weights,
        physical_ids,
        out,
        first,
        NUM_EXPERTS=gate_up.num_experts,
        NUM_CHOSEN=num_chosen,
        WIDTH=width,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
    )
    return out


def _few_gate_up(
    x: Tensor,
    x_scales: Tensor | None,
    physical_ids: Tensor | None,
    weight: Matrix,
    hidden: Tensor,
    first: int,
    num_chosen: int,
) -> None:
    inner = weight.out_width // 2
    sizes = tile("few_gate_up", 1, inner, weight.in_width, weight.values.dtype, x.device)
    _few_gate_up_kernel[(triton.cdiv(inner, sizes["BLOCK_N"]), len(hidden))](
        x,
        x_scales,
        physical_ids,
        weight.values,
        weight.scales,
        hidden,
        first,
        NUM_EXPERTS=1 if physical_ids is None else weight.num_experts,
        NUM_CHOSEN=num_chosen,
        WIDTH=weight.in_width,
        INNER=inner,
        HAS_IDS=physical_ids is not None,
        HAS_SCALES=weight.scales is not None,
        ROUNDS=x_scales is not None,
        **_fitting(sizes, weight.in_width),
    )


def _few_down(
    hidden: Tensor,
    hidden_scales: Tensor | None,
    physical_ids: Tensor | None,
    pair_weights: Tensor | None,
    weight: Matrix,
    onto: Tensor | None,
    out: Tensor,
    first: int,
) -> None:
    width, inner = weight.out_width, weight.in_width
    sizes = tile("few_down", 1, width, inner, weight.values.dtype, out.device)
    _few_down_kernel[(triton.cdiv(width, sizes["BLOCK_N"]), len(out))](
        hidden,
        hidden_scales,
        physical_ids,
        pair_weights,
        weight.values,
        weight.scales,
        onto,
        out,
        first,
        NUM_EXPERTS=1 if physical_ids is None else weight.num_experts,
        NUM_CHOSEN=1 if physical_ids is None else physical_ids.shape[1],
        WIDTH=width,
        INNER=inner,
        HAS_IDS=physical_ids is not None,
        HAS_ONTO=onto is not None,
        HAS_SCALES=weight.scales is not None,
        ROUNDS=hidden_scales is not None,
        **_fitting(sizes, inner),
    )


def _gate_up(
    x: Tensor,
    x_scales: Tensor | None,
    order: Order | None,
    weight: Matrix,
    hidden: Tensor,
    num_chosen: int,
    rows: int = 0,
) -> None:
    inner = weight.out_width // 2
    num_rows = len(hidden)
    sizes = tile("gate_up", rows or num_rows, inner, weight.in_width, weight.values.dtype, x.device)
    if order is not None:
        sizes["BLOCK_M"] = order.block_m
    num_tiles = triton.cdiv(num_rows, sizes["BLOCK_M"]) if order is None else len(order.tiles)
    _gate_up_kernel[(num_tiles * triton.cdiv(inner, sizes["BLOCK_N"]),)](
        x,
        x_scales,
        None if order is None else order.pairs,
        None if order is None else order.tiles,
        weight.values,
        weight.scales,
        hidden,
        num_rows,
        NUM_CHOSEN=num_chosen,
        WIDTH=weight.in_width,
        INNER=inner,
        IS_GROUPED=order is not None,
        HAS_SCALES=weight.scales is not None,
        ROUNDS=x_scales is not None,
        PRECISION=_precision(hidden),
        **sizes,
    )


def _down(
    hidden: Tensor,
    hidden_scales: Tensor | None,
    order: Order | None,
    weight: Matrix,
    onto: Tensor | None,
    out: Tensor,
    rows: int = 0,
) -> None:
    width, inner, num_rows = weight.out_width, weight.in_width, len(hidden)
    sizes = tile("down", rows or num_rows, width, inner, weight.values.dtype, out.device)
    num_tiles = triton.cdiv(num_rows, sizes["BLOCK_M"]) if order is None else len(order.tiles)
    _down_kernel[(num_tiles * triton.cdiv(width, sizes["BLOCK_N"]),)](
        hidden,
        hidden_scales,
        None if order is None else order.pairs,
        None if order is None else order.tiles,
        weight.values,
        weight.scales,
        onto,
        out,
        num_rows,
        WIDTH=width,
        INNER=inner,
        IS_GROUPED=order is not None,
        HAS_ONTO=onto is not None,
        HAS_SCALES=weight.scales is not None,
        ROUNDS=hidden_scales is not None,
        PRECISION=_precision(out),
        **sizes,
    )


def _fitting(sizes: dict[str, int], in_width: int) -> dict[str, int]:
    """`sizes`, with BLOCK_K reduced for rows that are shorter."""
    short = triton.next_power_of_2(in_width)
    return {**sizes, "BLOCK_K": min(sizes["BLOCK_K"], short)}


def _precision(x: Tensor) -> str:
    """`input_precision` of tl.dot: exact for float32, without effect on other dtypes."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
