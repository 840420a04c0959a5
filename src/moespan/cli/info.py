"""`moespan info`: describes a model in one page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from moespan.cli.flags import add_model_flags, settings_of
from moespan.config import Layout, ModelConfig
from moespan.units import COUNTS, bytes_in_words, scaled

SUMMARY = "describe a model"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `info`."""
    add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Describe a model in one page; reads no weights."""
    from moespan.planner.memory import footprint

    model, config, _ = settings_of(args).resolve(to_run=False)
    assert model is not None
    facts = {"model": args.model, **asdict(footprint(config, model)), "config": asdict(model)}
    if args.json:
        print(json.dumps(facts))
        return 0
    lines = list(_lines(model, config.layout, facts))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def _lines(model: ModelConfig, layout: Layout, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of each printed line."""
    experts = (
        f"{model.n_routed_experts} routed, top {model.num_experts_per_tok}, "
        f"{model.n_shared_experts or 0} shared, width {model.moe_intermediate_size}, "
        f"in {model.num_moe_layers} layers"
        if model.n_routed_experts
        else "none"
    )
    total, active = facts["parameters"], facts["active_parameters"]
    yield "model", facts["model"]
    yield (
        "parameters",
        f"{scaled(total, COUNTS, 3)} total, {scaled(active, COUNTS)} active for one token",
    )
    yield "layers", f"{model.num_hidden_layers}, hidden size {model.hidden_size}"
    yield (
        "attention",
        f"{model.num_attention_heads} heads × {model.head_dim}, "
        f"{model.num_key_value_heads} KV heads",
    )
    yield "experts", experts
    yield "dense MLP width", str(model.intermediate_size)
    yield "vocabulary", str(model.vocab_size)
    yield "longest sequence", f"{model.max_position_embeddings} tokens"
    yield (
        "weights",
        ", ".join(f"{bytes_in_words(size)} {name}" for name, size in facts["bytes"].items()),
    )
    yield (
        "KV cache per token",
        ", ".join(
            f"{size / 1024:g} KiB {name}" for name, size in facts["kv_bytes_per_token"].items()
        ),
    )
    weights = max(facts["weight_bytes_per_rank"])
    cache = max(facts["kv_bytes_per_token_per_rank"])
    yield (
        f"per rank, {layout}",
        f"{bytes_in_words(weights)} of {facts['quantization'] or facts['dtype']} weights, "
        f"{cache / 1024:g} KiB of {facts['kv_cache_dtype']} KV cache per token",
    )
