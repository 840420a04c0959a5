"""The network, in reading order: attention → MLP → MoE → layer → model.

It is written once against `Ops` and `Mesh` and knows no device. Weights come by the names of the
placement table. Shapes are those of one rank: T tokens of its replica's step, L of them that it
holds between attentions (all, unless sp splits them), H hidden, N query heads, KV key heads, D head
size, V vocabulary rows, R rows whose logits are wanted.

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
from moespan.ops import AttentionBatch, KVCache, Ops, Weight
from moespan.parallel.dispatch import Dispatch, Slots
from moespan.parallel.mesh import Axis, Mesh
from moespan.parallel.tokens import split_evenly

Weights = Mapping[str, Weight]
# Called with (layer, module, value [L, ...]) as the network computes, the same on all tp ranks: for
# looking inside, not for changing. Layer -1 is before the first.
Observer = Callable[[int, str, Tensor], None]


@dataclass(frozen=True)
class Step:
    """What all layers need to know of a step.

    Attributes:
        batch: how its T tokens lie in sequences and cache.
        lengths: how many of them each sp rank holds; they sum to T.
        cos, sin: the angles of this rank's L tokens, rows of `Ops.rotary_table`.
    """

    batch: AttentionBatch
    lengths: list[int]
    cos: Tensor
    sin: Tensor


class Attention:
    """Multi-head (or grouped-query) attention over the paged cache.

    tp splits the heads. sp splits the tokens outside, and the heads of tp once more inside
    (Ulysses, arXiv 2309.14509).
    """

    def __init__(self, config: ModelConfig, ops: Ops, mesh: Mesh, weights: Weights, name: str):
        self.ops, self.tp, self.sp = ops, mesh.tp, mesh.sp
        self.qkv, self.out = weights[f"{name}.qkv"], weights[f"{name}.out"]
        self.qkv_bias = weights.get(f"{name}.qkv_bias")
        self.out_bias = weights.get(f"{name}.out_bias")
        self.head_dim = config.head_dim
        queries, keys = head_shares(config, self.tp.size, self.tp.rank)
        self.num_heads, self.num_kv_heads = (
            share.length // self.head_dim for share in (queries, keys)
        )
        self.sent_heads = torch.tensor(
            [head for rank in range(self.sp.size) for head in self._heads_of(rank)],
            device=mesh.device,
        )

    def __call__(self, x: Tensor, cache: KVCache, step: Step) -> Tensor:
        """[L, H] replicated over tp → [L, H] replicated over tp."""
        qkv = self.ops.linear(x, self.qkv, self.qkv_bias).unflatten(-1, (-1, self.head_dim))
        turn = self.num_heads, self.num_kv_heads, step.cos, step.sin
        if self.sp.size == 1:
            q = self.ops.rope_to_cache(qkv, *turn, cache, step.batch.slots)
        else:
            q, k, v = self.ops.rope(qkv, *turn)
            q, k, v = self._to_heads(torch.cat([q, k, v], 1), step.lengths)
            self.ops.write_cache(k, v, cache, step.batch.slots)
        attended = self.ops.attention(q, cache, step.batch, self.head_dim**-0.5)
        if self.sp.size > 1:
            attended = self._to_tokens(attended, step.lengths)
        out = self.ops.linear_sum(attended.flatten(1), self.out, self.tp, "attention")
        return out if self.out_bias is None else out + self.out_bias

    def _heads_of(self, sp_rank: int) -> list[int]:
        """The query, key and value heads, numbered through, that `sp_rank` attends with."""
        share = self.num_heads // self.sp.size
        queries = range(sp_rank * share, (sp_rank + 1) * share)
        # Query heads of one group share a key head, so those of one rank may need but a few.
        keys = sorted({head * self.num_kv_heads // self.num_heads for head in queries})
        first_key, first_value = self.num_heads, self.num_heads + self.num_kv_heads
        return [
            *queries,
            *(first_key + head for head in keys),
            *(first_value + head for head in keys),
        ]

    def _to_heads(self, qkv: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """[L, N + 2·KV, D] of my tokens → q, k, v [T, heads, D] of my heads."""
        num_tokens = len(qkv)
        chosen = qkv[:, self.sent_heads].unflatten(1, (self.sp.size, -1))
        by_rank = chosen.transpose(0, 1).flatten(0, 1)
        received = self.sp.all_to_all(by_rank, [num_tokens] * self.sp.size, lengths, "attention")
        num_queries = self.num_heads // self.sp.size
        num_keys = (received.shape[1] - num_queries) // 2
        q, k, v = received.split([num_queries, num_keys, num_keys], 1)
        return q, k, v

    def _to_tokens(self, attended: Tensor, lengths: list[int]) -> Tensor:
        """[T, N/sp, D] of my heads → [L, N, D] of my tokens."""
        num_tokens = lengths[self.sp.rank]
        received = self.sp.all_to_all(attended, lengths, [num_tokens] * self.sp.size, "attention")
        by_rank = received.unflatten(0, (self.sp.size, num_tokens))
        return by_rank.transpose(0, 1).flatten(1, 2)


class Rope:
    """Angles of the rotary embedding (arXiv 2104.09864), from float32, for `length` positions."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
        frequencies = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
        positions = torch.arange(length, dtype=torch.float32) / config.rope_linear_factor
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos().to(device), angles.sin().to(device)
        self.cos, self.sin = ops.rotary_table(cos, sin, dtype)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Integers [T] → T rows of cos and of sin."""
        return self.cos[positions], self.sin[positions]


class MLP:
    """SwiGLU. tp splits the width."""

    def __init__(self, ops: Ops, tp: Axis, weights: Weights, name: str) -> None:
        self.ops, self.tp = ops, tp
        self.gate_up, self.down = weights[f"{name}.gate_up"], weights[f"{name}.down"]

    def __call__(self, x: Tensor, module: str = "mlp", plus: Tensor | None = None) -> Tensor:
        """[T, H] replicated over tp → [T, H] replicated over tp: one sum carries `plus`, which is
        partial over tp, too."""
        return self.ops.mlp_sum(x, self.gate_up, self.down, self.tp, module, plus)


class MoE:
    """Routed experts plus the shared ones.

    ep spreads the routed ones; tp splits the shared ones' width, and that of the routed ones where
    there are more tp ranks than ep ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        tp: Axis,
        weights: Weights,
        name: str,
        dispatch: Dispatch,
        slots: Slots,
    ) -> None:
        self.ops, self.tp, self.dispatch, self.slots = ops, tp, dispatch, slots
        self.first_slot = dispatch.first_slot(slots)
        self.router = weights[f"{name}.router"]
        self.gate_up = weights[f"{name}.experts.gate_up"]
        self.down = weights[f"{name}.experts.down"]
        self.num_chosen, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        has_shared = config.shared_intermediate_size > 0
        self.shared = MLP(ops, tp, weights, f"{name}.shared") if has_shared else None

    def __call__(self, x: Tensor, observe: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """[L, H] replicated over tp → [L, H] replicated over tp: one sum carries both kinds."""
        weights, chosen = self.ops.route(x, self.router, self.num_chosen, self.renormalize)
        if observe:
            observe("router.experts", chosen)
            observe("router.weights", weights)
        routed = self.dispatch(
            x, weights, chosen, self.slots, self._experts, self._experts_anywhere
        )  # partial over tp
        if self.shared is None:
            return self.tp.all_reduce(routed, "moe")
        return self.shared(x, "moe", routed)

    def _experts(self, x: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
        return self.ops.experts(
            x, weights, slots, self.gate_up, self.down, self.first_slot, self.slots.count
        )

    def _experts_anywhere(self, x: Tensor, weights: Tensor, slots: Tensor, axis: Axis) -> Tensor:
        return self.ops.experts_anywhere(
            x, weights, slots, self.gate_up, self.down, axis, self.slots.count
        )


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
            slots = Slots(experts.of(index), config.n_routed_experts or 0, mesh.device)
            self.mlp = MoE(config, ops, mesh.tp, weights, f"{name}.mlp", dispatch, slots)
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
        """What the layer before added, and the stream before it: [L, H] each → the same."""
        see = partial(observe, self.index) if observe else None
        if residual is None:
            x, residual = self.ops.rms_norm(x, self.attention_norm, self.eps), x
        else:
            x, residual = self.ops.add_rms_norm(x, residual, self.attention_norm, self.eps)
        x = self.attention(x, cache, step)
        if see:
            see("attention", x)
        x, residual = self.ops.add_rms_norm(x, residual, self.mlp_norm, self.eps)
        x = self.mlp(x, see) if isinstance(self.mlp, MoE) else self.mlp(x)
        if see:
            see("hidden", x + residual)
        return x, residual


class Model:
    """One rank's stage of DeepSeek-MoE.

    Args:
        max_model_len: positions that the rotary table covers.
        weights: this rank's parameters, by the names of the placement table.
        dispatch: how tokens meet experts.
        experts: which ep rank holds which experts, as in the placement.
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
    ) -> None:
        self.ops, self.tp, self.sp, self.eps = ops, mesh.tp, mesh.sp, config.rms_norm_eps
        self.vocab_size = config.vocab_size
        self.vocabulary = Share.of(config.vocab_size, mesh.tp.size, mesh.tp.rank)
        self.is_first_stage, self.is_last_stage = mesh.is_first_stage, mesh.is_last_stage
        self.embed = weights.get("embed")
        stage = mesh.layout.stages(config)[mesh.at.pp]
        dtype = weights[f"layers.{stage.start}.attention.norm"].dtype
        self.rope = Rope(config, ops, max_model_len, dtype, mesh.device)
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
        """Run one step; keys and values go into `caches`, one for each of my layers.

        Args:
            inputs: on the first stage token ids, integers [T], on others the hidden state [L, H].
            rows: integers [R], the tokens whose logits are wanted.
            observe: shown `embed`, and of every layer `attention`, `router.experts`,
                `router.weights` and `hidden`, what the layer passes on.

        Returns:
            On the last stage logits [R, vocabulary] in the activations' dtype, replicated over tp
            (none on sp ranks but the first); on others the hidden state [L, H] for the next stage.
        """
        lengths = split_evenly(len(batch.positions), self.sp.size)
        start = sum(lengths[: self.sp.rank])
        mine = slice(start, start + lengths[self.sp.rank])
        step = Step(batch, lengths, *self.rope(batch.positions[mine]))
        x = self._embed(inputs[mine]) if self.is_first_stage else inputs
        residual: Tensor | None = None
        if observe and self.is_first_stage:
            observe(-1, "embed", x)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, cache, step, observe)
        assert residual is not None
        if not self.is_last_stage:
            return x + residual
        return self._logits(x, residual, rows, mine)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Integers [L] → [L, H] replicated over tp; each rank looks up the rows that it holds."""
        assert self.embed is not None
        if self.tp.size == 1:
            return self.embed[token_ids]
        local = token_ids - self.vocabulary.start
        elsewhere = (local < 0) | (local >= self.vocabulary.stop - self.vocabulary.start)
        x = self.embed[local.masked_fill(elsewhere, 0)]
        return self.tp.all_reduce(x.masked_fill_(elsewhere[:, None], 0), "embed")

    def _logits(self, x: Tensor, residual: Tensor, rows: Tensor, mine: slice) -> Tensor:
        """[L, H] twice → [R, vocabulary] on the first sp rank, no rows on others."""
        assert self.norm is not None and self.head is not None
        if self.sp.size == 1:
            x, _ = self.ops.add_rms_norm(x[rows], residual[rows], self.norm, self.eps)
        else:
            # Each row is on one sp rank, and zero on the others.
            if mine.start == mine.stop:
                x = x.new_zeros(len(rows), x.shape[-1])
            else:
                local = (rows - mine.start).clamp(0, mine.stop - mine.start - 1)
                x, _ = self.ops.add_rms_norm(x[local], residual[local], self.norm, self.eps)
                x.masked_fill_((rows != local + mine.start)[:, None], 0)
            x = self.sp.all_reduce(x, "head")
            if self.sp.rank > 0:
                return x.new_empty((0, self.vocab_size))
        logits = self.ops.linear(x, self.head)  # split over tp
        if self.tp.size > 1:
            logits = torch.cat(self.tp.all_gather(logits, "head").chunk(self.tp.size), -1)
        return logits[:, : self.vocab_size]
