"""Groups of flags that several verbs share, and the `Settings` that they make.

The flag of an engine option sets the field of `Settings` that its `dest` names. The flag has no
default of its own: without it, the field keeps its default.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from typing import Any, NoReturn

from moespan import log
from moespan.config import (
    DISPATCHES,
    DTYPE_BYTES,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    WEIGHT_FORMATS,
    EngineConfig,
)
from moespan.device import DEVICES
from moespan.engine.drafts import NUM_MATCHED
from moespan.errors import shown
from moespan.front.settings import PYTHON_ONLY, Settings
from moespan.machine.cluster import Found, nodes_of

_NUM_TOKENS = "num_speculative_tokens"
_LOOKUP_MIN, _LOOKUP_MAX = "prompt_lookup_min", "prompt_lookup_max"


def settings_of(args: argparse.Namespace, **defaults: Any) -> Settings:
    """The settings that the flags ask for.

    Args:
        defaults: the verb's own defaults, for fields that no given flag sets.

    Raises:
        ConfigError: a setting cannot be used.
    """
    given = given_fields(args)
    found = nodes_here(args)
    if found:
        log.logger.info("%s", describe_nodes(args))
    return Settings(**{**defaults, **{name: one.value for name, one in found.items()}, **given})


def nodes_here(args: argparse.Namespace) -> dict[str, Found]:
    """Fields of `Nodes` that the environment sets and no flag gives."""
    return nodes_of(os.environ, given_fields(args)) if hasattr(args, "has_node_flags") else {}


def describe_nodes(args: argparse.Namespace) -> str:
    """The nodes of the job in one line, each value with the flag or variable that it comes from."""
    given, found = given_fields(args), nodes_here(args)
    parts = []
    for name in ("nnodes", "node_rank", "master_addr", "master_port"):
        if name in given:
            value, source = given[name], f"--{name.replace('_', '-')}"
        else:
            value, source = found.get(name, (_default(name), "default"))
        parts.append(f"{name}={value} ({source})")
    return ", ".join(parts)


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Settings` that flags have set."""
    names = [field.name for field in fields(Settings) if field.name not in PYTHON_ONLY]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def integers(text: str) -> tuple[int, ...]:
    """The numbers in a text like `1,2,3`, for argparse; none in an empty text."""
    return tuple(int(part) for part in text.split(",") if part)


def add_model_flags(parser: argparse.ArgumentParser, model_is_required: bool = True) -> None:
    """Flags of the model, the layout, and the dtypes of weights and KV cache."""
    _add(
        parser,
        "model",
        metavar="MODEL",
        nargs=None if model_is_required else "?",
        help="checkpoint folder, or a hub name",
    )
    _add_layout_flags(parser)
    _add(parser, "dtype", "--dtype", choices=["auto", *DTYPE_BYTES], help="auto: the checkpoint's")
    _add(
        parser,
        "quantization",
        "--quantization",
        choices=QUANTIZATIONS,
        help="hold matrices in 8 or 4 bits (default: as in the checkpoint)",
    )
    _add(
        parser,
        "kv_cache_dtype",
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        help="auto: same as --dtype (auto)",
    )
    _add(
        parser,
        "trust_remote_code",
        "--trust-remote-code",
        nargs=0,
        action=_RefuseRemoteCode,
        help=argparse.SUPPRESS,
    )


def add_settings_flags(parser: argparse.ArgumentParser, model_is_required: bool = True) -> None:
    """A flag for every field of `Settings` that has one."""
    add_model_flags(parser, model_is_required)
    _add(
        parser,
        "moe_dispatch",
        "--moe-dispatch",
        choices=DISPATCHES,
        help="how tokens reach experts on other ranks (auto); fused: NPUs only",
    )
    _add(
        parser,
        "device",
        "--device",
        choices=["auto", *DEVICES],
        help="what to run on (auto: the best that torch can use)",
    )
    _add_limit_flags(parser)
    _add(
        parser,
        "load_format",
        "--load-format",
        choices=["auto", "safetensors", "dummy"],
        help="dummy: random weights, no file is read",
    )
    _add(
        parser,
        "check_finite",
        "--check-finite",
        action="store_true",
        help="look for NaN and Inf in every weight while loading",
    )
    _add(
        parser,
        "weight_cache_gb",
        "--weight-cache-gb",
        type=float,
        metavar="GB",
        help="CPUs: keep packed weights on disk, so many GB at most; later starts map them (0)",
    )
    _add_step_flags(parser)
    _add_device_flags(parser)
    _add_node_flags(parser)


def add_print_env_flag(parser: argparse.ArgumentParser) -> None:
    """The flag `--print-env`, which `main` handles for every verb that has it."""
    parser.add_argument(
        "--print-env",
        action="store_true",
        help="only show the environment variables that the ranks would get",
    )


def _add(parser: argparse._ActionsContainer, field: str, *names: str, **options: Any) -> None:
    """Add a flag that sets `field` of `Settings`; without `names`, a positional argument."""
    if names:
        options["dest"] = field
    parser.add_argument(*(names or (field,)), default=argparse.SUPPRESS, **options)


def _default(field: str) -> Any:
    return Settings.__dataclass_fields__[field].default


def _add_layout_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layout (degree of parallelism on each axis)")
    for axis, name, meaning in (
        ("tp", "tensor", "heads, widths and the vocabulary are split"),
        ("ep", "expert", "whole routed experts are spread"),
        ("pp", "pipeline", "layers are split into stages"),
        ("sp", "sequence", "the tokens of a step are split"),
        ("dp", "data", "requests are spread over replicas"),
    ):
        _add(
            group,
            f"{name}_parallel_size",
            f"-{axis}",
            f"--{name}-parallel-size",
            f"--{axis}-size",
            f"--{axis}",
            type=int,
            metavar="N",
            help=f"{meaning} (1)",
        )
    _add(
        group,
        "enable_expert_parallel",
        "--enable-expert-parallel",
        action="store_true",
        help="use the largest -ep that fits",
    )
    _add(
        group,
        "pipeline_layers",
        "--pipeline-layers",
        type=integers,
        metavar="N,N,...",
        help="layers of each stage (default: cut by cost)",
    )
    _add(
        group,
        "expert_placement",
        "--expert-placement",
        metavar="contiguous|round_robin|FILE.json",
        help="which ep rank holds which experts (contiguous)",
    )


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of lengths, batch sizes, and the blocks of the KV cache."""
    _add(
        parser,
        "max_model_len",
        "--max-model-len",
        "--context-length",
        type=int,
        metavar="N",
        help="most tokens of one sequence (the model's limit)",
    )
    _add(
        parser,
        "max_num_seqs",
        "--max-num-seqs",
        "--max-running-requests",
        type=int,
        metavar="N",
        help=f"most sequences in one step ({EngineConfig.max_num_seqs})",
    )
    _add(
        parser,
        "max_num_batched_tokens",
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        help=f"most tokens in one step ({_default('max_num_batched_tokens')}; verify: 256)",
    )
    sizes = ", ".join(f"{device.name} {device.block_size}" for device in DEVICES.values())
    _add(
        parser,
        "block_size",
        "--block-size",
        "--page-size",
        type=int,
        metavar="N",
        help=f"tokens in a KV block ({sizes})",
    )
    _add(
        parser,
        "num_blocks",
        "--num-blocks",
        "--num-gpu-blocks-override",
        type=int,
        metavar="N",
        help="KV blocks (default: what fits the free memory)",
    )
    _add(
        parser,
        "memory_reserve",
        "--memory-reserve",
        type=float,
        metavar="SHARE",
        help="share of the memory that stays free when the KV cache is sized "
        f"({_default('memory_reserve'):g})",
    )
    _add(
        parser,
        "memory_reserve",
        "--gpu-memory-utilization",
        type=lambda text: 1 - float(text),
        help=argparse.SUPPRESS,
    )


def _add_step_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of how steps are planned and run."""
    _add(
        parser,
        "enable_prefix_caching",
        "--no-prefix-caching",
        "--no-enable-prefix-caching",
        "--disable-radix-cache",
        action="store_false",
        help="do not share the cache of equal prefixes",
    )
    _add(
        parser,
        "enable_prefix_caching",
        "--enable-prefix-caching",
        action="store_true",
        help=argparse.SUPPRESS,
    )
    _add(
        parser,
        "enforce_eager",
        "--enforce-eager",
        "--disable-cuda-graph",
        action="store_true",
        help="never run decode steps as recorded graphs",
    )
    _add(
        parser,
        "batch_invariant",
        "--batch-invariant",
        action="store_true",
        help="CPUs, bfloat16: a request gets the same tokens alone and in any batch",
    )
    _add(
        parser,
        "async_scheduling",
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="plan a step while the previous one runs (default: on NPUs and GPUs)",
    )
    _add(
        parser,
        "async_scheduling",
        "--disable-overlap-schedule",
        action="store_false",
        help=argparse.SUPPRESS,
    )
    _add(
        parser,
        "speculative_tokens",
        "--speculative-tokens",
        type=int,
        metavar="K",
        help="drafts of the next tokens that a step computes for a sequence, looked up in its own "
        f"text; they change no token ({_default('speculative_tokens')})",
    )
    parser.add_argument(
        "--speculative-config",
        dest="speculative_tokens",
        default=argparse.SUPPRESS,
        type=_ngram_tokens,
        metavar="JSON",
        help='the same in vLLM\'s form: \'{"method": "ngram", "num_speculative_tokens": K}\'',
    )
    _add(
        parser,
        "expert_stats",
        "--expert-stats",
        action="store_true",
        help="count the tokens of each expert and layer",
    )
    _add(
        parser,
        "step_timeout_s",
        "--step-timeout",
        type=float,
        metavar="SECONDS",
        help="end the job when no rank gets further in a step for so long "
        f"({_default('step_timeout_s'):g}); a first step has five times as long",
    )


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the binding to cores, and of options that only one device has."""
    _add(
        parser,
        "bind",
        "--bind",
        metavar="{auto,off,MAP}",
        help="cores and NUMA node of each rank (auto); MAP as in 0:0,1:0,2:1,3:1 (rank:node)",
    )
    _add(parser, "bind", "--numa-bind", action="store_const", const="auto", help=argparse.SUPPRESS)
    _add(
        parser,
        "npu_fused_all_reduce",
        "--npu-fused-all-reduce",
        type=int,
        nargs="?",
        const=512,
        metavar="ROWS",
        help="NPUs: one operator for a matmul and its all-reduce, in steps of ROWS (512) or more",
    )
    _add(
        parser,
        "npu_scatter_prefill",
        "--npu-scatter-prefill",
        type=int,
        nargs="?",
        const=256,
        metavar="TOKENS",
        help="NPUs: another operator writes the KV cache in steps of TOKENS (256) or more",
    )
    _add(
        parser,
        "npu_weight_format",
        "--npu-weight-format",
        choices=WEIGHT_FORMATS,
        help=f"NPUs: nz lays matrices out in tiles ({_default('npu_weight_format')})",
    )
    for field, meaning in (
        ("npu_aiv", "small collectives on vector cores (HCCL_OP_EXPANSION_MODE=AIV)"),
        ("npu_update_first", "update the lengths of a recorded decode step before its replay"),
        ("npu_maskless_decode", "attention of decode steps without a mask"),
        ("npu_hierarchical_dispatch", "--moe-dispatch fused sends to other servers in two steps"),
        ("npu_overlap_shared", "shared experts on a second stream, beside the routed ones"),
    ):
        flag = f"--{field.replace('_', '-')}"
        _add(parser, field, flag, action="store_true", help=f"NPUs: {meaning}")
    _add(
        parser,
        "cuda_one_shot_bytes",
        "--cuda-one-shot-bytes",
        type=int,
        metavar="BYTES",
        help="GPUs joined by NVLink: sum messages up to this size over tp in one kernel; 0 leaves "
        f"them all to NCCL ({_default('cuda_one_shot_bytes')})",
    )


def _add_node_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many nodes (the same command on each, except --node-rank)",
        "Without them NNODES, NODE_RANK and MASTER_ADDR count, or what Slurm, MPI or others "
        "set; --print-env shows them.",
    )
    parser.set_defaults(has_node_flags=True)
    _add(
        group,
        "nnodes",
        "--nnodes",
        type=int,
        metavar="N",
        help="machines of the job (1, or as the environment says)",
    )
    _add(
        group,
        "node_rank",
        "--node-rank",
        type=int,
        metavar="N",
        help="number of this machine, from 0 (0); node 0 reads and writes all files",
    )
    _add(
        group,
        "master_addr",
        "--master-addr",
        metavar="HOST",
        help=f"address of node 0 that the others reach ({_default('master_addr')})",
    )
    _add(
        group,
        "master_port",
        "--master-port",
        type=int,
        metavar="PORT",
        help=f"port of node 0 where they meet ({_default('master_port')})",
    )
    group.add_argument(
        "--dist-init-addr",
        dest="master_addr",
        default=argparse.SUPPRESS,
        action=_MasterAddress,
        metavar="HOST:PORT",
        help="--master-addr and --master-port in one",
    )
    _add(
        group,
        "join_timeout_s",
        "--join-timeout",
        type=float,
        metavar="SECONDS",
        help=f"seconds to wait for the other nodes ({_default('join_timeout_s'):g})",
    )
    _add(
        group,
        "cluster_key_file",
        "--cluster-key-file",
        metavar="FILE",
        help="secret that all nodes share; node 0 makes a missing file (MOESPAN_CLUSTER_KEY, or a "
        "key that node 0 shows)",
    )
    _add(
        group,
        "no_cluster_key",
        "--no-cluster-key",
        action="store_true",
        help="without a secret: anybody who reaches --master-port may take part",
    )


def _ngram_tokens(text: str) -> int:
    """The number of drafts in vLLM's `--speculative-config`."""
    try:
        asked = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not valid JSON: {error}") from None
    if not isinstance(asked, dict) or asked.get("method") != "ngram":
        raise argparse.ArgumentTypeError('only {"method": "ngram", ...} is known')
    unknown = asked.keys() - {"method", _NUM_TOKENS, _LOOKUP_MIN, _LOOKUP_MAX}
    if unknown:
        raise argparse.ArgumentTypeError(f"{shown(min(unknown))} is not known")
    for name in asked.keys() & {_LOOKUP_MIN, _LOOKUP_MAX}:
        if asked[name] != NUM_MATCHED:
            raise argparse.ArgumentTypeError(
                f"{name}={shown(asked[name])} is refused: drafts follow the last {NUM_MATCHED} "
                f"tokens, neither more nor fewer; leave {name} out. It would change no token"
            )
    if type(asked.get(_NUM_TOKENS)) is not int:
        raise argparse.ArgumentTypeError(f"{_NUM_TOKENS} must be a number of tokens")
    return int(asked[_NUM_TOKENS])


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
