"""What a step cannot do without, and how fast this machine could do it: a roofline's two sides."""

from __future__ import annotations

import math
import platform
import time
from pathlib import Path

import torch

from moespan import ModelConfig
from moespan.checkpoint.placement import place
from moespan.config import Layout


def step_work(
    config: ModelConfig, dtype: str, num_sequences: int, num_new: int, context: float
) -> tuple[float, float]:
    """Operations and bytes of one step: `num_new` tokens of each sequence after `context` others.

    Operations are two for each weight that a token meets, and four for each element of a query and
    each token that it attends to. Bytes are those of the weights, read once, and of the KV cache.
    With routing as even as that of random weights, T tokens that choose k of E experts meet
    1 - (1 - k/E)^T of them.
    """
    num_tokens = num_sequences * num_new
    chosen = config.num_experts_per_tok / (config.n_routed_experts or 1)
    head = "embed" if config.tie_word_embeddings else "head"
    operations = num_bytes = 0.0
    for name, parameter in place(config, Layout(), 0).parameters.items():
        elements, size_bytes = math.prod(parameter.shape), parameter.num_bytes(dtype)
        if name == head:  # only the last token of a sequence needs logits
            operations += 2 * elements * num_sequences
            num_bytes += size_bytes
        elif name == "embed":  # a token reads one row
            num_bytes += size_bytes / config.vocab_size * num_tokens
        elif ".experts." in name:
            operations += 2 * elements * chosen * num_tokens
            num_bytes += size_bytes * (1 - (1 - chosen) ** num_tokens)
        else:
            operations += 2 * elements * num_tokens
            num_bytes += size_bytes
    pairs = num_sequences * num_new * (context + (num_new + 1) / 2)
    operations += 4 * config.hidden_size * config.num_hidden_layers * pairs
    num_bytes += num_sequences * (context + num_new) * config.kv_bytes_per_token(dtype)
    return operations, num_bytes


class Probes:
    """Measures one device: bytes read, and matrix operations in `dtype`, in a second."""

    def __init__(self, device: str, dtype: str, read_mb: int, width: int) -> None:
        self._numbers = torch.ones((read_mb << 20) // 4, device=device)
        self._matrix = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)

    def bytes_per_s(self) -> float:
        started = time.perf_counter()
        self._numbers.sum().item()  # `item` waits for the device
        return self._numbers.nbytes / (time.perf_counter() - started)

    def operations_per_s(self) -> float:
        started = time.perf_counter()
        torch.nn.functional.linear(self._matrix, self._matrix)[0, 0].item()
        return 2 * len(self._matrix) ** 3 / (time.perf_counter() - started)


def machine_name(device: str) -> str:
    """The model of the device, or of this machine's processor."""
    if device != "cpu":
        return str(torch.get_device_module(device).get_device_name())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())
