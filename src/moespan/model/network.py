"""The network, in reading order: attention → MLP → MoE → layer → model.

It is written once against `Ops` and `Mesh` and knows no device. Weights come by the names of the
placement table. Shapes are those of one rank: T tokens of the step, H hidden, N query heads, KV key
heads, D head size, V vocabulary rows, R rows whose logits are wanted.

Formulas: DeepSeekMoE (arXiv 2401.06066), with the numerics of its Hugging Face model, except that
the router works in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moespan.checkpoint.placement import Share, head_shares
from moespan.config import ModelConfig
from moespan.ops import AttentionBatch, Ops
from moespan.parallel.mesh import Axis, Mesh

Weights = Mapping[str, Tensor]
# Called with (layer, module, value) as the network computes; for looking inside, not for changing.
Observer = Callable[[int, str, Tensor], None]


class Attention:
    """Multi-head (or grouped-query) attention over the paged cache. tp splits the heads."""

    def __init__(self, config: ModelConfig, ops: Ops, tp: Axis, weights: Weights, name: str):
        self.ops, self.tp = ops, tp
        self.qkv, self.out = weights[f"{name}.qkv"], weights[f"{name}.out"]
        self.qkv_bias = weights.get(f"{name}.qkv_bias")
        self.out_bias = weights.get(f"{name}.out_bias")
        queries, keys = head_shares(config, tp.size, tp.rank)
        self.head_dim = config.head_dim
        self.widths = [queries.length, keys.length, keys.length]

    def __call__(
        self, x: Tensor, k_cache: Tensor, v_cache: Tensor, rope: Rope, batch: AttentionBatch
    ) -> Tensor:
        """[T, H] replicated over tp → [T, H] replicated over tp."""
        qkv = self.ops.linear(x, self.qkv, self.qkv_bias)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.widths, -1))
        cos, sin = rope(batch.positions)
        q, k = self.ops.rope(q, cos, sin), self.ops.rope(k, cos, sin)
        self.ops.write_cache(k, v, k_cache, v_cache, batch.slots)
        attended = self.ops.attention(q, k_cache, v_cache, batch, self.head_dim**-0.5)
        out = self.ops.linear(attended.flatten(1), self.out)  # partial over tp
        out = self.tp.all_reduce(out, "attention")
        return out if self.out_bias is None else out + self.out_bias


class Rope:
    """Angles of the rotary embedding (arXiv 2104.09864), from float32, for `length` positions."""

    def __init__(self, config: ModelConfig, length: int, device: torch.device) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
        frequencies = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
        positions = torch.arange(length, dtype=torch.float32) / config.rope_linear_factor
        angles = torch.outer(positions, frequencies)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] → float32 cos, sin [T, D/2]."""
        return self.cos[positions], self.sin[positions]


class MLP:
    """SwiGLU. tp splits the width."""

    def __init__(self, ops: Ops, weights: Weights, name: str) -> None:
        self.ops = ops
        self.gate_up, self.down = weights[f"{name}.gate_up"], weights[f"{name}.down"]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] replicated over tp → [T, H] partial over tp."""
        hidden = self.ops.swiglu(self.ops.linear(x, self.gate_up))
        return self.ops.linear(hidden, self.down)


class MoE:
    """Routed experts plus the shared ones. tp splits every expert's width."""

    def __init__(self, config: ModelConfig, ops: Ops, weights: Weights, name: str) -> None:
        self.ops = ops
        self.router = weights[f"{name}.router"]
        self.gate_up, self.down = (
            weights[f"{name}.experts.gate_up"],
            weights[f"{name}.experts.down"],
        )
        self.num_chosen, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        has_shared = config.shared_intermediate_size > 0
        self.shared = MLP(ops, weights, f"{name}.shared") if has_shared else None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] replicated over tp → [T, H] partial over tp: one sum carries both kinds."""
        weights, chosen = self.ops.route(x, self.router, self.num_chosen, self.renormalize)
        out = self.ops.experts(x, weights, chosen, self.gate_up, self.down)
        return out if self.shared is None else out + self.shared(x)


class Layer:
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, ops: Ops, tp: Axis, weights: Weights, index: int):
        name = f"layers.{index}"
        self.ops, self.tp, self.eps = ops, tp, config.rms_norm_eps
        self.attention_norm = weights[f"{name}.attention.norm"]
        self.attention = Attention(config, ops, tp, weights, f"{name}.attention")
        self.mlp_norm = weights[f"{name}.mlp.norm"]
        self.is_moe = config.is_moe(index)
        self.mlp = (
            MoE(config, ops, weights, f"{name}.mlp")
            if self.is_moe
            else MLP(ops, weights, f"{name}.mlp")
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        rope: Rope,
        batch: AttentionBatch,
    ) -> tuple[Tensor, Tensor]:
        """What the layer before added, and the stream before it: [T, H] each → the same."""
        if residual is None:
            x, residual = self.ops.rms_norm(x, self.attention_norm, self.eps), x
        else:
            x, residual = self.ops.add_rms_norm(x, residual, self.attention_norm, self.eps)
        x = self.attention(x, k_cache, v_cache, rope, batch)
        x, residual = self.ops.add_rms_norm(x, residual, self.mlp_norm, self.eps)
        x = self.tp.all_reduce(self.mlp(x), "moe" if self.is_moe else "mlp")
        return x, residual


class Model:
    """DeepSeek-MoE on one rank.

    Args:
        max_model_len: positions that the rotary table covers.
        weights: this rank's parameters, by the names of the placement table.
    """

    def __init__(
        self, config: ModelConfig, ops: Ops, mesh: Mesh, weights: Weights, max_model_len: int
    ) -> None:
        self.ops, self.tp, self.eps = ops, mesh.tp, config.rms_norm_eps
        self.vocab_size = config.vocab_size
        self.vocabulary = Share.of(config.vocab_size, mesh.tp.size, mesh.tp.rank)
        self.embed = weights["embed"]
        self.rope = Rope(config, max_model_len, mesh.device)
        self.layers = [
            Layer(config, ops, mesh.tp, weights, i) for i in range(config.num_hidden_layers)
        ]
        self.norm = weights["norm"]
        self.head = weights["embed" if config.tie_word_embeddings else "head"]

    def __call__(
        self,
        token_ids: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        batch: AttentionBatch,
        rows: Tensor,
        observe: Observer | None = None,
    ) -> Tensor:
        """Run one step; keys and values go into `caches`, one (k, v) pair for each layer.

        Args:
            token_ids: int64 [T].
            rows: int64 [R], the tokens whose logits are wanted.
            observe: shown `embed` and, after every layer, `hidden` [T, H].

        Returns:
            Logits float32 [R, vocabulary], replicated over tp.
        """
        x = self._embed(token_ids)
        residual: Tensor | None = None
        if observe:
            observe(-1, "embed", x)
        for index, (layer, (k_cache, v_cache)) in enumerate(zip(self.layers, caches, strict=True)):
            x, residual = layer(x, residual, k_cache, v_cache, self.rope, batch)
            if observe:
                observe(index, "hidden", x + residual)
        assert residual is not None
        x, _ = self.ops.add_rms_norm(x[rows], residual[rows], self.norm, self.eps)
        logits = self.ops.linear(x, self.head).float()  # split over tp
        return self.tp.all_gather(logits, "head")[:, : self.vocab_size]

    def _embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] → [T, H] replicated over tp; each rank looks up the rows that it holds."""
        if self.tp.size == 1:
            return self.embed[token_ids]
        local = token_ids - self.vocabulary.start
        elsewhere = (local < 0) | (local >= self.vocabulary.stop - self.vocabulary.start)
        x = self.embed[local.masked_fill(elsewhere, 0)]
        return self.tp.all_reduce(x.masked_fill_(elsewhere[:, None], 0), "embed")
