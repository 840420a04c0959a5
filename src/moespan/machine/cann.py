"""Versions of CANN and torch_npu: which work together, which are here, and the refusal of others.

`TORCH_NPU_OF_CANN` is the only table. The start of an engine, `moespan doctor`, docs/ascend.md and
the stand-in for NPUs read it. It is COMPATIBILITY.md of torch_npu's repository, as of August 2026,
without torch_npu 2.7.1, whose torch hangs at times where a process group ends
(https://github.com/pytorch/pytorch/pull/154976), and without the releases of CANN that cannot run
moespan:

- 8.3.RC1: its attention takes sequences of several lengths over a paged cache in bfloat16 only, in
  blocks of 128, and not in a recorded graph.
- 8.5.0: the torch_npu of its row write the KV cache as tiles (`PA_NZ`), whatever its layout, and
  the dispatch of tokens to experts takes multiples of 8 ranks only.

Rules:

- A later post of a listed torch_npu belongs to the row of the latest post that is not later:
  2.9.0.post4 goes with CANN 9.0.0, as 2.9.0.post2 does, and 2.9.0.post8 with CANN 9.1.0.
- CANN 9.0.1 counts as 9.0.0.
- A CANN or torch_npu that is newer than the table is accepted; `doctor` warns.
- Everything else is refused. `MOESPAN_UNSUPPORTED_CANN=1` starts nevertheless.

Imports no torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from moespan.errors import ConfigError
from moespan.log import once

TORCH_NPU_OF_CANN = {
    "9.1.0": ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6"),
    "9.0.0": ("2.9.0.post2", "2.8.0.post4"),
}
LEAST_CANN = "9.0.0"
RECOMMENDED_CANN, RECOMMENDED_TORCH_NPU = "9.1.0", "2.10.0.post4"
LEAST_TORCH = "2.8"

TRY_ANYWAY = "MOESPAN_UNSUPPORTED_CANN"


class Verdict(NamedTuple):
    """Whether moespan runs on a torch_npu with a CANN.

    Attributes:
        is_supported: False if an engine must not start.
        is_listed: whether the table lists both; False for supported versions newer than the table.
        found: the versions, and the rule that they break, if any.
        fix: the versions to install; empty if there is nothing to do.
    """

    is_supported: bool
    is_listed: bool
    found: str
    fix: str


def judge(torch_npu: str, cann: str = "") -> Verdict:
    """Whether moespan runs on `torch_npu`, and on it with `cann`; "" if no CANN was found."""
    fitting = cann_of(torch_npu)
    if cann and not at_least(cann, LEAST_CANN):
        return Verdict(
            False,
            False,
            f"CANN {cann} is not supported: moespan needs CANN {LEAST_CANN} or later",
            _recommended(),
        )
    if fitting is None:
        if not _is_newer(torch_npu):
            found = f"torch_npu {torch_npu} is not supported: it is not in the compatibility table"
            return Verdict(False, False, found, _recommended())
        found = f"torch_npu {torch_npu} is newer than the compatibility table"
        return Verdict(True, False, found, _recommended())
    if not cann:
        return Verdict(True, True, f"torch_npu {torch_npu} needs CANN {fitting}; none found", "")
    known = _row_of(cann)
    if known is None:
        found = f"CANN {cann} is newer than the compatibility table; torch_npu {torch_npu} is for "
        return Verdict(True, False, f"{found}{fitting}", f"install CANN {fitting}")
    if known != fitting:
        others = ", ".join(TORCH_NPU_OF_CANN[known])
        return Verdict(
            False,
            False,
            f"torch_npu {torch_npu} needs CANN {fitting}, not {cann}",
            f"install CANN {fitting}, or torch_npu {others}",
        )
    return Verdict(True, True, f"torch_npu {torch_npu} and CANN {cann}", "")


def check_installed() -> None:
    """Refuse a CANN or torch_npu that cannot run moespan, before anything is loaded.

    Versions that were not found are not judged: torch_npu reports a missing CANN itself.

    Raises:
        ConfigError: with the versions that work, and the variable that starts nevertheless.
    """
    try:
        torch_npu = importlib.metadata.version("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        return
    cann, _ = installed_cann(os.environ, _read, platform.machine())
    verdict = judge(torch_npu, cann)
    if verdict.is_supported:
        return
    if os.environ.get(TRY_ANYWAY) == "1":
        once(f"{verdict.found}; started because {TRY_ANYWAY}=1")
        return
    raise ConfigError(
        f"{verdict.found}; {verdict.fix}; {TRY_ANYWAY}=1 starts nevertheless (docs/ascend.md)"
    )


def installed_cann(
    environ: Mapping[str, str], read: Callable[[str], str], architecture: str
) -> tuple[str, str]:
    """Version and folder of CANN; both empty if none is installed.

    Args:
        read: the text of a file, empty if it cannot be read.
        architecture: as `uname -m` prints it.
    """
    homes = [
        environ.get("ASCEND_HOME_PATH", ""),
        environ.get("ASCEND_TOOLKIT_HOME", ""),
        "/usr/local/Ascend/ascend-toolkit/latest",
        "/usr/local/Ascend/cann",
    ]
    for home in filter(None, homes):
        for folder in (f"{home}/{architecture}-linux", home):
            text = read(f"{folder}/ascend_toolkit_install.info")
            if version := parse_key_values(text).get("version"):
                return version, home
        if version := parse_version_cfg(read(f"{home}/version.cfg")):
            return version, home
    return "", ""


def parse_key_values(text: str) -> dict[str, str]:
    """Lines `key=value` of `version.info`, `*_install.info` and `/etc/hccn.conf`; keys in lower
    case."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip().lower(): value.strip() for key, value in pairs}


def parse_version_cfg(text: str) -> str:
    """The version of CANN in its `version.cfg`.

    ```
    toolkit_running_version=[7.7.0.1.238:8.3.RC1]
    ```
    """
    found = re.search(r"^toolkit_(?:running|installed)_version\s*=\s*\[+([^\]]+)\]", text, re.M)
    return found[1].rpartition(":")[2].strip() if found else ""


def release(version: str) -> str:
    """The release of torch that a version belongs to: `2.9.0` for `2.9.0.post2+gitabc`."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else ""


def at_least(version: str, least: str) -> bool:
    """Whether the release of `version` is `least` or later."""
    return _numbers(version) >= _numbers(least)


def cann_of(torch_npu: str) -> str | None:
    """The CANN of the table's row that a torch_npu belongs to; None if it belongs to none."""
    rows = {
        _post(listed): cann
        for cann, versions in TORCH_NPU_OF_CANN.items()
        for listed in versions
        if release(listed) == release(torch_npu) and _post(listed) <= _post(torch_npu)
    }
    return rows[max(rows)] if rows else None


def _row_of(cann: str) -> str | None:
    """The table's CANN with the same first two numbers; None if the table lacks it."""
    same = (known for known in TORCH_NPU_OF_CANN if _numbers(known)[:2] == _numbers(cann)[:2])
    return next(same, None)


def _is_newer(torch_npu: str) -> bool:
    listed = (one for versions in TORCH_NPU_OF_CANN.values() for one in versions)
    return _numbers(torch_npu) > max(map(_numbers, listed))


def _post(torch_npu: str) -> int:
    found = re.search(r"\.post(\d+)", torch_npu)
    return int(found[1]) if found else 0


def _numbers(version: str) -> list[int]:
    return [int(part) for part in release(version).split(".") if part]


def _recommended() -> str:
    return (
        f"install CANN {RECOMMENDED_CANN}, torch {release(RECOMMENDED_TORCH_NPU)} and "
        f"torch-npu {RECOMMENDED_TORCH_NPU}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
