"""The ranks of `test_traffic.py`: they execute steps under many layouts, one after the other.

`step_rank.py FOLDER RANKS` forks the ranks, so that torch is imported once. Each reads `cases.json`
in the folder and writes what it counted to `rank<r>.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import place
from moespan.checkpoint.random import RandomSource
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.engine.step import StepPlan, StepPlans
from moespan.engine.worker import Worker
from moespan.launch.distributed import init_distributed
from moespan.ops import CpuOps
from moespan.parallel.mesh import Mesh


def main() -> int:
    """Run all ranks; returns 1 if one of them fails, and ends the others then."""
    folder, world_size = Path(sys.argv[1]), int(sys.argv[2])
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    ranks = set()
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(folder, rank))
        ranks.add(pid)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for left in ranks:
                os.kill(left, signal.SIGKILL)
            return 1
    return 0


def run_rank(folder: Path, rank: int) -> int:
    """Run all cases; returns 1 and prints the traceback if that fails."""
    os.environ["RANK"] = str(rank)
    try:
        device = init_distributed("cpu", folder / "store", timeout_s=60)
        given = json.loads((folder / "cases.json").read_text())
        model = ModelConfig.from_dict(given["model"])
        results = [run(case, model, device) for case in given["cases"]]
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run(case: dict[str, Any], model: ModelConfig, device: torch.device) -> list[dict[str, Any]]:
    """For each step: the counted rows, and layer → the choices of this rank's router."""
    config = EngineConfig(
        "unused",
        Layout(**case["layout"]),
        dtype=case["dtype"],
        block_size=4,
        max_model_len=64,
        moe_dispatch=case["dispatch"],
        expert_placement=case["placement"],
    )
    dtype = getattr(torch, config.dtype)
    mesh = Mesh.create(config.layout, device, config.moe_dispatch)
    experts = ExpertPlacement.make(config.expert_placement, model, config.layout)
    placement = place(model, config.layout, mesh.rank, experts)
    weights, _ = load_weights(placement, RandomSource(model, dtype, 0), dtype, device)
    worker = Worker(config, model, mesh, CpuOps(), weights, num_blocks=64)
    results = []
    for step in case["steps"]:
        plans = [msgspec.convert(plan, StepPlan | None) for plan in step]
        mesh.traffic.calls.clear()
        mesh.traffic.sent_bytes.clear()
        worker.execute(StepPlans.of(plans, trace=True))
        chosen = {
            str(seen.layer): seen.values.astype(np.int64).tolist()
            for seen in worker.trace
            if seen.module == "router.experts"
        }
        results.append({"traffic": mesh.traffic.rows(), "chosen": chosen})
    mesh.close()
    return results


if __name__ == "__main__":
    sys.exit(main())
