"""The measurements of `peers.py` as a table in Markdown and as pictures; no import of moespan.

A report is the contents of `results.json`:

    {"machine", "cores", "threads", "model", "rounds",
     "limits": {"bytes_per_s", "lowest_bytes_per_s", "highest_bytes_per_s", "operations_per_s"},
     "engines": {name: {"bits": 16 | 8 | 4, "versions": {package: version}, "load_s",
                        "start_to_first_token_s", "peak_rss_bytes", "error"}},
     "rows": {name: {"label", "work": {"operations", "num_bytes", "tokens"} | null,
                     "engines": {name: {"tokens_per_s", "limit_share", "spread", "latency_s",
                                        "latency_p99_s", "seconds", "limit_shares", "others"}}}}}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Report = dict[str, Any]

OURS = "moespan"
PRECISIONS = {16: "bfloat16", 8: "8-bit weights", 4: "4-bit weights"}


class Line(NamedTuple):
    """A line of the table: the figures of the engines that have one, and their format."""

    label: str
    figures: dict[str, float]
    texts: dict[str, str]
    more_is_better: bool = False


def table(report: Report) -> Iterator[str]:
    """Markdown with a table for each precision; this project's engines come first."""
    limits = report["limits"]
    yield (
        f"{report['model']} on {report['machine']}, {report['threads']} threads, medians of "
        f"{report['rounds']} interleaved rounds. Limits in the same run, medians: "
        f"{limits['bytes_per_s'] / 1e9:.1f} GB/s read "
        f"({limits['lowest_bytes_per_s'] / 1e9:.0f} to {limits['highest_bytes_per_s'] / 1e9:.0f}), "
        f"{limits['operations_per_s'] / 1e12:.3f} TFLOP/s in bfloat16. In brackets: the share of "
        "the bfloat16 limit, measured right around each figure; quantised weights may pass 100 %."
    )
    for bits, precision in PRECISIONS.items():
        names = [name for name, engine in report["engines"].items() if engine["bits"] == bits]
        if not names:
            continue
        names.sort(key=lambda name: not is_ours(name))
        yield ""
        yield f"| {precision} | " + " | ".join(names) + " | ours to the best peer |"
        yield "|---|" + "---|" * (len(names) + 1)
        for line in _lines(report):
            figures = {name: line.figures[name] for name in names if name in line.figures}
            if not figures:
                continue
            ratio = ratio_to_best_peer(figures, line.more_is_better)
            cells = [line.texts.get(name, "–") if name in figures else "–" for name in names]
            cells.append("–" if ratio is None else f"{ratio:.2f}×")
            yield f"| {line.label} | " + " | ".join(cells) + " |"
    yield ""
    for name, engine in report["engines"].items():
        versions = ", ".join(
            f"{package} {number}" for package, number in engine["versions"].items()
        )
        error = f"; failed: {engine['error']}" if engine.get("error") else ""
        yield f"- {name}: {versions or 'did not start'}{error}"


def is_ours(name: str) -> bool:
    """Whether an engine is this project's, in any precision."""
    return name.partition("-")[0] == OURS


def ratio_to_best_peer(figures: dict[str, float], more_is_better: bool) -> float | None:
    """Our best figure divided by the best of all others; None if either is missing."""
    best = max if more_is_better else min
    ours = [figure for name, figure in figures.items() if is_ours(name)]
    peers = [figure for name, figure in figures.items() if not is_ours(name)]
    if not ours or not peers:
        return None
    return best(ours) / best(peers) if more_is_better else best(peers) / best(ours)


def _lines(report: Report) -> Iterator[Line]:
    for row in report["rows"].values():
        cells = row["engines"]
        yield Line(
            f"{row['label']}, tokens/s",
            {name: cell["tokens_per_s"] for name, cell in cells.items()},
            {name: _speed_text(cell) for name, cell in cells.items()},
            more_is_better=True,
        )
    for key, row in report["rows"].items():
        if row["work"] is None:  # a mix has no single latency
            continue
        cells = row["engines"]
        what = "first token" if key.startswith("prefill") else "between tokens"
        yield Line(
            f"{what}, {row['label']}, ms",
            {name: cell["latency_s"] for name, cell in cells.items()},
            {name: _latency_text(cell) for name, cell in cells.items()},
        )
    for key, label, scale in (
        ("peak_rss_bytes", "peak memory, GB", 1e-9),
        ("load_s", "load, with the first token of a short prompt, s", 1.0),
        ("start_to_first_token_s", "start-up to the first token, s", 1.0),
    ):
        facts = {name: engine.get(key) for name, engine in report["engines"].items()}
        known = {name: fact * scale for name, fact in facts.items() if fact is not None}
        yield Line(label, known, {name: three_digits(fact) for name, fact in known.items()})


def _speed_text(cell: dict[str, Any]) -> str:
    share = cell["limit_share"]
    return three_digits(cell["tokens_per_s"]) + ("" if share is None else f" ({share:.0%})")


def _latency_text(cell: dict[str, Any]) -> str:
    late_s = cell["latency_p99_s"]
    late = "" if late_s is None else f", p99 {three_digits(1e3 * late_s)}"
    return three_digits(1e3 * cell["latency_s"]) + late


def three_digits(number: float) -> str:
    """A number with three significant digits and no exponent."""
    return (
        f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )


def draw(report: Report, folder: Path) -> list[Path]:
    """Write `bars.png`, and `roofline.png` if there is a row whose work is known.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    files = [_draw_bars(report, folder / "bars.png")]
    rows = [row for row in report["rows"].values() if row["work"] is not None]
    if rows:
        files.append(_draw_roofline(report, rows, folder / "roofline.png"))
    return files


_MARKERS = "oDPXv^<>ps*h"


def _colors(report: Report) -> dict[str, Any]:
    """One color for each engine: ours are red, in shades; peers are of other colors."""
    from matplotlib import colormaps

    ours = [name for name in report["engines"] if is_ours(name)]
    peers = [name for name in report["engines"] if not is_ours(name)]
    reds, others = colormaps["Reds"], colormaps["Dark2"]
    return {
        **{name: reds(0.9 - 0.5 * i / max(len(ours), 1)) for i, name in enumerate(ours)},
        **{name: others(i % others.N) for i, name in enumerate(peers)},
    }


def _draw_roofline(report: Report, rows: list[dict[str, Any]], path: Path) -> Path:
    """Operations a second over operations per byte, each axis by tens, under the two limits."""
    from matplotlib import pyplot

    limits, colors = report["limits"], _colors(report)
    figure, axes = pyplot.subplots(figsize=(9, 6))
    at = [row["work"]["operations"] / row["work"]["num_bytes"] for row in rows]
    low, high = min(at) / 2, max(at) * 2
    points = [low * (high / low) ** (i / 200) for i in range(201)]
    roof = [min(limits["operations_per_s"], x * limits["bytes_per_s"]) / 1e9 for x in points]
    axes.plot(points, roof, color="black", linewidth=1.5, label="limit, weights in bfloat16")
    for engine, marker in zip(report["engines"], itertools.cycle(_MARKERS), strict=False):
        places, rates = [], []
        for place, row in zip(at, rows, strict=True):
            if engine in row["engines"]:
                per_token = row["work"]["operations"] / row["work"]["tokens"]
                places.append(place)
                rates.append(per_token * row["engines"][engine]["tokens_per_s"] / 1e9)
        axes.scatter(places, rates, marker=marker, color=colors[engine], label=engine, s=45)
    above = axes.get_xaxis_transform()
    for place, row in zip(at, rows, strict=True):
        axes.axvline(place, color="lightgray", linewidth=0.6, zorder=0)
        axes.text(place, 1.0, f" {row['label']}", transform=above, rotation=90, fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that has to be read (weights in bfloat16)")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8)
    figure.suptitle(f"{report['model']} on {report['machine']}, {report['threads']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _draw_bars(report: Report, path: Path) -> Path:
    """Tokens a second, a panel for each row."""
    from matplotlib import pyplot

    rows, colors = report["rows"], _colors(report)
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    names = list(report["engines"])
    height = 1.0 + 0.26 * len(names)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, height * lines), sharey=True, squeeze=False
    )
    for panel in panels.flat:
        panel.set_visible(False)
    for panel, row in zip(panels.flat, rows.values(), strict=False):
        panel.set_visible(True)
        values = [row["engines"].get(name, {}).get("tokens_per_s", 0.0) for name in names]
        bars = panel.barh(names, values, color=[colors[name] for name in names])
        panel.bar_label(bars, [three_digits(v) if v else "" for v in values], fontsize=7, padding=2)
        panel.set_title(f"{row['label']}, tokens/s", fontsize=9)
        panel.set_xlim(0, 1.25 * max(values, default=1.0) or 1.0)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    figure.suptitle(f"{report['model']} on {report['machine']}, {report['threads']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
