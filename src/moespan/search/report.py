"""The document of a plan as the text that `moespan plan` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moespan.planner.outcome import in_words
from moespan.search.commands import KEYS_PLACE, MODEL_PLACE
from moespan.units import COUNTS, scaled

_GIB = 1 << 30


def text(found: dict[str, Any], *, explain: bool = False) -> Iterator[str]:
    """The lines that `moespan plan` prints."""
    yield from _heading(found)
    plans = found["plans"]
    if not plans:
        yield ""
        yield "nothing fits: use more devices, a quantization, or shorter sequences"
        return
    yield ""
    yield from _table(found)
    yield from _remarks(found)
    if explain:
        yield from _explanation(plans[0])
    yield ""
    yield from _starts(found)


def _heading(found: dict[str, Any]) -> Iterator[str]:
    hardware, model, searched = found["hardware"], found["model"], found["searched"]
    count = f"{hardware['devices']} ×"
    if hardware["devices"] % hardware["devices_per_node"] == 0 and hardware["nodes"] > 1:
        count = f"{hardware['nodes']} × {hardware['devices_per_node']}"
    memory = f"{hardware['memory_bytes'] / _GIB:.1f} GiB usable"
    yield f"hardware   {count} {hardware['title']}, {memory}; {_quality(hardware)}"
    yield (
        f"model      {model['name']}, {model['dtype']}: {scaled(model['parameters'], COUNTS)} "
        f"parameters, {model['kv_bytes_per_token'] / 1024:g} KiB of KV cache a token; "
        f"routing {model['routing']}"
    )
    load = found["load"]
    cut = f"; {load['clipped']} prompts CUT to the model's length" if load["clipped"] else ""
    targets = f"; {', '.join(found['targets'])}" if found["targets"] else ""
    yield f"load       {load['name']}{cut}{targets}"
    simulated = (
        "nothing simulated (--fast)"
        if searched["is_estimate"]
        else f"{searched['simulated']} simulated ({searched['requests']} requests each)"
    )
    yield (
        f"searched   {_some(searched['layouts'], 'layout')} × "
        f"{_some(searched['settings'], 'setting')}: "
        f"{searched['combinations']}; {searched['fitting']} fit; {simulated}"
    )


def _quality(hardware: dict[str, Any]) -> str:
    """The origin of the figures, and their error."""
    error = f"±{hardware['error']:.0%}"
    if hardware["is_calibrated"]:
        return f"calibrated; {error} is expected, not promised"
    if not hardware["was_calibrated"]:
        return (
            f"VENDOR FIGURES AND GUESSES ({error}): `moespan calibrate` on one node measures its "
            "part"
        )
    parts = hardware["unmeasured"]
    more = f" and {len(parts) - _MOST_PARTS} more" if len(parts) > _MOST_PARTS else ""
    missing = f"no curve of {', '.join(parts[:_MOST_PARTS])}{more}" if parts else "it was cut short"
    return f"PARTLY CALIBRATED ({error}), {missing}: calibrate longer, with the flags of the layout"


_MOST_PARTS = 3


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(found: dict[str, Any]) -> Iterator[str]:
    ttft, tpot = statistics_of(found)
    rows = [
        [
            "",
            "engines × layout",
            "seqs",
            "tokens",
            f"TTFT {ttft}",
            f"TPOT {tpot}",
            "tokens/s",
            "of it a device",
            "fits at once",
            "tightest rank",
        ]
    ]
    memory = found["hardware"]["memory_bytes"] / _GIB
    for plan in found["plans"]:
        missed = {miss["target"].split()[0] for miss in plan["misses"]}
        marks = {latency: " ✗" if latency in missed else "" for latency in ("TTFT", "TPOT")}
        if plan["at_risk"]:
            marks["TPOT"] = " at risk"
        rows.append(
            [
                str(plan["rank"]),
                f"{plan['engines']} × {plan['layout_text']}{_quantized(plan)}",
                str(plan["max_num_seqs"]),
                str(plan["max_num_batched_tokens"]),
                _latency(plan["ttft_s"], ttft, plan["was_given_up"]) + marks["TTFT"],
                _latency(plan["tpot_s"], tpot) + marks["TPOT"],
                f"{plan['tokens_per_s']:,.0f}".replace(",", " "),
                f"{plan['tokens_per_s_per_device']:,.0f} ±{plan['error']:.0%}".replace(",", " "),
                f"{plan['engines']} × {plan['sequences_at_once']}",
                f"{plan['memory']['taken_bytes'] / _GIB:.1f} of {memory:.1f} GiB",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def statistics_of(found: dict[str, Any]) -> tuple[str, str]:
    """The statistics of TTFT and TPOT that targets are about; p90 without one."""
    wanted = {"TTFT": "p90", "TPOT": "p90"}
    for target in found["targets"]:
        latency, statistic, *_ = target.split()
        wanted[latency] = statistic
    return wanted["TTFT"], wanted["TPOT"]


def _quantized(plan: dict[str, Any]) -> str:
    parts = [plan["quantization"]] if plan["quantization"] else []
    parts += [f"{plan['kv_cache_dtype']} cache"] if plan["kv_cache_dtype"] != "auto" else []
    return f" ({', '.join(parts)})" if parts else ""


def _latency(figures: dict[str, Any], statistic: str, was_given_up: bool = False) -> str:
    if statistic not in figures:
        return "-"
    value = figures[statistic]["value"]
    return ("> " if was_given_up else "") + in_words(value) if value < 1e6 else "no end"


def _remarks(found: dict[str, Any]) -> Iterator[str]:
    plans = found["plans"]
    limits = ", ".join(f"{kind} {share:.0%}" for kind, share in plans[0]["limits"].items())
    close = [str(plan["rank"]) for plan in plans if plan["too_close"]]
    too_close = f".  {', '.join(close)}: too close to call with 1" if close else ""
    yield f"limits     1, in decode: {limits} ({plans[0]['num_sums']} collectives){too_close}"
    yield from _bands(found)
    if not found["met"]:
        for plan in plans:
            missed = "; ".join(map(missed_in_words, plan["misses"]))
            yield f"missed     {plan['rank']}: {missed or 'too slow to end'}"
        for advice in found["advice"] or [_NO_ADVICE]:
            yield f"would do   {advice}"
    worst = found["small_messages"]
    if worst is not None and not worst["is_same"]:
        yield (
            f"guess      small messages between devices decide: at {_microseconds(worst, 'worst')} "
            f"instead of {_microseconds(worst, 'usual')} the best is {worst['engines']} × "
            f"{worst['layout_text']} (TPOT {in_words(worst['tpot_s'])})"
        )
    elif worst is not None:
        yield (
            f"guess      small messages at {_microseconds(worst, 'worst')} instead of "
            f"{_microseconds(worst, 'usual')} leave the same layout first"
        )
    placement = found["placement"]
    if placement is not None:
        now, placed = (in_words(placement[key]) for key in ("now_s", "placed_s"))
        yield (
            f"placement  experts placed by their counts: decode step of 1 {now} → {placed}; "
            f"moespan experts {found['model']['name']} --counts {placement['counts']} "
            f"{' '.join(_axes(plans[0]))} --out placement.json, then --expert-placement"
        )
    if not found["hardware"]["is_calibrated"] or close:
        yield f"next       calibrate, or measure: {plans[0]['bench']}"
        for plan in plans:
            if plan["too_close"]:
                yield f"{'':<10} and {plan['rank']}: {plan['bench']}"
    yield from _what_if_lines(found)


def _bands(found: dict[str, Any]) -> Iterator[str]:
    """Latencies with times that are shorter and longer by the profile's error."""
    statistics = dict(zip(("ttft_s", "tpot_s"), statistics_of(found), strict=True))
    label = "band"
    for plan in found["plans"]:
        parts = []
        for key, statistic in statistics.items():
            values = [_latency(edge[key], statistic, edge["was_given_up"]) for edge in plan["band"]]
            parts += [f"{key[:4].upper()} {statistic} {' to '.join(values)}"] if values else []
        if parts:
            error = f"{plan['error']:.0%}"
            yield f"{label:<10} {plan['rank']}, at times ±{error}: {', '.join(parts)}"
            label = ""


_NO_ADVICE = "none of the changes that were tried; relax the targets to the figures of layout 1"


def _axes(plan: dict[str, Any]) -> Iterator[str]:
    """The flags of a plan's layout."""
    return (f"-{axis} {degree}" for axis, degree in plan["layout"].items() if degree > 1)


def missed_in_words(miss: dict[str, Any]) -> str:
    """A target, and by how much it is missed."""
    target, value_s, by = miss["target"], miss["value_s"], miss["by"]
    if not math.isfinite(value_s):
        return f"{target} is out of reach: requests come faster than they are served"
    if by < 1:
        return f"{target} missed by {by:.0%}: {in_words(value_s)}"
    times = f"{by + 1:,.0f}" if by >= 99 else f"{by + 1:.3g}"
    return f"{target} missed: {in_words(value_s)}, {times} times as long as allowed"


def _microseconds(worst: dict[str, Any], which: str) -> str:
    values = worst[f"{which}_us"].values()
    return f"{min(values):g} to {max(values):g} µs"


def _what_if_lines(found: dict[str, Any]) -> Iterator[str]:
    _, tpot = statistics_of(found)
    now = found["plans"][0]["tpot_s"].get(tpot, {"value": 0.0})["value"]
    for other in found["what_if"]:
        if other is None:
            continue
        change = other["change"]
        if not other["fits"]:
            yield f"what if    {change}: nothing fits"
            continue
        parts = []
        if other["requests_ratio"]:
            within = " within the targets" if found["targets"] else ""
            parts.append(f"{other['requests_ratio'] - 1:+.0%} requests{within}")
        if tpot in other["tpot_s"]:
            parts.append(
                f"TPOT {tpot} {in_words(now)} → {in_words(other['tpot_s'][tpot]['value'])}"
            )
        missed = ", ".join(miss["target"] for miss in other["misses"])
        still = f"; still missed: {missed}" if missed else ""
        best = f"{other['engines']} × {other['layout_text']}"
        yield f"what if    {change}: {', or '.join(parts)}{still} ({best})"


def _starts(found: dict[str, Any]) -> Iterator[str]:
    plan = found["plans"][0]
    nodes = plan["command_nodes"]
    shown_nodes = sorted(set(nodes))[: max(1, min(2, len(set(nodes))))]
    label = "start 1"
    for command, node in zip(plan["commands"], nodes, strict=True):
        if node in shown_nodes:
            yield f"{label:<10} node {node}: {command}"
            label = ""
    rest = plan["num_commands"] - sum(node in shown_nodes for node in nodes)
    if rest > 0:
        yield f"{'':<10} {rest} more like these; --json has the first {len(nodes)}"
    places = [words for place, words in _PLACES.items() if place in plan["commands"][0].split()]
    if places:
        yield f"{'':<10} write {', and '.join(places)}"
    if plan["engines"] > 1:
        engines = plan["engines"]
        yield f"{'':<10} put a load balancer (least connections) before the {engines} engines"


_PLACES = {
    MODEL_PLACE: f"the folder of the model for {MODEL_PLACE}",
    KEYS_PLACE: f"a file of API keys for {KEYS_PLACE}",
}


def _explanation(plan: dict[str, Any]) -> Iterator[str]:
    yield ""
    classes = plan["classes"]
    yield "memory, GiB" if len(classes) == 1 else "memory of each class of ranks, GiB"
    yield "  " + " " * 22 + "".join(_class_title(one).rjust(20) for one in classes)
    for name in plan["memory"]:
        cells = "".join(f"{one[name] / _GIB:>20.2f}" for one in classes)
        yield f"  {name.removesuffix('_bytes'):<22}{cells}"
    for key, title in (("decode_step", "a decode step"), ("prefill_step", "a prefill step")):
        lines = plan[key]
        total = sum(line["seconds"] for line in lines)
        yield ""
        yield f"{title} on the busiest rank of the first stage: {in_words(total)} in all parts"
        for line in lines:
            each_us = line["seconds"] / line["count"] * 1e6
            name = f"  {line['part']:<36}{line['count']:>5} × {each_us:>9.1f} µs"
            yield f"{name} {line['seconds'] * 1e3:>9.3f} ms  {line['source']}"


def _class_title(one: dict[str, Any]) -> str:
    return f"stage {one['stage']}, {_some(one['ranks'], 'rank')}"
