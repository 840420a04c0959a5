"""The placement table: which slice of which checkpoint tensor lives in which parameter of a rank.

This module is the one place that knows how a weight is cut and fused. The loader, the memory
estimate, the random checkpoints, `verify` and the tests all read the table. The table holds no data
and imports no torch.

The shapes are those of one of tp ranks; every length that is cut is padded to a multiple of tp. E'
is the number of experts that the rank holds (`experts.py`). e is the number of ranks that each
expert is cut over: tp/ep where ep < tp, else 1. A rank holds the layers of its stage. The first
stage also has the embedding; the last stage has the norm and the head.

| parameter                    | shape                         | from (HF name, one layer)         |
|------------------------------|-------------------------------|-----------------------------------|
| embed                        | (V/tp, H)                     | model.embed_tokens                |
| layers.i.attention.norm      | (H)                           | input_layernorm                   |
| layers.i.attention.qkv       | ((N + 2·KV)/tp · D, H)        | self_attn.{q,k,v}_proj, stacked   |
| layers.i.attention.out       | (H, N/tp · D)                 | self_attn.o_proj                  |
| layers.i.mlp.norm            | (H)                           | post_attention_layernorm          |
| layers.i.mlp.gate_up         | (2·I/tp, H)                   | mlp.{gate,up}_proj, stacked       |
| layers.i.mlp.down            | (H, I/tp)                     | mlp.down_proj                     |
| layers.i.mlp.router          | (E, H), float32               | mlp.gate                          |
| layers.i.mlp.experts.gate_up | (E', 2·I/e, H)                | mlp.experts.e.{gate,up}_proj      |
| layers.i.mlp.experts.down    | (E', H, I/e)                  | mlp.experts.e.down_proj           |
| layers.i.mlp.shared.gate_up  | (2·I/tp, H)                   | mlp.shared_experts.{gate,up}_proj |
| layers.i.mlp.shared.down     | (H, I/tp)                     | mlp.shared_experts.down_proj      |
| norm                         | (H)                           | model.norm                        |
| head                         | (V/tp, H)                     | lm_head (embed when tied)         |

With `attention_bias`, attention.qkv_bias and attention.out_bias hold the biases of the same
projections, cut as the rows of qkv and out.

Fewer KV heads than tp ranks are replicated: each rank holds the one head that its queries read. sp
and dp cut no weights, but the KV cache is split by heads over tp·sp.

Every matrix but embed and router may have 8 or 4 bits; head keeps its floats with `fp8`. A rank
then holds its slice of the matrix and that slice's scales. Every layout computes with the same
numbers:

- 8 bits: a scale belongs to a whole row of the checkpoint's tensor, wherever its columns are cut.
  A matrix (out, in) has (out) scales.
- 4 bits: a scale belongs to a group of columns in a row. A matrix (out, in) has (out, in / group)
  scales.
  Columns, and with them the widths I, are cut between groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from moespan.checkpoint.experts import ExpertPlacement
from moespan.config import (
    DTYPE_BYTES,
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    SCHEMES,
    SHAPE_SUFFIX,
    Layout,
    ModelConfig,
    QuantizationConfig,
    Scheme,
)
from moespan.errors import ConfigError, LayoutError

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Share:
    """One rank's part of a dimension that is cut into equal, padded parts.

    The rank reads `start:stop` of the dimension and allocates `length` elements for it. The
    `length - (stop - start)` elements at the end stay zero, which changes no result.
    """

    start: int
    stop: int
    length: int

    @classmethod
    def of(cls, total: int, parts: int, part: int, unit: int = 1) -> Share:
        """Part number `part` of `total` elements in units of `unit` that are never cut."""
        length = -(-total // (parts * unit)) * unit
        return cls(min(part * length, total), min((part + 1) * length, total), length)


@dataclass(frozen=True)
class Parameter:
    """A tensor that a rank holds.

    Attributes:
        dtype: None is the engine's dtype.
        scheme: how a quantised matrix is quantised; None for every other tensor.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    scheme: Scheme | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the parameter is held in 8 or 4 bits."""
        return self.scheme is not None

    def num_bytes(self, dtype: str) -> int:
        """Bytes of the parameter, scales included, when the engine's dtype is `dtype`."""
        if self.scheme is not None:
            return math.prod(self.shape[:-1]) * self.scheme.row_bytes(self.shape[-1])
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype or dtype]


@dataclass(frozen=True)
class Piece:
    """A slice to read: `tensor[tensor_index]` of the checkpoint goes to `parameter[index]`.

    `index` holds slices of the same lengths as `tensor_index`. In a bank of experts the expert's
    number comes before them.

    With `is_scale`, the piece goes to the scales of the parameter. Columns of stored 4-bit integers
    are counted in int32s of eight, columns of their scales in groups.
    """

    tensor: str
    tensor_index: Index
    parameter: str
    index: tuple[Any, ...]
    is_scale: bool = False

    @property
    def num_rows(self) -> int:
        """How many rows are read."""
        rows = self.tensor_index[0]
        return int(rows.stop - rows.start)

    @property
    def num_elements(self) -> int:
        """How many elements are read."""
        return math.prod(part.stop - part.start for part in self.tensor_index)


@dataclass
class Placement:
    """Everything that one rank holds. `place` makes it.

    Attributes:
        cut_rows: number of rows of each checkpoint tensor that is quantised while it is read, and
            whose rows are cut over tp ranks. Only these ranks together know the scales of such a
            row. The same on all of them.
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    cut_rows: dict[str, int] = field(default_factory=dict)

    @property
    def num_elements_read(self) -> int:
        """Elements that the rank reads from the checkpoint."""
        return sum(piece.num_elements for piece in self.pieces)

    def num_bytes(self, dtype: str) -> int:
        """Bytes of all parameters, padding included, when the engine's dtype is `dtype`."""
        return sum(parameter.num_bytes(dtype) for parameter in self.parameters.values())


def place(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    experts: ExpertPlacement | None = None,
    quantization: str | None = None,
) -> Placement:
    """The placement of `rank` under `layout`, which must fit (`Layout.check`).

    Args:
        experts: which ep rank holds which experts; None is contiguous.
        quantization: one of `QUANTIZATIONS`; None keeps the checkpoint's.

    Raises:
        ConfigError: the checkpoint holds weights of another quantization, or the model's rows are
            not whole groups.
        LayoutError: tp would cut through a group.
    """
    layers = layout.stages(config)[layout.coordinates(rank).pp]
    is_last = layers.stop == config.num_hidden_layers
    experts = experts or ExpertPlacement.make("contiguous", config, layout)
    table = _Table(config, layout, rank, experts, _Quantization(config, layout, quantization))
    if layers.start == 0 or (is_last and config.tie_word_embeddings):
        table.embed()
    for layer in layers:
        table.attention(layer)
        if config.is_moe(layer):
            table.moe(layer)
        else:
            table.dense(layer)
    if is_last:
        table.head()
    return table.placement


class _Stored(NamedTuple):
    """One of the tensors that a checkpoint holds for a matrix.

    Attributes:
        suffix: appended to the name of the matrix.
        columns: columns of the matrix for each element of a row; None: the whole row has one.
    """

    suffix: str
    columns: int | None


_FLOATS = (_Stored("", 1),)


class _Quantization:
    """In which scheme a rank holds each matrix, and as which tensors the checkpoint stores it."""

    def __init__(self, config: ModelConfig, layout: Layout, wanted: str | None) -> None:
        self._stored = config.quantization
        self._wanted = QuantizationConfig.of(wanted) if wanted else None
        running = self._stored.running_as(wanted) if self._stored else wanted
        self._scheme = SCHEMES[running] if running else None
        self.group_size = self._scheme.group_size if self._scheme else None
        if running and self.group_size is not None:
            _check_groups(config, layout, running, self.group_size)

    def _is_stored(self, tensor: str) -> bool:
        return self._stored is not None and self._stored.holds(tensor.removesuffix(".weight"))

    def _is_wanted(self, tensor: str) -> bool:
        return self._wanted is not None and self._wanted.holds(tensor.removesuffix(".weight"))

    def rounds_rows(self, tensor: str) -> bool:
        """Whether `tensor` is read as floats and gets one scale for each of its rows."""
        is_rounded = self._is_wanted(tensor) and not self._is_stored(tensor)
        return is_rounded and self.group_size is None

    def scheme_of(self, name: str, tensors: Sequence[str]) -> Scheme | None:
        """The scheme of the parameter `name`, stacked from `tensors`; None is floats."""
        is_quantized = any(self._is_stored(one) or self._is_wanted(one) for one in tensors)
        scheme = self._scheme if is_quantized else None
        if name != "head" or self._scheme is None:
            return scheme
        if scheme is not None:
            # The input of the head is never rounded: its errors would go into the logits.
            return replace(scheme, activation_bits=16)
        return SCHEMES[self._scheme.head] if self._scheme.head is not None else None

    def stored_as(self, tensor: str) -> tuple[_Stored, ...]:
        """The tensors that the checkpoint holds for the matrix `tensor`."""
        if not self._is_stored(tensor):
            return _FLOATS
        if self.group_size is None:
            return (_Stored("", 1), _Stored(SCALE_SUFFIX, None))
        return (_Stored(PACKED_SUFFIX, 8), _Stored(SCALE_SUFFIX, self.group_size))


_Rows = list[tuple[str, Share]]
"""Tensors of the checkpoint, and the rows of each that a rank holds."""


class _Table:
    """Writes the placement of one rank, with a method for each part of `moespan.model.network`.

    `moespan.planner.traffic` and `moespan.planner.work` walk the same parts.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        rank: int,
        experts: ExpertPlacement,
        quantization: _Quantization,
    ) -> None:
        self.placement = Placement()
        self._config, self._layout = config, layout
        self._experts, self._ep_rank = experts, layout.ep_rank(rank)
        self._quantization = quantization
        self._tp, self._part = layout.tp, layout.coordinates(rank).tp
        self._hidden = Share.of(config.hidden_size, 1, 0)
        self._vocabulary = Share.of(config.vocab_size, self._tp, self._part)
        self._queries, self._keys = head_shares(config, self._tp, self._part)

    def embed(self) -> None:
        self._matrix("embed", [("model.embed_tokens.weight", self._vocabulary)], self._hidden)

    def attention(self, layer: int) -> None:
        name, hf_name = f"layers.{layer}.attention", f"model.layers.{layer}.self_attn"
        self._norm(f"{name}.norm", f"model.layers.{layer}.input_layernorm")
        shares = [("q_proj", self._queries), ("k_proj", self._keys), ("v_proj", self._keys)]
        qkv = [(f"{hf_name}.{projection}.weight", share) for projection, share in shares]
        self._linear(f"{name}.qkv", qkv, self._hidden)
        out = f"{hf_name}.o_proj.weight"
        self._linear(f"{name}.out", [(out, self._hidden)], self._queries)
        self._note_cut_rows(out, self._tp)
        if self._config.attention_bias:
            biases = [(f"{hf_name}.{projection}.bias", share) for projection, share in shares]
            self._vector(f"{name}.qkv_bias", biases)
            self._vector(f"{name}.out_bias", [(f"{hf_name}.o_proj.bias", self._hidden)])

    def dense(self, layer: int) -> None:
        name, hf_name = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        self._norm(f"{name}.norm", f"model.layers.{layer}.post_attention_layernorm")
        self._tp_mlp(name, hf_name, self._config.intermediate_size)

    def moe(self, layer: int) -> None:
        name, hf_name = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        self._norm(f"{name}.norm", f"model.layers.{layer}.post_attention_layernorm")
        num_experts = self._config.n_routed_experts or 0
        router = [(f"{hf_name}.gate.weight", Share.of(num_experts, 1, 0))]
        self._matrix(f"{name}.router", router, self._hidden, dtype="float32")
        slices = self._layout.expert_slices
        for expert in range(num_experts):
            self._note_cut_rows(f"{hf_name}.experts.{expert}.down_proj.weight", slices)
        width = self._width(self._config.moe_intermediate_size, slices)
        held = self._experts.of(layer)[self._ep_rank]
        for number, expert in enumerate(held):
            bank = (number, len(held))
            self._mlp(f"{name}.experts", f"{hf_name}.experts.{expert}", width, bank)
        if self._config.shared_intermediate_size:
            shared, hf_shared = f"{name}.shared", f"{hf_name}.shared_experts"
            self._tp_mlp(shared, hf_shared, self._config.shared_intermediate_size)

    def head(self) -> None:
        self._norm("norm", "model.norm")
        if not self._config.tie_word_embeddings:
            self._linear("head", [("lm_head.weight", self._vocabulary)], self._hidden)

    def _norm(self, name: str, hf_name: str) -> None:
        self._vector(name, [(f"{hf_name}.weight", self._hidden)])

    def _width(self, width: int, parts: int) -> Share:
        """This rank's share of the width of an MLP, cut between groups and padded to whole ones."""
        return Share.of(width, parts, self._part % parts, self._quantization.group_size or 1)

    def _tp_mlp(self, name: str, hf_name: str, width: int) -> None:
        """An MLP whose width is cut over tp."""
        self._mlp(name, hf_name, self._width(width, self._tp))
        self._note_cut_rows(f"{hf_name}.down_proj.weight", self._tp)

    def _mlp(
        self, name: str, hf_name: str, width: Share, expert: tuple[int, int] | None = None
    ) -> None:
        gate_up = [(f"{hf_name}.{part}_proj.weight", width) for part in ("gate", "up")]
        self._linear(f"{name}.gate_up", gate_up, self._hidden, expert)
        down = [(f"{hf_name}.down_proj.weight", self._hidden)]
        self._linear(f"{name}.down", down, width, expert)

    def _linear(
        self, name: str, rows: _Rows, columns: Share, expert: tuple[int, int] | None = None
    ) -> None:
        """A matrix that may be quantised."""
        scheme = self._quantization.scheme_of(name, [tensor for tensor, _ in rows])
        stored_as = self._quantization.stored_as
        self._matrix(name, rows, columns, expert=expert, scheme=scheme, stored_as=stored_as)

    def _note_cut_rows(self, tensor: str, parts: int) -> None:
        """Note that each of `parts` ranks reads a part of every row of `tensor`, H rows."""
        if parts > 1 and self._quantization.rounds_rows(tensor):
            self.placement.cut_rows[tensor] = self._config.hidden_size

    def _matrix(
        self,
        name: str,
        rows: _Rows,
        columns: Share,
        *,
        expert: tuple[int, int] | None = None,
        dtype: str | None = None,
        scheme: Scheme | None = None,
        stored_as: Callable[[str], tuple[_Stored, ...]] = lambda tensor: _FLOATS,
    ) -> None:
        """Stack the rows of several tensors into one matrix.

        Args:
            expert: the matrix's number in a bank of experts, and the size of the bank.
            stored_as: which tensors the checkpoint holds for each of `rows`.
        """
        number, bank = ((), ()) if expert is None else (expert[:1], expert[1:])
        shape = (*bank, sum(share.length for _, share in rows), columns.length)
        self.placement.parameters[name] = Parameter(shape, dtype, scheme)
        first = 0
        for tensor, share in rows:
            num_rows = share.stop - share.start
            for stored in stored_as(tensor):
                tensor_index: Index = (slice(share.start, share.stop),)
                index: Index = (slice(first, first + num_rows),)
                if stored.columns is not None:
                    start, stop = (at // stored.columns for at in (columns.start, columns.stop))
                    tensor_index += (slice(start, stop),)
                    index += (slice(0, stop - start),)
                is_scale = stored.suffix == SCALE_SUFFIX
                hf_name = tensor + stored.suffix
                self._append(Piece(hf_name, tensor_index, name, (*number, *index), is_scale))
            first += share.length

    def _vector(self, name: str, rows: _Rows) -> None:
        """Join parts of several vectors into one."""
        self.placement.parameters[name] = Parameter((sum(share.length for _, share in rows),))
        first = 0
        for tensor, share in rows:
            tensor_index = (slice(share.start, share.stop),)
            index = (slice(first, first + share.stop - share.start),)
            self._append(Piece(tensor, tensor_index, name, index))
            first += share.length

    def _append(self, piece: Piece) -> None:
        # A rank whose whole share is padding reads nothing.
        if piece.num_elements:
            self.placement.pieces.append(piece)


def _check_groups(config: ModelConfig, layout: Layout, name: str, group_size: int) -> None:
    """Refuse a model or a layout that would leave part of a group.

    Raises:
        ConfigError: rows of the model are not whole groups.
        LayoutError: tp cuts through a group.
    """
    sizes = {"hidden_size": config.hidden_size}
    if config.num_moe_layers < config.num_hidden_layers:
        sizes["intermediate_size"] = config.intermediate_size
    if config.num_moe_layers:
        sizes["moe_intermediate_size"] = config.moe_intermediate_size
    for key, size in sizes.items():
        if size % group_size:
            raise ConfigError(
                f"{name} rounds rows in groups of {group_size}, and {key}={size} is no multiple of "
                "it; use int8"
            )

    def cut(tp: int) -> int:
        return head_shares(config, tp, 0)[0].length

    if cut(layout.tp) % group_size:
        fitting = [str(tp) for tp in range(1, layout.tp) if not cut(tp) % group_size]
        raise LayoutError(
            f"tp={layout.tp} gives a rank {cut(layout.tp)} columns of o_proj, which cuts through "
            f"the groups of {group_size} of {name}; use tp of {', '.join(fitting)}"
        )


def head_shares(config: ModelConfig, tp: int, part: int) -> tuple[Share, Share]:
    """Rows of the query and of the key (and value) projection that tp rank `part` holds."""
    size = config.head_dim
    queries = Share.of(config.num_attention_heads * size, tp, part, unit=size)
    kv_heads = config.num_key_value_heads
    if tp <= kv_heads:
        return queries, Share.of(kv_heads * size, tp, part, unit=size)
    head = part * kv_heads // tp
    return queries, Share(head * size, (head + 1) * size, size)


def cache_heads(config: ModelConfig, layout: Layout, rank: int) -> int:
    """Number of KV heads whose keys and values `rank` keeps, in each layer of its stage."""
    at = layout.coordinates(rank)
    _, keys = head_shares(config, layout.tp * layout.sp, at.tp * layout.sp + at.sp)
    return keys.length // config.head_dim


def cache_bytes_per_token(config: ModelConfig, layout: Layout, rank: int, dtype: str) -> int:
    """Bytes of KV cache of `dtype`, which may be `int8`, on `rank` for one token of its replica."""
    num_layers = len(layout.stages(config)[layout.coordinates(rank).pp])
    heads = cache_heads(config, layout, rank)
    return 2 * num_layers * heads * config.kv_bytes_per_head(dtype)


def checkpoint_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this model, in the model's order.

    Scales come right after the tensor that they belong to; scales of rows are vectors.
    """
    return {
        piece.tensor: tuple(part.stop for part in piece.tensor_index)
        for piece in place(config, Layout(), 0).pieces
    }


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Number of all parameters of the model, and of the parameters that one token uses."""
    tensors = checkpoint_tensors(replace(config, quantization=None))
    total = sum(math.prod(shape) for shape in tensors.values())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.n_routed_experts or 0) - config.num_experts_per_tok
    return total, total - config.num_moe_layers * idle * expert


def tolerated_tensors(config: ModelConfig) -> Iterator[str]:
    """Names of tensors that a checkpoint may hold in addition, and that nothing reads."""
    for name in checkpoint_tensors(config):
        if name.endswith(PACKED_SUFFIX):
            yield name.removesuffix(PACKED_SUFFIX) + SHAPE_SUFFIX
    if config.tie_word_embeddings:
        yield "lm_head.weight"
    for i in range(config.num_hidden_layers):
        yield f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
