"""The environment variables that moespan sets for the ranks: which, their values, and why.

`rank_environment` decides, as a pure function; a variable that the user has set is never changed.
The agent applies the settings before it starts the ranks, and `--print-env` shows them. The rules
of HCCL's own variables are in `hccl`. Imports no torch. Sources of the reasons: docs/ascend.md.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from moespan.config import EngineConfig, ModelConfig
from moespan.machine.hccl import hccl_settings
from moespan.machine.interfaces import address_towards, interface_of
from moespan.machine.launcher import launched
from moespan.machine.setting import NOBODY, US, USER, Machine, Setting, ours
from moespan.machine.topology import npu_chip

BACKEND_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

# Variables with these prefixes are shown if the user has set them, whether or not we set them too.
_SHOWN = (
    "ASCEND_",
    "CPU_AFFINITY_CONF",
    "CUDA_",
    "GLOO_",
    "GOMP_",
    "HCCL_",
    "KMP_",
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

# Variables that this process has set in its own environment; they are not the user's.
_set_here: set[str] = set()


def rank_environment(
    config: EngineConfig, model: ModelConfig | None, machine: Machine, user: Mapping[str, str]
) -> list[Setting]:
    """Every variable that we have a rule for, then the others that the user has set.

    Args:
        config: what the ranks run, on which device and in which layout.
        model: its geometry; None if it is not known, then buffer sizes are left out.
        user: the environment without our own variables.
    """
    settings = []
    for wish, unless in _wishes(config, model, machine, user):
        blocking = next((name for name in unless if name in user), None)
        if wish.name in user:
            settings.append(
                msgspec.structs.replace(
                    wish,
                    value=user[wish.name],
                    set_by=USER,
                    why="kept as you set it",
                    reference="",
                )
            )
        elif blocking is not None:
            settings.append(
                msgspec.structs.replace(wish, value=None, set_by=NOBODY, why=f"{blocking} is set")
            )
        else:
            settings.append(wish)
    known = {setting.name for setting in settings}
    settings += [
        Setting(name=name, value=user[name], set_by=USER)
        for name in sorted(user)
        if name.startswith(_SHOWN) and name not in known
    ]
    return settings


def apply(settings: Sequence[Setting]) -> None:
    """Set our own variables in this process, so that the processes it starts inherit them."""
    for setting in settings:
        if setting.set_by == US and setting.value is not None and not setting.per_rank:
            os.environ[setting.name] = setting.value


def describe(settings: Sequence[Setting]) -> list[str]:
    """The settings as lines of a table."""
    rows = [("variable", "value", "set by", "why")]
    rows += [
        (
            one.name,
            one.value or "-",
            one.set_by,
            one.why + (one.reference and f" [{one.reference}]"),
        )
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
    """Stop torch from loading torch_npu by itself, in this process and in those that it starts."""
    if BACKEND_AUTOLOAD not in os.environ:
        os.environ[BACKEND_AUTOLOAD] = "0"
        _set_here.add(BACKEND_AUTOLOAD)


def environment_of_this_process(config: EngineConfig) -> list[Setting]:
    """`environment_here` for a rank that we do not start: a single one, or one of torchrun's."""
    nnodes, address, interface = 1, "", ""
    place = launched()
    if place is not None and place.local_world_size != place.world_size:
        nnodes = place.world_size // (place.local_world_size or 1)
        # By default Gloo takes the interface that the host name resolves to: often the loopback.
        address = address_towards(os.environ["MASTER_ADDR"]) or ""
        interface = (interface_of(address) if address else None) or ""
        if interface == "lo":
            address = interface = ""
    return environment_here(config, nnodes=nnodes, address=address, interface=interface)


def this_machine(
    threads: Sequence[int] = (), nnodes: int = 1, address: str = "", interface: str = "lo"
) -> Machine:
    """The facts of the machine that this process runs on."""
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
    """The settings that we would choose, each with the variables that keep us from setting it."""
    many_ranks = config.layout.world_size > 1
    if machine.threads:
        threads = sorted(set(machine.threads))
        yield (
            ours(
                "OMP_NUM_THREADS",
                " or ".join(map(str, threads)),
                "one for each core of the rank, within the CPU quota",
                "docs/numa.md",
                per_rank=len(threads) > 1,
            ),
            (),
        )
    if config.device == "cpu":
        yield (
            ours(
                "OMP_WAIT_POLICY",
                "passive",
                "threads that wait leave their core to those that they wait for; on cores with "
                "other work a step takes many times as long if they spin",
                "docs/performance.md",
            ),
            ("GOMP_SPINCOUNT", "KMP_BLOCKTIME"),
        )
    if many_ranks and machine.interface:
        is_alone = machine.nnodes == 1
        why = "a single node needs the loopback only" if is_alone else "it leads to the other nodes"
        yield ours("GLOO_SOCKET_IFNAME", machine.interface, why), ()
        if config.device == "cuda":
            exactly = "lo" if is_alone else f"={machine.interface}"
            yield ours("NCCL_SOCKET_IFNAME", exactly, why), ()
    if machine.has_torch_npu:
        why = "moespan loads torch_npu when it is needed; without CANN it breaks `import torch`"
        yield ours(BACKEND_AUTOLOAD, 0, why, "torch_npu"), ()
    if config.device != "npu":
        return
    if many_ranks:
        yield from hccl_settings(config, model, machine, user)
    yield (
        ours(
            "TASK_QUEUE_ENABLE",
            1,
            "a second thread launches kernels; 2 may be faster, but its peak of memory is not "
            "planned for",
            "torch_npu: TASK_QUEUE_ENABLE",
        ),
        ("ASCEND_LAUNCH_BLOCKING",),
    )
    yield (
        ours(
            "PYTORCH_NPU_ALLOC_CONF",
            "expandable_segments:True",
            "less fragmentation, so that the KV cache can take all free memory",
            "torch_npu: PYTORCH_NPU_ALLOC_CONF",
        ),
        ("PYTORCH_ALLOC_CONF",),  # torch_npu refuses both together
    )
    if machine.architecture == "aarch64" and machine.libgomp:
        yield (
            ours(
                "LD_PRELOAD",
                machine.libgomp,
                "if OpenMP is loaded late, no room may be left for its thread-local data "
                "(`cannot allocate memory in static TLS block`)",
                "glibc",
            ),
            (),
        )


def _torchs_libgomp() -> str:
    """The OpenMP library in torch's wheel, found without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return ""
    package = Path(spec.origin).parent
    found = [*package.parent.glob("torch.libs/libgomp*.so*"), *package.glob("lib/libgomp*.so*")]
    return str(found[0]) if found else ""
