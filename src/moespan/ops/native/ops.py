"""Operations for CPUs in bfloat16, through the kernels of `kernels/`.

What the kernels do not take (sizes that do not fill their vectors) goes through plain torch.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from moespan.checkpoint.quantization import QuantizedWeight
from moespan.ops.base import AttentionBatch, KVCache, Weight
from moespan.ops.cpu import CpuOps
from moespan.ops.native.build import BuildError, library

_LANES, _PANEL = 16, 32
_MOST_HEAD_SIZE = 256
_LINEAR = ("qkv", "out", "gate_up", "down", "head")
_BF16, _W8A8, _W8A16, _INT4 = range(4)
_INT4_GROUP = 32

# The parameters of each kernel, as `kernels/kernels.cpp` declares them: p is a pointer, n an int64.
_SIGNATURES = {
    "pack": "ppnnniipppi",
    "pack_int4": "pppnnnii",
    "linear": "ipnnnpppppippp",
    "experts": "ipnnppnnnpppnpppnnpippppp",
    "attention": "pnpnnnppppinpnppnfi",
    "rms_norm": "pppnnfppi",
    "rope": "pnnnnppi",
    "write_cache": "pnnnnpppi",
    "route": "ppnnnnippi",
}
_TYPES = {"p": c_void_p, "n": c_int64, "i": c_int, "f": c_float}


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [out, in], or a bank of `count`, in the panels that `kernels/packing.h` describes.

    Attributes:
        kind: 0 bfloat16; 1 and 2 int8 for activations of 8 and of 16 bits; 3 of 4 bits.
        padded_out: channels with those that fill the last panel.
        scales, sums: float32 and int32 [count, padded_out], of int8 weights.
    """

    panels: Tensor
    kind: int
    count: int
    out: int
    padded_out: int
    width: int
    scales: Tensor | None = None
    sums: Tensor | None = None

    @property
    def pointers(self) -> tuple[int, int | None, int | None]:
        """Where panels, scales and sums are."""
        return self.panels.data_ptr(), _at(self.scales), _at(self.sums)


class NativeCpuOps(CpuOps):
    """See `moespan.ops.base.Ops` for what each operation promises."""

    def __init__(self, *flags: str) -> None:
        """Build the kernels if this machine has none yet; raises `BuildError` if it cannot.

        Args:
            flags: see `library`.
        """
        kernels = library(*flags)
        for name, signature in _SIGNATURES.items():
            function = getattr(kernels, f"moespan_{name}")
            function.argtypes = [_TYPES[kind] for kind in signature]
            function.restype = None
        self._kernels = kernels
        self._buffers: dict[str, Tensor] = {}

    def prepare(self, name: str, weight: Tensor | QuantizedWeight) -> Weight:
        """Matrices are packed, in their own memory where they fill it; the router is transposed."""
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "router":
            assert isinstance(weight, Tensor)
            return weight.t().contiguous().t()
        if leaf not in _LINEAR:
            return weight
        is_gate_up = leaf == "gate_up"
        if isinstance(weight, QuantizedWeight) and weight.group_size == _INT4_GROUP:
            return self._pack_int4(weight, is_gate_up)
        values = weight.values if isinstance(weight, QuantizedWeight) else weight
        if values.dtype not in (torch.bfloat16, torch.int8):
            return super().prepare(name, weight)
        # One instruction takes four bytes of a row; what gate_up gives is a row for `down`.
        rows = [values.shape[-1], values.shape[-2] // 2 if is_gate_up else 0]
        if any(row * values.itemsize % 4 for row in rows):
            return super().prepare(name, weight)
        return self._pack(values, weight, is_gate_up)

    def _pack(
        self, values: Tensor, weight: Tensor | QuantizedWeight, is_gate_up: bool
    ) -> PackedWeight:
        bank = values.contiguous().view(-1, *values.shape[-2:])
        count, out, width = bank.shape
        padded_out = _padded(out, is_gate_up)
        panels, scales, sums = bank, None, None
        if padded_out != out:
            panels = torch.empty((count, padded_out, width), dtype=bank.dtype)
        kind = _BF16
        if isinstance(weight, QuantizedWeight):
            kind = _W8A8 if weight.activation_bits == 8 else _W8A16
            scales = torch.empty((count, padded_out), dtype=torch.float32)
            sums = torch.empty((count, padded_out), dtype=torch.int32)
        for i in range(count):
            # Halves of a gate-up matrix are interleaved, so that one is not packed where it lies.
            source = bank[i].clone() if is_gate_up and panels is bank else bank[i]
            given = weight.scales.view(count, out)[i] if scales is not None else None
            self._kernels.moespan_pack(
                source.data_ptr(),
                panels[i].data_ptr(),
                1,
                out,
                width,
                bank.itemsize,
                is_gate_up,
                _at(given),
                _at(None if scales is None else scales[i]),
                _at(None if sums is None else sums[i]),
                torch.get_num_threads(),
            )
        return PackedWeight(panels, kind, count, out, padded_out, width, scales, sums)

    def _pack_int4(self, weight: QuantizedWeight, is_gate_up: bool) -> PackedWeight:
        values = weight.values.contiguous()
        out, count = values.shape[-2], values.shape[:-2].numel()
        width = weight.scales.shape[-1] * _INT4_GROUP
        padded_out = _padded(out, is_gate_up)
        # Nibbles, and bfloat16 scales.
        row_bytes = width // 2 + weight.scales.shape[-1] * 2
        panels = torch.empty((count, padded_out, row_bytes), dtype=torch.uint8)
        self._kernels.moespan_pack_int4(
            values.data_ptr(),
            weight.scales.contiguous().data_ptr(),
            panels.data_ptr(),
            count,
            out,
            width,
            is_gate_up,
            torch.get_num_threads(),
        )
        return PackedWeight(panels, _INT4, count, out, padded_out, width)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]."""
        if x.shape[-1] % _LANES:
            return super().rms_norm(x, weight, eps)
        return self._norm(x, None, weight, eps)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        if x.shape[-1] % _LANES:
            return super().add_rms_norm(x, residual, weight, eps)
        return self._norm(x, residual.contiguous(), weight, eps)

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        normed = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        self._kernels.moespan_rms_norm(
            x.data_ptr(),
            _at(residual),
            weight.data_ptr(),
            *x.shape,
            eps,
            total.data_ptr(),
            normed.data_ptr(),
            torch.get_num_threads(),
        )
        return normed, total

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """[T, in], [out, in] → [T, out]."""
        if not isinstance(weight, PackedWeight):
            return super().linear(x, weight, bias)
        x = x.contiguous()
        rows = len(x)
        out = torch.empty((rows, weight.out), dtype=x.dtype)
        self._kernels.moespan_linear(
            weight.kind,
            x.data_ptr(),
            rows,
            weight.width,
            weight.out,
            *weight.pointers,
            _at(bias),
            out.data_ptr(),
            torch.get_num_threads(),
            self._buffer("packed", 2 * rows * weight.width),
            self._buffer("row scales", 4 * rows),
            self._buffer("integers", 2 * rows * weight.width),
        )
        return out

    def rope(
        self, qkv: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N + 2·KV, D], float32 [T, D/2] twice → views of qkv, which is rotated in place."""
        if qkv.shape[-1] % (2 * _LANES):
            return super().rope(qkv, num_heads, num_kv_heads, cos, sin)
        qkv = qkv.contiguous()
        num_tokens, heads, head_size = qkv.shape
        self._kernels.moespan_rope(
            qkv.data_ptr(),
            num_tokens,
            heads,
            num_heads + num_kv_heads,
            head_size,
            cos.contiguous().data_ptr(),
            sin.contiguous().data_ptr(),
            torch.get_num_threads(),
        )
        q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
        return q, k, v

    def write_cache(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Store [T, KV, D] at `slots`."""
        for heads, to, scales in (
            (k, cache.keys, cache.key_scales),
            (v, cache.values, cache.value_scales),
        ):
            heads = _with_dense_tokens(heads)
            self._kernels.moespan_write_cache(
                heads.data_ptr(),
                *heads.shape,
                heads.stride(0),
                slots.data_ptr(),
                to.data_ptr(),
                _at(scales),
                torch.get_num_threads(),
            )

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        """[T, N, D] over the cache → [T, N, D]."""
        head_size = q.shape[-1]
        if head_size % _LANES or head_size > _MOST_HEAD_SIZE:
            return super().attention(q, cache, batch, scale)
        q = _with_dense_tokens(q)
        out = torch.empty(q.shape, dtype=q.dtype)
        tables = batch.block_tables.contiguous()
        query_lens, context_lens = batch.lens_on_host
        self._kernels.moespan_attention(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            q.shape[1],
            head_size,
            cache.keys.shape[2],
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            _at(cache.key_scales),
            _at(cache.value_scales),
            cache.keys.dtype == torch.int8,
            cache.block_size,
            tables.data_ptr(),
            tables.shape[-1],
            query_lens.data_ptr(),
            context_lens.data_ptr(),
            len(query_lens),
            scale,
            torch.get_num_threads(),
        )
        return out

    def route(
        self, x: Tensor, router: Tensor, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """[T, H] → float32 [T, K], int32 [T, K]."""
        transposed = router.t()
        if not transposed.is_contiguous():
            return super().route(x, router, num_chosen, renormalize)
        x = x.contiguous()
        weights = torch.empty((len(x), num_chosen), dtype=torch.float32)
        chosen = torch.empty((len(x), num_chosen), dtype=torch.int32)
        self._kernels.moespan_route(
            x.data_ptr(),
            transposed.data_ptr(),
            *x.shape,
            len(router),
            num_chosen,
            renormalize,
            weights.data_ptr(),
            chosen.data_ptr(),
            torch.get_num_threads(),
        )
        return weights, chosen

    def mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """[T, H] → [T, H]: an expert that every token chooses."""
        if not _are_packed(gate_up, down):
            return super().mlp(x, gate_up, down)
        slots = torch.zeros((len(x), 1), dtype=torch.int32)
        return self._experts(x, None, slots, gate_up, down, 0)

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        slots: Tensor,
        gate_up: Weight,
        down: Weight,
        first: int,
        num_slots: int,
    ) -> Tensor:
        """[T, H] → [T, H]; touches the weights of chosen experts only, each once."""
        if not _are_packed(gate_up, down):
            return super().experts(x, weights, slots, gate_up, down, first, num_slots)
        return self._experts(
            x, weights.contiguous(), slots.int().contiguous(), gate_up, down, first
        )

    def _experts(
        self,
        x: Tensor,
        weights: Tensor | None,
        slots: Tensor,
        gate_up: PackedWeight,
        down: PackedWeight,
        first: int,
    ) -> Tensor:
        x = x.contiguous()
        num_tokens, hidden_size = x.shape
        rows, width, kind = slots.numel(), down.width, gate_up.kind
        out = torch.empty_like(x)
        self._kernels.moespan_experts(
            kind,
            x.data_ptr(),
            num_tokens,
            hidden_size,
            _at(weights),
            slots.data_ptr(),
            slots.shape[1],
            first,
            gate_up.count,
            *gate_up.pointers,
            gate_up.padded_out,
            *down.pointers,
            down.padded_out,
            width,
            out.data_ptr(),
            torch.get_num_threads(),
            self._buffer("packed", 2 * rows * max(hidden_size, width)),
            self._buffer("row scales", 4 * rows),
            self._buffer("integers", 2 * max(rows * width, num_tokens * hidden_size)),
            self._buffer("hidden", 2 * rows * width),
            self._buffer("sums", 4 * num_tokens * down.padded_out),
        )
        return out

    def _buffer(self, name: str, num_bytes: int) -> int:
        """Where so many bytes of scratch memory are, until the next call with this name.

        It is kept: fresh memory of this size is given page by page, which takes longer than some
        of the work that is done in it.
        """
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return int(buffer.data_ptr())


def _padded(out: int, is_gate_up: bool) -> int:
    """Channels of the panels that hold `out`; of a gate-up matrix both halves fill theirs."""
    unit, step = (2 * _LANES, 2) if is_gate_up else (_PANEL, 1)
    return -(-(out // step) // (unit // step)) * unit


def _are_packed(gate_up: Weight, down: Weight) -> bool:
    return isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)


def _with_dense_tokens(heads: Tensor) -> Tensor:
    """[T, heads, D] with each token's elements in one piece."""
    is_dense = heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
    return heads if is_dense else heads.contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


__all__ = ["BuildError", "NativeCpuOps", "PackedWeight"]
