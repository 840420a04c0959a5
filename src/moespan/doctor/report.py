"""What a check found, and how findings are shown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import msgspec

OK, WARNING, PROBLEM, SKIPPED = "ok", "warning", "problem", "skipped"

_WIDTH = 100


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report.

    Attributes:
        check: what was looked at.
        status: `ok`; `warning`: it may run, slower or less surely than it could; `problem`: it will
            fail; `skipped`: it could not be looked at, or does not apply.
        found: what there is, or why nothing was looked at.
        fix: what to do about it.
    """

    check: str
    status: str
    found: str
    fix: str = ""


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(check="", status=OK, found=found)


def warning(found: str, fix: str) -> Finding:
    """It may run, slower or less surely than it could."""
    return Finding(check="", status=WARNING, found=found, fix=fix)


def problem(found: str, fix: str) -> Finding:
    """It will fail."""
    return Finding(check="", status=PROBLEM, found=found, fix=fix)


def skipped(why: str) -> Finding:
    """It could not be looked at, or does not apply here."""
    return Finding(check="", status=SKIPPED, found=why)


def table(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines to read, and how many there are of each kind."""
    width = max((len(one.check) for one in findings), default=0)
    lines = []
    for one in findings:
        head = f"{one.status:<8} {one.check:<{width}}  "
        lines += _wrapped(head, one.found)
        if one.fix:
            lines += _wrapped(" " * len(head) + "→ ", one.fix)
    counts = [
        f"{sum(one.status == status for one in findings)} {status}"
        for status in (PROBLEM, WARNING, OK, SKIPPED)
    ]
    return [*lines, "", ", ".join(counts)]


def to_dict(findings: Sequence[Finding], device: str, layout: str) -> dict[str, Any]:
    """The findings as plain data."""
    return {
        "device": device,
        "layout": layout,
        "findings": msgspec.to_builtins(list(findings)),
        "counts": {
            status: sum(one.status == status for one in findings)
            for status in (OK, WARNING, PROBLEM, SKIPPED)
        },
    }


def _wrapped(head: str, text: str) -> list[str]:
    indent = " " * len(head)
    return textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=indent, break_long_words=False
    ) or [head.rstrip()]
