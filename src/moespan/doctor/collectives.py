"""The check of collectives: all-reduces over each axis of a layout, timed on its real ranks."""

from __future__ import annotations

import msgspec

from moespan.config import EngineConfig
from moespan.doctor.report import Finding, ok, problem, skipped, warning
from moespan.errors import MoespanError
from moespan.measure.collectives import Timing, measure
from moespan.units import bytes_in_words

# NPUs of one A2 server → published bytes per second over the bus (CANN 8.0).
_PUBLISHED = {2: 18e9, 4: 30e9, 8: 72e9}


def findings(config: EngineConfig, nnodes: int = 1) -> list[Finding]:
    """One finding for each axis of `config`'s layout."""
    return [msgspec.structs.replace(one, check="collectives") for one in _findings(config, nnodes)]


def _findings(config: EngineConfig, nnodes: int) -> list[Finding]:
    if config.layout.world_size == 1:
        return [skipped("a single rank sends nothing: name a layout, such as -tp 8")]
    if nnodes > 1:
        return [skipped("timed on one node only: name a layout of one node")]
    try:
        timings = measure(config)
    except MoespanError as error:
        fix = "the last lines of the error say where; the findings above may say why"
        return [problem(f"all-reduces over {config.layout} failed: {error}", fix)]
    if not timings:
        return [skipped(f"{config.layout} has no axis with traffic")]
    axes = dict.fromkeys(timing.axis for timing in timings)
    return [judge([one for one in timings if one.axis == axis], config.device) for axis in axes]


def judge(timings: list[Timing], device: str) -> Finding:
    """The finding for one axis, from its timings in order of message size."""
    words = f"all-reduce over {timings[0].axis} of {timings[0].ranks}: " + ", ".join(
        f"{_size(one.message_bytes)} {one.median_s * 1e6:.0f} µs "
        f"({bytes_in_words(one.bus_bytes_per_s)}/s{', one shot' if one.one_shot else ''})"
        for one in timings
    )
    expected = _PUBLISHED.get(timings[0].ranks) if device == "npu" else None
    if expected is not None and timings[-1].bus_bytes_per_s < expected / 2:
        return warning(
            f"{words}; others have measured {bytes_in_words(expected, 0)}/s",
            "end other jobs; npu-smi info -t topo must show HCCS between all NPUs",
        )
    return ok(words)


def _size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"
