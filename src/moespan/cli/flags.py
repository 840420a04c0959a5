"""The flags of all verbs, and what they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from moespan.config import (
    DISPATCHES,
    DTYPE_BYTES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    WEIGHT_FORMATS,
    EngineConfig,
    Layout,
    ModelConfig,
    Nodes,
    all_layouts,
)

if TYPE_CHECKING:
    from moespan.front.llm import LLM


def set_layout(args: argparse.Namespace, layout: Layout) -> None:
    args.pipeline_layers = None
    for name, size in zip(LAYOUT, layout.sizes.values(), strict=False):
        setattr(args, name, size)


def nodes_of(args: argparse.Namespace) -> Nodes:
    return Nodes(args.nnodes, args.node_rank, args.master_addr, args.master_port, args.join_timeout)


def planned(args: argparse.Namespace) -> tuple[ModelConfig | None, EngineConfig]:
    """The model, if one is named, and what the flags say of a run that is not started."""
    from moespan.front.hub import resolve

    folder = None if args.model is None else resolve(args.model)
    model = None if folder is None else ModelConfig.from_pretrained(folder)
    sizes = {name: getattr(args, name) for name in LAYOUT}
    if model is not None:
        layout = Layout.make(model, **sizes)
    else:
        layout = Layout(*(sizes[name] for name in LAYOUT[: len(Layout.AXES)]))
    dtype = args.dtype if args.dtype != "auto" else (model.dtype if model else "bfloat16")
    longest = model.max_position_embeddings if model else EngineConfig.max_model_len
    config = EngineConfig(
        model="" if folder is None else str(folder.resolve()),
        layout=layout,
        device=args.device,
        dtype=dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len or longest,
        max_num_seqs=max_num_seqs_of(args),
        max_num_batched_tokens=args.max_num_batched_tokens,
        moe_dispatch=args.moe_dispatch,
        bind=args.bind,
        npu_fused_all_reduce=args.npu_fused_all_reduce,
        cuda_one_shot_bytes=args.cuda_one_shot_bytes,
        npu_weight_format=args.npu_weight_format,
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


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
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
        type=integers,
        metavar="N,N,...",
        help="layers of each stage (default: cut by cost)",
    )
    group.add_argument(
        "--expert-placement",
        default="contiguous",
        metavar="contiguous|round_robin|FILE.json",
        help="which ep rank holds which experts (contiguous)",
    )


LAYOUT = (
    "tensor_parallel_size",
    "expert_parallel_size",
    "pipeline_parallel_size",
    "sequence_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "pipeline_layers",
)


def integers(text: str) -> tuple[int, ...]:
    """`1,2,3` as numbers, for argparse; none for an empty text."""
    return tuple(int(part) for part in text.split(",") if text)


def add_common_flags(parser: argparse.ArgumentParser, model_is_required: bool = True) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if model_is_required else "?",
        help="checkpoint folder, or a hub name",
    )
    add_layout_flags(parser)
    parser.add_argument("--dtype", choices=["auto", *DTYPE_BYTES], default="auto")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="hold matrices in 8 or 4 bits (default: as the checkpoint does)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default=EngineConfig.kv_cache_dtype,
        help="auto is --dtype (auto)",
    )
    parser.add_argument(
        "--trust-remote-code", nargs=0, action=_RefuseRemoteCode, help=argparse.SUPPRESS
    )


def add_model_flags(parser: argparse.ArgumentParser, model_is_required: bool = True) -> None:
    add_common_flags(parser, model_is_required)
    parser.add_argument(
        "--print-env",
        action="store_true",
        help="only show the environment variables that the ranks would get",
    )
    parser.add_argument(
        "--moe-dispatch",
        choices=DISPATCHES,
        default="auto",
        help="how tokens meet experts on other ranks (auto); fused: NPUs only",
    )
    parser.add_argument(
        "--npu-fused-all-reduce",
        type=int,
        nargs="?",
        const=512,
        default=0,
        metavar="ROWS",
        help="NPUs: one operator for a matmul and its all-reduce, in steps of ROWS (512) or more",
    )
    parser.add_argument(
        "--cuda-one-shot-bytes",
        type=int,
        default=EngineConfig.cuda_one_shot_bytes,
        metavar="BYTES",
        help="GPUs joined by NVLink: sum messages up to this size over tp in one kernel; 0 leaves "
        f"them all to NCCL ({EngineConfig.cuda_one_shot_bytes})",
    )
    parser.add_argument(
        "--npu-weight-format",
        choices=WEIGHT_FORMATS,
        default=EngineConfig.npu_weight_format,
        help="NPUs: nz lays matrices out in tiles (nd)",
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
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="plan a step while the one before runs (on NPUs and GPUs)",
    )
    parser.add_argument(
        "--disable-overlap-schedule",
        dest="async_scheduling",
        action="store_false",
        default=None,
        help=argparse.SUPPRESS,
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
    add_node_flags(parser)


def add_node_flags(parser: argparse.ArgumentParser) -> None:
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


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
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


SAMPLING = (
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


def start_llm(args: argparse.Namespace) -> LLM:
    from moespan.front.llm import LLM

    if args.model is None:
        args.usage_error("the following arguments are required: MODEL")
    return LLM(
        args.model,
        **{name: getattr(args, name) for name in LAYOUT},
        moe_dispatch=args.moe_dispatch,
        expert_placement=args.expert_placement,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=max_num_seqs_of(args),
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        load_format=args.load_format,
        enable_prefix_caching=args.enable_prefix_caching,
        check_finite=args.check_finite,
        bind=args.bind,
        enforce_eager=args.enforce_eager,
        npu_fused_all_reduce=args.npu_fused_all_reduce,
        cuda_one_shot_bytes=args.cuda_one_shot_bytes,
        npu_weight_format=args.npu_weight_format,
        async_scheduling=args.async_scheduling,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
        join_timeout_s=args.join_timeout,
    )


def max_num_seqs_of(args: argparse.Namespace) -> int:
    """As said, or so many that a step has room for a token of each."""
    if args.max_num_seqs is not None:
        return int(args.max_num_seqs)
    return max(min(EngineConfig.max_num_seqs, int(args.max_num_batched_tokens)), 1)


def serve_node(args: argparse.Namespace) -> None:
    """Serve node 0, which does what the verb says and reads and writes all files. Never returns."""
    if getattr(args, "all_layouts", None) is not None:
        from moespan.front.hub import resolve

        config = ModelConfig.from_pretrained(resolve(args.model))
        for layout in all_layouts(args.all_layouts, config)[:1]:  # the first; others follow it
            set_layout(args, layout)
    start_llm(args)
