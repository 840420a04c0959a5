"""The last table of `ascend_acceptance.sh`: which options to switch on for this machine.

    python benchmarks/acceptance_options.py OUT

OUT holds what the script wrote: `options.jsonl`, the options that were tried; `summary.jsonl`, the
exit code of each step; and a log of `bench --json` without and with each option. An option is worth
switching on if it verified, and if some phase gains 3 % or more and none loses as much. Where the
repeats of a phase lie further apart than 3 %, only a larger difference counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

THRESHOLD = 0.03
"""Differences below this share are within the noise of two runs."""

Speed = tuple[float, float]
"""Tokens per second of a phase, and the spread of its repeats as a share of them."""


def main(out: Path) -> None:
    """Print one line for each option, and the options to switch on."""
    codes = {one["step"]: one["exit_code"] for one in _lines(out / "summary.jsonl")}
    rows = [
        _row(out, option, codes)
        for option in _lines(out / "options.jsonl")
        if any(step.startswith(f"option-{option['option']}-") for step in codes)
    ]
    if not rows:
        print("no option was tried")
        return
    rows.insert(
        0, ("option", "layout", "verified", "speed with it (decode 1, prefill, ...)", "switch on")
    )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    worth = [row[0] for row in rows[1:] if row[4] == "yes"]
    print(f"switch on: {'; '.join(worth) or 'none'}")


def judge(gains: list[tuple[float, float]]) -> str:
    """The advice for an option; of each phase the share that it gains, and its repeats' spread."""
    better = any(gain >= max(THRESHOLD, spread) for gain, spread in gains)
    worse = any(gain <= -max(THRESHOLD, spread) for gain, spread in gains)
    if better and worse:
        return "depends: see the speeds"
    return "yes" if better else "no"


def _row(out: Path, option: dict[str, str], codes: dict[str, int]) -> tuple[str, ...]:
    name, how = option["option"], option["how"]
    code = codes.get(f"option-{name}-verify")
    head = (how, option["layout"], "yes" if code == 0 else "NO" if code else "-")
    without, with_it = (
        _speeds(out / f"option-{name}-{which}.log") for which in ("without", "with")
    )
    gains = {
        phase: (with_it[phase][0] / speed - 1, max(spread, with_it[phase][1]))
        for phase, (speed, spread) in without.items()
        if speed > 0 and phase in with_it
    }
    speeds = ", ".join(f"{phase} {gain:+.1%}" for phase, (gain, _) in gains.items()) or "-"
    if code is None:
        return (*head, speeds, "unknown: not verified")
    if code:
        return (*head, speeds, f"no: see option-{name}-verify.log")
    if not gains:
        missing = "with" if without else "without"
        return (*head, speeds, f"unknown: see option-{name}-{missing}.log")
    return (*head, speeds, judge(list(gains.values())))


def _speeds(log: Path) -> dict[str, Speed]:
    """The speed of each phase in the last JSON line of a log; empty if there is none."""
    try:
        text = log.read_text(errors="replace")
        found = [line for line in text.splitlines() if line.startswith("{")]
        record = json.loads(found[-1])
        return {
            f"{phase} {size}": (float(one["tokens_per_s"]), float(one.get("spread", 0)))
            for phase in ("decode", "prefill")
            for size, one in record[phase].items()
        }
    except (OSError, ValueError, KeyError, IndexError):
        return {}


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
