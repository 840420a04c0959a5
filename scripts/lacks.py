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
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    wanted = [*requirements(text, "dependencies"), *requirements_of_extras(text, extras)]
    faults = [fault for one in wanted if (fault := check(one))]
    return f"lacks {', '.join(faults)}" if faults else None


def requirements_of_extras(text: str, extras: str) -> list[str]:
    """The entries of `[one,another]`, and of the extras of this project that they name in turn."""
    found: list[str] = []
    for name in filter(None, extras.strip("[]").split(",")):
        for one in requirements(text, name):
            own, _, nested = one.partition("[")
            found += requirements_of_extras(text, nested) if own == "moespan" else [one]
    return found


def requirements(text: str, name: str) -> list[str]:
    """The entries of one list of pyproject.toml (Python 3.10 has no tomllib)."""
    found = re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    assert found, name
    # One with a condition is for some machines only.
    return [one for one in re.findall(r'"([^"]+)"', found[1]) if ";" not in one]


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
