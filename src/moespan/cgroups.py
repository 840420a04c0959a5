"""Limits of cgroups on this process: memory and CPU time, in v1, v2 and hybrid hierarchies.

The limits of all groups apply, from the process's own group up to the root; the tightest counts.
`/proc/self/cgroup` names the own group. `/proc/self/mountinfo` names the mount points and the group
at each of them, since a container may see only a part of the hierarchy. If no mount there contains
the wanted file, the usual places `/sys/fs/cgroup` (v2) and `/sys/fs/cgroup/CONTROLLER` (v1) are
read.

A missing or malformed file counts as no limit. `root` is the folder that contains /proc and /sys.
Imports no torch.

| | v2 | v1 |
|---|---|---|
| memory limit | `memory.max` | `memory.limit_in_bytes` |
| memory in use | `memory.current` | `memory.usage_in_bytes` |
| reclaimable page cache | `inactive_file` of `memory.stat` | `total_inactive_file` |
| processes killed for memory | `oom_kill` of `memory.events` | `oom_kill` of `memory.oom_control` |
| CPU quota | `cpu.max` | `cpu.cfs_quota_us`, `cpu.cfs_period_us` |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")

# v1 writes "no limit" as the largest multiple of a page below 2^63; no machine has an exbibyte.
_UNLIMITED_BYTES = 1 << 60

_NUMBER = re.compile(r"[0-9]{1,19}")
_QUOTA = re.compile(r"([0-9]{1,19}) ([1-9][0-9]{0,18})")  # quota and period, in microseconds


def memory_limit_bytes(root: Path = _ROOT) -> int | None:
    """The tightest memory limit; None without one."""
    return min((limit for limit, _ in _memory(root)), default=None)


def available_memory_bytes(root: Path = _ROOT) -> int | None:
    """Memory that can still be allocated within all limits; None without one.

    A group counts its inactive page cache as used, but the kernel reclaims it on demand.
    """
    return min((max(limit - used, 0) for limit, used in _memory(root)), default=None)


def quota_cores(root: Path = _ROOT) -> int | None:
    """Whole cores that the tightest CPU quota leaves, at least one; None without a quota."""
    quotas = [_read(group / "cpu.max") for group in _groups(root, "", "cpu.max")]
    quotas += [
        f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        for group in _groups(root, "cpu", "cpu.cfs_quota_us")
    ]
    found = (_QUOTA.fullmatch(quota) for quota in quotas)  # v2: `max 100000`, v1: `-1 100000`
    return min((max(1, int(one[1]) // int(one[2])) for one in found if one), default=None)


def oom_kills(root: Path = _ROOT) -> int | None:
    """Number of processes of our group that the kernel has killed for memory; None if unknown."""
    for controller, name in (("memory", "memory.oom_control"), ("", "memory.events")):
        for group in _groups(root, controller, name):
            count = _statistic(group / name, "oom_kill")
            if count is not None:
                return count
    return None


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """For each group with a limit: the limit, and the memory in use that is not reclaimable."""
    for controller, limit_name, usage_name, cache_key in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups(root, controller, limit_name):
            limit = _number(group / limit_name)
            if limit is not None and limit < _UNLIMITED_BYTES:
                used = _number(group / usage_name) or 0
                cache = _statistic(group / "memory.stat", cache_key) or 0
                yield limit, max(used - cache, 0)


def _groups(root: Path, controller: str, name: str) -> list[Path]:
    """The folders of our own group and of all groups above it that have a file `name`, own first.

    Args:
        controller: the v1 controller; empty for v2.
    """
    own = _own_group(root, controller)
    for mounts in (_mounts(root, controller), [(_usual_mount(root, controller), "/")]):
        groups = [
            group
            for mount_point, top in mounts
            for group in _chain(mount_point, top, own)
            if _read(group / name)
        ]
        if groups:
            return groups
    return []


def _own_group(root: Path, controller: str) -> str:
    """The path of our group in the hierarchy of `controller`; `/` if it is not known."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (controller in controllers.split(",")) if controller else (number == "0"):
            return path
    return "/"


def _mounts(root: Path, controller: str) -> list[tuple[Path, str]]:
    """The mount points of the hierarchy of `controller`, each with the path of its top group.

    A line is `ID PARENT DEVICE TOP MOUNT_POINT OPTIONS... - TYPE SOURCE SUPER_OPTIONS`.
    """
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        fields, filesystem = head.split(), tail.split()
        if len(fields) < 5 or filesystem[:1] != ["cgroup" if controller else "cgroup2"]:
            continue
        if not controller or controller in filesystem[-1].split(","):
            top, mount_point = (_unescaped(field) for field in fields[3:5])
            found.append((root / mount_point.lstrip("/"), top))
    return found


def _usual_mount(root: Path, controller: str) -> Path:
    return root / "sys/fs/cgroup" / controller


def _chain(mount_point: Path, top: str, own: str) -> list[Path]:
    """The folders from our group up to `top`, the group at the mount point; [] if we are not in it.

    In a cgroup namespace, the path of a group outside it contains `..`. A `top` of that kind is
    above our group, but the names of the groups between them are not known.
    """
    if ".." in PurePosixPath(top).parts:
        return [mount_point]
    own_path = PurePosixPath(own)
    if ".." in own_path.parts or not own_path.is_relative_to(top):
        return []
    below = own_path.relative_to(top)
    return [mount_point / group for group in (below, *below.parents)]


def _unescaped(field: str) -> str:
    """A field of mountinfo, in which special characters are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _read(path: Path) -> str:
    """The text of a file, stripped; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    found = _NUMBER.fullmatch(_read(path))
    return int(found[0]) if found else None


def _statistic(path: Path, key: str) -> int | None:
    """The number after `key` in a file of lines `key number`."""
    found = re.search(rf"^{key} ({_NUMBER.pattern})$", _read(path), re.M)
    return int(found[1]) if found else None
