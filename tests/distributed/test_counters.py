"""The counters of a whole engine, including the control channel, equal their formulas."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from moespan.config import Coordinates, Layout, ModelConfig
from moespan.engine.request import SamplingParams
from moespan.engine.step import Sampled, StepResult
from moespan.parallel.counters import Traffic
from moespan.planner.traffic import StepSize, step_traffic
from tests.distributed.ranks import Ranks
from tests.support import geometry, write_config

CONFIG = ModelConfig.from_dict(geometry())
PROMPT = [3, 14, 15, 9, 26, 5, 35]
FRAME_BYTES = 16 << 10
LAYOUTS = [
    Layout(tp=2, pp=2),
    Layout(pp=2, sp=2),
    Layout(tp=2, dp=2, ep=4),  # the second replica is idle, and keeps up
    Layout(dp=4),  # three replicas have nothing to do
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_request(layout: Layout, folder: Path, ranks: Ranks) -> None:
    llm = ranks.llm(folder, layout, load_format="dummy", max_model_len=64)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    token_ids = llm.generate([PROMPT], params)[0].outputs[0].token_ids
    counted = [[tuple(row) for row in rows] for rows in llm.traffic()]

    idle = [0] * (layout.dp - 1)
    steps = [StepSize([len(PROMPT), *idle], [1, *idle])] + 3 * [StepSize([1, *idle], [1, *idle])]
    speaker = layout.rank(Coordinates(pp=layout.pp - 1, dp=0, sp=0, tp=0))
    for rank, rows in enumerate(counted):
        expected = Traffic()
        for step in steps:
            for axis, collective, module, calls, sent in step_traffic(
                CONFIG, layout, rank, "float32", step
            ).rows():
                expected.calls[axis, collective, module] += calls
                expected.sent_bytes[axis, collective, module] += sent
        others = layout.world_size - 1
        expected.count("control", "all_reduce", "smallest", 2 * others * 8 // layout.world_size)
        if rank > 0:  # at the start each rank tells what it holds
            held = msgspec.msgpack.encode(llm.info.memory[rank])
            expected.count("control", "send", "report", 8 + len(held))
        if rank == 0:
            for _ in steps:
                expected.count("control", "broadcast", "step", others * FRAME_BYTES)
            expected.count("control", "broadcast", "report", others * FRAME_BYTES)
        elif rank == speaker:
            for token in token_ids:
                result = msgspec.msgpack.encode(StepResult([Sampled(token)], []))
                expected.count("control", "send", "result", 8 + len(result))
        assert rows == expected.rows(), f"rank {rank}"
