"""Findings of the checks, and their display as a table or as plain data."""

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
        check: name of the check.
        status: `ok`; `warning`: the job may run, but slower or less reliably than it could;
            `problem`: the job will fail; `skipped`: not checked, or not applicable.
        found: the observation, or why nothing was checked.
        fix: what to do about it; empty if nothing needs doing.
    """

    check: str
    status: str
    found: str
    fix: str = ""


def ok(found: str) -> Finding:
    """The check found no fault."""
    return Finding(check="", status=OK, found=found)


def warning(found: str, fix: str) -> Finding:
    """The job may run, but slower or less reliably than it could."""
    return Finding(check="", status=WARNING, found=found, fix=fix)


def problem(found: str, fix: str) -> Finding:
    """The job will fail."""
    return Finding(check="", status=PROBLEM, found=found, fix=fix)


def skipped(why: str) -> Finding:
    """Not checked, or not applicable here."""
    return Finding(check="", status=SKIPPED, found=why)


def table(findings: Sequence[Finding]) -> list[str]:
    """The findings as lines to read, and their number by status."""
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
