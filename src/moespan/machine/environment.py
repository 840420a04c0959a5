"""The environment variables that we set for the ranks: which, to what, and why.

`rank_environment` decides (a pure function); what the user has set is never changed. The agent
applies it before it starts the ranks, `--print-env` shows it. Imports no torch. Where each reason
comes from: docs/ascend.md.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moespan.config import COLLECTIVE_TIMEOUT_S, EngineConfig, ModelConfig
from moespan.launch.job import started_by_torchrun
from moespan.machine.interfaces import address_towards, interface_of
from moespan.machine.topology import npu_chip
from moespan.parallel.buffers import fused_buffer_mb, group_buffers_mb, p2p_buffer_mb

BACKEND_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

# HCCL's first chips round its execution timeout down to multiples of this.
_HCCL_TICK_S = 68

# Whatever a user has set of these is shown, ours or not.
_SHOWN = (
    "ASCEND_",
    "CPU_AFFINITY_CONF",
    "CUDA_",
    "GLOO_",
    "HCCL_",
    "LD_PRELOAD",
    "MULTI_STREAM_",
    "NCCL_",
    "OMP_",
    "P2P_HCCL_",
    "PYTORCH_",
    "RANK_TABLE_FILE",
    "TASK_QUEUE_ENABLE",
    "TORCH_",
)

# Variables of this process that are ours, though they are in its environment.
_set_here: set[str] = set()

US, USER, NOBODY = "moespan", "you", "nobody"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One variable as the ranks will have it.

    Attributes:
        value: None if it is left unset.
        set_by: `moespan`, `you`, or `nobody`.
        why: why it is set so, or left.
        source: where that is written.
        per_rank: ranks differ in it, so each sets its own; `value` is for reading.
    """

    name: str
    value: str | None
    set_by: str
    why: str = ""
    source: str = ""
    per_rank: bool = False


@dataclass(frozen=True)
class Machine:
    """What the settings depend on beside config and model.

    Attributes:
        architecture: as `uname -m` says it.
        chip: `910B` (A2), `910C` (A3), `310P`, or empty if there is none or it is not known.
        threads: OpenMP threads of each rank of this node; empty if its ranks are not ours.
        nnodes: nodes of the job.
        address: this node's own, on the network that leads to the others.
        interface: the network interface that has it; empty if it is not for us to choose.
        libgomp: path of the OpenMP library that torch brings along; empty if it brings none.
        has_torch_npu: whether the package torch-npu is installed.
    """

    architecture: str = "x86_64"
    chip: str = ""
    threads: tuple[int, ...] = ()
    nnodes: int = 1
    address: str = ""
    interface: str = "lo"
    libgomp: str = ""
    has_torch_npu: bool = False


def rank_environment(
    config: EngineConfig, model: ModelConfig | None, machine: Machine, user: Mapping[str, str]
) -> list[Setting]:
    """Every variable that we have an opinion on, then what else the user has set.

    Args:
        config: what the ranks run, on which device and in which layout.
        model: its geometry; None if it is not known, then nothing is said of buffers.
        user: the environment as it is without us.
    """
    settings = []
    for wish, unless in _wishes(config, model, machine, user):
        blocking = next((name for name in unless if name in user), None)
        if wish.name in user:
            settings.append(
                msgspec.structs.replace(
                    wish, value=user[wish.name], set_by=USER, why="kept as you set it", source=""
                )
            )
        elif blocking is not None:
            settings.append(
                msgspec.structs.replace(wish, value=None, set_by=NOBODY, why=f"{blocking} is set")
            )
        else:
            settings.append(wish)
    ours = {setting.name for setting in settings}
    settings += [
        Setting(name=name, value=user[name], set_by=USER)
        for name in sorted(user)
        if name.startswith(_SHOWN) and name not in ours
    ]
    return settings


def apply(settings: Sequence[Setting]) -> None:
    """Set in this process what is ours, so that processes it starts inherit it."""
    for setting in settings:
        if setting.set_by == US and setting.value is not None and not setting.per_rank:
            os.environ[setting.name] = setting.value


def describe(settings: Sequence[Setting]) -> list[str]:
    """The settings as lines of a table."""
    rows = [("variable", "value", "set by", "why")]
    rows += [
        (one.name, one.value or "-", one.set_by, one.why + (one.source and f" [{one.source}]"))
        for one in settings
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row[:3], widths, strict=True))
        + f"  {row[3]}".rstrip()
        for row in rows
    ]


def environment_here(
    config: EngineConfig,
    threads: Sequence[int] = (),
    nnodes: int = 1,
    address: str = "",
    interface: str = "lo",
) -> list[Setting]:
    """`rank_environment` for this machine, this process's environment, and `config`'s model."""
    machine = this_machine(threads, nnodes, address, interface)
    has_model = config.device == "npu" and config.model
    model = ModelConfig.from_pretrained(config.model) if has_model else None
    user = {name: value for name, value in os.environ.items() if name not in _set_here}
    return rank_environment(config, model, machine, user)


def keep_torch_npu_out() -> None:
    """Keep torch from loading torch_npu by itself, in this process and those that it starts."""
    if BACKEND_AUTOLOAD not in os.environ:
        os.environ[BACKEND_AUTOLOAD] = "0"
        _set_here.add(BACKEND_AUTOLOAD)


def environment_of_this_process(config: EngineConfig) -> list[Setting]:
    """The same for a rank that we do not start: it is alone, or torchrun has started it."""
    nnodes, address, interface = 1, "", ""
    if started_by_torchrun() and os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        nnodes = int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Gloo would take the interface that the machine's name leads to: often the loopback.
        address = address_towards(os.environ["MASTER_ADDR"]) or ""
        interface = (interface_of(address) if address else None) or ""
        if interface == "lo":
            address = interface = ""
    return environment_here(config, nnodes=nnodes, address=address, interface=interface)


def this_machine(
    threads: Sequence[int] = (), nnodes: int = 1, address: str = "", interface: str = "lo"
) -> Machine:
    """What there is to know of the machine that this process runs on."""
    return Machine(
        architecture=platform.machine(),
        chip=npu_chip(Path("/")),
        threads=tuple(threads),
        nnodes=nnodes,
        address=address,
        interface=interface,
        libgomp=_torchs_libgomp(),
        has_torch_npu=importlib.util.find_spec("torch_npu") is not None,
    )


def _wishes(
    config: EngineConfig, model: ModelConfig | None, machine: Machine, user: Mapping[str, str]
) -> Iterator[tuple[Setting, Sequence[str]]]:
    """What we would set, each with other variables that make us leave it."""

    def wish(
        name: str, value: object, why: str, source: str = "", per_rank: bool = False
    ) -> Setting:
        text, by = (None, NOBODY) if value is None else (str(value), US)
        return Setting(name=name, value=text, set_by=by, why=why, source=source, per_rank=per_rank)

    many_ranks = config.layout.world_size > 1
    if machine.threads:
        threads = sorted(set(machine.threads))
        yield (
            wish(
                "OMP_NUM_THREADS",
                " or ".join(map(str, threads)),
                "one for each core of the rank, within the CPU quota",
                "docs/numa.md",
                per_rank=len(threads) > 1,
            ),
            (),
        )
    if many_ranks and machine.interface:
        alone = "one node talks to itself only"
        why = alone if machine.nnodes == 1 else "the way to the other nodes"
        yield wish("GLOO_SOCKET_IFNAME", machine.interface, why), ()
        if config.device == "cuda":
            exactly = "lo" if machine.nnodes == 1 else f"={machine.interface}"
            yield wish("NCCL_SOCKET_IFNAME", exactly, why), ()
    if machine.has_torch_npu:
        why = "torch_npu is loaded when it is wanted; without CANN it would stop `import torch`"
        yield wish(BACKEND_AUTOLOAD, 0, why, "torch_npu"), ()
    if config.device != "npu":
        return
    if many_ranks:
        yield from ((setting, unless) for setting, unless in _hccl(config, model, machine, user))
    yield (
        wish(
            "TASK_QUEUE_ENABLE",
            1,
            "a second thread launches kernels; 2 may be faster, but its memory peak is not in the "
            "plan",
            "torch_npu: TASK_QUEUE_ENABLE",
        ),
        ("ASCEND_LAUNCH_BLOCKING",),
    )
    yield (
        wish(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "less fragmentation, so that the KV cache can take what is free",
            "torch_npu: PYTORCH_NPU_ALLOC_CONF",
        ),
        ("PYTORCH_ALLOC_CONF",),  # both together are an error
    )
    if machine.architecture == "aarch64" and machine.libgomp:
        yield (
            wish(
                "LD_PRELOAD",
                machine.libgomp,
                "loaded late, OpenMP may find no room left for its thread-local data "
                "(`cannot allocate memory in static TLS block`)",
                "glibc",
            ),
            (),
        )


def _hccl(
    config: EngineConfig, model: ModelConfig | None, machine: Machine, user: Mapping[str, str]
) -> Iterator[tuple[Setting, Sequence[str]]]:
    if model is not None:
        sizes = group_buffers_mb(config, model)
        words = ", ".join(f"{axis} {size} MB" for axis, size in sizes.items())
        if fused_mb := fused_buffer_mb(config, model):
            why = f"of the fused dispatch, whose operators read it here; the others: {words}"
            yield (
                Setting(
                    name="HCCL_BUFFSIZE",
                    value=str(fused_mb),
                    set_by=US,
                    why=why,
                    source="torch_npu: npu_moe_distribute_dispatch_v2",
                ),
                (),
            )
        elif words:
            why = f"each group is given its own: {words}; the default of 200 MB is taken twice"
            yield _left("HCCL_BUFFSIZE", why, "CANN: HCCL_BUFFSIZE"), ()
        if config.layout.pp > 1:
            yield (
                Setting(
                    name="P2P_HCCL_BUFFSIZE",
                    value=str(p2p_buffer_mb(config, model)),
                    set_by=US,
                    why="two stages have a communicator of their own; this is what they send",
                    source="torch_npu: P2P_HCCL_BUFFSIZE",
                ),
                (),
            )
    yield _expansion_mode(config, machine, user), ()
    timeout_s = int(COLLECTIVE_TIMEOUT_S)
    yield (
        Setting(
            name="HCCL_CONNECT_TIMEOUT",
            value=str(timeout_s),
            set_by=US,
            why="ranks come to their first collective when they have loaded, some much later; the "
            "default of 120 s ends in EI0006",
            source="CANN: HCCL_CONNECT_TIMEOUT",
        ),
        (),
    )
    execute_s, event_s = _timeouts(timeout_s, user)
    for name, value, why in (
        (
            "HCCL_EXEC_TIMEOUT",
            execute_s,
            f"before torch's watchdog at {timeout_s} s, else HCCL logs nothing of its wait",
        ),
        ("HCCL_EVENT_TIMEOUT", event_s, "must be longer than HCCL_EXEC_TIMEOUT"),
    ):
        source = f"torch_npu: {'ProcessGroupHCCL' if 'EXEC' in name else name}"
        yield Setting(name=name, value=str(value), set_by=US, why=why, source=source), ()
    if machine.nnodes > 1 and machine.address:
        yield (
            Setting(
                name="HCCL_IF_IP",
                value=machine.address,
                set_by=US,
                why="this node's own address on the way to the others; HCCL would take the first "
                "network card by name",
                source="CANN: HCCL_IF_IP",
            ),
            ("HCCL_SOCKET_IFNAME",),
        )


def _expansion_mode(config: EngineConfig, machine: Machine, user: Mapping[str, str]) -> Setting:
    """AIV where the rules allow it: they are about the whole process, not one collective."""
    name, source = "HCCL_OP_EXPANSION_MODE", "CANN: HCCL_OP_EXPANSION_MODE"
    layout = config.layout
    axes = [axis for axis in ("tp", "sp", "pp") if layout.sizes[axis] > 1]
    axes += ["ep"] * (layout.ep_tp_groups > 1)
    axes += ["ep_fused"] * (config.moe_dispatch == "fused")
    if machine.chip not in ("910B", "910C"):
        return _left(name, "AIV is for A2 and A3, and no such NPU was found", source)
    if machine.nnodes > 1:
        return _left(name, "AIV is used within one server only", source)
    if len(axes) > 1:
        reason = f"AIV allows one communicator at a time, and this layout has {', '.join(axes)}"
        return _left(name, reason, source)
    if axes in (["pp"], []):
        return _left(name, "this layout has no collectives", source)
    if user.get("HCCL_DETERMINISTIC", "false").lower() not in ("false", ""):
        return _left(name, "HCCL_DETERMINISTIC is set and wins over AIV", source)
    return Setting(
        name=name,
        value="AIV",
        set_by=US,
        why="small collectives run on the vector cores: less latency in decode",
        source=source,
    )


def _timeouts(collective_s: int, user: Mapping[str, str]) -> tuple[int, int]:
    """HCCL_EXEC_TIMEOUT and HCCL_EVENT_TIMEOUT, so that they fit to one that the user has set."""
    execute_s = (collective_s - 1) // _HCCL_TICK_S * _HCCL_TICK_S
    users_event_s, users_execute_s = (
        int(text) if (text := user.get(name, "")).isdigit() else None
        for name in ("HCCL_EVENT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
    )
    if users_event_s:  # 0 is never
        execute_s = max(min(execute_s, users_event_s - _HCCL_TICK_S), 1)
    if users_execute_s == 0:
        return 0, 0
    return execute_s, (users_execute_s or execute_s) + 2 * _HCCL_TICK_S


def _left(name: str, why: str, source: str) -> Setting:
    return Setting(name=name, value=None, set_by=NOBODY, why=why, source=source)


def _torchs_libgomp() -> str:
    """The OpenMP library in torch's wheel, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return ""
    package = Path(spec.origin).parent
    found = [*package.parent.glob("torch.libs/libgomp*.so*"), *package.glob("lib/libgomp*.so*")]
    return str(found[0]) if found else ""
