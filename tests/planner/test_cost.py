"""The time of a step: from curves where there are any, else by formula, on the busiest rank."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.errors import ConfigError
from moespan.planner import profile
from moespan.planner.cost import IDLE, ReplicaStep, StepCost, Times
from moespan.planner.expert_load import Routing
from moespan.planner.profile import Collective, Figure, Operation, Profile
from moespan.planner.work import Chunk

MODEL = ModelConfig.from_dict(preset("16b", {}))
H100 = profile.load("h100")
A2 = profile.load("910b3")


def cost_of(
    machine: Profile, layout: Layout | None = None, *, worst: bool = False, **options: Any
) -> StepCost:
    kind = machine.device.kind
    config = EngineConfig("", layout or Layout(), kind, block_size=128, **options)
    return StepCost(machine, MODEL, config, Routing(MODEL), worst=worst)


def decode(sequences: int, context: int = 1000) -> ReplicaStep:
    return ReplicaStep(sequences, sequences, sequences, sequences * context)


def prefill(tokens: int, context: int = 0) -> ReplicaStep:
    return ReplicaStep(tokens, 1, 0, 0, (Chunk(tokens, context),))


def changed(machine: Profile, **fields: Any) -> Profile:
    return Profile(**{**{f: getattr(machine, f) for f in machine.__struct_fields__}, **fields})


def test_a_large_decode_step_reads_all_weights_at_the_machines_rate():
    (seconds,) = cost_of(H100).stages_s([decode(64)])
    weights_and_cache = 32.3e9 + 64 * 1000 * 224 * 1024
    assert seconds == pytest.approx(weights_and_cache / 2.9e12, rel=0.1)
    assert seconds > weights_and_cache / 2.9e12


def test_one_calibrated_device_has_no_links_and_the_error_says_how_to_get_some():
    alone = changed(A2, levels=[], collectives=[])
    assert cost_of(alone).stages_s([decode(4)]) == cost_of(A2).stages_s([decode(4)])
    with pytest.raises(ConfigError, match=r"no links between 2 devices.*-tp 2.*910b3\+FILE"):
        cost_of(alone, Layout(tp=2)).stages_s([decode(4)])


def test_a_prefill_multiplies_at_the_machines_rate():
    (seconds,) = cost_of(H100, max_num_batched_tokens=4096).stages_s([prefill(4096)])
    assert seconds > 2 * 2.6e9 * 4096 / 712e12
    assert seconds < 2 * (2 * 2.6e9 * 4096 / 712e12)


def test_a_decode_step_is_padded_to_its_recorded_size_and_an_eager_one_waits_for_launches():
    layout = Layout(tp=8)
    recorded, eager = cost_of(H100, layout), cost_of(H100, layout, enforce_eager=True)
    assert recorded.stages_s([decode(33)]) == pytest.approx(
        recorded.stages_s([ReplicaStep(40, 40, 33, 33000)]), rel=1e-3
    )
    (slow,), (fast,) = eager.stages_s([decode(1)]), recorded.stages_s([decode(1)])
    # 17 kernels and two sums in each of 28 layers, each 4.5 us.
    assert slow == pytest.approx(28 * 19 * 4.5e-6, rel=0.05)
    assert slow > 1.2 * fast


def test_a_step_ends_with_its_slowest_replica():
    cost = cost_of(H100, Layout(dp=4))
    alone = cost.stages_s([decode(1), prefill(2048), IDLE, decode(8)])
    assert alone == cost.stages_s([IDLE, prefill(2048), IDLE, IDLE])
    assert cost.stages_s([IDLE] * 4) == [0.0]


def test_a_replica_with_less_to_compute_waits_for_the_others():
    step = [decode(8), prefill(4096)]
    for layout in (Layout(dp=2), Layout(dp=2, ep=2)):
        cost = cost_of(H100, layout)
        ((few,), (many,)) = (cost.computing_s(step, replica) for replica in (0, 1))
        assert few < 0.9 * many
        assert cost.stages_s(step) == [pytest.approx(many, rel=0.05)]
    assert cost_of(H100, Layout(dp=2)).computing_s([IDLE, decode(8)], 0) == [0.0]


def test_results_of_other_ranks_take_the_leader_and_their_rank_some_time():
    host = msgspec.structs.replace(
        H100.host, broadcast=None, result_us=Figure(value=100.0, origin="measured")
    )
    machine = changed(H100, host=host)
    for layout, sent in ((Layout(), 0), (Layout(dp=3), 2), (Layout(pp=2), 1), (Layout(tp=2), 0)):
        step = [decode(4)] * layout.dp
        plain, more = (cost_of(one, layout) for one in (changed(machine, host=H100.host), machine))
        assert more.after_s(step) - plain.after_s(step) == pytest.approx(sent * 100e-6)
    last = cost_of(machine, Layout(dp=2)).computing_s([decode(4)] * 2, 1)[0]
    assert last - cost_of(machine).stages_s([decode(4)])[0] == pytest.approx(100e-6)


def test_a_rank_computes_less_than_the_busiest_of_each_layer():
    cost = cost_of(H100, Layout(tp=4, ep=4))
    assert cost.computing_s([decode(4)], 0)[0] < 0.97 * cost.stages_s([decode(4)])[0]


def test_replicas_that_share_experts_pay_for_all_tokens():
    cost = cost_of(H100, Layout(dp=4, ep=4))
    one, all_of_them = cost.stages_s([prefill(512)] + [IDLE] * 3), cost.stages_s([prefill(512)] * 4)
    assert all_of_them[0] > one[0]


def test_a_stage_has_its_layers_and_the_last_one_the_head():
    one = cost_of(H100).stages_s([decode(32)])
    two = cost_of(H100, Layout(pp=2)).stages_s([decode(32)])
    assert sum(two) == pytest.approx(one[0], rel=0.05)


def test_more_tensor_parallelism_costs_collectives_that_the_worst_case_makes_dearer():
    layout = Layout(tp=8)
    lines = cost_of(A2, layout).lines([decode(16)])
    sums = [line for line in lines if line.part.startswith("tp all_reduce")]
    assert sum(line.count for line in sums) == 2 * 28 + 1
    usual, worst = (
        cost_of(A2, layout, worst=worst).stages_s([decode(16)]) for worst in (False, True)
    )
    # 57 sums of 765 us instead of 20 us, and the head's gather.
    assert worst[0] - usual[0] == pytest.approx(57 * 745e-6, rel=0.05)


def test_lines_add_up_to_the_step():
    cost = cost_of(A2, Layout(tp=2, ep=8, dp=4))
    step = [decode(16)] * 4
    lines = [line for line in cost.lines(step) if line.kind != "host" or line.part == "replay"]
    assert sum(line.seconds for line in lines) == pytest.approx(cost.stages_s(step)[0], rel=0.01)
    assert all(line.source for line in lines)


def test_a_measured_curve_comes_first_and_is_interpolated():
    def head(us: list[float]) -> Operation:
        return Operation(op="linear", n=102400, k=2048, rows=[1, 4, 16], us=us, graph=True)

    slow = cost_of(changed(H100, operations=[head([1e4, 2e4, 4e4])]))
    seconds = {
        rows: next(one.seconds for one in slow.lines([decode(rows)]) if one.part == "head")
        for rows in (1, 2, 16)
    }
    assert seconds[1] == pytest.approx(0.01)
    assert seconds[2] == pytest.approx(0.01 * 2**0.5)
    assert seconds[16] == pytest.approx(0.04)


def test_a_measured_collective_comes_first():
    link = Collective(
        kind="all_reduce", level="node", ranks=8, bytes=[4096, 1 << 20], us=[100, 300], graph=True
    )
    cost = cost_of(changed(H100, collectives=[link]), Layout(tp=8))
    sums = [line for line in cost.lines([decode(1)]) if line.part == "tp all_reduce attention"]
    assert sums[0].seconds == pytest.approx(28 * 102e-6)  # with 2 us of skew
    link = msgspec.structs.replace(link, skew_us=50.0)
    cost = cost_of(changed(H100, collectives=[link]), Layout(tp=8))
    sums = [line for line in cost.lines([decode(1)]) if line.part == "tp all_reduce attention"]
    assert sums[0].seconds == pytest.approx(28 * 150e-6)  # its own wait


def test_ranks_of_a_host_share_its_memory():
    host = profile.load("zen4-2")
    one = cost_of(host).stages_s([decode(4)])[0]
    half = cost_of(host, Layout(tp=2)).stages_s([decode(4)])[0]
    # Two ranks read half of the weights each, at half of the rate each.
    assert half > 0.95 * one


def test_python_between_operations_counts_where_the_host_computes():
    def more(machine: Profile, layout: Layout) -> float:
        figures = {name: Figure(value=us, origin="measured") for name, us in PYTHON_US.items()}
        launch = msgspec.structs.replace(machine.launch, **figures)
        before, after = (
            cost_of(one, layout).stages_s([decode(4)])[0]
            for one in (machine, changed(machine, launch=launch))
        )
        return after - before

    host = profile.load("zen4-2")
    assert more(host, Layout()) == pytest.approx(100e-6 + 28 * 10e-6)
    assert more(H100, Layout()) == 0
    one_core = changed(host, device=msgspec.structs.replace(host.device, cores=1))
    assert more(one_core, Layout(tp=2)) == pytest.approx(2 * (100e-6 + 28 * 10e-6))


PYTHON_US = {"step_us": 100.0, "layer_us": 10.0}


def test_the_leader_pays_for_the_sequences_of_all_its_replicas():
    few, many = (cost_of(H100, Layout(dp=8)).leader_s([decode(n)] * 8) for n in (1, 64))
    assert many - few == pytest.approx(8 * 63 * 9.2e-6)
    cost = cost_of(H100, Layout(dp=8))
    assert cost.before_s([decode(64)] * 8) + cost.after_s([decode(64)] * 8) > many


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, ep=8, dp=8),
        Layout(tp=2, pp=4, dp=8),
        Layout(sp=2, ep=4, dp=4),
        Layout(ep=6, sp=4, dp=3),
    ],
    ids=str,
)
def test_times_that_costs_share_change_none(layout: Layout):
    times = Times()
    few = layout.with_fewest_replicas
    for other in (Layout(tp=2, sp=2), few, replace(layout, pp=1)):
        shared(other, times).stages_s([decode(8)] * other.dp)
    busy = [prefill(700), decode(3), *[decode(16)] * (layout.dp - 2)]
    for step in ([decode(8)] * layout.dp, busy, [IDLE, *busy[1:]]):
        assert shared(layout, times).stages_s(step) == shared(layout, Times()).stages_s(step)
        assert shared(layout, times, worst=True).stages_s(step) > shared(layout, times).stages_s(
            step
        )


def shared(layout: Layout, times: Times, *, worst: bool = False) -> StepCost:
    config = EngineConfig("", layout, "npu", block_size=128)
    return StepCost(A2, MODEL, config, Routing(MODEL), worst=worst, times=times)


def test_a_figure_that_is_missing_is_named():
    device = H100.device
    fields = {f: getattr(device, f) for f in device.__struct_fields__}
    rates = {"float32": Figure(value=1, origin="guess")}
    without = profile.DeviceFigures(**{**fields, "operations_per_s": rates})
    with pytest.raises(ConfigError, match="no operations_per_s of bfloat16; it has float32"):
        cost_of(changed(H100, device=without)).stages_s([decode(1)])
    without = profile.DeviceFigures(**{**fields, "bytes_per_s": None})
    with pytest.raises(ConfigError, match=r"has no device\.bytes_per_s"):
        cost_of(changed(H100, device=without))


def test_pricing_needs_no_torch():
    code = "import moespan.planner.cost, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
