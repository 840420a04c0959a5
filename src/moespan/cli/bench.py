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
from typing import Any

from moespan.cli.flags import add_print_env_flag, add_settings_flags, integers, settings_of
from moespan.cli.show import bench_table, load_table
from moespan.cli.starting import serve_unless_first_node, start_llm
from moespan.config import EngineConfig
from moespan.errors import ConfigError
from moespan.front.settings import Settings

_NUM_REQUESTS = 100

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
        metavar="N,N,...",
        help="sequences that decode together (1,8,32)",
    )
    group.add_argument("--context", type=int, metavar="N", help="prompt tokens of each (128)")
    group.add_argument("--decode-tokens", type=int, metavar="N", help="timed tokens of each (32)")
    group.add_argument("--repeats", type=int, metavar="N", help="rounds after a warm-up (5)")
    _add_load_flags(parser)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a load instead",
        "Requests arrive whether or not earlier ones have ended; with --concurrency the next one "
        "comes when one ends. `moespan plan` predicts what is measured.",
    )
    group.add_argument(
        "--load",
        metavar="FILE",
        help="requests of a trace: CSV of Azure's traces, JSON Lines of Mooncake's or ours",
    )
    length = "N|lognormal:MEAN:SIGMA|uniform:LOW:HIGH"
    group.add_argument("--input", metavar=length, help="prompt tokens of drawn requests (1024)")
    group.add_argument("--output", metavar=length, help="their output tokens (256)")
    often = group.add_mutually_exclusive_group()
    often.add_argument("--rate", type=float, metavar="R", help="requests per second, Poisson")
    often.add_argument("--concurrency", type=int, metavar="N", help="requests at any time")
    group.add_argument(
        "--num-requests", type=int, metavar="N", help=f"drawn requests ({_NUM_REQUESTS})"
    )
    group.add_argument("--speed", type=float, metavar="X", help="a trace X times as fast (1)")
    group.add_argument("--clip", action="store_true", help="cut prompts that are too long")
    group.add_argument(
        "--share",
        type=int,
        metavar="N",
        help="one of N parts of the load, drawn by chance: what one of N engines gets (1)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the load (0)")


def run(args: argparse.Namespace) -> int:
    """Measure prefill and decode speed, latencies, memory and start-up time, and compare the speed
    with the limits of the machine. Token ids are random, sampling is greedy, the prefix cache is
    off, and figures are medians."""
    from moespan.measure.bench import Workload, bench, first_token_s

    if _has_load(args):
        return _run_load(args)
    _refuse_flags_of_a_load(args)
    workload = Workload(**_asked_steps(args))
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


def _has_load(args: argparse.Namespace) -> bool:
    asked = (args.load, args.input, args.output, args.rate, args.concurrency)
    return any(one is not None for one in asked)


def _refuse_flags_of_a_load(args: argparse.Namespace) -> None:
    values = {name: getattr(args, name) for name in ("num_requests", "speed", "share")}
    names = [name for name, value in values.items() if value is not None] + ["clip"] * args.clip
    if given := ["--" + name.replace("_", "-") for name in names]:
        raise ConfigError(
            f"{', '.join(given)} without a load has no effect; add --load, --rate, --concurrency, "
            "--input or --output, or leave it out"
        )


def _asked_steps(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of steps that are given: field of `Workload` → value."""
    fields = ("prefill", "decode_batch", "context", "decode_tokens", "repeats")
    given = {name: getattr(args, name) for name in fields}
    return {name: value for name, value in given.items() if value is not None}


def _run_load(args: argparse.Namespace) -> int:
    """Run a load, and print latencies and throughput."""
    from moespan.measure.bench import first_token_s
    from moespan.measure.under_load import bench_load
    from moespan.planner import load

    if steps := _asked_steps(args):
        flags = ", ".join("--" + name.replace("_", "-") for name in steps)
        raise ConfigError(f"{flags} measure steps, not a load; give either these flags or a load")
    share = 1 if args.share is None else args.share
    num_requests = _NUM_REQUESTS if args.num_requests is None else args.num_requests
    if share < 1:
        raise ConfigError(f"--share {share} must be at least 1")
    often = {"rate": args.rate, "concurrency": args.concurrency, "seed": args.seed}
    if args.load is not None:
        if args.input is not None or args.output is not None:
            raise ConfigError("--load brings its own lengths; leave out --input and --output")
        if args.num_requests is not None:
            raise ConfigError("--load brings its own requests; leave out --num-requests")
        asked = load.read(args.load, speed=args.speed, **often)
    elif num_requests < 1:
        raise ConfigError(f"--num-requests {num_requests} must be at least 1")
    else:
        load.refuse_speed(args.speed)
        asked = load.drawn(args.input or "1024", args.output or "256", num_requests, **often)
    settings = settings_of(args)
    if settings.model is None and (args.preset is None or settings.node_rank > 0):
        args.usage_error("one of the arguments MODEL --preset is required")
    serve_unless_first_node(settings)
    with contextlib.ExitStack() as stack:
        if args.preset is not None:
            settings = stack.enter_context(preset_model(args.preset, settings))
        llm = stack.enter_context(start_llm(settings))
        tokenizer = llm.tokenizer
        asked = load.encoded(asked, None if tokenizer is None else tokenizer.encode)
        asked = asked.fitting(llm.config.max_model_len, args.clip).share(share, args.seed)
        first_token_s(llm)
        report = bench_load(llm, asked, args.seed)
    if args.preset is not None:
        report["model"] = args.preset
    print(json.dumps(report) if args.json else "\n".join(load_table(report)))
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
