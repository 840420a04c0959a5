"""`moespan bench`: speed, beside the limits of the machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moespan.cli.flags import add_print_env_flag, add_settings_flags, integers, settings_of
from moespan.cli.show import bench_table
from moespan.cli.starting import serve_unless_first_node, start_llm
from moespan.config import EngineConfig
from moespan.errors import ConfigError
from moespan.front.settings import Settings

SUMMARY = "measure speed against the machine's limits"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench`."""
    add_settings_flags(parser, model_is_required=False)
    add_print_env_flag(parser)
    parser.add_argument(
        "--preset",
        metavar="{16b,16b-4l,tiny}",
        help="random weights of this geometry instead of MODEL; takes --load-format dummy",
    )
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--prefill",
        type=integers,
        metavar="N,N,...",
        help="lengths of single prompts (128,512,2048, as far as the model takes them)",
    )
    group.add_argument(
        "--decode-batch",
        type=integers,
        default=(1, 8, 32),
        metavar="N,N,...",
        help="sequences that decode together (1,8,32)",
    )
    group.add_argument(
        "--context", type=int, default=128, metavar="N", help="prompt tokens of each (128)"
    )
    group.add_argument(
        "--decode-tokens", type=int, default=32, metavar="N", help="timed tokens of each (32)"
    )
    group.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds after a warm-up (5)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure prefill and decode speed, latencies, memory and start-up time, and compare the speed
    with the limits of the machine. Token ids are random, sampling is greedy, the prefix cache is
    off, and figures are medians."""
    from moespan.measure.bench import Workload, bench, first_token_s

    workload = Workload(
        Workload.prefill if args.prefill is None else args.prefill,
        args.decode_batch,
        args.context,
        args.decode_tokens,
        args.repeats,
    )
    settings = _for_bench(settings_of(args), workload.decode_batch)
    if settings.model is None and (args.preset is None or settings.node_rank > 0):
        args.usage_error("one of the arguments MODEL --preset is required")
    serve_unless_first_node(settings)
    with contextlib.ExitStack() as stack:
        if args.preset is not None:
            settings = stack.enter_context(preset_model(args.preset, settings))
        started = time.perf_counter()
        llm = stack.enter_context(start_llm(settings))
        start_s = time.perf_counter() - started
        start_up_s = first_token_s(llm)
        if args.prefill is None:
            longest = llm.config.max_model_len
            fitting = tuple(length for length in workload.prefill if length < longest)
            workload = replace(workload, prefill=fitting)
        report = bench(llm, workload, settings.nnodes)
    if args.preset is not None:
        report["model"] = args.preset
    report |= {"engine_start_s": start_s, "start_to_first_token_s": start_up_s}
    if args.json:
        print(json.dumps(report))
    else:
        print(*bench_table(report), sep="\n")
    return 0


def _for_bench(settings: Settings, decode_batch: tuple[int, ...]) -> Settings:
    """`settings` without a prefix cache, and with room for the largest batch by default."""
    max_num_seqs = settings.max_num_seqs
    if max_num_seqs is None:
        fitting = min(EngineConfig.max_num_seqs, settings.max_num_batched_tokens)
        max_num_seqs = max(fitting, *decode_batch, 1)
    return replace(settings, enable_prefix_caching=False, max_num_seqs=max_num_seqs)


@contextlib.contextmanager
def preset_model(name: str, settings: Settings) -> Iterator[Settings]:
    """`settings` with a temporary model folder that holds only the config of a preset."""
    from moespan.checkpoint.presets import preset

    if settings.model is not None:
        raise ConfigError(f"both {settings.model} and --preset {name} are given; leave one out")
    if settings.load_format == "safetensors":
        raise ConfigError(
            "--load-format safetensors finds no file with --preset; use --load-format dummy"
        )
    if settings.nnodes > 1:
        raise ConfigError(
            "--preset makes its config on one node only; give MODEL, a folder with a config.json "
            "on every node, and --load-format dummy"
        )
    with tempfile.TemporaryDirectory(prefix="moespan-") as folder:
        Path(folder, "config.json").write_text(json.dumps(preset(name, {})))
        yield replace(settings, model=folder, load_format="dummy")
