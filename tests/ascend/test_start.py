"""`run.sh` on servers with 8 NPUs, pretended by the stand-in: one server, and two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiers

ROOT = Path(__file__).resolve().parents[2]
PROMPT = ("--device", "npu", "--prompt", "681+734=", "--max-tokens", "4", "--num-blocks", "8")
# Many processes share few cores.
LIMIT_S = 600


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "tools/ascend_sim/run.sh", "--run", "bash", "run.sh", *PROMPT, *arguments],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "NPUS": "8",
            "ASCEND_SIM_HBM_GIB": "1",
            "OMP_NUM_THREADS": "1",
            "MOESPAN_LOG_LEVEL": "info",
            **environ,
        },
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ends(*processes: subprocess.Popen[str]) -> list[str]:
    """The output of each process. Kills all of them if one does not end in time."""
    try:
        return [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.usefixtures("ascend_sim")
def test_one_server_runs_its_8_npus():
    process = start()
    (output,) = ends(process)
    assert process.returncode == 0, output
    assert "runs on  npu, bfloat16, tp=8\n" in output
    assert "\n→ 1415\n" in output


@pytest.mark.skipif(not tiers.ALL, reason="16 ranks; MOESPAN_TEST_ALL=1 runs them")
@pytest.mark.usefixtures("ascend_sim")
def test_two_servers_run_8_npus_each():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    job = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "MOESPAN_CLUSTER_KEY": "the secret of these two servers",
    }
    # The second server gets its number from Slurm.
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "1",
    }
    servers = (
        start("--join-timeout", "300", NODE_RANK="0", **job),
        start("--join-timeout", "300", **slurm, **job),
    )
    outputs = ends(*servers)
    # Ranks that share few cores may end later than the 5 s that the front gives them.
    late = "node 0 was ended by SIGTERM" in outputs[1]
    assert [server.returncode for server in servers] == [0, int(late)], "\n---\n".join(outputs)
    assert "runs on  npu, bfloat16, tp=8×pp=2\n" in outputs[0]
    assert "\n→ 1415\n" in outputs[0]
    assert f"master_addr=127.0.0.1 (MASTER_ADDR), master_port={port} (MASTER_PORT)" in outputs[0]
    assert "nnodes=2 (NNODES), node_rank=1 (SLURM_NODEID)" in outputs[1]
    assert "joined 127.0.0.1" in outputs[1] and "with ranks 8 to 15" in outputs[1]


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({}, "-tp 8 -ep 1 -pp 1 -sp 1 -dp 1"),
        ({"EP": "8"}, "-tp 8 -ep 8 -pp 1 -sp 1 -dp 1"),
        ({"TP": "4"}, "-tp 4 -ep 1 -pp 1 -sp 1 -dp 1"),
        ({"NPUS": "2"}, "-tp 2 -ep 1 -pp 1 -sp 1 -dp 1"),
        ({"NPUS": "0", "EP": "4"}, "-tp 4 -ep 4 -pp 1 -sp 1 -dp 1"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            "-tp 8 -ep 1 -pp 2 -sp 1 -dp 1",
        ),
    ],
    ids=str,
)
def test_the_layout_that_run_sh_chooses(tmp_path: Path, environ: dict[str, str], flags: str):
    """An interpreter in the place of Python shows what would be run."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *moespan.machine.cluster*) exec {sys.executable} "$@";; esac\n'
        'echo "$@"\n'
    )
    python.chmod(0o755)
    ran = subprocess.run(
        ["bash", "run.sh"],
        env={**os.environ, "PYTHON": str(python), "NPUS": "8", **environ},
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert flags in ran.stdout, ran.stderr
