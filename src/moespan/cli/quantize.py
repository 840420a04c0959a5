"""`moespan quantize`: writes a checkpoint of 8 or 4 bits."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moespan.cli.show import progress_bytes, say_written
from moespan.config import QUANTIZATIONS, Layout, ModelConfig

SUMMARY = "write a checkpoint of 8 or 4 bits"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `quantize`."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or a hub name")
    parser.add_argument("folder", type=Path, metavar="OUT", help="the new folder")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="int8",
        help="int8: 8-bit integer weights; w8a8: the same, and integer activations at run time; "
        "fp8: 8-bit floats for both; int4: 4-bit integer weights (int8)",
    )


def run(args: argparse.Namespace) -> int:
    """Write a checkpoint of 8 or 4 bits, for this engine and others (compressed-tensors format)."""
    from moespan.checkpoint.placement import place
    from moespan.checkpoint.quantize import quantize_checkpoint
    from moespan.front.hub import resolve

    folder = resolve(args.model)
    config = ModelConfig.from_pretrained(folder)
    total_bytes = place(config, Layout(), 0, quantization=args.quantization).num_bytes(config.dtype)
    started = time.perf_counter()
    with progress_bytes(total_bytes) as bar:
        quantize_checkpoint(folder, args.folder, args.quantization, bar.update)
    say_written(args.folder, total_bytes, time.perf_counter() - started)
    return 0
