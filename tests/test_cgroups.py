"""Limits of cgroups, on trees of files as the kernel shows them in v1, v2 and both."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespan.cgroups import (
    available_memory_bytes,
    memory_limit_bytes,
    oom_kills,
    quota_cores,
)

V2_MOUNT = "30 23 0:26 {top} {at} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "33 25 0:30 {top} {at} ro,nosuid master:11 - cgroup cgroup rw,{controllers}\n"
OTHER_MOUNTS = (
    "22 27 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n"
    "25 22 0:25 / /sys/fs/cgroup ro shared:8 - tmpfs tmpfs ro,mode=755\n"
    "31 25 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
)

# v1 without a limit, with pages of 4 and of 64 KiB.
UNLIMITED_4K, UNLIMITED_64K = 9223372036854771712, 9223372036854710272


class Machine:
    """A root folder with files of /proc and /sys."""

    def __init__(self, root: Path, membership: str, mounts: str) -> None:
        self.root = root
        self.write("proc/self/cgroup", membership)
        self.write("proc/self/mountinfo", OTHER_MOUNTS + mounts)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v2(self, group: str, files: Mapping[str, str], at: str = "sys/fs/cgroup") -> None:
        for name, text in files.items():
            self.write(f"{at}{group}/{name}", text + "\n")

    def v1(self, controller: str, group: str, files: Mapping[str, str]) -> None:
        self.v2(group, files, f"sys/fs/cgroup/{controller}")

    def memory(self) -> tuple[int | None, int | None]:
        """The limit, and the memory available within all limits."""
        return memory_limit_bytes(self.root), available_memory_bytes(self.root)


def v2_memory(limit: object, used: int = 0, cache: int = 0, kills: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}",
        "memory.current": f"{used}",
        "memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 7",
        "memory.events": f"low 0\noom 9\noom_kill {kills}\noom_group_kill 5",
    }


def v1_memory(limit: int, used: int = 0, cache: int = 0, kills: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}",
        "memory.usage_in_bytes": f"{used}",
        "memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {cache}",
        "memory.oom_control": f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}",
    }


def v1_quota(quota_us: int) -> dict[str, str]:
    return {"cpu.cfs_quota_us": f"{quota_us}", "cpu.cfs_period_us": "100000"}


def test_v2_in_a_container_with_a_namespace(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n", V2_MOUNT.format(top="/", at="/sys/fs/cgroup"))
    machine.v2("", {**v2_memory(1000, 400, 150, kills=2), "cpu.max": "250000 100000"})
    assert machine.memory() == (1000, 750)
    assert quota_cores(tmp_path) == 2
    assert oom_kills(tmp_path) == 2


def test_v2_on_the_host_has_no_files_at_the_root(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/init.scope\n", V2_MOUNT.format(top="/", at="/sys/fs/cgroup"))
    machine.v2("/init.scope", {**v2_memory("max", 400), "cpu.max": "max 100000"})
    assert machine.memory() == (None, None)
    assert quota_cores(tmp_path) is None
    assert oom_kills(tmp_path) == 0


@pytest.mark.parametrize(
    "own",
    [
        "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0",
        "/user.slice/user-1000.slice/user@1000.service/app.slice/run-r1.scope",
    ],
)
def test_v2_below_the_root_is_bound_by_every_group_above(tmp_path: Path, own: str) -> None:
    machine = Machine(tmp_path, f"0::{own}\n", V2_MOUNT.format(top="/", at="/sys/fs/cgroup"))
    above = str(Path(own).parents[1])
    machine.v2(own, {**v2_memory("max", 10, kills=1), "cpu.max": "max 100000"})
    machine.v2(above, {**v2_memory(1000, 300, 100, kills=8), "cpu.max": "350000 100000"})
    top = "/" + own.split("/")[1]
    machine.v2(top, {**v2_memory(5000, 4900), "cpu.max": "800000 100000"})
    assert machine.memory() == (1000, 100)  # the slice has less left than the job
    assert quota_cores(tmp_path) == 3
    assert oom_kills(tmp_path) == 1  # of our own group, not of others in the slice


def test_v2_without_a_namespace_in_a_mount_of_a_part(tmp_path: Path) -> None:
    mounts = V2_MOUNT.format(top="/docker/abc", at="/sys/fs/cgroup")
    machine = Machine(tmp_path, "0::/docker/abc/worker\n", mounts)
    machine.v2("", v2_memory(1000, 400))
    machine.v2("/worker", v2_memory(800, 100))
    assert machine.memory() == (800, 600)


def test_v2_mounted_elsewhere_under_a_name_with_a_space(tmp_path: Path) -> None:
    mounts = V2_MOUNT.format(top="/", at="/mnt/all\\040groups")
    machine = Machine(tmp_path, "0::/a:b\n", mounts)
    machine.v2("/a:b", v2_memory(500), at="mnt/all groups")
    assert machine.memory() == (500, 500)


def test_groups_outside_the_namespace_are_not_guessed(tmp_path: Path) -> None:
    # A mount from above the namespace: its group is above ours, the ones between have no names.
    machine = Machine(tmp_path, "0::/\n", V2_MOUNT.format(top="/../..", at="/sys/fs/cgroup"))
    machine.v2("", v2_memory(1000, 100))
    assert machine.memory() == (1000, 900)
    # A process that was moved out of the namespace that it sees.
    machine.write("proc/self/cgroup", "0::/../../other\n")
    machine.write(
        "proc/self/mountinfo", OTHER_MOUNTS + V2_MOUNT.format(top="/", at="/sys/fs/cgroup")
    )
    assert machine.memory() == (None, None)


MEMORY_V1 = "4:memory:{own}\n3:cpu,cpuacct:{own}\n1:name=systemd:{own}\n"


def v1_mounts(top: str) -> str:
    return V1_MOUNT.format(
        top=top, at="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"
    ) + V1_MOUNT.format(top=top, at="/sys/fs/cgroup/memory", controllers="memory")


def test_v1_in_docker(tmp_path: Path) -> None:
    machine = Machine(tmp_path, MEMORY_V1.format(own="/docker/abc"), v1_mounts("/docker/abc"))
    machine.v1("memory", "", v1_memory(1000, 700, 250, kills=3))
    machine.v1("cpu,cpuacct", "", v1_quota(150000))
    assert machine.memory() == (1000, 550)
    assert quota_cores(tmp_path) == 1
    assert oom_kills(tmp_path) == 3


@pytest.mark.parametrize("unlimited", [UNLIMITED_4K, UNLIMITED_64K])
def test_v1_nested_on_the_host(tmp_path: Path, unlimited: int) -> None:
    own = "/slurm/uid_1000/job_7"
    machine = Machine(tmp_path, MEMORY_V1.format(own=own), v1_mounts("/"))
    machine.v1("memory", "", v1_memory(unlimited, 5000))
    machine.v1("memory", "/slurm", v1_memory(unlimited, 4000))
    machine.v1("cpu,cpuacct", own, v1_quota(-1))
    assert machine.memory() == (None, None)
    assert quota_cores(tmp_path) is None
    machine.v1("memory", "/slurm/uid_1000", v1_memory(3000, 1000))
    machine.v1("memory", own, v1_memory(2500, 200))
    machine.v1("cpu,cpuacct", "/slurm", v1_quota(600000))
    assert machine.memory() == (2500, 2000)
    assert quota_cores(tmp_path) == 6


def test_hybrid_has_its_controllers_in_v1(tmp_path: Path) -> None:
    mounts = v1_mounts("/") + V2_MOUNT.format(top="/", at="/sys/fs/cgroup/unified")
    machine = Machine(tmp_path, MEMORY_V1.format(own="/app") + "0::/app\n", mounts)
    machine.v2("/app", {"cgroup.procs": "1"}, at="sys/fs/cgroup/unified")
    machine.v1("memory", "/app", v1_memory(1000, 300))
    machine.v1("cpu,cpuacct", "/app", v1_quota(400000))
    assert machine.memory() == (1000, 700)
    assert quota_cores(tmp_path) == 4


def test_without_mountinfo_the_usual_places_are_read(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "", "")
    machine.v2("", {**v2_memory(1000, 100), "cpu.max": "200000 100000"})
    assert machine.memory() == (1000, 900)
    machine.v1("memory", "", v1_memory(800, 100))
    machine.v1("cpu", "", v1_quota(100000))
    assert machine.memory() == (800, 700)
    assert quota_cores(tmp_path) == 1
    machine.write("proc/self/cgroup", "0::/pod/container\n")
    machine.v2("/pod", v2_memory(500, 450))
    assert machine.memory() == (500, 50)


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n", V2_MOUNT.format(top="/", at="/sys/fs/cgroup"))
    machine.v2("", v2_memory(1000, 1200))
    assert machine.memory() == (1000, 0)
    machine.v2("", v2_memory(1000, 100, cache=900))  # more page cache than memory in use
    assert machine.memory() == (1000, 1000)


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path) is None
    assert available_memory_bytes(tmp_path) is None
    assert quota_cores(tmp_path) is None
    assert oom_kills(tmp_path) is None


GARBAGE = st.text(max_size=30) | st.sampled_from(
    [
        "",
        "max",
        "-1",
        "0",
        "0 0",
        "1 0",
        "9" * 5000,
        "²",
        "a b c - cgroup2",
        " - ",
        "0::",
        "::",
        ":",
    ]
)


@given(*[GARBAGE] * 6)
def test_garbage_is_no_limit_and_no_error(
    tmp_path_factory: pytest.TempPathFactory,
    membership: str,
    mounts: str,
    limit: str,
    used: str,
    statistics: str,
    quota: str,
) -> None:
    root = tmp_path_factory.mktemp("root")
    machine = Machine(root, "", "")
    for path, text in (("proc/self/cgroup", membership), ("proc/self/mountinfo", mounts)):
        (root / path).write_text(text, errors="replace")
    for at in ("", "/memory", "/cpu"):
        machine.v2(at, {"cgroup.procs": "1"})
        for name, text in (
            ("memory.max", limit),
            ("memory.limit_in_bytes", limit),
            ("memory.current", used),
            ("memory.usage_in_bytes", used),
            ("memory.stat", statistics),
            ("memory.events", statistics),
            ("cpu.max", quota),
            ("cpu.cfs_quota_us", quota),
            ("cpu.cfs_period_us", quota),
        ):
            (root / f"sys/fs/cgroup{at}" / name).write_text(text, errors="replace")
    given_limit, available = machine.memory()
    assert given_limit is None or given_limit == int(limit)
    assert available is None or available >= 0
    cores = quota_cores(root)
    assert cores is None or cores >= 1
    oom_kills(root)


def test_folders_that_cannot_be_read_are_no_limit(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/" + "a" * 300 + "\n", "")
    (tmp_path / "sys/fs/cgroup/memory.max").mkdir(parents=True)
    assert machine.memory() == (None, None)


def test_this_machine_can_be_read() -> None:
    limit, available = memory_limit_bytes(), available_memory_bytes()
    assert (limit is None) == (available is None)
    cores = quota_cores()
    assert cores is None or cores >= 1


def test_it_needs_no_torch() -> None:
    code = "import sys, moespan.cgroups\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
