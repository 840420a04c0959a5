"""The work of a step by formula: arithmetic operations, bytes to read, and the least time for both.

The formulas read the placement table and the model's geometry. Nothing is run, and no torch is
imported. `moespan.measure.probe` measures the limits that the least time depends on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from moespan.checkpoint.placement import cache_bytes_per_token, place
from moespan.config import EngineConfig, Layout, ModelConfig, share_of_experts_read


class Limits(msgspec.Struct, frozen=True):
    """What the devices of a job can do together in a second."""

    bytes_per_s: float
    operations_per_s: float

    @classmethod
    def mean(cls, before: Limits, after: Limits) -> Limits:
        """What held between two measurements."""
        return cls(
            (before.bytes_per_s + after.bytes_per_s) / 2,
            (before.operations_per_s + after.operations_per_s) / 2,
        )


class Work(NamedTuple):
    """What cannot be avoided: arithmetic operations, and bytes to be read."""

    operations: float
    num_bytes: float

    def least_s(self, limits: Limits) -> float:
        """Seconds that no program takes less than: the slower of the two, both at their limit."""
        return max(self.operations / limits.operations_per_s, self.num_bytes / limits.bytes_per_s)

    def bound(self, limits: Limits) -> str:
        """Which of the two is the slower: `compute` or `memory`."""
        compute_s = self.operations / limits.operations_per_s
        return "compute" if compute_s > self.num_bytes / limits.bytes_per_s else "memory"


def step_work(
    config: ModelConfig, engine: EngineConfig, num_sequences: int, num_new: int, context: float
) -> Work:
    """One step: `num_new` tokens of each of `num_sequences` sequences after `context` others.

    Operations are two for each weight that a token meets, and four for each element of a query and
    each token that it attends to; the head only meets the last token of a sequence. Bytes are those
    of the weights, as the engine keeps them, read once, and of the KV cache. T tokens that choose k
    of E experts meet E · (1 - (1 - k/E)^T) of them when routing is as even as that of random
    weights; a trained router is less even, and they meet fewer. Activations are not counted.

    The whole model counts, however it is laid out: its weights are somewhere, and have to be read.
    """
    num_tokens = num_sequences * num_new
    chosen = config.num_experts_per_tok / (config.n_routed_experts or 1)
    head = "embed" if config.tie_word_embeddings else "head"
    operations = num_bytes = 0.0
    held = place(config, Layout(), 0, quantization=engine.quantization)
    for name, parameter in held.parameters.items():
        elements, size_bytes = math.prod(parameter.shape), parameter.num_bytes(engine.dtype)
        if name == head:
            operations += 2 * elements * num_sequences
            num_bytes += size_bytes
        elif name == "embed":  # a token reads one row
            num_bytes += size_bytes / config.vocab_size * num_tokens
        elif ".experts." in name:
            operations += 2 * elements * chosen * num_tokens
            num_bytes += size_bytes * share_of_experts_read(config, num_tokens)
        else:
            operations += 2 * elements * num_tokens
            num_bytes += size_bytes
    pairs = num_tokens * (context + (num_new + 1) / 2)
    operations += 4 * config.hidden_size * config.num_hidden_layers * pairs
    token_bytes = cache_bytes_per_token(config, Layout(), 0, engine.cache_dtype)
    num_bytes += num_sequences * (context + num_new) * token_bytes
    return Work(operations, num_bytes)
