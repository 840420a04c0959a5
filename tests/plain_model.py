"""The model once more, as short as it can be said: whole sequences, no cache, nothing shared.

It reads `config.json` and the tensors of a checkpoint by their Hugging Face names, and imports
nothing of moespan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_logits(
    raw: Mapping[str, Any], tensor: Callable[[str], Tensor], token_ids: list[int]
) -> Tensor:
    """Logits [T, V] of every position, in the dtype of the weights that `tensor` gives."""
    num_heads = raw["num_attention_heads"]
    num_kv_heads = raw["num_key_value_heads"] or num_heads
    head_dim = raw["hidden_size"] // num_heads
    num_tokens = len(token_ids)
    factor = (raw["rope_scaling"] or {"factor": 1.0})["factor"]

    def linear(x: Tensor, name: str, bias: bool = False) -> Tensor:
        return F.linear(x, tensor(f"{name}.weight"), tensor(f"{name}.bias") if bias else None)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + raw["rms_norm_eps"]).sqrt()
        return x / scale * tensor(f"{name}.weight")

    def rotate(x: Tensor) -> Tensor:
        """[N, T, D]: the pair (i, i + D/2) of position p is turned by the angle p·θ^(-2i/D)."""
        half = head_dim // 2
        turns = torch.tensor(
            [
                [p / factor * raw["rope_theta"] ** (-2 * i / head_dim) for i in range(half)]
                for p in range(num_tokens)
            ],
            dtype=torch.float64,
        )
        pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
        turned = pairs * torch.polar(torch.ones_like(turns), turns)
        return torch.cat([turned.real, turned.imag], -1).to(x.dtype)

    def attention(x: Tensor, name: str) -> Tensor:
        bias = raw["attention_bias"]
        q, k, v = (
            linear(x, f"{name}.{part}_proj", bias).view(num_tokens, -1, head_dim).transpose(0, 1)
            for part in "qkv"
        )
        q, k = rotate(q), rotate(k)
        outputs = []
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = q[head] @ k[kv_head].T / head_dim**0.5
            future = torch.ones(num_tokens, num_tokens).triu(1).bool()
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[kv_head])
        return linear(torch.cat(outputs, -1), f"{name}.o_proj", bias)

    def mlp(x: Tensor, name: str) -> Tensor:
        gate = linear(x, f"{name}.gate_proj")
        return linear(gate * gate.sigmoid() * linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def moe(x: Tensor, name: str) -> Tensor:
        rows = []
        for token in x:
            scores = linear(token, f"{name}.gate").softmax(-1)
            chosen = scores.sort(descending=True).indices[: raw["num_experts_per_tok"]]
            total = scores[chosen].sum() if raw["norm_topk_prob"] and len(chosen) > 1 else 1.0
            parts = [scores[e] / total * mlp(token, f"{name}.experts.{int(e)}") for e in chosen]
            rows.append(torch.stack(parts).sum(0))
        shared = mlp(x, f"{name}.shared_experts") if raw["n_shared_experts"] else 0.0
        return torch.stack(rows) + shared

    x = tensor("model.embed_tokens.weight")[token_ids]
    for i in range(raw["num_hidden_layers"]):
        name = f"model.layers.{i}"
        has_experts = (
            raw["n_routed_experts"] is not None
            and i >= raw["first_k_dense_replace"]
            and i % raw["moe_layer_freq"] == 0
        )
        x = x + attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
        normed = norm(x, f"{name}.post_attention_layernorm")
        x = x + (moe if has_experts else mlp)(normed, f"{name}.mlp")
    head = "model.embed_tokens" if raw["tie_word_embeddings"] else "lm_head"
    return linear(norm(x, "model.norm"), head)
