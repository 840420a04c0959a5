"""Finds the tile sizes with which the matmul kernels are fastest on this GPU.

    python benchmarks/tune_moe.py                 # prints what it finds
    python benchmarks/tune_moe.py --write         # and puts it into tiles.json
    python benchmarks/tune_moe.py --device cpu --preset tiny    # its logic, in the interpreter

For each number of rows that an expert gets, every candidate is timed on random tokens spread evenly
over the experts. `moespan.ops.cuda.tiles` explains the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from moespan import ModelConfig
from moespan.checkpoint.presets import PRESETS, preset
from moespan.checkpoint.rounding import QuantizedWeight
from moespan.config import QUANTIZATIONS, SCHEMES

ROWS = (16, 32, 64, 128, 256)
MOST_ROWS = 1 << 30


def candidates(kernel: str, rows: int, quick: bool) -> Iterator[dict[str, int]]:
    """Tile sizes that may suit so many rows; only a few if `quick`."""
    if kernel.startswith("few_"):
        small = itertools.product((4, 8, 16), (256, 512, 1024), (2, 4, 8))
        every = [
            {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": 3}
            for n, k, warps in small
        ]
    else:
        most = max(16, min(128, rows))
        wide = itertools.product((32, 64, 128, 256), (32, 64, 128), (4, 8), (3, 4, 5))
        every = [
            {
                "BLOCK_M": m,
                "BLOCK_N": n,
                "BLOCK_K": k,
                "num_warps": warps,
                "num_stages": stages,
            }
            for m in sorted({most, max(16, most // 2)})
            for n, k, warps, stages in wide
            # Larger tiles do not fit into the registers of so few warps.
            if m * n <= 4096 * warps
        ]
    yield from every[:: len(every) // 2] if quick else every


def measure(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Least seconds of `times` calls; infinite for tiles that do not fit on the card."""
    best = float("inf")
    try:
        for _ in range(times):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    except Exception as error:
        if "out of resource" not in str(error):
            raise
        return float("inf")
    return best


def tune(
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: str | None,
    device: torch.device,
    quick: bool,
) -> dict[str, list[dict[str, int]]]:
    """Shape → table, in the form of `tiles.json`."""
    from moespan.ops import ExpertBank, Weight
    from moespan.ops.cuda import matmul, tiles

    width, inner = config.hidden_size, config.moe_intermediate_size
    num_experts, num_chosen = config.n_routed_experts or 1, config.num_experts_per_tok

    def matrices(*shape: int) -> Weight:
        drawn = torch.randn(shape, device=device)
        if quantization is None:
            return drawn.to(dtype)
        scheme = SCHEMES[quantization]
        values = (30 * drawn).to(getattr(torch, scheme.dtype))
        scales = torch.rand(shape[:-1], device=device) / 1000
        return QuantizedWeight(values, scales, scheme.activation_bits)

    gate_up, down = matrices(num_experts, 2 * inner, width), matrices(num_experts, width, inner)
    bank = ExpertBank(gate_up, down, 0, num_experts)
    kind = matmul.Matrix.of(gate_up).values.dtype
    shapes = {"few_gate_up": (inner, width), "gate_up": (inner, width)}
    shapes |= {"few_down": (width, inner), "down": (width, inner)}
    found: dict[str, list[dict[str, int]]] = {}
    current: dict[str, dict[str, int]] = {}

    def tile(kernel: str, rows: int, *rest: Any) -> dict[str, int]:
        return dict(current.get(kernel) or tiles.tile(kernel, rows, *rest))

    with patch.object(matmul, "tile", tile):
        for few in (True, False):
            for rows in ROWS[:1] if few or quick else ROWS:
                num_tokens = 1 if few else max(5, rows * num_experts // num_chosen)
                x = torch.randn(num_tokens, width, device=device).to(dtype)
                order = torch.rand(num_tokens, num_experts, device=device).argsort(-1)
                physical_ids = order[:, :num_chosen].int()
                weights = torch.rand(num_tokens, num_chosen, device=device)
                run = partial(matmul.experts, x, weights, physical_ids, bank)
                current.clear()
                # Both products use the same row tiles; those of the second product come first.
                for kernel in ("few_down", "few_gate_up") if few else ("down", "gate_up"):
                    timed = []
                    for sizes in candidates(kernel, rows, quick):
                        if kernel == "gate_up" and sizes["BLOCK_M"] != current["down"]["BLOCK_M"]:
                            continue
                        current[kernel] = sizes
                        seconds = measure(run, device, 1 if quick else 12)
                        timed.append((seconds, json.dumps(sizes)))
                    seconds, best = min(timed)
                    current[kernel] = json.loads(best)
                    key = tiles.shape_key(kernel, *shapes[kernel], kind)
                    limit = MOST_ROWS if few or rows == ROWS[-1] or quick else rows
                    found.setdefault(key, []).append({"rows": limit, **current[kernel]})
                    print(f"{key}, {rows} rows: {1e6 * seconds:.0f} µs with {best}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--preset", choices=PRESETS, default="16b")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    kinds = [name for name in QUANTIZATIONS if name != "int4"]  # of GPUs
    parser.add_argument("--quantization", choices=kinds)
    parser.add_argument("--write", action="store_true", help="into tiles.json, for this card")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --preset tiny tries the script out")
    device = torch.device(args.device)
    config = ModelConfig.from_dict(preset(args.preset, {}))
    with torch.inference_mode():
        found = tune(
            config,
            getattr(torch, args.dtype),
            args.quantization,
            device,
            quick=args.device == "cpu",
        )
    if args.write and args.device == "cuda":
        path = Path(str(files("moespan.ops.cuda").joinpath("tiles.json")))
        table = json.loads(path.read_text())
        table.setdefault(torch.cuda.get_device_name(), {}).setdefault("shapes", {}).update(found)
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
