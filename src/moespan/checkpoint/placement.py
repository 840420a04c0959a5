"""The placement table: which slice of which checkpoint tensor lives in which parameter of a rank.

This is the one place that knows how a weight is cut and fused. The loader, the memory estimate,
the random checkpoints, `verify` and the tests all read it. It holds no data and imports no torch.

Local shapes, with tp ranks and every split length padded up to a multiple of tp. E' is how many
experts the rank holds (`experts.py`), e = tp/ep over how many ranks each is cut where ep < tp, else
1. A rank holds the layers of its stage; the first stage has the embedding, the last norm and head.

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

KV heads fewer than tp are replicated: then each rank holds the one head that its queries read. sp
and dp cut no weights, but the KV cache is split by heads over tp·sp.

Of matrices of 8 or 4 bits (all but embed, router and, where activations are rounded, head) a rank
has its slice and that slice's scales. Every layout computes with the same numbers: of 8 bits a
scale is of a whole row of the checkpoint's tensor, wherever its columns are cut, and of (out, in)
there are (out); of 4 bits it is of a group, (out, in / group), and columns are cut between groups,
as are the widths I.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

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

# See `tensors_of` of `Placement._add`.
_FLOATS: tuple[tuple[str, int | None], ...] = (("", 1),)


@dataclass(frozen=True)
class Share:
    """One rank's part of a dimension that is cut into equal, padded parts.

    The rank reads `start:stop` of the source and gives it `length` places; the `length - (stop -
    start)` places after it stay zero, which changes no result.
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
        dtype: None is the engine's.
        scheme: of a quantised matrix, how; None for another.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    scheme: Scheme | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether it is held in 8 or 4 bits."""
        return self.scheme is not None

    def num_bytes(self, dtype: str) -> int:
        """Bytes that it takes, its scales included, when the engine's dtype is `dtype`."""
        if self.scheme is not None:
            return math.prod(self.shape[:-1]) * self.scheme.row_bytes(self.shape[-1])
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype or dtype]


@dataclass(frozen=True)
class Piece:
    """`source[source_index]` of the checkpoint goes to `parameter[index]`.

    `index` holds slices, of the same lengths as `source_index`, after an expert's number where the
    parameter is a bank of experts. With `is_scale` it is the parameter's scales that are meant. Of
    stored integers of 4 bits columns count the words that they are packed in, and of their scales
    groups.
    """

    source: str
    source_index: Index
    parameter: str
    index: tuple[Any, ...]
    is_scale: bool = False

    @property
    def num_rows(self) -> int:
        """How many rows are read."""
        rows = self.source_index[0]
        return int(rows.stop - rows.start)

    @property
    def num_elements(self) -> int:
        """How many elements are read."""
        return math.prod(part.stop - part.start for part in self.source_index)


@dataclass
class Placement:
    """All that one rank holds. Build it with `place`.

    Attributes:
        cut_rows: tensors of the checkpoint to be quantised of whose rows each tp rank reads a part,
            and how many rows they have: what their scales must be is known to all of these ranks
            together. The same on all of them.
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

    def _add(
        self,
        name: str,
        sources: list[tuple[str, Share]],
        *,
        columns: Share,
        expert: tuple[int, int] | None = None,
        dtype: str | None = None,
        scheme: Scheme | None = None,
        tensors_of: Callable[[str], Iterable[tuple[str, int | None]]] = lambda source: _FLOATS,
    ) -> None:
        """Stack the row shares of `sources` into one matrix; `expert` is (number, how many).

        Args:
            tensors_of: those that a source is in the checkpoint: what each adds to its name, and
                how many columns it has one element for; None has one for a row.
        """
        rows = sum(share.length for _, share in sources)
        shape = (rows, columns.length)
        self.parameters[name] = Parameter((expert[1], *shape) if expert else shape, dtype, scheme)
        number = expert[:1] if expert else ()
        at = 0
        for source, share in sources:
            source_rows = slice(share.start, share.stop)
            to_rows = slice(at, at + share.stop - share.start)
            for suffix, unit in tensors_of(source):
                source_index: Index = (source_rows,)
                index: tuple[Any, ...] = (*number, to_rows)
                if unit is not None:
                    start, stop = columns.start // unit, columns.stop // unit
                    source_index += (slice(start, stop),)
                    index += (slice(0, stop - start),)
                is_scale = suffix == SCALE_SUFFIX
                self._append(Piece(source + suffix, source_index, name, index, is_scale))
            at += share.length

    def _add_vector(self, name: str, sources: list[tuple[str, Share]]) -> None:
        self.parameters[name] = Parameter((sum(share.length for _, share in sources),))
        at = 0
        for source, share in sources:
            length = share.stop - share.start
            self._append(
                Piece(source, (slice(share.start, share.stop),), name, (slice(at, at + length),))
            )
            at += share.length

    def _append(self, piece: Piece) -> None:
        # A rank whose whole share is padding reads nothing.
        if piece.num_elements:
            self.pieces.append(piece)


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
        quantization: one of `QUANTIZATIONS`; None is as the checkpoint is.

    Raises:
        ConfigError: the checkpoint holds weights of another quantization, or the model's rows are
            not whole groups.
        LayoutError: tp would cut through a group.
    """
    at = layout.coordinates(rank)
    tp, part = layout.tp, at.tp
    layers = layout.stages(config)[at.pp]
    is_last = layers.stop == config.num_hidden_layers
    experts = experts or ExpertPlacement.make("contiguous", config, layout)
    whole = Share.of(config.hidden_size, 1, 0)
    vocabulary = Share.of(config.vocab_size, tp, part)
    queries, keys = head_shares(config, tp, part)
    placement = Placement()
    stored, wanted = config.quantization, quantization and QuantizationConfig.of(quantization)
    running = stored.running_as(quantization) if stored else quantization
    scheme = SCHEMES[running] if running else None
    group_size = scheme.group_size if scheme else None
    if running is not None and group_size is not None:
        _check_groups(config, layout, running, group_size)
    # Widths are cut between groups, and padded to whole ones.
    unit = group_size or 1

    def is_stored(source: str) -> bool:
        return stored is not None and stored.holds(source.removesuffix(".weight"))

    def is_quantized(source: str) -> bool:
        return is_stored(source) or bool(wanted and wanted.holds(source.removesuffix(".weight")))

    def tensors_of(source: str) -> Iterable[tuple[str, int | None]]:
        if not is_stored(source):
            return _FLOATS
        if group_size is None:
            return (("", 1), (SCALE_SUFFIX, None))
        return ((PACKED_SUFFIX, 8), (SCALE_SUFFIX, group_size))

    def add_linear(
        name: str,
        sources: list[tuple[str, Share]],
        columns: Share,
        expert: tuple[int, int] | None = None,
    ) -> None:
        own = scheme if any(is_quantized(source) for source, _ in sources) else None
        if name == "head":
            if own is not None:
                # What the head reads is never rounded: its errors would be those of the logits.
                own = replace(own, activation_bits=16)
            elif scheme is not None and scheme.head is not None:
                own = SCHEMES[scheme.head]
        placement._add(
            name, sources, columns=columns, expert=expert, scheme=own, tensors_of=tensors_of
        )

    def add_cut_rows(source: str, parts: int) -> None:
        if parts > 1 and group_size is None and is_quantized(source) and not is_stored(source):
            placement.cut_rows[source] = config.hidden_size

    def mlp(name: str, source: str, share: Share, expert: tuple[int, int] | None = None) -> None:
        gate_up = [(f"{source}.gate_proj.weight", share), (f"{source}.up_proj.weight", share)]
        add_linear(f"{name}.gate_up", gate_up, whole, expert)
        add_linear(f"{name}.down", [(f"{source}.down_proj.weight", whole)], share, expert)

    if layers.start == 0 or (is_last and config.tie_word_embeddings):
        placement._add("embed", [("model.embed_tokens.weight", vocabulary)], columns=whole)
    for i in layers:
        source, layer = f"model.layers.{i}", f"layers.{i}"
        placement._add_vector(
            f"{layer}.attention.norm", [(f"{source}.input_layernorm.weight", whole)]
        )
        attention = f"{source}.self_attn"
        shares = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
        add_linear(
            f"{layer}.attention.qkv",
            [(f"{attention}.{name}.weight", share) for name, share in shares],
            whole,
        )
        add_linear(f"{layer}.attention.out", [(f"{attention}.o_proj.weight", whole)], queries)
        add_cut_rows(f"{attention}.o_proj.weight", tp)
        if config.attention_bias:
            placement._add_vector(
                f"{layer}.attention.qkv_bias",
                [(f"{attention}.{name}.bias", share) for name, share in shares],
            )
            placement._add_vector(
                f"{layer}.attention.out_bias", [(f"{attention}.o_proj.bias", whole)]
            )
        placement._add_vector(
            f"{layer}.mlp.norm", [(f"{source}.post_attention_layernorm.weight", whole)]
        )
        if not config.is_moe(i):
            mlp(
                f"{layer}.mlp",
                f"{source}.mlp",
                Share.of(config.intermediate_size, tp, part, unit),
            )
            add_cut_rows(f"{source}.mlp.down_proj.weight", tp)
            continue
        router = Share.of(config.n_routed_experts or 0, 1, 0)
        placement._add(
            f"{layer}.mlp.router",
            [(f"{source}.mlp.gate.weight", router)],
            columns=whole,
            dtype="float32",
        )
        held = experts.of(i)[layout.ep_rank(rank)]
        slices = layout.expert_slices
        for e in range(config.n_routed_experts or 0):
            add_cut_rows(f"{source}.mlp.experts.{e}.down_proj.weight", slices)
        for slot, e in enumerate(held):
            mlp(
                f"{layer}.mlp.experts",
                f"{source}.mlp.experts.{e}",
                Share.of(config.moe_intermediate_size, slices, part % slices, unit),
                expert=(slot, len(held)),
            )
        if config.shared_intermediate_size:
            mlp(
                f"{layer}.mlp.shared",
                f"{source}.mlp.shared_experts",
                Share.of(config.shared_intermediate_size, tp, part, unit),
            )
            add_cut_rows(f"{source}.mlp.shared_experts.down_proj.weight", tp)
    if is_last:
        placement._add_vector("norm", [("model.norm.weight", whole)])
    if is_last and not config.tie_word_embeddings:
        add_linear("head", [("lm_head.weight", vocabulary)], whole)
    return placement


def _check_groups(config: ModelConfig, layout: Layout, name: str, group_size: int) -> None:
    """Refuse what would leave a part of a group."""
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
            f"tp={layout.tp} gives a rank {cut(layout.tp)} columns of o_proj, and cuts through "
            f"{name}'s groups of {group_size}; use tp of {', '.join(fitting)}"
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
    """KV heads of each of its layers whose keys and values `rank` keeps."""
    at = layout.coordinates(rank)
    _, keys = head_shares(config, layout.tp * layout.sp, at.tp * layout.sp + at.sp)
    return keys.length // config.head_dim


def cache_bytes_per_token(config: ModelConfig, layout: Layout, rank: int, dtype: str) -> int:
    """Bytes of KV cache of `dtype`, which may be `int8`, on `rank` for one token of its replica."""
    num_layers = len(layout.stages(config)[layout.coordinates(rank).pp])
    heads = cache_heads(config, layout, rank)
    return 2 * num_layers * heads * config.kv_bytes_per_head(dtype)


def checkpoint_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this model, in the model's order; scales
    of integers right after them, as vectors."""
    return {
        piece.source: tuple(part.stop for part in piece.source_index)
        for piece in place(config, Layout(), 0).pieces
    }


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the model: all of them, and those that one token uses."""
    tensors = checkpoint_tensors(replace(config, quantization=None))
    total = sum(math.prod(shape) for shape in tensors.values())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.n_routed_experts or 0) - config.num_experts_per_tok
    return total, total - config.num_moe_layers * idle * expert


def tolerated_tensors(config: ModelConfig) -> Iterator[str]:
    """Names that checkpoints may hold beside the model's own, and that nothing reads."""
    for name in checkpoint_tensors(config):
        if name.endswith(PACKED_SUFFIX):
            yield name.removesuffix(PACKED_SUFFIX) + SHAPE_SUFFIX
    if config.tie_word_embeddings:
        yield "lm_head.weight"
    for i in range(config.num_hidden_layers):
        yield f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
