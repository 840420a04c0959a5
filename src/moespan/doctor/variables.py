"""Environment variables that contradict each other, the machine, or the layout. Pure functions."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterator, Mapping

from moespan.config import COLLECTIVE_TIMEOUT_S, EngineConfig, Layout
from moespan.doctor.report import Finding, problem, warning
from moespan.machine.topology import format_list, parse_list

# HCCL's defaults, in seconds.
_EXECUTE_S, _EVENT_S = 1836, 1868
_CONNECT_S = range(120, 7201)


def contradictions(
    environ: Mapping[str, str],
    layout: Layout,
    nnodes: int,
    allowed: Collection[int],
    addresses: Collection[str],
    config: EngineConfig | None = None,
    chip: str = "",
) -> Iterator[Finding]:
    """Findings about variables that contradict each other, the machine or the layout.

    Args:
        allowed: CPUs that this process may use.
        addresses: addresses of this machine.
        config: None if no model is named.
        chip: kind of NPU, as `moespan.machine.topology.npu_chip` names it.
    """
    if {"PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} <= environ.keys():
        yield problem(
            "PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set, which torch_npu refuses",
            "unset one of them",
        )
    yield from _timeouts(environ)
    if environ.get("HCCL_INTRA_ROCE_ENABLE") == environ.get("HCCL_INTRA_PCIE_ENABLE") == "1":
        yield problem(
            "HCCL_INTRA_ROCE_ENABLE and HCCL_INTRA_PCIE_ENABLE are both 1",
            "unset both; only Atlas 200T A2 Box16 needs one of them",
        )
    buffer = environ.get("HCCL_BUFFSIZE")
    if buffer is not None and not (buffer.isdigit() and int(buffer) >= 1):
        yield problem(f"HCCL_BUFFSIZE={buffer!r} is not a number of MB", "unset it")
    if environ.get("HCCL_WHITELIST_DISABLE") == "0" and not environ.get("HCCL_WHITELIST_FILE"):
        yield problem(
            "HCCL_WHITELIST_DISABLE=0 requires a whitelist, but HCCL_WHITELIST_FILE is not set",
            "unset HCCL_WHITELIST_DISABLE: no whitelist is the default",
        )
    yield from _addresses(environ, addresses)
    yield from _expansion(environ, layout, nnodes)
    if environ.get("HCCL_OP_EXPANSION_MODE", "").upper() == "AIV":
        yield from _aiv_on(chip, config)
    if environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        yield warning(
            "ASCEND_LAUNCH_BLOCKING=1 waits for every kernel and prevents the capture of graphs",
            "unset it unless you are searching for a kernel that fails",
        )
    yield from _cores(environ, allowed)
    visible = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    ranks = max(layout.world_size // nnodes, 1)
    if visible is not None and sum(bool(part.strip()) for part in visible.split(",")) < ranks:
        yield problem(
            f"ASCEND_RT_VISIBLE_DEVICES={visible} shows fewer NPUs than a node's {ranks} ranks",
            "list more NPUs, or use a smaller layout",
        )
    if environ.get("WORLD_SIZE", "").strip() not in ("", "0", "1") and environ.get("RANK"):
        yield warning(
            "RANK and WORLD_SIZE are set, so moespan would assume that torchrun has started this "
            "process",
            "unset both, unless torchrun starts your program",
        )


def _timeouts(environ: Mapping[str, str]) -> Iterator[Finding]:
    execute, event = (
        int(text) if (text := environ.get(name, "")).isdigit() else default
        for name, default in (("HCCL_EXEC_TIMEOUT", _EXECUTE_S), ("HCCL_EVENT_TIMEOUT", _EVENT_S))
    )
    named = {"HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT"} & environ.keys()
    # If only one of them is set, we choose the other to fit. 0 means no timeout.
    if len(named) == 2 and event and (not execute or event <= execute):
        yield problem(
            f"HCCL_EVENT_TIMEOUT={event} is not longer than HCCL_EXEC_TIMEOUT={execute}",
            "unset both: moespan sets them to fit",
        )
    if "HCCL_EXEC_TIMEOUT" in environ and (not execute or execute >= COLLECTIVE_TIMEOUT_S):
        yield warning(
            f"HCCL_EXEC_TIMEOUT={execute} is not shorter than torch's watchdog, "
            f"{COLLECTIVE_TIMEOUT_S:g} s, so HCCL logs nothing of what it waited for",
            "unset it: moespan sets it to fit",
        )
    connect = environ.get("HCCL_CONNECT_TIMEOUT")
    if connect is not None and not (connect.isdigit() and int(connect) in _CONNECT_S):
        yield problem(
            f"HCCL_CONNECT_TIMEOUT={connect} is not from {_CONNECT_S[0]} to {_CONNECT_S[-1]}",
            "unset it: moespan sets 600",
        )


def _addresses(environ: Mapping[str, str], addresses: Collection[str]) -> Iterator[Finding]:
    own = environ.get("HCCL_IF_IP")
    if own is None:
        return
    if "HCCL_SOCKET_IFNAME" in environ:
        yield warning(
            "HCCL_IF_IP and HCCL_SOCKET_IFNAME are both set; HCCL_IF_IP wins", "unset one"
        )
    try:
        is_here = ipaddress.ip_address(own) in {ipaddress.ip_address(one) for one in addresses}
    except ValueError:
        is_here = False
    if not is_here:
        yield problem(
            f"HCCL_IF_IP={own} is not an address of this machine, which has "
            f"{', '.join(addresses) or 'none'}",
            "unset it, or set it to each node's own address",
        )


def _expansion(environ: Mapping[str, str], layout: Layout, nnodes: int) -> Iterator[Finding]:
    if environ.get("HCCL_OP_EXPANSION_MODE", "").upper() != "AIV":
        return
    axes = [name for name in ("tp", "sp", "pp") if layout.sizes[name] > 1]
    axes += ["ep"] * (layout.ep_tp_groups > 1)
    if len(axes) > 1:
        yield warning(
            f"HCCL_OP_EXPANSION_MODE=AIV allows one communicator at a time, and {layout} has "
            f"{', '.join(axes)}",
            "unset it; --npu-aiv sets it where it is allowed",
        )
    if nnodes > 1:
        yield warning(
            "HCCL_OP_EXPANSION_MODE=AIV is set for several nodes, but most collectives support it "
            "within one server only",
            "unset it; --npu-aiv sets it where it is allowed",
        )
    if environ.get("HCCL_DETERMINISTIC", "false").lower() not in ("", "false"):
        yield warning(
            "HCCL_DETERMINISTIC wins over HCCL_OP_EXPANSION_MODE=AIV, which then has no effect",
            "unset one of them",
        )


def _aiv_on(chip: str, config: EngineConfig | None) -> Iterator[Finding]:
    """Faults that others have reported of AIV."""
    records = config is None or not config.enforce_eager
    if chip == "910C" and records:
        yield warning(
            "HCCL_OP_EXPANSION_MODE=AIV is reported to hang in recorded decode steps of a 910C",
            "unset it, or start with --enforce-eager",
        )
    if config is not None and config.npu_fused_all_reduce:
        yield warning(
            "HCCL_OP_EXPANSION_MODE=AIV competes with --npu-fused-all-reduce for the vector cores",
            "unset one of them",
        )


def _cores(environ: Mapping[str, str], allowed: Collection[int]) -> Iterator[Finding]:
    """torch_npu drops its whole binding, silently, if one core of any card is not allowed."""
    text = environ.get("CPU_AFFINITY_CONF", "")
    if "force:1" in text.replace(" ", ""):
        return
    wanted = {
        cpu for part in re.findall(r"npu\d+\s*:\s*([\d-]+)", text) for cpu in parse_list(part)
    }
    outside = sorted(wanted - set(allowed))
    if outside:
        yield warning(
            f"CPU_AFFINITY_CONF names cores {format_list(outside)}, which this process may not "
            "use, so torch_npu skips its whole binding silently",
            "name cores of this container, or unset it: moespan binds the ranks itself",
        )
