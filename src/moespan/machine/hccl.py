"""The environment variables of HCCL, the NPUs' collective library: buffers, AIV, timeouts, address.

Pure functions of the config, the model, the machine and the user's environment. The reason for each
value: docs/ascend.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moespan.config import COLLECTIVE_TIMEOUT_S, EngineConfig, ModelConfig
from moespan.machine.setting import Machine, Setting, ours, unset
from moespan.parallel.buffers import fused_buffer_mb, group_buffers_mb, p2p_buffer_mb

# The first chips round HCCL's execution timeout down to multiples of this.
_TICK_S = 68


def hccl_settings(
    config: EngineConfig, model: ModelConfig | None, machine: Machine, user: Mapping[str, str]
) -> Iterator[tuple[Setting, Sequence[str]]]:
    """The settings of a job of several NPUs, each with the variables that keep us from setting it.

    Args:
        model: None if it is not known; then the buffers are left out.
        user: the environment without our own variables.
    """
    if model is not None:
        yield from _buffers(config, model)
    yield _expansion_mode(config, machine, user), ()
    timeout_s = int(COLLECTIVE_TIMEOUT_S)
    yield (
        ours(
            "HCCL_CONNECT_TIMEOUT",
            timeout_s,
            "ranks reach their first collective when they have loaded, some much later than "
            "others; the default of 120 s ends in EI0006",
            "CANN: HCCL_CONNECT_TIMEOUT",
        ),
        (),
    )
    execute_s, event_s = _timeouts(timeout_s, user)
    yield (
        ours(
            "HCCL_EXEC_TIMEOUT",
            execute_s,
            f"before torch's watchdog at {timeout_s} s, else HCCL logs nothing of its wait",
            "torch_npu: ProcessGroupHCCL",
        ),
        (),
    )
    yield (
        ours(
            "HCCL_EVENT_TIMEOUT",
            event_s,
            "must be longer than HCCL_EXEC_TIMEOUT",
            "torch_npu: HCCL_EVENT_TIMEOUT",
        ),
        (),
    )
    if machine.nnodes > 1 and machine.address:
        yield (
            ours(
                "HCCL_IF_IP",
                machine.address,
                "this node's address on the network that connects the nodes; by default HCCL "
                "takes the first network card by name",
                "CANN: HCCL_IF_IP",
            ),
            ("HCCL_SOCKET_IFNAME",),
        )


def _buffers(config: EngineConfig, model: ModelConfig) -> Iterator[tuple[Setting, Sequence[str]]]:
    sizes = ", ".join(f"{axis} {size} MB" for axis, size in group_buffers_mb(config, model).items())
    if fused_mb := fused_buffer_mb(config, model):
        yield (
            ours(
                "HCCL_BUFFSIZE",
                fused_mb,
                f"for the fused dispatch, whose operators read it here; other groups: {sizes}",
                "torch_npu: npu_moe_distribute_dispatch_v2",
            ),
            (),
        )
    elif sizes:
        why = f"each group gets its own size: {sizes}; the default of 200 MB is taken twice"
        yield unset("HCCL_BUFFSIZE", why, "CANN: HCCL_BUFFSIZE"), ()
    if config.layout.pp > 1:
        yield (
            ours(
                "P2P_HCCL_BUFFSIZE",
                p2p_buffer_mb(config, model),
                "the size of what two stages send through their own communicator",
                "torch_npu: P2P_HCCL_BUFFSIZE",
            ),
            (),
        )


def why_not_aiv(
    config: EngineConfig, chip: str, nnodes: int, user: Mapping[str, str]
) -> tuple[str, str]:
    """The rule that forbids AIV, and its source; both empty if AIV is allowed.

    The rules concern the whole process, not a single collective.

    Args:
        chip: `910B` (A2), `910C` (A3) or any other text.
        nnodes: nodes of the job.
        user: the environment without our own variables.
    """
    reference = "CANN: HCCL_OP_EXPANSION_MODE"
    layout = config.layout
    axes = [axis for axis in ("tp", "sp", "pp") if layout.sizes[axis] > 1]
    axes += ["ep"] * (layout.ep_tp_groups > 1)
    axes += ["ep_fused"] * (config.moe_dispatch == "fused")
    if chip == "910C":
        why = "on a 910C, recorded collectives are reported to hang with AIV"
        return why, "vllm-ascend#13688"
    if chip != "910B":
        return "AIV is for A2, and no such NPU was found", reference
    if nnodes > 1:
        return "AIV works within one server only", reference
    if config.npu_fused_all_reduce:
        why = "npu_fused_all_reduce and AIV compete for the vector cores"
        return why, "vllm-ascend#3881"
    if len(axes) > 1:
        named = ", ".join(axes)
        return f"AIV allows one communicator at a time, and this layout has {named}", reference
    if axes in (["pp"], []):
        return "this layout has no collectives", reference
    if user.get("HCCL_DETERMINISTIC", "false").lower() not in ("false", ""):
        return "HCCL_DETERMINISTIC is set and wins over AIV", reference
    return "", ""


def _expansion_mode(config: EngineConfig, machine: Machine, user: Mapping[str, str]) -> Setting:
    """AIV if it is asked for and allowed.

    AIV is not the default. With recorded decode steps it is reported to hang at the first replay on
    a 910C, and nobody has tried it here on a 910B.
    """
    name = "HCCL_OP_EXPANSION_MODE"
    reference = f"CANN: {name}"
    if not config.npu_aiv:
        return unset(name, "--npu-aiv sets it; nobody has measured it for this model", reference)
    why, source = why_not_aiv(config, machine.chip, machine.nnodes, user)
    if why:
        return unset(name, why, source)
    why = "small collectives run on the vector cores: less latency in decode"
    return ours(name, "AIV", why, reference)


def _timeouts(collective_s: int, user: Mapping[str, str]) -> tuple[int, int]:
    """HCCL_EXEC_TIMEOUT and HCCL_EVENT_TIMEOUT, each chosen to fit the other if the user set it."""
    execute_s = (collective_s - 1) // _TICK_S * _TICK_S
    users_event_s, users_execute_s = (
        int(text) if (text := user.get(name, "")).isdigit() else None
        for name in ("HCCL_EVENT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
    )
    if users_event_s:  # 0 means no timeout
        execute_s = max(min(execute_s, users_event_s - _TICK_S), 1)
    if users_execute_s == 0:
        return 0, 0
    return execute_s, (users_execute_s or execute_s) + 2 * _TICK_S
