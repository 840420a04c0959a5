"""The front of a plan as a picture, by matplotlib (the extra `bench`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from moespan.errors import ConfigError, install_hint


def check_installed() -> None:
    """Raise `ConfigError` if matplotlib is not installed. Nothing is imported: the search forks
    before threads of numerical libraries exist."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--plot needs matplotlib; {install_hint('bench')}, or use --html")


def plot(found: dict[str, Any], path: Path) -> None:
    """Write the Pareto picture of a plan's document as .png or .svg; see `check_installed`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    points = found["points"]
    if points:
        colours = [one["ttft_s"] for one in points]
        shown = axes.scatter(*_places(points), c=colours, s=18, cmap="viridis_r", norm="log")
        figure.colorbar(shown, label="TTFT, s (mean)")
    for plan in found["plans"]:
        tpot = plan["tpot_s"].get("mean", {"value": 1e9})["value"]
        if tpot < 1e6:
            at = (tpot * 1e3, plan["tokens_per_s_per_device"])
            axes.annotate(str(plan["rank"]), at, ha="center", va="center", bbox=_MARK, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("time per output token, ms (mean)")
    axes.set_ylabel("output tokens/s a device")
    axes.set_title(f"{found['model']['name']} on {found['hardware']['title']}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


_MARK = {"boxstyle": "circle", "fc": "white", "ec": "black"}


def _places(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [one["tpot_s"] * 1e3 for one in points], [
        one["tokens_per_s_per_device"] for one in points
    ]
