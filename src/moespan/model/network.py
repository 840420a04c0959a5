"""The network, in reading order: rope → attention → MLP → MoE → layer → model.

The network is written once, against `Ops` and `Mesh`, and knows no device. Weights are looked up by
the names of the placement table. Shapes are those of one rank:

    T   tokens of its replica's step
    L   tokens that the rank holds outside attention: all T, unless sp splits them
    H   hidden size
    N   query heads
    KV  key heads
    D   head size
    K   experts of one token
    V   rows of the vocabulary
    R   tokens whose logits are wanted

Formulas: DeepSeekMoE (arXiv 2401.06066), with the numerics of its Hugging Face model, except that
the router works in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import Share, head_shares
from moespan.config import ModelConfig
from moespan.model.expert_counts import ExpertCounter
from moespan.ops import AttentionBatch, ExpertBank, KVCache, Ops, Rotation, Weight
from moespan.parallel.dispatch import Dispatch, PhysicalExperts
from moespan.parallel.mesh import Axis, Mesh
from moespan.parallel.tokens import split_evenly

Weights = Mapping[str, Weight]

Observer = Callable[[int, str, Tensor], None]
"""Called with (layer, module, value [L, ...]) while the network computes. Values are the same on
all tp ranks and must not be changed. Layer -1 is the embedding."""


@dataclass(frozen=True)
class Step:
    """One step, as all layers see it.

    Attributes:
        batch: where the T tokens lie in sequences and cache.
        lengths: tokens that each sp rank holds outside attention; they sum to T.
        rotation: the rotary embedding of this rank's L tokens.
        chosen: gets the experts that each layer's router chooses, integers [L, K], if they are
            counted; otherwise None.
    """

    batch: AttentionBatch
    lengths: list[int]
    rotation: Rotation
    chosen: list[Tensor] | None = None


def _local_heads(config: ModelConfig, tp: Axis) -> tuple[int, int]:
    """Query heads N and key heads KV of one tp rank."""
    queries, keys = head_shares(config, tp.size, tp.rank)
    return queries.length // config.head_dim, keys.length // config.head_dim


class Rope:
    """The rotary embedding (arXiv 2104.09864): its table in `dtype`, computed in float32, for
    positions below `length`."""

    def __init__(
        self, config: ModelConfig, ops: Ops, mesh: Mesh, length: int, dtype: torch.dtype
    ) -> None:
        self.num_heads, self.num_kv_heads = _local_heads(config, mesh.tp)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
        frequencies = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
        positions = torch.arange(length, dtype=torch.float32) / config.rope_linear_factor
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos().to(mesh.device), angles.sin().to(mesh.device)
        self.cos, self.sin = ops.rotary_table(cos, sin, dtype)

    def __call__(self, positions: Tensor) -> Rotation:
        """Integers [L] → the rotation of L tokens."""
        # Not `cos[positions]`: CANN 9.1 checks such indices by a kernel of its own.
        cos, sin = (part.index_select(0, positions) for part in (self.cos, self.sin))
        return Rotation(self.num_heads, self.num_kv_heads, cos, sin)


class Attention:
    """Multi-head (or grouped-query) attention over the paged cache.

    tp splits the heads. sp splits the tokens outside attention, and inside it splits the heads of
    a tp rank once more (Ulysses, arXiv 2309.14509).
    """

    def __init__(self, config: ModelConfig, ops: Ops, mesh: Mesh, weights: Weights, name: str):
        self.ops, self.tp, self.sp = ops, mesh.tp, mesh.sp
        self.qkv, self.out = weights[f"{name}.qkv"], weights[f"{name}.out"]
        self.qkv_bias = weights.get(f"{name}.qkv_bias")
        self.out_bias = weights.get(f"{name}.out_bias")
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = _local_heads(config, self.tp)
        self.sent_heads = torch.tensor(
            [head for rank in range(self.sp.size) for head in self._heads_of(rank)],
            device=mesh.device,
        )

    def __call__(self, x: Tensor, cache: KVCache, step: Step) -> Tensor:
        """[L, H] replicated over tp → [L, H] replicated over tp."""
        qkv = self.ops.linear(x, self.qkv, self.qkv_bias).unflatten(-1, (-1, self.head_dim))
        if self.sp.size == 1:
            q = self.ops.rope_to_cache(qkv, step.rotation, cache, step.batch.slots)
        else:
            q, k, v = self.ops.rope(qkv, step.rotation)
            q, k, v = self._to_heads(torch.cat([q, k, v], 1), step.lengths)
            self.ops.write_cache(k, v, cache, step.batch.slots)
        attended = self.ops.attention(q, cache, step.batch, self.head_dim**-0.5)
        if self.sp.size > 1:
            attended = self._to_tokens(attended, step.lengths)
        out = self.ops.linear_sum(attended.flatten(1), self.out, self.tp, "attention")
        return out if self.out_bias is None else out + self.out_bias

    def _heads_of(self, sp_rank: int) -> list[int]:
        """Heads of `sp_rank` inside attention, as indices into the N + 2·KV heads of `qkv`."""
        share = self.num_heads // self.sp.size
        queries = range(sp_rank * share, (sp_rank + 1) * share)
        # Query heads of one group share a key head, so a rank may need only a few key heads.
        keys = sorted({head * self.num_kv_heads // self.num_heads for head in queries})
        first_key, first_value = self.num_heads, self.num_heads + self.num_kv_heads
        return [
            *queries,
            *(first_key + head for head in keys),
            *(first_value + head for head in keys),
        ]

    def _to_heads(self, qkv: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [L, N + 2·KV, D] of this rank's tokens → q, k, v [T, heads, D] of its heads."""
        num_tokens = len(qkv)
        chosen = qkv.index_select(1, self.sent_heads).unflatten(1, (self.sp.size, -1))
        by_rank = chosen.transpose(0, 1).flatten(0, 1)
        received = self.sp.all_to_all(by_rank, [num_tokens] * self.sp.size, lengths, "attention")
        num_queries = self.num_heads // self.sp.size
        num_keys = (received.shape[1] - num_queries) // 2
        q, k, v = received.split([num_queries, num_keys, num_keys], 1)
        return q, k, v

    def _to_tokens(self, attended: Tensor, lengths: list[int]) -> Tensor:
        """[T, N/sp, D] of this rank's heads → [L, N, D] of its tokens."""
        num_tokens = lengths[self.sp.rank]
        received = self.sp.all_to_all(attended, lengths, [num_tokens] * self.sp.size, "attention")
        by_rank = received.unflatten(0, (self.sp.size, num_tokens))
        return by_rank.transpose(0, 1).flatten(1, 2)


class MLP:
    """SwiGLU. tp splits the width."""

    def __init__(self, ops: Ops, tp: Axis, weights: Weights, name: str) -> None:
        self.ops, self.tp = ops, tp
        self.gate_up, self.down = weights[f"{name}.gate_up"], weights[f"{name}.down"]

    def __call__(self, x: Tensor, module: str = "mlp", plus: Tensor | None = None) -> Tensor:
        """[L, H] replicated over tp → [L, H] replicated over tp.

        `plus` [L, H], partial over tp, is added before the sum: one all-reduce carries both.
        """
        return self.ops.mlp_sum(x, self.gate_up, self.down, self.tp, module, plus)


class MoE:
    """Routed experts plus the shared ones.

    ep spreads the routed experts over ranks. tp splits the width of the shared experts, and of the
    routed experts where there are more tp ranks than ep ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        tp: Axis,
        weights: Weights,
        name: str,
        dispatch: Dispatch,
        experts: PhysicalExperts,
    ) -> None:
        self.ops, self.tp, self.dispatch, self.experts = ops, tp, dispatch, experts
        self.router = weights[f"{name}.router"]
        self.bank = ExpertBank(
            weights[f"{name}.experts.gate_up"],
            weights[f"{name}.experts.down"],
            dispatch.first_physical(experts),
            experts.count,
        )
        self.num_chosen, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        has_shared = config.shared_intermediate_size > 0
        self.shared = MLP(ops, tp, weights, f"{name}.shared") if has_shared else None

    def __call__(
        self,
        x: Tensor,
        observe: Callable[[str, Tensor], None] | None = None,
        all_chosen: list[Tensor] | None = None,
    ) -> Tensor:
        """[L, H] replicated over tp → [L, H] replicated over tp.

        One all-reduce carries the routed and the shared experts. The router's choices are appended
        to `all_chosen`.
        """
        weights, chosen = self.ops.route(x, self.router, self.num_chosen, self.renormalize)
        if observe:
            observe("router.experts", chosen)
            observe("router.weights", weights)
        if all_chosen is not None:
            all_chosen.append(chosen)

        def run_routed() -> Tensor:  # [L, H] partial over tp
            return self.dispatch(
                x, weights, chosen, self.experts, self._compute, self._compute_across
            )

        if self.shared is None:
            return self.tp.all_reduce(run_routed(), "moe")
        if not self.ops.has_second_stream:
            return self.shared(x, "moe", run_routed())
        routed, shared = self.ops.beside(run_routed, lambda: self._run_shared(x))
        return self.tp.all_reduce(routed + shared, "moe")

    def _run_shared(self, x: Tensor) -> Tensor:
        """[L, H] → [L, H] partial over tp."""
        assert self.shared is not None
        return self.ops.mlp(x, self.shared.gate_up, self.shared.down)

    def _compute(self, x: Tensor, weights: Tensor, physical_ids: Tensor) -> Tensor:
        return self.ops.experts(x, weights, physical_ids, self.bank)

    def _compute_across(
        self, x: Tensor, weights: Tensor, physical_ids: Tensor, axis: Axis
    ) -> Tensor:
        return self.ops.experts_across(x, weights, physical_ids, self.bank, axis)


class Layer:
    """One pre-norm decoder layer."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        mesh: Mesh,
        weights: Weights,
        index: int,
        dispatch: Dispatch,
        experts: ExpertPlacement,
    ) -> None:
        name = f"layers.{index}"
        self.index = index
        self.ops, self.eps = ops, config.rms_norm_eps
        self.attention_norm = weights[f"{name}.attention.norm"]
        self.attention = Attention(config, ops, mesh, weights, f"{name}.attention")
        self.mlp_norm = weights[f"{name}.mlp.norm"]
        self.mlp: MLP | MoE
        if config.is_moe(index):
            num_experts = config.n_routed_experts or 0
            physical = PhysicalExperts(experts.of(index), num_experts, mesh.device)
            self.mlp = MoE(config, ops, mesh.tp, weights, f"{name}.mlp", dispatch, physical)
        else:
            self.mlp = MLP(ops, mesh.tp, weights, f"{name}.mlp")

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: KVCache,
        step: Step,
        observe: Observer | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) → (x, residual), all [L, H] replicated over tp.

        The hidden state is x + residual: x is the output of the last sublayer, which the next norm
        adds to the residual stream. `residual` is None where x alone is the hidden state, at the
        start of a stage.
        """
        see = partial(observe, self.index) if observe else None
        if residual is None:
            x, residual = self.ops.rms_norm(x, self.attention_norm, self.eps), x
        else:
            x, residual = self.ops.add_rms_norm(x, residual, self.attention_norm, self.eps)
        x = self.attention(x, cache, step)
        if see:
            see("attention", x)
        x, residual = self.ops.add_rms_norm(x, residual, self.mlp_norm, self.eps)
        x = self.mlp(x, see, step.chosen) if isinstance(self.mlp, MoE) else self.mlp(x)
        if see:
            see("hidden", x + residual)
        return x, residual


class Model:
    """One rank's stage of DeepSeek-MoE.

    Args:
        max_model_len: positions that the rotary table covers.
        weights: parameters of this rank, by the names of the placement table.
        dispatch: how tokens meet experts.
        experts: which ep rank holds which experts, as in the placement.
        counter: counts the tokens of each expert; None for no counting.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        mesh: Mesh,
        weights: Weights,
        max_model_len: int,
        dispatch: Dispatch,
        experts: ExpertPlacement,
        counter: ExpertCounter | None = None,
    ) -> None:
        self.ops, self.tp, self.sp, self.eps = ops, mesh.tp, mesh.sp, config.rms_norm_eps
        self.beat, self.counter = mesh.beat, counter
        self.vocab_size = config.vocab_size
        self.vocabulary = Share.of(config.vocab_size, mesh.tp.size, mesh.tp.rank)
        self.is_first_stage, self.is_last_stage = mesh.is_first_stage, mesh.is_last_stage
        self.embed = weights.get("embed")
        stage = mesh.layout.stages(config)[mesh.at.pp]
        dtype = weights[f"layers.{stage.start}.attention.norm"].dtype
        self.rope = Rope(config, ops, mesh, max_model_len, dtype)
        self.layers = [
            Layer(config, ops, mesh, weights, index, dispatch, experts) for index in stage
        ]
        self.norm = weights.get("norm")
        self.head = weights.get("embed" if config.tie_word_embeddings else "head")

    def __call__(
        self,
        inputs: Tensor,
        caches: list[KVCache],
        batch: AttentionBatch,
        rows: Tensor,
        observe: Observer | None = None,
    ) -> Tensor:
        """Run one step; keys and values go into `caches`, one for each layer of this stage.

        Args:
            inputs: token ids, integers [T], on the first stage; the hidden state [L, H] on others.
            rows: integers [R], the tokens whose logits are wanted.
            observe: called with `embed`, and for every layer with `attention`, `router.experts`,
                `router.weights` and `hidden`, the hidden state that the layer passes on.

        Returns:
            On the last stage logits [R, vocabulary] in the activations' dtype, replicated over tp;
            sp ranks other than the first get no rows. On other stages the hidden state [L, H].
        """
        lengths = split_evenly(len(batch.positions), self.sp.size)
        start = sum(lengths[: self.sp.rank])
        mine = slice(start, start + lengths[self.sp.rank])
        chosen: list[Tensor] | None = None if self.counter is None else []
        step = Step(batch, lengths, self.rope(batch.positions[mine]), chosen)
        x = self._embed(inputs[mine]) if self.is_first_stage else inputs
        residual: Tensor | None = None
        if observe and self.is_first_stage:
            observe(-1, "embed", x)
        for layer, cache in zip(self.layers, caches, strict=True):
            self.beat.layer(layer.index)
            x, residual = layer(x, residual, cache, step, observe)
        self.beat.layer(-1)
        if self.counter is not None and chosen is not None:
            self.counter.add(chosen, batch.slots[mine])
        assert residual is not None
        if not self.is_last_stage:
            return x + residual
        return self._logits(x, residual, rows, mine)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Integers [L] → [L, H] replicated over tp; each tp rank looks up its own V rows."""
        assert self.embed is not None
        if self.tp.size == 1:
            return self.embed.index_select(0, token_ids)
        local = token_ids - self.vocabulary.start
        elsewhere = (local < 0) | (local >= self.vocabulary.stop - self.vocabulary.start)
        x = self.embed.index_select(0, local.masked_fill(elsewhere, 0))
        return self.tp.all_reduce(x.masked_fill_(elsewhere[:, None], 0), "embed")

    def _logits(self, x: Tensor, residual: Tensor, rows: Tensor, mine: slice) -> Tensor:
        """x, residual [L, H] → [R, vocabulary] on the first sp rank, [0, vocabulary] on others."""
        assert self.norm is not None and self.head is not None
        if self.sp.size == 1:
            x, residual = (part.index_select(0, rows) for part in (x, residual))
            x, _ = self.ops.add_rms_norm(x, residual, self.norm, self.eps)
        else:
            # Each row comes from the one sp rank that holds its token; the others add zeros.
            if mine.start == mine.stop:
                x = x.new_zeros(len(rows), x.shape[-1])
            else:
                local = (rows - mine.start).clamp(0, mine.stop - mine.start - 1)
                x, residual = (part.index_select(0, local) for part in (x, residual))
                x, _ = self.ops.add_rms_norm(x, residual, self.norm, self.eps)
                x.masked_fill_((rows != local + mine.start)[:, None], 0)
            x = self.sp.all_reduce(x, "head")
            if self.sp.rank > 0:
                return x.new_empty((0, self.vocab_size))
        logits = self.ops.linear(x, self.head)  # [R, V], split over tp
        if self.tp.size > 1:
            logits = torch.cat(self.tp.all_gather(logits, "head").chunk(self.tp.size), -1)
        return logits[:, : self.vocab_size]
