"""What each verb does: reads its flags, calls the package, prints what came of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moespan.cli.flags import (
    LAYOUT,
    SAMPLING,
    max_num_seqs_of,
    nodes_of,
    planned,
    set_layout,
    start_llm,
)
from moespan.cli.show import (
    BYTES,
    COUNTS,
    LAYOUT_ROW,
    bench_table,
    print_layout,
    print_text,
    print_verification,
    say_speed,
    say_start,
    scaled,
)
from moespan.config import DTYPE_BYTES, QUANTIZATIONS, Layout, ModelConfig, all_layouts
from moespan.errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from moespan.front.llm import LLM
    from moespan.measure.verify import Reference
    from moespan.measure.verify_layouts import LayoutReport

EXIT_FAILED = 1
"""Something was asked that could not be done, or a check did not pass."""


def generate(args: argparse.Namespace) -> int:
    """Continue prompts from the command line or from a JSONL file."""
    from moespan.engine.request import SamplingParams
    from moespan.front.batch import answer

    if args.prompt is None and args.input is None:
        args.usage_error("one of the arguments --prompt --input is required")
    params = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    sampling = SamplingParams.from_dict(params)
    if args.input is not None:
        return _generate_batch(args, params)
    if args.output is not None or args.resume:
        raise ConfigError("--output and --resume go with --input FILE.jsonl")
    with start_llm(args) as llm:
        say_start(args, llm)
        started = time.perf_counter()
        if args.chat:
            said = [[{"role": "user", "content": prompt}] for prompt in args.prompt]
            outputs = llm.chat(said, sampling)
        else:
            outputs = llm.generate(args.prompt, sampling)
        seconds = time.perf_counter() - started
    num_failed = 0
    for number, output in enumerate(outputs):
        if output.error is not None:
            num_failed += 1
            print(f"moespan: prompt {number}: {output.error}", file=sys.stderr)
        elif args.json:
            print(json.dumps(answer(number, output), ensure_ascii=False))
        else:
            print_text(args.prompt[number], output)
    num_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    say_speed(args, len(outputs) - num_failed, num_tokens, seconds)
    return EXIT_FAILED if num_failed else 0


def _generate_batch(args: argparse.Namespace, params: dict[str, Any]) -> int:
    from tqdm import tqdm

    from moespan.front.batch import answered_ids, run_batch

    if not args.input.is_file():
        raise ConfigError(f"--input {args.input} is not a file")
    if args.resume and args.output is None:
        raise ConfigError("--resume needs --output FILE.jsonl, where the answers so far are")
    done: set[str] = set()
    if args.output is not None:
        _check_writable(args.output, "--output")
    if args.output is not None and args.output.exists():
        if not args.resume:
            raise ConfigError(
                f"--output {args.output} exists; add --resume to answer only what is missing in "
                "it, or give another file"
            )
        done = answered_ids(args.output)
    with args.input.open("rb") as file:
        num_lines = sum(1 for line in file if line.strip())
    with (
        start_llm(args) as llm,
        _output(args.output) as output,
        tqdm(total=num_lines, unit="prompt", disable=args.quiet or None) as bar,
    ):
        say_start(args, llm)
        report = run_batch(
            llm,
            args.input,
            output,
            params,
            chat=args.chat,
            done=done,
            complain=lambda message: tqdm.write(f"moespan: {message}", file=sys.stderr),
            advance=bar.update,
        )
    if report.num_skipped and not args.quiet:
        print(f"{report.num_skipped} were answered before", file=sys.stderr)
    say_speed(args, report.num_answered, report.num_output_tokens, report.seconds)
    if report.num_failed:
        print(f"moespan: {report.num_failed} of {num_lines} lines failed", file=sys.stderr)
    return EXIT_FAILED if report.num_failed else 0


def verify(args: argparse.Namespace) -> int:
    """Compare the engine with reference logits: of a file, which it can also write, or of what the
    same checkpoint gives in float32 without rounding to integers."""
    from moespan.measure import verify as verification

    if args.write_reference:
        if args.reference is None:
            args.usage_error("--write-reference needs --reference")
        return _write_reference(args)
    if args.reference is None:
        return _verify_against_floats(args)
    if args.prompt is not None or args.max_tokens is not None or args.against is not None:
        raise ConfigError(
            "--prompt, --max-tokens and --against are for making a reference: leave --reference "
            "out, or add --write-reference"
        )
    reference = verification.Reference(args.reference)
    if args.all_layouts is not None:
        return _verify_layouts(args, reference)
    with start_llm(args) as llm:
        report = verification.verify(llm, reference)
        differences = {}
        if args.trace:
            from moespan.measure.verify_layouts import trace_against_reference

            differences = trace_against_reference(llm, reference, report.tolerance.relative)
    if args.json:
        print(json.dumps({**report.to_dict(), "first_differences": differences}))
    else:
        print_verification(report)
        for name, difference in differences.items():
            print(f"{name}: first difference inside: {difference}")
        if args.trace and not differences:
            print("nothing inside differs from what the reference holds")
    return EXIT_FAILED if report.failures or differences else 0


def _verify_against_floats(args: argparse.Namespace) -> int:
    """Make the reference first, with an engine that is gone when the one to verify starts.

    It is of the same layout, but for `--all-layouts`: there it is of one rank that rounds as all
    layouts are to do.
    """
    if args.trace:
        raise ConfigError("--trace needs --reference: what is made here holds no hidden states")
    if args.nnodes > 1:
        raise ConfigError("on many nodes verify needs --reference; make one with --write-reference")
    plain = argparse.Namespace(**vars(args))
    plain.dtype = "float32"
    plain.model = args.against or args.model
    if args.all_layouts is not None:
        set_layout(plain, Layout())
    else:
        plain.quantization, plain.kv_cache_dtype = None, "auto"
    with tempfile.TemporaryDirectory(prefix="moespan-") as folder:
        plain.reference = Path(folder) / "reference.safetensors"
        _make_reference(plain)
        args.reference, args.prompt, args.max_tokens, args.against = plain.reference, *[None] * 3
        return verify(args)


def _verify_layouts(args: argparse.Namespace, reference: Reference) -> int:
    from moespan.front.hub import resolve
    from moespan.measure.verify_layouts import verify_layouts

    config = ModelConfig.from_pretrained(resolve(args.model))
    layouts = [
        layout
        for layout in all_layouts(args.all_layouts, config)
        if _can_be_cut(config, layout, args.quantization)
    ]
    if not layouts:
        raise ConfigError(f"--all-layouts {args.all_layouts}: no layout of so many ranks fits")

    def start(layout: Layout) -> LLM:
        set_layout(args, layout)
        if layout.world_size == 1:  # for what differs inside: node 0 does it alone
            args.nnodes = 1
        return start_llm(args)

    reports: list[LayoutReport] = []
    if not args.json:
        print(LAYOUT_ROW.format("layout", "dispatch", "max |Δ|", "greedy", "", "bytes sent/token"))
    with start(layouts[0]) as llm:
        for one in verify_layouts(llm, layouts, reference, lambda: start(Layout())):
            reports.append(one)
            if not args.json:
                print_layout(one)
    failed = sum(bool(one.report.failures) for one in reports)
    if args.json:
        print(json.dumps([one.to_dict() for one in reports]))
    else:
        seconds = sum(one.seconds for one in reports)
        verdict = f"{failed} FAILED" if failed else "all passed"
        print(f"{len(layouts)} layouts, {len(reports)} runs in {seconds:.0f} s: {verdict}")
    return EXIT_FAILED if failed else 0


def _can_be_cut(config: ModelConfig, layout: Layout, quantization: str | None) -> bool:
    from moespan.checkpoint.placement import place

    try:
        place(config, layout, 0, quantization=quantization)
    except LayoutError:
        return False
    return True


def _write_reference(args: argparse.Namespace) -> int:
    if args.reference.exists():
        raise ConfigError(f"--reference {args.reference} exists; give a new file to write")
    _check_writable(args.reference, "--reference")
    is_cut = any(getattr(args, name) not in (1, False, None) for name in LAYOUT)
    if args.dtype not in ("auto", "float32") or is_cut:
        raise ConfigError(
            "--write-reference computes in float32 on one rank; leave --dtype and -tp out"
        )
    args.dtype = "float32"
    num_prompts = _make_reference(args)
    kind = "float32" if args.quantization is None else f"float32, {args.quantization}"
    print(f"wrote {args.reference}: {num_prompts} prompts, {kind}, one rank")
    return 0


def _make_reference(args: argparse.Namespace) -> int:
    """Write what an engine of these flags computes; returns how many prompts."""
    from moespan.measure.verify import write_reference

    num_tokens = 24 if args.max_tokens is None else args.max_tokens
    if num_tokens < 1:
        raise ConfigError(f"--max-tokens {num_tokens} must be at least 1")
    with start_llm(args) as llm:
        prompts = _reference_prompts(args.prompt, llm, num_tokens)
        write_reference(llm, args.reference, prompts, num_tokens)
    return len(prompts)


def bench(args: argparse.Namespace) -> int:
    """Measure prefill and decode speed, latencies, memory and start-up, and what share of the
    machine's limits is reached. Random token ids, greedy, no prefix cache, medians."""
    from moespan.measure.bench import Settings, first_token_s
    from moespan.measure.bench import bench as run_bench

    settings = Settings(
        args.prefill, args.decode_batch, args.context, args.decode_tokens, args.repeats
    )
    if args.max_num_seqs is None:
        args.max_num_seqs = max(max_num_seqs_of(args), *settings.decode_batch, 1)
    args.enable_prefix_caching = False
    with contextlib.ExitStack() as stack:
        if args.preset is not None:
            args.model = stack.enter_context(_preset_folder(args))
        started = time.perf_counter()
        llm = stack.enter_context(start_llm(args))
        start_s = time.perf_counter() - started
        start_up_s = first_token_s(llm)
        report = run_bench(llm, settings, args.nnodes)
    if args.preset is not None:
        report["model"] = args.preset
    report |= {"engine_start_s": start_s, "start_to_first_token_s": start_up_s}
    if args.json:
        print(json.dumps(report))
    else:
        print(*bench_table(report), sep="\n")
    return 0


@contextlib.contextmanager
def _preset_folder(args: argparse.Namespace) -> Iterator[str]:
    """A folder with the config of `--preset` and nothing else, for as long as the engine runs."""
    import tempfile

    from moespan.checkpoint.random import preset

    if args.model is not None:
        raise ConfigError(f"both {args.model} and --preset {args.preset} are given; leave one out")
    if args.load_format == "safetensors":
        raise ConfigError("--preset has no file to read; it goes with --load-format dummy")
    if args.nnodes > 1:
        raise ConfigError(
            "--preset makes its config on one node only; give MODEL, a folder with a config.json "
            "on every node, and --load-format dummy"
        )
    args.load_format = "dummy"
    with tempfile.TemporaryDirectory(prefix="moespan-") as folder:
        Path(folder, "config.json").write_text(json.dumps(preset(args.preset, {})))
        yield folder


def info(args: argparse.Namespace) -> int:
    """Describe a model in one page; reads no weights."""
    from moespan.checkpoint.experts import ExpertPlacement, expert_rule
    from moespan.checkpoint.placement import cache_bytes_per_token, count_parameters, place
    from moespan.front.hub import resolve

    config = ModelConfig.from_pretrained(resolve(args.model))
    layout = Layout.make(config, **{name: getattr(args, name) for name in LAYOUT})
    placement = ExpertPlacement.make(expert_rule(args.expert_placement), config, layout)
    total, active = count_parameters(config)
    dtype = config.dtype if args.dtype == "auto" else args.dtype
    cache_dtype = dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    stored = config.quantization
    scheme = stored.running_as(args.quantization) if stored else args.quantization
    world = range(layout.world_size)
    ranks = [
        place(config, layout, rank, placement, args.quantization).num_bytes(dtype) for rank in world
    ]
    cache = [cache_bytes_per_token(config, layout, rank, cache_dtype) for rank in world]
    quantized = {}
    for name in stored.same_weights if stored else QUANTIZATIONS:
        with contextlib.suppress(ConfigError):  # rows need not be whole groups
            quantized[name] = place(config, Layout(), 0, quantization=name).num_bytes(dtype)
    cache_dtypes = (*DTYPE_BYTES, "int8")
    facts: dict[str, Any] = {
        "model": args.model,
        "parameters": total,
        "active_parameters": active,
        "bytes": {**{name: total * size for name, size in DTYPE_BYTES.items()}, **quantized},
        "kv_bytes_per_token": {name: config.kv_bytes_per_token(name) for name in cache_dtypes},
        "dtype": dtype,
        "quantization": scheme,
        "kv_cache_dtype": cache_dtype,
        "layout": layout.sizes,
        "pipeline_layers": [len(stage) for stage in layout.stages(config)],
        "weight_bytes_per_rank": ranks,
        "kv_bytes_per_token_per_rank": cache,
        "config": asdict(config),
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    experts = (
        f"{config.n_routed_experts} routed, top {config.num_experts_per_tok}, "
        f"{config.n_shared_experts or 0} shared, width {config.moe_intermediate_size}, "
        f"in {config.num_moe_layers} layers"
        if config.n_routed_experts
        else "none"
    )
    lines = [
        ("model", args.model),
        (
            "parameters",
            f"{scaled(total, COUNTS, 3)} total, {scaled(active, COUNTS)} active for one token",
        ),
        ("layers", f"{config.num_hidden_layers}, hidden size {config.hidden_size}"),
        (
            "attention",
            f"{config.num_attention_heads} heads × {config.head_dim}, "
            f"{config.num_key_value_heads} KV heads",
        ),
        ("experts", experts),
        ("dense MLP width", str(config.intermediate_size)),
        ("vocabulary", str(config.vocab_size)),
        ("longest sequence", f"{config.max_position_embeddings} tokens"),
        (
            "weights",
            ", ".join(f"{scaled(size, BYTES)} {name}" for name, size in facts["bytes"].items()),
        ),
        (
            "KV cache per token",
            ", ".join(
                f"{config.kv_bytes_per_token(name) / 1024:g} KiB {name}" for name in cache_dtypes
            ),
        ),
        (
            f"per rank, {layout}",
            f"{scaled(max(ranks), BYTES)} of {scheme or dtype} weights, "
            f"{max(cache) / 1024:g} KiB of {cache_dtype} KV cache per token",
        ),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def make_checkpoint(args: argparse.Namespace) -> int:
    """Write a random checkpoint in Hugging Face form."""
    from tqdm import tqdm

    from moespan.checkpoint.placement import count_parameters
    from moespan.checkpoint.random import make_checkpoint, preset

    overrides: dict[str, Any] = {}
    for item in args.set:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set {item!r} is not key=value")
        try:
            overrides[key] = json.loads(value)
        except (ValueError, RecursionError):
            overrides[key] = value
    raw = preset(args.preset, overrides)
    config = ModelConfig.from_dict(raw)
    total_bytes = count_parameters(config)[0] * DTYPE_BYTES[config.dtype]
    started = time.perf_counter()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        make_checkpoint(args.folder, raw, args.seed, bar.update)
    seconds = time.perf_counter() - started
    print(f"wrote {args.folder}: {scaled(total_bytes, BYTES)} in {seconds:.1f} s", file=sys.stderr)
    return 0


def quantize(args: argparse.Namespace) -> int:
    """Write a checkpoint of 8 or 4 bits, for this engine and others (compressed-tensors)."""
    from tqdm import tqdm

    from moespan.checkpoint.placement import place
    from moespan.checkpoint.quantize import quantize_checkpoint
    from moespan.front.hub import resolve

    folder = resolve(args.model)
    config = ModelConfig.from_pretrained(folder)
    total_bytes = place(config, Layout(), 0, quantization=args.quantization).num_bytes(config.dtype)
    started = time.perf_counter()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        quantize_checkpoint(folder, args.folder, args.quantization, bar.update)
    seconds = time.perf_counter() - started
    print(f"wrote {args.folder}: {scaled(total_bytes, BYTES)} in {seconds:.1f} s", file=sys.stderr)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Look for what would stop a job on this machine or slow it down; exit code 1 if something
    would stop it."""
    from moespan.doctor import report
    from moespan.doctor.checks import examine
    from moespan.doctor.devices import find_device
    from moespan.doctor.host import Host
    from moespan.doctor.job_spec import JobSpec

    host = Host()
    if args.device == "auto":
        args.device = find_device(host)
    model, config = planned(args)
    job = JobSpec(
        device=config.device,
        layout=config.layout,
        config=config if model else None,
        model=model,
        bind=args.bind,
        nodes=nodes_of(args),
    )
    findings = examine(host, job)
    if args.collectives:
        from moespan.doctor.collectives import findings as time_collectives

        findings += time_collectives(config, args.nnodes)
    if args.compare_nodes:
        from moespan.doctor.nodes import findings as compare_nodes

        findings += compare_nodes(job.nodes)
    if args.json:
        print(json.dumps(report.to_dict(findings, job.device, str(job.layout))))
    else:
        print(*report.table(findings), sep="\n")
    return EXIT_FAILED if any(one.status == report.PROBLEM for one in findings) else 0


def print_environment(args: argparse.Namespace) -> int:
    """Show the environment variables that the ranks would get."""
    from moespan.machine.binding import binding_here
    from moespan.machine.environment import describe, environment_here
    from moespan.machine.interfaces import address_towards, interface_of

    if args.device == "auto":
        from moespan.machine.device import choose_device

        args.device = choose_device(args.device)
    _, config = planned(args)
    nnodes = args.nnodes
    ranks = nodes_of(args).ranks_per_node(config.layout)
    threads = (
        [part.threads for part in binding_here(config.bind, config.device, ranks).ranks]
        if config.layout.world_size > 1
        else []
    )
    address, interface = "", "lo"
    if nnodes > 1:
        address = address_towards(args.master_addr) or ""
        interface = (interface_of(address) if address else None) or ""
    print(*describe(environment_here(config, threads, nnodes, address, interface)), sep="\n")
    return 0


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield sys.stdout
        return
    with path.open("a", encoding="utf-8") as file:
        yield file


def _check_writable(path: Path, flag: str) -> None:
    """Refuse now what could not be written after a long run."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; give a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}; make it first")


def _reference_prompts(texts: list[str] | None, llm: LLM, num_tokens: int) -> list[list[int]]:
    """`texts`, or random prompts that leave room for `num_tokens` more."""
    import random

    if texts is not None:
        if llm.tokenizer is None:
            raise ConfigError("--prompt needs a tokenizer, and this checkpoint has none")
        return [llm.tokenizer.encode(text) for text in texts]
    draw = random.Random(0)
    longest = llm.config.max_model_len - num_tokens
    if longest < 1:
        raise ConfigError(
            f"--max-tokens {num_tokens} leaves no room for a prompt within "
            f"max_model_len={llm.config.max_model_len}"
        )
    return [
        [draw.randrange(llm.model_config.vocab_size) for _ in range(length)]
        for length in (1, 7, 32, 100)
        if length <= longest
    ]
