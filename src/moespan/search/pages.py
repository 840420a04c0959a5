"""A plan as one HTML page: pictures in SVG, a table that sorts, light and dark, no outside file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from typing import Any

from moespan.planner.outcome import in_words
from moespan.search.report import missed_in_words, statistics_of
from moespan.units import COUNTS, scaled

_GIB = 1 << 30
_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 34, 46
_COLOURS = 5
"""Steps of the scale of TTFT; `plan.css` has their colours."""

_KINDS = ("experts", "attention", "other operations", "collective", "host")
_NAMES = {"collective": "collectives", "host": "host and launch"}
_MEMORY = ("weight", "cache", "activation", "graph", "communicator", "base", "slack")


def page(found: dict[str, Any]) -> str:
    """The page of a plan's document."""
    style = resources.files("moespan.search").joinpath("plan.css").read_text(encoding="utf-8")
    script = resources.files("moespan.search").joinpath("plan.js").read_text(encoding="utf-8")
    title = f"Plan: {found['model']['name']} on {found['hardware']['title']}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style></head><body><main>",
            *_body(found, title),
            f"</main><script>{script}</script></body></html>",
            "",
        ]
    )


def _body(found: dict[str, Any], title: str) -> Iterator[str]:
    yield f"<header><h1>{escape(title)}</h1>"
    yield from _summary(found)
    yield "</header>"
    if not found["plans"]:
        yield "<p>No layout fits. Use more devices, a quantization, or shorter sequences.</p>"
        return
    yield "<section><h2>Layouts</h2>"
    yield from _table(found)
    yield "</section><section><h2>Throughput against time per token</h2>"
    yield from _front(found)
    yield '</section><div class="pair"><section><h2>Memory of the tightest rank</h2>'
    yield from _memory(found)
    yield "</section><section><h2>A decode step</h2>"
    yield from _steps(found)
    yield "</section></div>"
    yield from _what_if(found)
    yield from _start(found)
    yield from _figures(found)


def _summary(found: dict[str, Any]) -> Iterator[str]:
    hardware, model, load = found["hardware"], found["model"], found["load"]
    error = f"±{hardware['error']:.0%}"
    quality = f'<span class="badge warn">vendor figures and guesses, {error}</span>'
    if hardware["was_calibrated"]:
        quality = f'<span class="badge warn">partly calibrated, {error}</span>'
    if hardware["is_calibrated"]:
        quality = f'<span class="badge good">calibrated, {error} is expected</span>'
    verdict = (
        '<span class="badge good">every target is met</span>'
        if found["met"]
        else '<span class="badge bad">no layout meets every target</span>'
    )
    yield f"<p>{verdict} {quality}</p><dl>"
    targets = ", ".join(found["targets"]) or "none"
    searched = found["searched"]
    nodes = "nodes" if hardware["nodes"] > 1 else "node"
    for name, value in (
        ("Devices", f"{hardware['devices']} in {hardware['nodes']} {nodes}"),
        ("Model", f"{scaled(model['parameters'], COUNTS)} parameters, {model['dtype']}"),
        ("Load", load["name"]),
        ("Targets", targets),
        ("Routing", model["routing"]),
        (
            "Searched",
            f"{searched['combinations']} combinations, {searched['fitting']} fit, "
            f"{searched['simulated']} simulated",
        ),
    ):
        yield f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>"
    yield "</dl>"


def _table(found: dict[str, Any]) -> Iterator[str]:
    ttft, tpot = statistics_of(found)
    heads = (
        "#", "Engines × layout", "Seqs", "Tokens", f"TTFT {ttft}", f"TPOT {tpot}",
        "Tokens/s", "a device", "Memory", "",
    )  # fmt: skip
    yield '<div class="scroll" tabindex="0" role="region" aria-label="Layouts"><table><thead><tr>'
    for number, head in enumerate(heads):
        cell = (
            f'<button type="button" data-column="{number}">{escape(head)}</button>' if head else ""
        )
        yield f'<th scope="col">{cell}</th>'
    yield "</tr></thead><tbody>"
    for plan in found["plans"]:
        yield "<tr>" + "".join(_cells(found, plan, ttft, tpot)) + "</tr>"
    yield "</tbody></table></div>"


def _cells(found: dict[str, Any], plan: dict[str, Any], ttft: str, tpot: str) -> Iterator[str]:
    def number(value: float, shown: str, more: str = "") -> str:
        return f'<td class="n" data-value="{value:.9g}">{shown}{more}</td>'

    name = f"{plan['engines']} × {plan['layout_text']}"
    if plan["quantization"]:
        name += f" {plan['quantization']}"
    memory = plan["memory"]["taken_bytes"] / _GIB
    yield number(plan["rank"], str(plan["rank"]))
    yield f'<td data-value="{plan["rank"]}">{escape(name)}</td>'
    yield number(plan["max_num_seqs"], str(plan["max_num_seqs"]))
    yield number(plan["max_num_batched_tokens"], str(plan["max_num_batched_tokens"]))
    for key, statistic in (("ttft_s", ttft), ("tpot_s", tpot)):
        value = plan[key].get(statistic, {"value": math.inf})["value"]
        yield number(
            min(value, 1e12), in_words(value) if value < 1e6 else "–", _band(plan, key, statistic)
        )
    yield number(plan["tokens_per_s"], f"{plan['tokens_per_s']:,.0f}")
    yield number(plan["tokens_per_s_per_device"], f"{plan['tokens_per_s_per_device']:,.0f}")
    whole = found["hardware"]["memory_bytes"] / _GIB
    yield number(memory, f"{memory:.1f} of {whole:.1f} GiB")
    yield f"<td>{_judged(plan)}</td>"


def _band(plan: dict[str, Any], key: str, statistic: str) -> str:
    edges = [edge[key].get(statistic, {"value": math.inf})["value"] for edge in plan["band"]]
    if len(edges) != 2 or max(edges) > 1e6:
        return ""
    return f"<small>{in_words(min(edges))} – {in_words(max(edges))}</small>"


def _judged(plan: dict[str, Any]) -> str:
    if plan["misses"]:
        missed = "; ".join(map(missed_in_words, plan["misses"]))
        return f'<span class="badge bad">{escape(missed)}</span>'
    if plan["at_risk"]:
        return '<span class="badge warn">at risk</span>'
    if plan["too_close"]:
        return '<span class="badge">too close to call with 1</span>'
    return '<span class="badge good">meets</span>'


def _front(found: dict[str, Any]) -> Iterator[str]:
    points = [one for one in found["points"] if one["tpot_s"] and one["tpot_s"] < 1e6]
    if not points:
        return
    tpots = [one["tpot_s"] * 1e3 for one in points]
    rates = [one["tokens_per_s_per_device"] for one in points]
    ttfts = [one["ttft_s"] for one in points]
    low, high = min(ttfts), max(ttfts)
    x = _Scale(min(tpots), max(tpots), _LEFT, _WIDTH - _RIGHT, is_log=max(tpots) > 8 * min(tpots))
    y = _Scale(0, max(rates) * 1.05, _HEIGHT - _BOTTOM, _TOP)
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="front-title">'
    yield '<title id="front-title">The most promising layouts with ever more sequences: output '
    yield "tokens per second and device against time per output token.</title>"
    yield from _axes(x, y, "time per output token, ms (mean)", "tokens/s a device")
    for curve in sorted({one["curve"] for one in points}):
        places = " ".join(
            f"{x(one['tpot_s'] * 1e3):.1f},{y(one['tokens_per_s_per_device']):.1f}"
            for one in points
            if one["curve"] == curve
        )
        yield f'<polyline points="{places}"/>'
    for one, tpot, rate in zip(reversed(points), reversed(tpots), reversed(rates), strict=True):
        colour = _colour(one["ttft_s"], low, high)
        told = f"{one['label']}: TPOT {tpot:.3g} ms, {rate:,.0f} tokens/s a device, TTFT "
        told += in_words(one["ttft_s"])
        yield (
            f'<circle class="c{colour}" cx="{x(tpot):.1f}" cy="{y(rate):.1f}" r="4.5">'
            f"<title>{escape(told)}</title></circle>"
        )
    yield from _shown_marks(found, x, y)
    yield "</svg>"
    yield from _legend(low, high)


def _shown_marks(found: dict[str, Any], x: _Scale, y: _Scale) -> Iterator[str]:
    for plan in reversed(found["plans"]):
        tpot = plan["tpot_s"].get("mean", {"value": math.inf})["value"] * 1e3
        if tpot > 1e9:
            continue
        at, height = x(tpot), y(plan["tokens_per_s_per_device"])
        told = f"{plan['rank']}: {plan['engines']} × {plan['layout_text']}, simulated"
        yield (
            f'<g class="mark" tabindex="0"><title>{escape(told)}</title>'
            f'<circle cx="{at:.1f}" cy="{height:.1f}" r="10"/>'
            f'<text x="{at:.1f}" y="{height + 4:.1f}">{plan["rank"]}</text></g>'
        )


class _Scale:
    """Values → places in a picture."""

    def __init__(
        self, low: float, high: float, start: float, stop: float, is_log: bool = False
    ) -> None:
        if is_log:
            margin = (high / low) ** 0.04
            low, high = low / margin, high * margin
        elif low:
            margin = (high - low) * 0.06 or low * 0.1
            low, high = low - margin, high + margin
        self.low, self.high, self._is_log = low, max(high, low + 1e-12), is_log
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        value = min(max(value, low), high)
        share = (value - low) / (high - low)
        if self._is_log:
            share = math.log(value / low) / math.log(high / low)
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Round values inside the scale."""
        if self._is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * one for one in (1, 2, 5, 10) if unit * one >= rough)
            first = math.ceil(self.low / step)
            values = [step * number for number in range(first, first + 12)]
        return [value for value in values if self.low <= value <= self.high]


def _axes(x: _Scale, y: _Scale, below: str, beside: str) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in y.ticks():
        at = y(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="tick end" x="{_LEFT - 8}" y="{at + 4:.1f}">{tick:,.4g}</text>'
    for tick in x.ticks():
        at = x(tick)
        yield f'<line class="grid" y1="{_TOP}" y2="{bottom}" x1="{at:.1f}" x2="{at:.1f}"/>'
        yield f'<text class="tick middle" x="{at:.1f}" y="{bottom + 18}">{tick:,.4g}</text>'
    middle = (_LEFT + right) / 2
    yield f'<text class="tick middle" x="{middle}" y="{_HEIGHT - 6}">{escape(below)}</text>'
    yield f'<text class="tick" x="{_LEFT}" y="{_TOP - 14}">{escape(beside)}</text>'


def _colour(ttft_s: float, low: float, high: float) -> int:
    """Step of the scale of TTFT."""
    if high <= low:
        return 0
    return min(int(math.log(ttft_s / low) / math.log(high / low) * _COLOURS), _COLOURS - 1)


def _legend(low: float, high: float) -> Iterator[str]:
    yield '<p class="legend">TTFT'
    for step in range(_COLOURS):
        edge = low * (high / low) ** ((step + 1) / _COLOURS) if low > 0 else high
        yield f'<span><i class="c{step}"></i>≤ {in_words(edge)}</span>'
    yield "<span>Dots: a layout with 1, 2, 4, ... sequences, by mean values. Numbers: the rows of "
    yield "the table under the asked load.</span></p>"


def _memory(found: dict[str, Any]) -> Iterator[str]:
    whole = found["hardware"]["memory_bytes"]
    names = [
        name for name in _MEMORY if any(p["memory"].get(f"{name}_bytes") for p in found["plans"])
    ]
    rows = []
    for plan in found["plans"]:
        parts = [(name, plan["memory"].get(f"{name}_bytes", 0.0)) for name in names]
        told = f"{plan['memory']['taken_bytes'] / _GIB:.1f} of {whole / _GIB:.1f} GiB"
        rows.append((plan, parts, told))
    shown = {name: f"{name}" for name in names}
    yield from _bars(rows, whole, shown, lambda value: f"{value / _GIB:.2f} GiB")


def _steps(found: dict[str, Any]) -> Iterator[str]:
    rows, longest = [], 0.0
    for plan in found["plans"]:
        total = sum(line["seconds"] for line in plan["decode_step"])
        longest = max(longest, total)
        parts = [(kind, plan["limits"].get(kind, 0.0) * total) for kind in _KINDS]
        rows.append((plan, parts, in_words(total)))
    shown = {kind: _NAMES.get(kind, kind) for kind in _KINDS}
    yield from _bars(rows, longest, shown, in_words)


def _bars(
    rows: Sequence[tuple[dict[str, Any], list[tuple[str, float]], str]],
    whole: float,
    names: dict[str, str],
    told: Any,
) -> Iterator[str]:
    """A bar of parts for each plan, and the parts' names."""
    order = list(names)
    yield '<ul class="bars">'
    for plan, parts, total in rows:
        label = f"{plan['rank']}  {plan['engines']} × {plan['layout_text']}"
        spoken = ", ".join(f"{names[name]} {told(value)}" for name, value in parts if value)
        yield f"<li><span>{escape(label)}</span><b>{escape(total)}</b>"
        yield f'<div class="bar" role="img" aria-label="{escape(spoken)}">'
        for name, value in parts:
            share = value / whole if whole else 0.0
            title = f"{names[name]}: {told(value)}"
            yield (
                f'<i class="p{order.index(name)}" style="width:{share:.2%}" '
                f'title="{escape(title)}"></i>'
            )
        yield "</div></li>"
    yield '</ul><p class="legend">'
    for number, name in enumerate(order):
        yield f'<span><i class="p{number}"></i>{escape(names[name])}</span>'
    yield "</p>"


def _what_if(found: dict[str, Any]) -> Iterator[str]:
    others = [one for one in found["what_if"] if one is not None]
    notes = list(found["advice"])
    worst = found["small_messages"]
    if worst is not None and not worst["is_same"]:
        notes.append(
            "if small messages between devices take as long as their upper bound "
            f"({max(worst['worst_us'].values()):g} µs), the best is {worst['engines']} × "
            f"{worst['layout_text']}, with a TPOT of {in_words(worst['tpot_s'])}"
        )
    if not others and not notes:
        return
    yield "<section><h2>What if</h2><ul>"
    _, tpot = statistics_of(found)
    for one in others:
        told = f"{one['change']}: "
        if not one["fits"]:
            yield f"<li>{told}nothing fits</li>"
            continue
        parts = []
        if one["requests_ratio"]:
            within = " within the targets" if found["targets"] else ""
            parts.append(f"{one['requests_ratio'] - 1:+.0%} requests{within}")
        if tpot in one["tpot_s"]:
            parts.append(f"TPOT {tpot} of {in_words(one['tpot_s'][tpot]['value'])}")
        parts += [f"misses {miss['target']}" for miss in one["misses"]]
        best = f"{one['engines']} × {one['layout_text']}"
        yield f"<li>{escape(told + ', or '.join(parts) + f' ({best})')}</li>"
    for note in notes:
        yield f"<li>{escape(note)}</li>"
    yield "</ul></section>"


def _start(found: dict[str, Any]) -> Iterator[str]:
    plan = found["plans"][0]
    yield "<section><h2>Start the first one</h2>"
    yield '<div class="scroll" tabindex="0" role="region" aria-label="Commands"><pre>'
    for node, command in zip(plan["command_nodes"], plan["commands"], strict=True):
        yield f"<b>node {node}</b>  {escape(command)}"
    yield "</pre></div></section>"


def _figures(found: dict[str, Any]) -> Iterator[str]:
    """Every figure of the profile and where it comes from."""
    origins = ", ".join(
        f"{number} {origin}" for origin, number in sorted(found["hardware"]["origins"].items())
    )
    yield f"<details><summary>Where the figures come from: {escape(origins)}</summary>"
    yield '<div class="scroll"><table><thead><tr><th>figure</th><th>from</th><th>source</th></tr>'
    yield "</thead><tbody>"
    for path, origin, source in found["hardware"]["figures"]:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (path, origin, source))
        yield f"<tr>{cells}</tr>"
    yield "</tbody></table></div></details>"
    yield f"<footer>moespan {escape(found['moespan'])}, seed {found['seed']}</footer>"
