"""The memory of single operations while they run, by device: results, and what they need meanwhile.

Each class mirrors one implementation of `moespan.ops`, method by method, in bytes instead of
tensors. A method takes from `Live` what the operation returns, and notes what it needs meanwhile.
Shapes are those of `moespan.ops.base`. Nothing is run, and no torch is imported.

The counts of CPUs are held to a recording of the real operations by a test. Those of GPUs and NPUs
follow the code of their operations; workspaces inside the libraries of a vendor are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moespan.checkpoint import panels
from moespan.checkpoint.placement import Parameter
from moespan.config import DTYPE_BYTES, EngineConfig


class Live:
    """Counts the bytes of tensors that are alive.

    Attributes:
        now_bytes: bytes that are alive.
        peak_bytes: most bytes that were alive at once.
        peak_in: part of the step in which that was.
    """

    def __init__(self) -> None:
        self.now_bytes = self.peak_bytes = 0
        self.peak_in = ""
        self._part = ""

    def take(self, num_bytes: float) -> int:
        """A tensor that stays; → its bytes, for `give`."""
        taken = int(num_bytes)
        self.now_bytes += taken
        if self.now_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_in = self.now_bytes, self._part
        return taken

    def give(self, *num_bytes: int) -> None:
        """Tensors that are freed."""
        self.now_bytes -= sum(num_bytes)

    def touch(self, num_bytes: float) -> None:
        """A tensor that is freed before the next one is taken."""
        self.give(self.take(num_bytes))

    @contextmanager
    def frame(self) -> Iterator[None]:
        """A function: all that is taken inside is freed at its end. Take its result afterwards,
        which adds nothing to the peak if the result was taken inside, too."""
        before = self.now_bytes
        yield
        self.now_bytes = before

    def enter(self, part: str) -> None:
        """Name the part of the step that follows."""
        self._part = part


class Matrix(NamedTuple):
    """A matrix as operations see it: outputs, inputs, and whether and how it is quantised."""

    out: int
    width: int
    parameter: Parameter

    @property
    def is_quantized(self) -> bool:
        """Whether the matrix has 8 or 4 bits."""
        return self.parameter.scheme is not None

    @property
    def rounds_activations(self) -> bool:
        """Whether the activations that multiply the matrix are rounded to 8 bits."""
        return self.parameter.scheme is not None and self.parameter.scheme.activation_bits == 8

    @classmethod
    def of(cls, parameter: Parameter) -> Matrix:
        """The matrix, or one matrix of a bank."""
        return cls(parameter.shape[-2], parameter.shape[-1], parameter)


@dataclass(frozen=True)
class Heads:
    """Attention of one rank: query and key heads, their size, and the longest context."""

    queries: int
    keys: int
    size: int
    longest: int

    @property
    def all(self) -> int:
        """Heads of qkv."""
        return self.queries + 2 * self.keys


class Operations(Protocol):
    """The operations that the network calls. Each takes its results from `live`."""

    rotary_bytes: int
    live: Live

    def rms_norm(self, rows: int, width: int) -> int: ...
    def add_rms_norm(self, rows: int, width: int) -> tuple[int, int]: ...
    def linear(self, rows: int, matrix: Matrix) -> int: ...
    def rope(self, rows: int, heads: Heads) -> int: ...
    def attention(self, rows: int, heads: Heads) -> int: ...
    def mlp(self, rows: int, gate_up: Matrix, down: Matrix, plus: bool = False) -> int: ...
    def route(self, rows: int, hidden: int, experts: int, chosen: int) -> int: ...
    def experts(
        self, rows: int, chosen: int, gate_up: Matrix, down: Matrix, met: float = 1
    ) -> int: ...
    def sampling(self, rows: int, vocabulary: int, how: str) -> int: ...
    def held_bytes(self, name: str, parameter: Parameter) -> int: ...
    def scratch_bytes(self) -> int: ...


class PlainOperations:
    """`moespan.ops.cpu.plain.CpuOps`, and what other implementations share.

    Attributes:
        rotary_bytes: bytes of the rotary embedding for one position.
    """

    def __init__(self, config: EngineConfig, head_size: int) -> None:
        self.live = Live()
        self._dtype = config.dtype
        self._element = DTYPE_BYTES[config.dtype]
        self._int8_cache = config.cache_dtype != config.dtype
        self.rotary_bytes = 2 * (head_size // 2) * 4

    def held_bytes(self, name: str, parameter: Parameter) -> int:
        """Bytes of a parameter as the operations hold it."""
        return parameter.num_bytes(self._dtype)

    def scratch_bytes(self) -> int:
        """Memory that the operations keep between calls."""
        return 0

    def rms_norm(self, rows: int, width: int) -> int:
        """[T, H]."""
        self.live.touch((2 * self._element + 8) * rows * width)
        return self.live.take(rows * width * self._element)

    def add_rms_norm(self, rows: int, width: int) -> tuple[int, int]:
        """(normed, total), both [T, H]."""
        total = self.live.take(rows * width * self._element)
        return self.rms_norm(rows, width), total

    def linear(self, rows: int, matrix: Matrix) -> int:
        """[T, out]."""
        if matrix.is_quantized:
            # In float32: the matrix dequantised, x, and the result before it is rounded.
            per_weight = 16 if matrix.rounds_activations else 8
            weights = per_weight * matrix.out * matrix.width
            self.live.touch(weights + 4 * rows * (matrix.width + matrix.out))
        return self.live.take(rows * matrix.out * self._element)

    def rope(self, rows: int, heads: Heads) -> int:
        """Copies of the rotated heads, in float32 and rounded."""
        rotated = rows * (heads.queries + heads.keys) * heads.size
        self.live.touch(rotated * 4 * 3)
        return self.live.take(rotated * self._element)

    def attention(self, rows: int, heads: Heads) -> int:
        """[T, N, D], for one sequence of all tokens whose context is the longest."""
        with self.live.frame():
            self.live.take(rows * heads.queries * heads.size * self._element)
            copied = 2 * heads.longest * heads.keys * heads.size
            if self._int8_cache:
                self.live.take(copied * 8)
                self.live.touch(3 * 4 * rows * heads.longest * heads.queries)
            else:
                self.live.take(copied * self._element)
                self.live.touch(rows * heads.longest * (1 + self._element))
        return self.live.take(rows * heads.queries * heads.size * self._element)

    def swiglu(self, rows: int, width: int) -> int:
        """[T, I]; silu(gate) is a tensor of its own."""
        self.live.touch(2 * rows * width * self._element)
        return self.live.take(rows * width * self._element)

    def mlp(self, rows: int, gate_up: Matrix, down: Matrix, plus: bool = False) -> int:
        """[T, H]; `plus`: another [T, H] is added."""
        with self.live.frame():
            both = self.linear(rows, gate_up)
            self.swiglu(rows, down.width)
            self.live.give(both)
            out = self.linear(rows, down)
        self.live.take(out)
        if plus:
            self.live.touch(out)
        return out

    def route(self, rows: int, hidden: int, experts: int, chosen: int) -> int:
        """float32 [T, K], int64 [T, K]."""
        self.live.touch(4 * rows * (2 * experts + (hidden if self._element < 4 else 0)))
        return self.live.take(12 * rows * chosen)

    def experts(self, rows: int, chosen: int, gate_up: Matrix, down: Matrix, met: float = 1) -> int:
        """[T, H]."""
        pairs, hidden = int(rows * chosen * met), down.out
        with self.live.frame():
            self.live.take(pairs * (8 * 5 + 1))  # numbers of pairs, experts, tokens
            self.live.take(2 * pairs * hidden * self._element)  # rows, results
            self.live.touch(3 * rows * down.width * self._element)  # all tokens choose one expert
            if self._element < 4:
                self.live.touch(pairs * hidden * 8)  # results in float32, and times weights
            self.live.take(pairs * hidden * 4)
            self.live.take(rows * hidden * 4)
            if self._element < 4:
                self.live.take(rows * hidden * self._element)
        return self.live.take(rows * hidden * self._element)

    def sampling(self, rows: int, vocabulary: int, how: str) -> int:
        """Tokens, the logits of which are alive; `how` is one of `SAMPLINGS`."""
        return self._sampling(rows * vocabulary, how, {"drawn": 24, "truncated": 50})

    def _sampling(self, logits: int, how: str, element_bytes: Mapping[str, int]) -> int:
        """`element_bytes`: what is alive for each logit, in float32 and the running sums."""
        self.live.touch(logits * element_bytes.get(how, 0))
        return 0


SAMPLINGS = ("greedy", "drawn", "truncated")
"""Ways of sampling that differ in memory: the best token, temperature, and top_k, top_p, min_p."""


class NativeOperations(PlainOperations):
    """`moespan.ops.cpu.native.NativeCpuOps`: kernels with scratch memory that stays."""

    def __init__(self, config: EngineConfig, head_size: int) -> None:
        super().__init__(config, head_size)
        self._head_size = head_size
        self._scratch: dict[str, int] = {}

    def held_bytes(self, name: str, parameter: Parameter) -> int:
        """Matrices are padded to whole panels."""
        return panels.held_bytes(name, parameter, self._dtype)

    def scratch_bytes(self) -> int:
        """The largest of each buffer."""
        return sum(self._scratch.values())

    def rms_norm(self, rows: int, width: int) -> int:
        """[T, H]."""
        return self.live.take(rows * width * self._element)

    def linear(self, rows: int, matrix: Matrix) -> int:
        """[T, out]."""
        if not panels.is_packed("qkv", matrix.parameter, self._dtype):
            return super().linear(rows, matrix)
        self._keep("packed", _planes(matrix) * rows * matrix.width)
        if _has_integers(matrix):
            self._keep("integers", _planes(matrix) * rows * matrix.width)
        return self.live.take(rows * matrix.out * self._element)

    def rope(self, rows: int, heads: Heads) -> int:
        """In place."""
        return 0

    def attention(self, rows: int, heads: Heads) -> int:
        """[T, N, D]."""
        return self.live.take(rows * heads.queries * heads.size * self._element)

    def mlp(self, rows: int, gate_up: Matrix, down: Matrix, plus: bool = False) -> int:
        """[T, H], as one expert that every token chooses."""
        out = self.experts(rows, 1, gate_up, down)
        if plus:
            self.live.touch(out)
        return out

    def route(self, rows: int, hidden: int, experts: int, chosen: int) -> int:
        """float32 [T, K], int32 [T, K]."""
        self._keep("logits", 4 * rows * experts)
        self._keep("packed", 2 * rows * hidden)
        return self.live.take(8 * rows * chosen)

    def experts(self, rows: int, chosen: int, gate_up: Matrix, down: Matrix, met: float = 1) -> int:
        """[T, H]."""
        if not panels.is_packed("down", down.parameter, self._dtype):
            return super().experts(rows, chosen, gate_up, down, met)
        pairs, hidden, width = int(rows * chosen * met), gate_up.width, down.width
        planes = _planes(gate_up)
        self._keep("packed", planes * pairs * max(hidden, width))
        if _has_integers(gate_up):
            self._keep("integers", planes * max(pairs * width, rows * hidden))
        self._keep("hidden", 2 * pairs * width)
        self._keep("sums", 4 * rows * panels.padded(down.out, False))
        return self.live.take(rows * hidden * self._element)

    def _keep(self, name: str, num_bytes: int) -> None:
        self._scratch[name] = max(self._scratch.get(name, 0), num_bytes)


def _planes(matrix: Matrix) -> int:
    """Bytes of an activation that is packed for the kernels: 1 where activations have 8 bits."""
    return 1 if matrix.rounds_activations else 2


def _has_integers(matrix: Matrix) -> bool:
    """Whether the kernels round activations: for weights of 8 bits."""
    scheme = matrix.parameter.scheme
    return scheme is not None and scheme.weight_bits == 8


class CudaOperations(PlainOperations):
    """`moespan.ops.cuda.ops.CudaOps`."""

    def rms_norm(self, rows: int, width: int) -> int:
        """[T, H]."""
        return self.live.take(rows * width * self._element)

    def linear(self, rows: int, matrix: Matrix) -> int:
        """[T, out]; x in 8 bits beside it, where it is rounded."""
        out = self.live.take(rows * matrix.out * self._element)
        if matrix.rounds_activations:
            self.live.touch(rows * (matrix.width + 4))
        return out

    def rope(self, rows: int, heads: Heads) -> int:
        """In place."""
        return 0

    def attention(self, rows: int, heads: Heads) -> int:
        """[T, N, D]."""
        return self.live.take(rows * heads.queries * heads.size * self._element)

    def mlp(self, rows: int, gate_up: Matrix, down: Matrix, plus: bool = False) -> int:
        """[T, H]; `plus` is added in place."""
        hidden = rows * down.width * self._element
        with self.live.frame():
            if gate_up.is_quantized:
                if gate_up.rounds_activations:
                    self.live.take(rows * (gate_up.width + 4))
                self.live.take(hidden)
            else:
                both = self.live.take(2 * hidden)
                self.live.take(hidden)
                self.live.give(both)
            out = self.linear(rows, down)
        return self.live.take(out)

    def route(self, rows: int, hidden: int, experts: int, chosen: int) -> int:
        """float32 [T, K], int32 [T, K]."""
        self.live.touch(4 * rows * experts)
        return self.live.take(8 * rows * chosen)

    def experts(self, rows: int, chosen: int, gate_up: Matrix, down: Matrix, met: float = 1) -> int:
        """[T, H]."""
        pairs, rounds = rows * chosen, gate_up.rounds_activations
        out = rows * down.out * self._element
        with self.live.frame():
            self.live.take(out + 8 * pairs)
            first = self.live.take(rows * (gate_up.width + 4)) if rounds else 0
            self.live.take(pairs * down.width * self._element)
            if rounds:
                self.live.take(pairs * (down.width + 4))
                self.live.give(first)
            self.live.take(pairs * down.out * self._element)
        return self.live.take(out)

    def sampling(self, rows: int, vocabulary: int, how: str) -> int:
        """Truncated rows are sorted whole: values, int64 indices, and as much again meanwhile."""
        return self._sampling(rows * vocabulary, how, {"drawn": 24, "truncated": 44})


class NpuOperations(PlainOperations):
    """`moespan.ops.npu.ops.NpuOps`."""

    def __init__(self, config: EngineConfig, head_size: int) -> None:
        super().__init__(config, head_size)
        self.rotary_bytes = 2 * head_size * self._element
        self._is_tiled = config.npu_weight_format == "nz"

    def held_bytes(self, name: str, parameter: Parameter) -> int:
        """Tiles of 16 × 16, or 16 × 32 for integers, are padded."""
        num_bytes = parameter.num_bytes(self._dtype)
        if not self._is_tiled or len(parameter.shape) < 2 or name in ("embed", "router"):
            return num_bytes
        across = 32 if parameter.is_quantized else 16
        out, width = parameter.shape[-2:]
        tiled = math.ceil(out / 16) * 16 * math.ceil(width / across) * across
        return num_bytes * tiled // (out * width)

    def rms_norm(self, rows: int, width: int) -> int:
        """[T, H]; and float32 [T]."""
        return self.live.take(rows * width * self._element)

    def linear(self, rows: int, matrix: Matrix) -> int:
        """[T, out]; x in 8 bits beside it, where it is rounded."""
        out = self.live.take(rows * matrix.out * self._element)
        if matrix.rounds_activations:
            self.live.touch(rows * (matrix.width + 4))
        return out

    def rope(self, rows: int, heads: Heads) -> int:
        """Copies of q, k and v."""
        return self.live.take(rows * heads.all * heads.size * self._element)

    def attention(self, rows: int, heads: Heads) -> int:
        """[T, N, D]; blocks of an int8 cache are dequantised in parts of 64 MiB."""
        out = self.live.take(rows * heads.queries * heads.size * self._element)
        if self._int8_cache:
            self.live.touch(out + 5 * (64 << 20))
        return out

    def swiglu(self, rows: int, width: int) -> int:
        """[T, I]."""
        return self.live.take(rows * width * self._element)

    def route(self, rows: int, hidden: int, experts: int, chosen: int) -> int:
        """float32 [T, K], int32 [T, K] twice; x and logits in float32."""
        self.live.touch(4 * rows * (hidden + experts))
        return self.live.take(12 * rows * chosen)

    def experts(self, rows: int, chosen: int, gate_up: Matrix, down: Matrix, met: float = 1) -> int:
        """[T, H]; all pairs have a row, also those of other ranks."""
        pairs, rounds = rows * chosen, gate_up.rounds_activations
        element = 1 if rounds else self._element
        with self.live.frame():
            self.live.take(pairs * (gate_up.width * element + 8))
            both = self.live.take(pairs * gate_up.out * (4 if rounds else self._element))
            self.live.take(pairs * down.width * element)
            self.live.give(both)
            self.live.take(pairs * down.out * self._element)
            self.live.take(rows * down.out * self._element)
        return self.live.take(rows * down.out * self._element)

    def sampling(self, rows: int, vocabulary: int, how: str) -> int:
        """As integers; truncated rows are sorted whole."""
        return self._sampling(rows * vocabulary, how, {"drawn": 20, "truncated": 44})


def operations_of(config: EngineConfig, head_size: int) -> Operations:
    """The operations of `config.device`, as `moespan.ops.ops_for` chooses them on a machine that
    has a compiler and Triton."""
    if config.dtype == "bfloat16" and config.device in _IN_BFLOAT16:
        return _IN_BFLOAT16[config.device](config, head_size)
    return _BY_DEVICE[config.device](config, head_size)


_BY_DEVICE: dict[str, type[PlainOperations]] = {
    "cpu": PlainOperations,
    "cuda": CudaOperations,
    "npu": NpuOperations,
}
_IN_BFLOAT16: dict[str, type[PlainOperations]] = {"cpu": NativeOperations}
