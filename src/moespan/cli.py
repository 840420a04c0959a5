"""The command line: one thin verb each. Heavy imports wait until a verb needs them.

`moespan VERB --help` shows a verb's flags; vLLM's and SGLang's spellings are accepted too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moespan import __version__
from moespan.config import DTYPE_BYTES, EngineConfig, Layout, ModelConfig, Nodes
from moespan.errors import ConfigError, MoespanError

if TYPE_CHECKING:
    from moespan.llm import LLM

EXIT_FAILED = 1
"""Something was asked that could not be done, or a check did not pass."""
EXIT_USAGE = 2
"""The command line itself is wrong."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 if all went well, 1 if something failed, 2 for a wrong command."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if getattr(args, "node_rank", 0) > 0:  # whatever the verb, node 0 does it
            _llm(args)
        code = args.run(args)
    except MoespanError as error:
        print(f"moespan: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = EXIT_FAILED
    sys.exit(code)


def generate(args: argparse.Namespace) -> int:
    """Continue prompts from the command line or from a JSONL file."""
    from moespan.batch import answer

    params = _sampling_defaults(args)
    if args.input is not None:
        return _generate_batch(args, params)
    if args.output is not None or args.resume:
        raise ConfigError("--output and --resume go with --input FILE.jsonl")
    from moespan.engine.request import SamplingParams

    with _llm(args) as llm:
        sampling = SamplingParams.from_dict(params)
        requests = []
        for prompt in args.prompt:
            messages = [{"role": "user", "content": prompt}]
            requests.append(
                llm.request(llm.chat_prompt(messages) if args.chat else prompt, sampling)
            )
        _say_start(args, llm)
        started = time.perf_counter()
        finished = {output.request_id: output for output in llm.stream(requests)}
        seconds = time.perf_counter() - started
        failed = 0
        for number, (_, request) in enumerate(requests):
            output = finished[request.id]
            if output.error is not None:
                failed += 1
                print(f"moespan: prompt {number}: {output.error}", file=sys.stderr)
            elif args.json:
                print(json.dumps(answer(number, output), ensure_ascii=False))
            else:
                _print_text(args.prompt[number], output)
        num_tokens = sum(len(one.token_ids) for out in finished.values() for one in out.outputs)
        _say_speed(args, len(finished), num_tokens, seconds)
    return EXIT_FAILED if failed else 0


def _generate_batch(args: argparse.Namespace, params: dict[str, Any]) -> int:
    from tqdm import tqdm

    from moespan.batch import answered_ids, run_batch

    if not args.input.is_file():
        raise ConfigError(f"--input {args.input} is not a file")
    done: set[str] = set()
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

    if args.write_reference:
        if Path(args.reference).exists():
            raise ConfigError(f"--reference {args.reference} exists; give a new file to write")
        args.dtype = "float32"
        args.tensor_parallel_size = 1
        with _llm(args) as llm:
            prompts = _reference_prompts(args, llm)
            verification.write_reference(llm, Path(args.reference), prompts, args.max_tokens or 24)
        print(f"wrote {args.reference}: {len(prompts)} prompts, float32, one rank")
        return 0
    reference = verification.Reference(args.reference)
    with _llm(args) as llm:
        report = verification.verify(llm, reference)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        _print_verification(report)
    return EXIT_FAILED if report.failures else 0


def info(args: argparse.Namespace) -> int:
    """Describe a model in one page; reads no weights."""
    from moespan.checkpoint.placement import count_parameters, place
    from moespan.hub import resolve

    config = ModelConfig.from_pretrained(resolve(args.model))
    layout = Layout(args.tensor_parallel_size)
    layout.check(config)
    total, active = count_parameters(config)
    dtype = config.dtype if args.dtype == "auto" else args.dtype
    ranks = [place(config, layout, rank).num_bytes(dtype) for rank in range(layout.world_size)]
    facts: dict[str, Any] = {
        "model": args.model,
        "parameters": total,
        "active_parameters": active,
        "bytes": {name: total * size for name, size in DTYPE_BYTES.items()},
        "kv_bytes_per_token": {name: config.kv_bytes_per_token(name) for name in DTYPE_BYTES},
        "dtype": dtype,
        "layout": {"tp": layout.tp},
        "weight_bytes_per_rank": ranks,
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
        ("parameters", f"{total / 1e9:.3f} B total, {active / 1e9:.2f} B active for one token"),
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
            ", ".join(f"{total * size / 1e9:.2f} GB {name}" for name, size in DTYPE_BYTES.items()),
        ),
        (
            "KV cache per token",
            ", ".join(
                f"{config.kv_bytes_per_token(name) / 1024:g} KiB {name}" for name in DTYPE_BYTES
            ),
        ),
        (
            f"per rank, {layout}",
            f"{max(ranks) / 1e9:.3f} GB of {dtype} weights, "
            f"{_kv_bytes_per_rank(config, layout, dtype) / 1024:g} KiB KV cache per token",
        ),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def make_checkpoint(args: argparse.Namespace) -> int:
    """Write a random checkpoint in Hugging Face form."""
    from moespan.checkpoint.random import make_checkpoint, preset

    overrides: dict[str, Any] = {}
    for item in args.set:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set {item!r} is not key=value")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    started = time.perf_counter()
    written = 0

    def advance(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        print(f"\r{written / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)

    make_checkpoint(args.folder, preset(args.preset, overrides), args.seed, advance)
    seconds = time.perf_counter() - started
    print(f"\rwrote {args.folder}: {written / 1e9:.2f} GB in {seconds:.1f} s", file=sys.stderr)
    return 0


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
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
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
    verb.set_defaults(run=generate)

    verb = verbs.add_parser(
        "verify",
        help="compare with reference logits",
        description=verify.__doc__,
        allow_abbrev=False,
    )
    _add_model_flags(verb)
    verb.add_argument(
        "--reference",
        required=True,
        metavar="FILE.safetensors",
        help="p<i>.ids [T], p<i>.logits [T, V], p<i>.greedy [N]",
    )
    verb.add_argument(
        "--write-reference",
        action="store_true",
        help="make the file, from the float32 model on one rank",
    )
    verb.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="prompts of the file to make (default: random token ids)",
    )
    verb.add_argument(
        "--max-tokens", type=int, metavar="N", help="greedy tokens in the file to make (24)"
    )
    verb.add_argument("--json", action="store_true", help="print the report as JSON")
    verb.set_defaults(run=verify, max_num_batched_tokens=256)

    verb = verbs.add_parser(
        "info", help="describe a model", description=info.__doc__, allow_abbrev=False
    )
    verb.add_argument("model", metavar="MODEL", help="checkpoint folder, or a hub name")
    _add_layout_flags(verb)
    verb.add_argument("--dtype", choices=["auto", *DTYPE_BYTES], default="auto")
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
    return parser


def _add_layout_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-tp",
        "--tensor-parallel-size",
        "--tp-size",
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="ranks of tensor parallelism (1)",
    )


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or a hub name")
    _add_layout_flags(parser)
    parser.add_argument("--device", choices=["auto", "npu", "cuda", "cpu"], default="auto")
    parser.add_argument("--dtype", choices=["auto", *DTYPE_BYTES], default="auto")
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
        default=EngineConfig.max_num_seqs,
        help="most sequences in one step (64)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        default=EngineConfig.max_num_batched_tokens,
        help="most tokens in one step (2048)",
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
        "--check-finite",
        action="store_true",
        help="look for NaN and Inf in every weight while loading",
    )
    parser.add_argument(
        "--trust-remote-code", nargs=0, action=_RefuseRemoteCode, help=argparse.SUPPRESS
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
    group.add_argument(
        "--seed", type=int, metavar="N", help="of sampling, and of --load-format dummy"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="F")
    group.add_argument("--presence-penalty", type=float, metavar="F")
    group.add_argument("--frequency-penalty", type=float, metavar="F")
    group.add_argument("--stop", nargs="+", metavar="TEXT", help="strings that end the output")
    group.add_argument("--stop-token-ids", nargs="+", type=int, metavar="ID")
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


def _sampling_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given, checked."""
    from moespan.engine.request import SamplingParams

    params = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    SamplingParams.from_dict(params)
    return params


def _llm(args: argparse.Namespace) -> LLM:
    from moespan.llm import LLM

    return LLM(
        args.model,
        tensor_parallel_size=args.tensor_parallel_size,
        device=args.device,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=min(args.max_num_seqs, args.max_num_batched_tokens),
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        load_format=args.load_format,
        seed=getattr(args, "seed", None) or 0,
        enable_prefix_caching=args.enable_prefix_caching,
        check_finite=args.check_finite,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
        join_timeout_s=args.join_timeout,
    )


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield sys.stdout
        return
    with path.open("a", encoding="utf-8") as file:
        yield file


def _reference_prompts(args: argparse.Namespace, llm: LLM) -> list[list[int]]:
    import random

    if args.prompt:
        if llm.tokenizer is None:
            raise ConfigError("--prompt needs a tokenizer, and this checkpoint has none")
        return [llm.tokenizer.encode(prompt) for prompt in args.prompt]
    draw = random.Random(0)
    longest = llm.config.max_model_len - (args.max_tokens or 24)
    return [
        [draw.randrange(llm.model_config.vocab_size) for _ in range(length)]
        for length in (1, 7, 32, 100)
        if length <= longest
    ]


def _say_start(args: argparse.Namespace, llm: LLM) -> None:
    """Where it runs and how, on stderr."""
    if args.quiet:
        return
    info = llm.info
    rate = info.read_bytes / max(info.load_s, 1e-9) / 1e9
    layout = ", ".join(f"{axis}={size}" for axis, size in info.layout.items())
    print(
        f"model    {args.model}\n"
        f"runs on  {info.device}, {info.dtype}, {layout}\n"
        f"weights  {info.weight_bytes / 1e9:.3f} GB per rank, loaded in {info.load_s:.2f} s "
        f"({rate:.2f} GB/s)\n"
        f"KV cache {info.num_blocks * info.block_size} tokens in blocks of {info.block_size}",
        file=sys.stderr,
    )


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
    layout = ", ".join(f"{axis}={size}" for axis, size in report.layout.items())
    kl_limit = "" if limit.kl is None else f" (limit {limit.kl:.1e})"
    top1_limit = "" if limit.top1 is None else f" (limit {limit.top1:.1%})"
    print(
        f"\n{report.dtype}, {layout}: max |Δ| {report.max_relative_diff:.2e} of the largest logit "
        f"(limit {limit.relative:.1e}), mean KL {report.mean_kl:.2e}{kl_limit}, "
        f"top-1 {report.top1:.2%}{top1_limit}"
    )
    for failure in report.failures:
        print(f"FAILED: {failure}")
    if not report.failures:
        print("passed")


def _kv_bytes_per_rank(config: ModelConfig, layout: Layout, dtype: str) -> int:
    from moespan.checkpoint.placement import head_shares

    _, keys = head_shares(config, layout.tp, 0)
    return 2 * config.num_hidden_layers * keys.length * DTYPE_BYTES[dtype]


if __name__ == "__main__":
    main()
