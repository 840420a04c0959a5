"""The tile sizes of the matmul kernels: a table, read from `tiles.json`.

The file maps a card (a part of its name; `any` for all others) to kernels, and each kernel to a
list of entries. An entry applies to up to `rows` rows of activations per matrix; the first that
applies is taken, or else the last. Lists for single shapes, under `shapes`, take precedence.
`benchmarks/tune_moe.py` measures and writes them on a card; the entries of `any` are estimates.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

Tile = dict[str, int]
"""The launch sizes of a kernel: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages."""

# Multiprocessors of an H100, assumed where there is no card.
_PROCESSORS_ELSEWHERE = 132


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card."""
    if device.type != "cuda":
        return _PROCESSORS_ELSEWHERE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "any"


@lru_cache
def _table() -> dict[str, Any]:
    text = files("moespan.ops.cuda").joinpath("tiles.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def shape_key(kernel: str, out_width: int, in_width: int, weight_dtype: torch.dtype) -> str:
    """The key in `tiles.json` of one shape of one kernel."""
    return f"{kernel} {out_width}x{in_width} {str(weight_dtype).removeprefix('torch.')}"


def tile(
    kernel: str,
    rows: int,
    out_width: int,
    in_width: int,
    weight_dtype: torch.dtype,
    device: torch.device,
) -> Tile:
    """The launch sizes of `kernel`.

    Args:
        rows: rows of activations per matrix of `weight_dtype` [out, in], on average.
    """
    return dict(_choose(kernel, _bucket(rows), out_width, in_width, weight_dtype, device))


def _bucket(rows: int) -> int:
    return 1 << max(rows - 1, 0).bit_length()


@lru_cache(maxsize=4096)
def _choose(
    kernel: str,
    rows: int,
    out_width: int,
    in_width: int,
    weight_dtype: torch.dtype,
    device: torch.device,
) -> Tile:
    name = _card(device)
    cards: list[Any] = [part for card, part in _table().items() if card != "any" and card in name]
    own = cards[0] if cards else {}
    general = _table()["any"]
    key = shape_key(kernel, out_width, in_width, weight_dtype)
    entries = own.get("shapes", {}).get(key) or own.get(kernel) or general[kernel]
    entry = next((entry for entry in entries if entry["rows"] >= rows), entries[-1])
    chosen = {name: value for name, value in entry.items() if name != "rows"}
    if weight_dtype == torch.float32:
        # Elements are twice as large: half as many fit into shared memory.
        chosen["BLOCK_K"] = max(16, chosen["BLOCK_K"] // 2)
    return chosen
