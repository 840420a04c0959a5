"""Counts of experts as a heat map: one HTML page, or a picture by matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from moespan.errors import ConfigError, install_hint

Counts = Mapping[int, Sequence[int]]

_CELL = 14
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2rem;color-scheme:light dark}"
    "svg{width:100%;height:auto;max-width:80rem}rect{fill:#c2410c}text{font-size:9px;fill:gray}"
)


def page(counts: Counts, title: str, lines: Sequence[str]) -> str:
    """A page with the map and `lines` of text below it."""
    text = escape("\n".join(lines))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>\n"
        f"{_svg(counts)}\n<pre>{text}</pre></body></html>\n"
    )


def _svg(counts: Counts) -> str:
    width = max(map(len, counts.values()))
    size = f"0 0 {(width + 2) * _CELL} {(len(counts) + 1) * _CELL}"
    about = f"{len(counts)} layers (rows) × {width} experts (columns); darker: more tokens"
    cells = "\n".join(_cells(counts))
    return f'<svg viewBox="{size}" role="img" aria-label="{about}">\n{cells}\n</svg><p>{about}</p>'


def _cells(counts: Counts) -> Iterator[str]:
    for place, (layer, row) in enumerate(counts.items()):
        top, most = place * _CELL, max(row) or 1
        yield f'<text x="0" y="{top + 10}">{layer}</text>'
        for expert, count in enumerate(row):
            yield (
                f'<rect x="{(expert + 2) * _CELL}" y="{top}" width="{_CELL - 1}" '
                f'height="{_CELL - 1}" fill-opacity="{count / most:.3f}"><title>layer {layer}, '
                f"expert {expert}: {count}</title></rect>"
            )


def plot(counts: Counts, title: str, path: Path) -> None:
    """Write the map as .png or .svg.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"--plot needs matplotlib; {install_hint('bench')}, or use --html"
        ) from None
    figure = Figure(figsize=(10, 2.5 + 0.15 * len(counts)), layout="constrained")
    axes = figure.add_subplot()
    rows = [[count / (max(row) or 1) for count in row] for row in counts.values()]
    figure.colorbar(axes.imshow(rows, aspect="auto"), label="share of the layer's most")
    axes.set_yticks(range(len(counts)), [str(layer) for layer in counts])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title)
    figure.savefig(path, dpi=150)
