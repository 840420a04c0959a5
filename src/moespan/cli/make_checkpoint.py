"""`moespan make-checkpoint`: writes random weights in the Hugging Face format."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from moespan.cli.show import progress_bytes, say_written
from moespan.config import DTYPE_BYTES, ModelConfig
from moespan.errors import ConfigError, shown

SUMMARY = "write random weights"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `make-checkpoint`."""
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--preset", default="tiny", metavar="{16b,16b-4l,tiny}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of config.json; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Write a checkpoint of random weights in the Hugging Face format."""
    from moespan.checkpoint.placement import count_parameters
    from moespan.checkpoint.presets import preset
    from moespan.checkpoint.random import make_checkpoint

    raw = preset(args.preset, _overrides(args.set))
    config = ModelConfig.from_dict(raw)
    total_bytes = count_parameters(config)[0] * DTYPE_BYTES[config.dtype]
    started = time.perf_counter()
    with progress_bytes(total_bytes) as bar:
        make_checkpoint(args.folder, raw, args.seed, bar.update)
    say_written(args.folder, total_bytes, time.perf_counter() - started)
    return 0


def _overrides(items: list[str]) -> dict[str, Any]:
    """`key=value` items as a dict; values are JSON, or else strings."""
    overrides: dict[str, Any] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set {shown(item)} is not key=value")
        try:
            overrides[key] = json.loads(value)
        except (ValueError, RecursionError):
            overrides[key] = value
    return overrides
