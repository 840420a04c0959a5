"""Says in one line what an interpreter's environment lacks of what moespan needs, and exits with 1.

python scripts/lacks.py EXTRAS      from the project's folder; EXTRAS is "" or "[dev]"

The packages and lower bounds are those of pyproject.toml. Nothing is imported, only metadata read.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(extras: str) -> str | None:
    """The words that name each missing or old package; None if nothing is missing."""
    lists = ["dependencies", *filter(None, extras.strip("[]").split(","))]
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    faults = [fault for name in lists for one in requirements(text, name) if (fault := check(one))]
    return f"lacks {', '.join(faults)}" if faults else None


def requirements(text: str, name: str) -> list[str]:
    """The entries of one list of pyproject.toml (Python 3.10 has no tomllib)."""
    found = re.search(rf"^{name} = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert found, name
    # One with a condition is for some machines only.
    return [one for one in re.findall(r'^\s*"(.+)",$', found[1], re.MULTILINE) if ";" not in one]


def check(requirement: str) -> str | None:
    """The requirement and what there is instead, if the environment does not meet it."""
    name, relation, bound = re.fullmatch(r"([\w.-]+)(>=|==)([\w.]+)", requirement).groups()
    try:
        found = version(name)
    except PackageNotFoundError:
        return requirement
    if relation == ">=" and release(found) < release(bound):
        return f"{requirement} (it has {found})"
    return None


def release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    return tuple(map(int, re.match(r"[\d.]*\d", text)[0].split(".")))


if __name__ == "__main__":
    if fault := main(sys.argv[1]):
        wanted = f'".{sys.argv[1]}"' if sys.argv[1] else "."
        sys.exit(
            f"moespan: {sys.executable} {fault}; run: {sys.executable} -m pip install {wanted}"
        )
