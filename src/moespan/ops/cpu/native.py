"""Operations for CPUs in bfloat16, through the C++ kernels of `kernels/`.

Sizes that the kernels do not take, because they do not fill their vectors, run in plain torch.
"""

from __future__ import annotations

import os
from ctypes import byref, c_float, c_int, c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from moespan.cache_folder import CacheError, cache_path
from moespan.checkpoint.building import Builder
from moespan.checkpoint.panels import INT4_GROUP, is_matrix, leaf, padded, takes_rows
from moespan.checkpoint.placement import Parameter, Placement
from moespan.checkpoint.rounding import QuantizedWeight
from moespan.errors import ConfigError
from moespan.log import once
from moespan.memory import zeros
from moespan.ops.base import AttentionBatch, ExpertBank, KVCache, Rotation, Weight
from moespan.ops.cpu.compiler import library, library_name
from moespan.ops.cpu.packing import INT4, PackedBuilder, PackedWeight
from moespan.ops.cpu.plain import CpuOps
from moespan.ops.cpu.weight_cache import WeightCache
from moespan.version import source_digest

_LANES = 16
_MOST_HEAD_SIZE = 256

# The parameters of each kernel as `kernels/kernels.cpp` declares them. p is a pointer, n an int64,
# i an int, f a float.
_SIGNATURES = {
    "checksum": "pnipp",
    "pack": "pnnnnnnipp",
    "pack_int4": "pppnnnii",
    "round": "pnnnppp",
    "linear": "ipnnnpppppippp",
    "experts": "ipnnppnnnpppnpppnnpippppp",
    "attention": "pnpnnnppppinpnppnfi",
    "rms_norm": "pppnnfppi",
    "rope": "pnnnnppi",
    "write_cache": "pnnnnpppi",
    "route": "ipnnpnnippipp",
}
_TYPES = {"p": c_void_p, "n": c_int64, "i": c_int, "f": c_float}


class NativeCpuOps(CpuOps):
    """See `moespan.ops.base.Ops` for what each operation promises."""

    def __init__(self, *flags: str, batch_invariant: bool = False) -> None:
        """Load the kernels, and build them first if this machine has none yet.

        Args:
            flags: see `library`.
            batch_invariant: whether the result of a row must be the same, bit by bit, whatever
                other rows there are. What the kernels do not take is then a `ConfigError`.

        Raises:
            CacheError: they cannot be built or loaded.
        """
        if batch_invariant:
            flags += ("-DBATCH_INVARIANT=1",)
        kernels = library(*flags)
        self._is_invariant = batch_invariant
        for name, signature in _SIGNATURES.items():
            function = getattr(kernels, f"moespan_{name}")
            function.argtypes = [_TYPES[kind] for kind in signature]
            function.restype = None
        self._kernels = kernels
        self._flags = flags
        # The memory of each buffer, its bytes, and its address.
        self._buffers: dict[str, tuple[Tensor, int, int]] = {}
        # Expert 0 for each token of the last MLP.
        self._only_expert = torch.zeros((1, 1), dtype=torch.int32)

    def builder(
        self, name: str, parameter: Parameter, dtype: torch.dtype, device: torch.device
    ) -> Builder:
        """A builder that packs matrices while they are read."""
        scheme = parameter.scheme
        held = getattr(torch, scheme.storage) if scheme else dtype
        bits = scheme.activation_bits if scheme else None
        packer = self._packer(name, parameter.shape, held, bits)
        return packer or super().builder(name, parameter, dtype, device)

    def kept_weights(
        self, placement: Placement, identity: str, dtype: torch.dtype, limit_bytes: int
    ) -> WeightCache | None:
        """The packed weights in moespan's cache folder."""
        name = library_name(*self._flags)
        parameters, pieces = placement.parameters, placement.pieces
        made_from = repr((source_digest(), name, dtype, identity, parameters, pieces))
        expected_bytes = placement.num_bytes(str(dtype).removeprefix("torch."))
        try:
            path = cache_path() / "weights"
        except CacheError as error:
            once(f"the packed weights are not kept for the next start: {error}")
            return None
        return WeightCache(path, made_from, expected_bytes, limit_bytes, self._checksum)

    def _checksum(self, data: Tensor) -> int:
        """The checksum of the memory of a vector.

        Raises:
            OSError: it is a mapped file that cannot be read.
        """
        checksum, error = c_uint64(), c_int()
        self._kernels.moespan_checksum(
            data.data_ptr(),
            data.numel() * data.itemsize,
            torch.get_num_threads(),
            byref(checksum),
            byref(error),
        )
        if error.value:
            raise OSError(error.value, os.strerror(error.value))
        return checksum.value

    def prepare(self, name: str, weight: Tensor | QuantizedWeight) -> Weight:
        """The parameter packed, if it is a matrix, or a router that bfloat16 holds exactly; any
        other router with transposed memory."""
        if isinstance(weight, QuantizedWeight):
            if weight.group_size == INT4_GROUP and is_matrix(name):
                return self._pack_int4(weight, leaf(name) == "gate_up")
            values, scales, bits = weight.values, weight.scales, weight.activation_bits
        else:
            if leaf(name) == "router":
                return self._prepare_router(weight)
            values, scales, bits = weight, None, None
        packer = self._packer(name, tuple(values.shape), values.dtype, bits)
        if packer is None:
            if is_matrix(name):
                self._leave_to_torch(f"{name} of shape {list(values.shape)} as {values.dtype}")
            return super().prepare(name, weight)
        packer.put_all(values, scales)
        return packer.finish()

    def _packer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int | None
    ) -> PackedBuilder | None:
        """A builder for a parameter [..., out, in] held in `dtype`; None if the kernels do not take
        it packed by rows.

        Args:
            bits: of the activations that integers meet; None for bfloat16.
        """
        if dtype not in (torch.bfloat16, torch.int8) or not is_matrix(name):
            return None
        if not takes_rows(name, shape, dtype.itemsize):
            return None
        is_gate_up = leaf(name) == "gate_up"
        return PackedBuilder(self._kernels, shape, bits, is_gate_up)

    def _prepare_router(self, router: Tensor) -> Weight:
        """The router packed as bfloat16, if it was made from bfloat16: products of two bfloat16
        are exact in float32, in which they are summed."""
        rounded = router.bfloat16()
        if router.shape[1] % 2 or not torch.equal(rounded.float(), router):
            return router.t().contiguous().t()
        packer = PackedBuilder(self._kernels, tuple(router.shape), None, is_gate_up=False)
        packer.put_all(rounded, None)
        return packer.finish()

    def _pack_int4(self, weight: QuantizedWeight, is_gate_up: bool) -> PackedWeight:
        values = weight.values.contiguous()
        out, count = values.shape[-2], values.shape[:-2].numel()
        width = weight.scales.shape[-1] * INT4_GROUP
        padded_out = padded(out, is_gate_up)
        # Half a byte for each weight, two for each scale.
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
        return PackedWeight(panels, INT4, count, out, padded_out, width)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]."""
        if x.shape[-1] % _LANES:
            self._leave_to_torch(f"a hidden size of {x.shape[-1]}")
            return super().rms_norm(x, weight, eps)
        return self._norm(x, None, weight, eps)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        if x.shape[-1] % _LANES:
            self._leave_to_torch(f"a hidden size of {x.shape[-1]}")
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

    def rope(self, qkv: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N + 2·KV, D] → q, k, v as views of qkv, which is rotated in place."""
        if qkv.shape[-1] % (2 * _LANES):
            return super().rope(qkv, rotation)
        qkv = qkv.contiguous()
        num_tokens, heads, head_size = qkv.shape
        num_heads, num_kv_heads = rotation.num_heads, rotation.num_kv_heads
        self._kernels.moespan_rope(
            qkv.data_ptr(),
            num_tokens,
            heads,
            num_heads + num_kv_heads,
            head_size,
            rotation.cos.contiguous().data_ptr(),
            rotation.sin.contiguous().data_ptr(),
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
        """[T, N, D] → [T, N, D]."""
        head_size = q.shape[-1]
        if head_size % _LANES or head_size > _MOST_HEAD_SIZE:
            self._leave_to_torch(f"a head size of {head_size}")
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
        self, x: Tensor, router: Weight, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """[T, H] → float32 [T, K], int32 [T, K]."""
        is_packed = isinstance(router, PackedWeight)
        if not is_packed and not router.t().is_contiguous():
            return super().route(x, router, num_chosen, renormalize)
        x = x.contiguous()
        num_tokens, hidden_size = x.shape
        num_experts = router.out if is_packed else len(router)
        weights = torch.empty((num_tokens, num_chosen), dtype=torch.float32)
        chosen = torch.empty((num_tokens, num_chosen), dtype=torch.int32)
        self._kernels.moespan_route(
            is_packed,
            x.data_ptr(),
            num_tokens,
            hidden_size,
            router.pointers[0] if is_packed else router.data_ptr(),
            num_experts,
            num_chosen,
            renormalize,
            weights.data_ptr(),
            chosen.data_ptr(),
            torch.get_num_threads(),
            self._buffer("logits", 4 * num_tokens * num_experts),
            self._buffer("packed", 2 * num_tokens * hidden_size),
        )
        return weights, chosen

    def mlp(self, x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        """[T, H] → [T, H]: computed as one expert that every token chooses."""
        if not _are_packed(gate_up, down):
            return super().mlp(x, gate_up, down)
        if len(self._only_expert) != len(x):
            self._only_expert = torch.zeros((len(x), 1), dtype=torch.int32)
        return self._experts(x, None, self._only_expert, gate_up, down, 0)

    def experts(self, x: Tensor, weights: Tensor, physical_ids: Tensor, bank: ExpertBank) -> Tensor:
        """[T, H] → [T, H]. Reads the weights of chosen experts only, each once."""
        if not _are_packed(bank.gate_up, bank.down):
            return super().experts(x, weights, physical_ids, bank)
        weights, physical_ids = weights.contiguous(), physical_ids.int().contiguous()
        return self._experts(x, weights, physical_ids, bank.gate_up, bank.down, bank.first)

    def _experts(
        self,
        x: Tensor,
        weights: Tensor | None,
        physical_ids: Tensor,
        gate_up: PackedWeight,
        down: PackedWeight,
        first: int,
    ) -> Tensor:
        x = x.contiguous()
        num_tokens, hidden_size = x.shape
        rows, width, kind = physical_ids.numel(), down.width, gate_up.kind
        out = torch.empty_like(x)
        self._kernels.moespan_experts(
            kind,
            x.data_ptr(),
            num_tokens,
            hidden_size,
            _at(weights),
            physical_ids.data_ptr(),
            physical_ids.shape[1],
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

    def _leave_to_torch(self, thing: str) -> None:
        """Refuse if rows must not depend on each other: torch's kernels promise nothing of it."""
        if self._is_invariant:
            raise ConfigError(
                f"batch_invariant needs the kernels for CPUs, which do not take {thing}; leave it "
                "out"
            )

    def _buffer(self, name: str, num_bytes: int) -> int:
        """Address of `num_bytes` bytes of scratch memory, valid until the next call with this name.

        The memory is kept between calls. Fresh memory of this size comes page by page, which takes
        longer than some of the work done in it. `zeros` allocates large pages.
        """
        kept = self._buffers.get(name)
        if kept is None or kept[1] < num_bytes:
            memory = zeros((num_bytes,), torch.uint8, torch.device("cpu"))
            kept = self._buffers[name] = memory, num_bytes, memory.data_ptr()
        return kept[2]


def _are_packed(gate_up: Weight, down: Weight) -> bool:
    return isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight)


def _with_dense_tokens(heads: Tensor) -> Tensor:
    """[T, heads, D], copied unless the elements of each token are contiguous."""
    is_dense = heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
    return heads if is_dense else heads.contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
