"""The versions of torch_npu that work with each version of CANN and torch.

The table is COMPATIBILITY.md of torch_npu's repository, as of August 2026.
"""

from __future__ import annotations

import re

TORCH_NPU_OF_CANN = {
    "9.1.0": ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6", "2.7.1.post8"),
    "9.0.0": ("2.9.0.post2", "2.8.0.post4", "2.7.1.post4"),
    "8.5.0": ("2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5"),
    "8.3.RC1": ("2.8.0", "2.7.1", "2.1.0.post17"),
}

LEAST_TORCH = "2.7"


def release(version: str) -> str:
    """The release of torch that a version belongs to: `2.9.0` for `2.9.0.post2+gitabc`."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else ""


def at_least(version: str, least: str) -> bool:
    """Whether the release of `version` is `least` or later."""
    have, want = (
        [int(part) for part in release(one).split(".") if part] for one in (version, least)
    )
    return have >= want


def cann_of(torch_npu: str) -> list[str]:
    """The CANN versions that the table lists for a torch_npu."""
    version = torch_npu.partition("+")[0]
    return [cann for cann, versions in TORCH_NPU_OF_CANN.items() if version in versions]


def known_cann(version: str) -> str | None:
    """The table's spelling of a CANN version; None if the table lacks it."""
    spellings = {known.lower(): known for known in TORCH_NPU_OF_CANN}
    return spellings.get(version.lower())
