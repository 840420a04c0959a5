"""The threads of the CPU kernels: the same results with any number of them, and no work at rest."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from moespan.ops.base import ExpertBank
from moespan.ops.cpu.native import NativeCpuOps
from tests.ops.test_cpu_native import random

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no compiler"
)

TOKENS, HIDDEN, WIDTH, EXPERTS = 9, 64, 48, 6


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def layer(ops: NativeCpuOps, seed: int = 0) -> Callable[[], list[Tensor]]:
    """Some operations, each in a call of its own or in several phases of one."""
    x = random(TOKENS, HIDDEN, seed=seed)
    matrix = ops.prepare("qkv", random(100, HIDDEN, seed=seed + 1))
    router = ops.prepare("router", random(EXPERTS, HIDDEN, seed=seed + 2).float())
    gate_up = ops.prepare("gate_up", random(EXPERTS, 2 * WIDTH, HIDDEN, seed=seed + 3))
    down = ops.prepare("down", random(EXPERTS, HIDDEN, WIDTH, seed=seed + 4))
    bank = ExpertBank(gate_up, down, first=0, num_physical=EXPERTS)

    def run() -> list[Tensor]:
        weights, chosen = ops.route(x, router, 3, False)
        return [ops.linear(x, matrix), weights, ops.experts(x, weights, chosen, bank)]

    return run


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def test_any_number_of_threads_computes_the_same_in_call_after_call(
    threads: Callable[[int], None],
) -> None:
    run = layer(NativeCpuOps())
    threads(1)
    expected = run()
    for call in range(300):
        threads(1 + call * 7 % 5)
        assert all_equal(run(), expected), call
        if call % 50 == 0:
            time.sleep(0.01)  # long enough for threads to sleep


def test_several_threads_of_a_program_may_call_at_once(threads: Callable[[int], None]) -> None:
    threads(1)
    runs = [layer(NativeCpuOps(), seed) for seed in range(3)]
    expected = [run() for run in runs]
    threads(3)

    def compute(which: int) -> bool:
        threads(3)
        return all(all_equal(runs[which](), expected[which]) for _ in range(100))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(compute, range(3)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_gets_threads_of_its_own(threads: Callable[[int], None]) -> None:
    threads(3)
    run = layer(NativeCpuOps())
    expected = run()
    child = os.fork()
    if not child:
        signal.alarm(60)  # so that a child that hangs ends
        os._exit(0 if all_equal(run(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all_equal(run(), expected)


def test_threads_that_have_nothing_to_do_sleep(threads: Callable[[int], None]) -> None:
    threads(3)
    layer(NativeCpuOps())()
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.5  # two of them would take two seconds
