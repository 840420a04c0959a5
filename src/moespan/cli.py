"""The command line: one thin verb each. Heavy imports wait until a verb needs them.

`moespan VERB --help` shows a verb's flags; vLLM's and SGLang's spellings are accepted too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moespan import __version__
from moespan.config import (
    DISPATCHES,
    DTYPE_BYTES,
    EngineConfig,
    Layout,
    ModelConfig,
    Nodes,
    all_layouts,
)
from moespan.errors import ConfigError, MoespanError

if TYPE_CHECKING:
    from moespan.llm import LLM
    from moespan.verify import Reference
    from moespan.verify_layouts import LayoutReport

EXIT_FAILED = 1
"""Something was asked that could not be done, or a check did not pass."""
EXIT_USAGE = 2
"""The command line itself is wrong."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 if all went well, 1 if something failed, 2 for a wrong command."""
    args = _parser().parse_args(argv)
    # An installed torch_npu without CANN would make `import torch` fail, for other devices too.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        if getattr(args, "print_env", False):
            args.run = print_environment
        elif getattr(args, "node_rank", 0) > 0 and args.run is not doctor:
            _serve_node(args)
        code = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone. Python flushes once more at the end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except (MoespanError, OSError) as error:
        print(f"moespan: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def generate(args: argparse.Namespace) -> int:
    """Continue prompts from the command line or from a JSONL file."""
    from moespan.batch import answer
    from moespan.engine.request import SamplingParams

    if args.prompt is None and args.input is None:
        args.usage_error("one of the arguments --prompt --input is required")
    params = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    sampling = SamplingParams.from_dict(params)
    if args.input is not None:
        return _generate_batch(args, params)
    if args.output is not None or args.resume:
        raise ConfigError("--output and --resume go with --input FILE.jsonl")
    with _llm(args) as llm:
        _say_start(args, llm)
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
            _print_text(args.prompt[number], output)
    num_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    _say_speed(args, len(outputs) - num_failed, num_tokens, seconds)
    return EXIT_FAILED if num_failed else 0


def _generate_batch(args: argparse.Namespace, params: dict[str, Any]) -> int:
    from tqdm import tqdm

    from moespan.batch import answered_ids, run_batch

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
        _llm(args) as llm,
        _output(args.output) as output,
        tqdm(total=num_lines, unit="prompt", disable=args.quiet or None) as bar,
    ):
        _say_start(args, llm)
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
    _say_speed(args, report.num_answered, report.num_output_tokens, report.seconds)
    if report.num_failed:
        print(f"moespan: {report.num_failed} of {num_lines} lines failed", file=sys.stderr)
    return EXIT_FAILED if report.num_failed else 0


def verify(args: argparse.Namespace) -> int:
    """Compare the engine with reference logits, or write such a file."""
    from moespan import verify as verification

    if args.reference is None:
        args.usage_error("the following arguments are required: --reference")
    if args.write_reference:
        return _write_reference(args)
    if args.prompt is not None or args.max_tokens is not None:
        raise ConfigError("--prompt and --max-tokens go with --write-reference")
    reference = verification.Reference(args.reference)
    if args.all_layouts is not None:
        return _verify_layouts(args, reference)
    with _llm(args) as llm:
        report = verification.verify(llm, reference)
        differences = {}
        if args.trace:
            from moespan.verify_layouts import trace_against_reference

            differences = trace_against_reference(llm, reference, report.tolerance.relative)
    if args.json:
        print(json.dumps({**report.to_dict(), "first_differences": differences}))
    else:
        _print_verification(report)
        for name, difference in differences.items():
            print(f"{name}: first difference inside: {difference}")
        if args.trace and not differences:
            print("nothing inside differs from what the reference holds")
    return EXIT_FAILED if report.failures or differences else 0


def _verify_layouts(args: argparse.Namespace, reference: Reference) -> int:
    from moespan.hub import resolve
    from moespan.verify_layouts import verify_layouts

    config = ModelConfig.from_pretrained(resolve(args.model))
    layouts = all_layouts(args.all_layouts, config)
    if not layouts:
        raise ConfigError(f"--all-layouts {args.all_layouts}: no layout of so many ranks fits")

    def start(layout: Layout) -> LLM:
        _set_layout(args, layout)
        if layout.world_size == 1:  # for what differs inside: node 0 does it alone
            args.nnodes = 1
        return _llm(args)

    reports: list[LayoutReport] = []
    if not args.json:
        print(_LAYOUT_ROW.format("layout", "dispatch", "max |Δ|", "greedy", "", "bytes sent/token"))
    with start(layouts[0]) as llm:
        for one in verify_layouts(llm, layouts, reference, lambda: start(Layout())):
            reports.append(one)
            if not args.json:
                _print_layout(one)
    failed = sum(bool(one.report.failures) for one in reports)
    if args.json:
        print(json.dumps([one.to_dict() for one in reports]))
    else:
        seconds = sum(one.seconds for one in reports)
        verdict = f"{failed} FAILED" if failed else "all passed"
        print(f"{len(layouts)} layouts, {len(reports)} runs in {seconds:.0f} s: {verdict}")
    return EXIT_FAILED if failed else 0


def _set_layout(args: argparse.Namespace, layout: Layout) -> None:
    args.pipeline_layers = None
    for name, size in zip(_LAYOUT, layout.sizes.values(), strict=False):
        setattr(args, name, size)


_LAYOUT_ROW = "{:<28}{:<12}{:>10}  {:<8}{:<8}{}"


def _print_layout(one: LayoutReport) -> None:
    greedy = all(prompt.greedy_equal is not False for prompt in one.report.prompts)
    sent = ", ".join(f"{axis} {count:,.0f}" for axis, count in one.sent_bytes_per_token.items())
    print(
        _LAYOUT_ROW.format(
            str(one.layout),
            one.dispatch,
            f"{one.report.max_relative_diff:.1e}",
            "equal" if greedy else "differs",
            "FAILED" if one.report.failures else "passed",
            sent or "-",
        ),
        flush=True,
    )
    if one.first_difference:
        print(f"    first difference from one rank: {one.first_difference}")


def _write_reference(args: argparse.Namespace) -> int:
    from moespan.verify import write_reference

    if args.reference.exists():
        raise ConfigError(f"--reference {args.reference} exists; give a new file to write")
    _check_writable(args.reference, "--reference")
    is_cut = any(getattr(args, name) not in (1, False, None) for name in _LAYOUT)
    if args.dtype not in ("auto", "float32") or is_cut:
        raise ConfigError(
            "--write-reference computes in float32 on one rank; leave --dtype and -tp out"
        )
    args.dtype = "float32"
    num_tokens = 24 if args.max_tokens is None else args.max_tokens
    if num_tokens < 1:
        raise ConfigError(f"--max-tokens {num_tokens} must be at least 1")
    with _llm(args) as llm:
        prompts = _reference_prompts(args.prompt, llm, num_tokens)
        write_reference(llm, args.reference, prompts, num_tokens)
    print(f"wrote {args.reference}: {len(prompts)} prompts, float32, one rank")
    return 0


def info(args: argparse.Namespace) -> int:
    """Describe a model in one page; reads no weights."""
    from moespan.checkpoint.experts import ExpertPlacement, expert_rule
    from moespan.checkpoint.placement import cache_bytes_per_token, count_parameters, place
    from moespan.hub import resolve

    config = ModelConfig.from_pretrained(resolve(args.model))
    layout = Layout.make(config, **{name: getattr(args, name) for name in _LAYOUT})
    placement = ExpertPlacement.make(expert_rule(args.expert_placement), config, layout)
    total, active = count_parameters(config)
    dtype = config.dtype if args.dtype == "auto" else args.dtype
    ranks = [
        place(config, layout, rank, placement).num_bytes(dtype) for rank in range(layout.world_size)
    ]
    cache = [
        cache_bytes_per_token(config, layout, rank, dtype) for rank in range(layout.world_size)
    ]
    facts: dict[str, Any] = {
        "model": args.model,
        "parameters": total,
        "active_parameters": active,
        "bytes": {name: total * size for name, size in DTYPE_BYTES.items()},
        "kv_bytes_per_token": {name: config.kv_bytes_per_token(name) for name in DTYPE_BYTES},
        "dtype": dtype,
        "layout": layout.sizes,
        "pipeline_layers": [len(stage) for stage in layout.stages(config)],
        "weight_bytes_per_rank": ranks,
        "kv_bytes_per_token_per_rank": cache,
        "config": {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__},
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
            f"{_scaled(total, _COUNTS, 3)} total, {_scaled(active, _COUNTS)} active for one token",
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
            ", ".join(
                f"{_scaled(total * size, _BYTES)} {name}" for name, size in DTYPE_BYTES.items()
            ),
        ),
        (
            "KV cache per token",
            ", ".join(
                f"{config.kv_bytes_per_token(name) / 1024:g} KiB {name}" for name in DTYPE_BYTES
            ),
        ),
        (
            f"per rank, {layout}",
            f"{_scaled(max(ranks), _BYTES)} of {dtype} weights, "
            f"{max(cache) / 1024:g} KiB KV cache per token",
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
    print(
        f"wrote {args.folder}: {_scaled(total_bytes, _BYTES)} in {seconds:.1f} s", file=sys.stderr
    )
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Look for what would stop a job on this machine or slow it down; exit code 1 if something
    would stop it."""
    from moespan.doctor import report
    from moespan.doctor.checks import examine
    from moespan.doctor.devices import find_device
    from moespan.doctor.host import Host
    from moespan.doctor.job_plan import JobPlan

    host = Host()
    if args.device == "auto":
        args.device = find_device(host)
    model, config = _planned(args)
    job = JobPlan(
        device=config.device,
        layout=config.layout,
        config=config if model else None,
        model=model,
        bind=args.bind,
        nodes=_nodes(args),
    )
    findings = examine(host, job)
    if args.collectives:
        from moespan.doctor.collectives import findings as time_collectives

        findings += time_collectives(config, args.nnodes)
    if args.json:
        print(json.dumps(report.to_dict(findings, job.device, str(job.layout))))
    else:
        print(*report.table(findings), sep="\n")
    return EXIT_FAILED if any(one.status == report.PROBLEM for one in findings) else 0


def print_environment(args: argparse.Namespace) -> int:
    """Show the environment variables that the ranks would get."""
    from moespan.launch.binding import plan_binding
    from moespan.launch.environment import describe, environment_here
    from moespan.launch.network import address_towards, interface_of

    if args.device == "auto":
        from moespan.launch.device import choose_device

        args.device = choose_device(args.device)
    _, config = _planned(args)
    nnodes = args.nnodes
    ranks = _nodes(args).ranks_per_node(config.layout)
    threads = (
        [part.threads for part in plan_binding(config.bind, config.device, ranks).ranks]
        if config.layout.world_size > 1
        else []
    )
    address, interface = "", "lo"
    if nnodes > 1:
        address = address_towards(args.master_addr) or ""
        interface = (interface_of(address) if address else None) or ""
    print(*describe(environment_here(config, threads, nnodes, address, interface)), sep="\n")
    return 0


def _nodes(args: argparse.Namespace) -> Nodes:
    return Nodes(args.nnodes, args.node_rank, args.master_addr, args.master_port, args.join_timeout)


def _planned(args: argparse.Namespace) -> tuple[ModelConfig | None, EngineConfig]:
    """The model, if one is named, and what the flags say of a run that is not started."""
    from moespan.hub import resolve

    folder = None if args.model is None else resolve(args.model)
    model = None if folder is None else ModelConfig.from_pretrained(folder)
    sizes = {name: getattr(args, name) for name in _LAYOUT}
    if model is not None:
        layout = Layout.make(model, **sizes)
    else:
        layout = Layout(*(sizes[name] for name in _LAYOUT[: len(Layout.AXES)]))
    dtype = args.dtype if args.dtype != "auto" else (model.dtype if model else "bfloat16")
    longest = model.max_position_embeddings if model else EngineConfig.max_model_len
    config = EngineConfig(
        model="" if folder is None else str(folder.resolve()),
        layout=layout,
        device=args.device,
        dtype=dtype,
        max_model_len=args.max_model_len or longest,
        max_num_seqs=_max_num_seqs(args),
        max_num_batched_tokens=args.max_num_batched_tokens,
        moe_dispatch=args.moe_dispatch,
        bind=args.bind,
    )
    if model is not None:
        layout.check_dispatch(config.moe_dispatch)
    return model, config


class _RefuseRemoteCode(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(
            "--trust-remote-code is refused: the model is built in, and code that comes with a "
            "checkpoint is never run; leave the flag out"
        )


class _MasterAddress(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any
    ) -> None:
        host, separator, port = value.rpartition(":")
        if not separator or not port.isdigit():
            parser.error(f"--dist-init-addr {value!r} is not HOST:PORT")
        namespace.master_addr = host.removeprefix("[").removesuffix("]")
        namespace.master_port = int(port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moespan", description="Runs DeepSeek-MoE under any layout. See VERB --help."
    )
    parser.add_argument("--version", action="version", version=f"moespan {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    verb = verbs.add_parser(
        "generate", help="continue prompts", description=generate.__doc__, allow_abbrev=False
    )
    _add_model_flags(verb)
    what = verb.add_mutually_exclusive_group()  # one is required, but not with --print-env
    what.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts"
    )
    what.add_argument(
        "--input",
        type=Path,
        metavar="FILE.jsonl",
        help='lines {"prompt": text or ids, "id": any, "params": {...}}',
    )
    verb.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="answers, a line each as they finish (default: stdout)",
    )
    verb.add_argument("--resume", action="store_true", help="skip ids that --output has already")
    verb.add_argument(
        "--chat",
        action="store_true",
        help="put prompts through the chat template as what the user says",
    )
    verb.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    verb.add_argument("--quiet", action="store_true", help="only answers and errors")
    _add_sampling_flags(verb)
    verb.set_defaults(run=generate, usage_error=verb.error)

    verb = verbs.add_parser(
        "verify",
        help="compare with reference logits",
        description=verify.__doc__,
        allow_abbrev=False,
    )
    _add_model_flags(verb)
    verb.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.safetensors",
        help="p<i>.ids [T], p<i>.logits [T, V], p<i>.greedy [N]",
    )
    verb.add_argument(
        "--all-layouts",
        type=int,
        metavar="WORLD",
        help="run every layout of WORLD ranks and print a table",
    )
    verb.add_argument(
        "--trace",
        action="store_true",
        help="also compare hidden states and router choices, where the reference has them",
    )
    verb.add_argument(
        "--write-reference",
        action="store_true",
        help="make the file, from the float32 model on one rank",
    )
    verb.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="prompts of the file to make (default: random token ids)",
    )
    verb.add_argument(
        "--max-tokens", type=int, metavar="N", help="greedy tokens in the file to make (24)"
    )
    verb.add_argument("--json", action="store_true", help="print the report as JSON")
    verb.set_defaults(run=verify, max_num_batched_tokens=256, usage_error=verb.error)

    verb = verbs.add_parser(
        "info", help="describe a model", description=info.__doc__, allow_abbrev=False
    )
    _add_common_flags(verb)
    verb.add_argument("--json", action="store_true", help="print as JSON")
    verb.set_defaults(run=info)

    verb = verbs.add_parser(
        "make-checkpoint",
        help="write random weights",
        description=make_checkpoint.__doc__,
        allow_abbrev=False,
    )
    verb.add_argument("folder", type=Path, metavar="DIR")
    verb.add_argument("--preset", default="tiny", metavar="{16b,16b-4l,tiny}")
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of config.json; may be repeated",
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.set_defaults(run=make_checkpoint)

    verb = verbs.add_parser(
        "doctor",
        help="check this machine",
        description=doctor.__doc__,
        allow_abbrev=False,
    )
    _add_model_flags(verb, model_is_required=False)
    verb.add_argument(
        "--collectives",
        action="store_true",
        help="also start the layout's ranks, and time all-reduces over each axis",
    )
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")
    verb.set_defaults(run=doctor)
    return parser


def _add_layout_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layout (degree of parallelism on each axis)")
    for axis, name, meaning in (
        ("tp", "tensor", "heads, widths and the vocabulary are split"),
        ("ep", "expert", "whole routed experts are spread"),
        ("pp", "pipeline", "layers are split into stages"),
        ("sp", "sequence", "the tokens of a step are split"),
        ("dp", "data", "requests are spread over replicas"),
    ):
        group.add_argument(
            f"-{axis}",
            f"--{name}-parallel-size",
            f"--{axis}-size",
            f"--{axis}",
            type=int,
            default=1,
            metavar="N",
            help=f"{meaning} (1)",
        )
    group.add_argument(
        "--enable-expert-parallel", action="store_true", help="the largest -ep that fits"
    )
    group.add_argument(
        "--pipeline-layers",
        type=_integers,
        metavar="N,N,...",
        help="layers of each stage (default: cut by cost)",
    )
    group.add_argument(
        "--expert-placement",
        default="contiguous",
        metavar="contiguous|round_robin|FILE.json",
        help="which ep rank holds which experts (contiguous)",
    )


_LAYOUT = (
    "tensor_parallel_size",
    "expert_parallel_size",
    "pipeline_parallel_size",
    "sequence_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "pipeline_layers",
)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _add_common_flags(parser: argparse.ArgumentParser, model_is_required: bool = True) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if model_is_required else "?",
        help="checkpoint folder, or a hub name",
    )
    _add_layout_flags(parser)
    parser.add_argument("--dtype", choices=["auto", *DTYPE_BYTES], default="auto")
    parser.add_argument(
        "--trust-remote-code", nargs=0, action=_RefuseRemoteCode, help=argparse.SUPPRESS
    )


def _add_model_flags(parser: argparse.ArgumentParser, model_is_required: bool = True) -> None:
    _add_common_flags(parser, model_is_required)
    parser.add_argument(
        "--print-env",
        action="store_true",
        help="only show the environment variables that the ranks would get",
    )
    parser.add_argument(
        "--moe-dispatch",
        choices=DISPATCHES,
        default="auto",
        help="how tokens meet experts on other ranks (auto)",
    )
    parser.add_argument("--device", choices=["auto", "npu", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--max-model-len",
        "--context-length",
        type=int,
        metavar="N",
        help="most tokens of one sequence (the model's limit)",
    )
    parser.add_argument(
        "--max-num-seqs",
        "--max-running-requests",
        type=int,
        metavar="N",
        help="most sequences in one step (64)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        default=EngineConfig.max_num_batched_tokens,
        help="most tokens in one step (2048; verify: 256)",
    )
    parser.add_argument(
        "--block-size",
        "--page-size",
        type=int,
        metavar="N",
        help="tokens in a KV block (32; on NPUs 128)",
    )
    parser.add_argument(
        "--num-blocks",
        "--num-gpu-blocks-override",
        type=int,
        metavar="N",
        help="KV blocks (default: what fits the free memory)",
    )
    parser.add_argument("--load-format", choices=["auto", "safetensors", "dummy"], default="auto")
    parser.add_argument(
        "--no-prefix-caching",
        "--no-enable-prefix-caching",
        "--disable-radix-cache",
        dest="enable_prefix_caching",
        action="store_false",
        help="do not share the cache of equal prefixes",
    )
    parser.add_argument(
        "--enable-prefix-caching", action="store_true", default=True, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--enforce-eager",
        "--disable-cuda-graph",
        action="store_true",
        help="never run decode steps as recorded graphs",
    )
    parser.add_argument(
        "--check-finite",
        action="store_true",
        help="look for NaN and Inf in every weight while loading",
    )
    parser.add_argument(
        "--bind",
        default=EngineConfig.bind,
        metavar="{auto,off,MAP}",
        help="cores and NUMA node of each rank (auto); MAP as in 0:0,1:0,2:1,3:1 (rank:node)",
    )
    parser.add_argument(
        "--numa-bind", dest="bind", action="store_const", const="auto", help=argparse.SUPPRESS
    )
    _add_node_flags(parser)


def _add_node_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many nodes (the same command on each, but for --node-rank)")
    group.add_argument(
        "--nnodes", type=int, metavar="N", default=Nodes.nnodes, help="machines of the job (1)"
    )
    group.add_argument(
        "--node-rank",
        type=int,
        metavar="N",
        default=Nodes.node_rank,
        help="this machine's number, from 0 (0); node 0 reads and writes all files",
    )
    group.add_argument(
        "--master-addr",
        metavar="HOST",
        default=Nodes.master_addr,
        help=f"address of node 0 that the others reach ({Nodes.master_addr})",
    )
    group.add_argument(
        "--master-port",
        type=int,
        metavar="PORT",
        default=Nodes.master_port,
        help=f"port of node 0 where they meet ({Nodes.master_port})",
    )
    group.add_argument(
        "--dist-init-addr",
        action=_MasterAddress,
        metavar="HOST:PORT",
        help="--master-addr and --master-port in one",
    )
    group.add_argument(
        "--join-timeout",
        type=float,
        metavar="SECONDS",
        default=Nodes.join_timeout_s,
        help=f"most seconds to wait for the other nodes ({Nodes.join_timeout_s:g})",
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults for lines that do not set them)")
    group.add_argument("--max-tokens", "--max-new-tokens", type=int, metavar="N", default=128)
    group.add_argument("--min-tokens", type=int, metavar="N")
    group.add_argument(
        "--temperature", type=float, metavar="F", default=0.0, help="0 is greedy (0)"
    )
    group.add_argument("--top-p", type=float, metavar="F")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--min-p", type=float, metavar="F")
    group.add_argument("--seed", type=int, metavar="N", help="makes what is drawn repeatable")
    group.add_argument("--repetition-penalty", type=float, metavar="F")
    group.add_argument("--presence-penalty", type=float, metavar="F")
    group.add_argument("--frequency-penalty", type=float, metavar="F")
    group.add_argument(
        "--stop", nargs="+", action="extend", metavar="TEXT", help="strings that end the output"
    )
    group.add_argument("--stop-token-ids", nargs="+", action="extend", type=int, metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--logprobs", type=int, metavar="N", help="with --json or --input")
    group.add_argument("--prompt-logprobs", type=int, metavar="N", help="with --json or --input")
    group.add_argument("-n", type=int, metavar="N", help="continuations of each prompt (1)")


_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "n",
)


def _llm(args: argparse.Namespace) -> LLM:
    from moespan.llm import LLM

    return LLM(
        args.model,
        **{name: getattr(args, name) for name in _LAYOUT},
        moe_dispatch=args.moe_dispatch,
        expert_placement=args.expert_placement,
        device=args.device,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=_max_num_seqs(args),
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        load_format=args.load_format,
        enable_prefix_caching=args.enable_prefix_caching,
        check_finite=args.check_finite,
        bind=args.bind,
        enforce_eager=args.enforce_eager,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
        join_timeout_s=args.join_timeout,
    )


def _max_num_seqs(args: argparse.Namespace) -> int:
    """As said, or so many that a step has room for a token of each."""
    if args.max_num_seqs is not None:
        return int(args.max_num_seqs)
    return max(min(EngineConfig.max_num_seqs, int(args.max_num_batched_tokens)), 1)


def _serve_node(args: argparse.Namespace) -> None:
    """Serve node 0, which does what the verb says and reads and writes all files. Never returns."""
    if getattr(args, "all_layouts", None) is not None:
        from moespan.hub import resolve

        config = ModelConfig.from_pretrained(resolve(args.model))
        for layout in all_layouts(args.all_layouts, config)[:1]:  # the first; others follow it
            _set_layout(args, layout)
    _llm(args)


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


_COUNTS = ("", " K", " M", " B")
_BYTES = (" B", " kB", " MB", " GB", " TB")


def _scaled(number: float, units: Sequence[str], digits: int = 2) -> str:
    """`number` in the largest of `units`, each a thousand of the one before, that it fills."""
    power = 0
    while number >= 1000 and power + 1 < len(units):
        number /= 1000
        power += 1
    return f"{number:.{digits if power else 0}f}{units[power]}"


def _say_start(args: argparse.Namespace, llm: LLM) -> None:
    """Where it runs and how, on stderr."""
    if args.quiet:
        return
    info = llm.info
    rate = _scaled(info.read_bytes / max(info.load_s, 1e-9), _BYTES)
    print(
        f"model    {args.model}\n"
        f"runs on  {info.device}, {info.dtype}, {info.layout}\n"
        f"weights  {_scaled(info.weight_bytes, _BYTES)} per rank, loaded in {info.load_s:.2f} s "
        f"({rate}/s)\n"
        f"KV cache {info.num_blocks * info.block_size} tokens in blocks of {info.block_size}",
        file=sys.stderr,
    )
    if info.binding:
        print("cores   ", "\n         ".join(info.binding), file=sys.stderr)


def _say_speed(
    args: argparse.Namespace, num_requests: int, num_tokens: int, seconds: float
) -> None:
    if not args.quiet:
        rate = num_tokens / max(seconds, 1e-9)
        print(
            f"{num_requests} answered, {num_tokens} tokens in {seconds:.2f} s: {rate:.1f} tokens/s",
            file=sys.stderr,
        )


def _print_text(prompt: str, output: Any) -> None:
    for one in output.outputs:
        text = one.text if one.text or not one.token_ids else " ".join(map(str, one.token_ids))
        print(f"\n{prompt}\n→ {text}")


def _print_verification(report: Any) -> None:
    print(
        f"{'prompt':<8}{'tokens':>7}{'max |Δ|':>11}{'mean KL':>11}{'top-1':>9}  "
        f"{'first diff':<12}greedy"
    )
    for one in report.prompts:
        first = "-" if one.first_divergence is None else f"at {one.first_divergence}"
        greedy = {True: "equal", False: f"differs at {one.first_greedy_divergence}", None: "-"}
        print(
            f"{one.name:<8}{one.num_tokens:>7}{one.max_abs_diff:>11.2e}{one.mean_kl:>11.2e}"
            f"{one.top1:>9.2%}  {first:<12}{greedy[one.greedy_equal]}"
        )
    limit = report.tolerance
    kl_limit = "" if limit.kl is None else f" (limit {limit.kl:.1e})"
    top1_limit = "" if limit.top1 is None else f" (limit {limit.top1:.1%})"
    print(
        f"\n{report.dtype}, {report.layout}: max |Δ| {report.max_relative_diff:.2e} of the largest "
        f"logit (limit {limit.relative:.1e}), mean KL {report.mean_kl:.2e}{kl_limit}, "
        f"top-1 {report.top1:.2%}{top1_limit}"
    )
    for failure in report.failures:
        print(f"FAILED: {failure}")
    if not report.failures:
        print("passed")


if __name__ == "__main__":
    main()
