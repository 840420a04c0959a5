"""The work of a step by formula: arithmetic operations, bytes to read, and the least time for both.

The formulas read the placement table and the model's geometry. Nothing is run, and no torch is
imported. `moespan.measure.probe` measures the limits that the least time depends on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import msgspec

from moespan.checkpoint.placement import Parameter, cache_bytes_per_token, place
from moespan.config import EngineConfig, Layout, ModelConfig, share_of_experts_read


class Limits(msgspec.Struct, frozen=True):
    """The rates that all devices of a job reach together."""

    bytes_per_s: float
    operations_per_s: float

    @classmethod
    def mean(cls, before: Limits, after: Limits) -> Limits:
        """The limits that held between two measurements."""
        return cls(
            (before.bytes_per_s + after.bytes_per_s) / 2,
            (before.operations_per_s + after.operations_per_s) / 2,
        )


class Work(NamedTuple):
    """Unavoidable work: arithmetic operations, and bytes to read."""

    operations: float
    num_bytes: float

    def least_s(self, limits: Limits) -> float:
        """Least seconds of any program: the longer of the two, each at its limit."""
        return max(self.operations / limits.operations_per_s, self.num_bytes / limits.bytes_per_s)

    def bound(self, limits: Limits) -> str:
        """The part of the work that takes longer: `compute` or `memory`."""
        compute_s = self.operations / limits.operations_per_s
        return "compute" if compute_s > self.num_bytes / limits.bytes_per_s else "memory"


def step_work(
    config: ModelConfig, engine: EngineConfig, num_sequences: int, num_new: int, context: float
) -> Work:
    """The work of one step: each of `num_sequences` sequences gets `num_new` tokens after `context`
    others.

    Operations are two for each weight that a token meets, and four for each element of a query and
    each token that it attends to. The head meets only the last token of a sequence.

    Bytes are those of the weights, as the engine keeps them and read once, and of the KV cache. T
    tokens that choose K of E experts each read E·(1 − (1 − K/E)^T) of them, if routing is as even
    as that of random weights. A trained router is less even, and its tokens read fewer experts.
    Activations are not counted.

    The whole model counts, however it is laid out: each weight is on some rank and has to be read.
    """
    counts = _Counts(config, engine, num_sequences, num_new, context)
    counts.embed()
    for layer in range(config.num_hidden_layers):
        counts.attention(layer)
        if config.is_moe(layer):
            counts.moe(layer)
        else:
            counts.dense(layer)
    counts.head()
    return Work(counts.operations, counts.num_bytes)


class _Counts:
    """Counts the work of a step, by the parts of `moespan.model.network`."""

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        num_sequences: int,
        num_new: int,
        context: float,
    ) -> None:
        self.operations = self.num_bytes = 0.0
        self._config, self._engine = config, engine
        self._num_sequences, self._num_tokens = num_sequences, num_sequences * num_new
        self._cached_tokens = num_sequences * (context + num_new)
        # Pairs of a token and one that it attends to: (num_new + 1) / 2 of the new ones on average.
        self._pairs = self._num_tokens * (context + (num_new + 1) / 2)
        # "embed", "layers.3.mlp", ... → name → parameter.
        self._parts: dict[str, dict[str, Parameter]] = defaultdict(dict)
        whole = place(config, Layout(), 0, quantization=engine.quantization)
        for name, parameter in whole.parameters.items():
            self._parts[".".join(name.split(".")[:3])][name] = parameter
        cache_bytes = cache_bytes_per_token(config, Layout(), 0, engine.cache_dtype)
        self._layer_cache_bytes = cache_bytes // config.num_hidden_layers

    def embed(self) -> None:
        # A token reads one row. Tied weights are counted once, by the head.
        if not self._config.tie_word_embeddings:
            table = self._parts["embed"]["embed"]
            row_bytes = table.num_bytes(self._engine.dtype) / self._config.vocab_size
            self.num_bytes += row_bytes * self._num_tokens

    def attention(self, layer: int) -> None:
        for parameter in self._parts[f"layers.{layer}.attention"].values():
            self._weight(parameter, self._num_tokens)
        self.operations += 4 * self._config.hidden_size * self._pairs
        self.num_bytes += self._cached_tokens * self._layer_cache_bytes

    def dense(self, layer: int) -> None:
        for parameter in self._parts[f"layers.{layer}.mlp"].values():
            self._weight(parameter, self._num_tokens)

    def moe(self, layer: int) -> None:
        config = self._config
        chosen = config.num_experts_per_tok / (config.n_routed_experts or 0)
        share_read = share_of_experts_read(config, self._num_tokens)
        for name, parameter in self._parts[f"layers.{layer}.mlp"].items():
            if ".experts." in name:
                self._weight(parameter, chosen * self._num_tokens, share_read)
            else:
                self._weight(parameter, self._num_tokens)

    def head(self) -> None:
        self._weight(self._parts["norm"]["norm"], self._num_tokens)
        name = "embed" if self._config.tie_word_embeddings else "head"
        self._weight(self._parts[name][name], self._num_sequences)

    def _weight(self, parameter: Parameter, num_tokens: float, share_read: float = 1) -> None:
        """A parameter whose elements `num_tokens` tokens meet on average."""
        self.operations += 2 * math.prod(parameter.shape) * num_tokens
        self.num_bytes += parameter.num_bytes(self._engine.dtype) * share_read
